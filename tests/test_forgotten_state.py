"""Each thing that a checkpoint holds is needed: leave one out, and the run that goes on becomes another one."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

import launch
from ressl import checkpoint
from ressl.checkpoint import Checkpoint
from ressl.config_file import load_config
from ressl.run_dir import checkpoints_path, lines_of, metrics_path

STOP = 6  # amid the second epoch of four steps


@pytest.fixture(scope="module")
def run(write_tiny_config: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run with a checkpoint after each step, on its last one."""
    config = write_tiny_config(tmp_path_factory.mktemp("config"))
    train(config)
    return config.parent / "run"


def train(config: Path, *overrides: str) -> None:
    rules = ["run.checkpoint.steps=1", "run.checkpoint.keep=99", *overrides]
    launch.run(load_config(config, rules), Console(quiet=True))


def gone_on(run: Path, directory: Path, change: Callable[[Checkpoint], Checkpoint]) -> str:
    """What the run becomes that goes on after step STOP from a changed checkpoint."""
    out = directory / "run"
    shutil.copytree(run, out)
    shutil.rmtree(checkpoints_path(out))
    saved = checkpoint.read(checkpoints_path(run) / checkpoint.name_of(STOP))
    checkpoint.write(checkpoints_path(out), change(saved))
    train(run.parent / "tiny.yaml", f"run.out_dir={out}")
    return final(out)


def final(out: Path) -> str:
    """Of weights, queue, optimizer and the rest: all that the last checkpoint holds."""
    (newest, *_) = checkpoint.found(checkpoints_path(out))
    assert newest.name == checkpoint.name_of(8)
    files = (newest / name for name in (checkpoint.MODEL, checkpoint.TRAINING))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def fresh(run: Path) -> Checkpoint:
    """What the run was after its first steps."""
    return checkpoint.read(checkpoints_path(run) / checkpoint.name_of(2))


def model(prefix: str, run: Path) -> Callable[[Checkpoint], Checkpoint]:
    old = fresh(run).model
    return lambda saved: replace(
        saved, model={k: old[k] if k.startswith(prefix) else v for k, v in saved.model.items()}
    )  # fmt: skip


def training(key: str, run: Path) -> Callable[[Checkpoint], Checkpoint]:
    old = fresh(run).training
    return lambda saved: replace(saved, training={**saved.training, key: old[key]})


def part_of_statistics(last: bool, run: Path) -> Callable[[Checkpoint], Checkpoint]:
    """Those of one of the two networks; one after the other, they are half of the values each."""
    old = fresh(run).training["statistics"]

    def change(saved: Checkpoint) -> Checkpoint:
        values: Tensor = saved.training["statistics"].clone()
        half = values.shape[1] // 2
        part = slice(half, None) if last else slice(None, half)
        values[:, part] = old[:, part]
        return replace(saved, training={**saved.training, "statistics": values})

    return change


def another_random_state(run: Path) -> Callable[[Checkpoint], Checkpoint]:
    """Training draws nothing from it, so it is the same after each step: a method that does would go astray."""
    own = torch.Generator().manual_seed(99).get_state()
    return lambda saved: replace(saved, training={**saved.training, "random": own[None].clone()})


def another_count_of_skipped(run: Path) -> Callable[[Checkpoint], Checkpoint]:
    return lambda saved: replace(saved, training={**saved.training, "guard": {"skipped": torch.tensor(3)}})


def another_step(run: Path) -> Callable[[Checkpoint], Checkpoint]:
    """Order, views, learning rate and teacher's momentum all follow from it."""
    return lambda saved: replace(saved, about=replace(saved.about, step=STOP - 1))


FORGOTTEN = {
    "student": lambda run: model("student.", run),
    "teacher": lambda run: model("teacher.", run),
    "queue": lambda run: model("queue.keys", run),
    "cursor": lambda run: model("queue.cursor", run),
    "momentum": lambda run: training("optimizer", run),
    "statistics of the student": lambda run: part_of_statistics(False, run),
    "statistics of the teacher": lambda run: part_of_statistics(True, run),
    "random numbers": another_random_state,
    "skipped steps": another_count_of_skipped,
    "step": another_step,
}


def test_nothing_forgotten_changes_nothing(run: Path, tmp_path: Path) -> None:
    assert gone_on(run, tmp_path, lambda saved: saved) == final(run)


@pytest.mark.parametrize("what", FORGOTTEN)
def test_a_state_that_is_forgotten_is_noticed(what: str, run: Path, tmp_path: Path) -> None:
    assert gone_on(run, tmp_path, FORGOTTEN[what](run)) != final(run)


@pytest.mark.parametrize("key", ["optimizer", "scaler", "guard", "statistics", "random"])
def test_a_state_that_is_missing_is_refused(key: str, run: Path, tmp_path: Path) -> None:
    def without(saved: Checkpoint) -> Checkpoint:
        return replace(saved, training={k: v for k, v in saved.training.items() if k != key})

    with pytest.raises(
        checkpoint.CheckpointError, match=f"training.pt lacks {key}: what the run was is not known whole"
    ):
        gone_on(run, tmp_path, without)


@pytest.mark.gpu
def test_the_scale_of_fp16_is_kept(write_tiny_config: Callable[[Path], Path], tmp_path: Path) -> None:
    config, out = write_tiny_config(tmp_path), tmp_path / "run"
    train(config, "run.device=auto", "run.precision=fp16")
    states = [checkpoint.read(path).training["scaler"] for path in checkpoint.found(checkpoints_path(out))]
    assert all(state["scale"] > 0 for state in states)
    assert all(record["loss_scale"] > 0 for record in lines_of(metrics_path(out)) if "loss" in record)
    assert json.dumps(states[0]) and states[0]["_growth_tracker"] != states[-1]["_growth_tracker"]
