"""Runs that are stopped, damaged, changed or gone on with, as a person types it."""

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from ressl import checkpoint
from ressl.run_dir import checkpoints_path, lines_of

Launch = Callable[..., tuple[int, str, str]]


def records(run_dir: Path) -> list[dict]:
    return lines_of(run_dir / "metrics.jsonl")


def losses(run_dir: Path) -> list[float]:
    return [record["loss"] for record in records(run_dir) if "loss" in record]


def last_state(run_dir: Path) -> list[bytes]:
    (newest, *_) = checkpoint.found(checkpoints_path(run_dir))
    return [(newest / name).read_bytes() for name in (checkpoint.MODEL, checkpoint.TRAINING, checkpoint.MANIFEST)]


@pytest.mark.parametrize("after", [2, 4])  # amid an epoch, and at its end
def test_a_run_that_was_asked_to_stop_goes_on_to_the_same_bits(
    after: int, ressl: Launch, tiny_config: Path, tmp_path: Path
) -> None:
    rules = ["run.knn_every=1", "optim.epochs=15"]  # long enough for the signal to come amid it
    assert ressl("pretrain", tiny_config, f"run.out_dir={tmp_path / 'straight'}", *rules)[0] == 0
    broken = [tiny_config, f"run.out_dir={tmp_path / 'broken'}", *rules]

    code, _, err = stopped_after(after, tmp_path / "broken", ressl, *broken)
    assert code == 75 and err.startswith("ressl: stopped after step ") and f"resume {tmp_path / 'broken'}" in err
    assert checkpoint.found(checkpoints_path(tmp_path / "broken"))
    code, out, err = ressl("resume", tmp_path / "broken")
    assert (code, err) == (0, "") and "going on after step" in out
    assert untimed(records(tmp_path / "broken")) == untimed(records(tmp_path / "straight"))
    assert last_state(tmp_path / "broken") == last_state(tmp_path / "straight")


def untimed(found: list[dict]) -> list[dict]:
    return [{k: v for k, v in record.items() if k not in ("images_per_s", "evaluation_s")} for record in found]


def stopped_after(step: int, run_dir: Path, ressl: Launch, *arguments: object) -> tuple[int, str, str]:
    """Of a run whose log has come so far when SIGTERM comes."""
    over, before = threading.Event(), signal.signal(signal.SIGTERM, lambda number, frame: None)

    def watch() -> None:
        while not over.wait(0.002):
            there = run_dir / "metrics.jsonl"
            if there.exists() and f'"step": {step},' in there.read_text():
                os.kill(os.getpid(), signal.SIGTERM)
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        return ressl("pretrain", *arguments)
    finally:
        over.set()
        thread.join()
        signal.signal(signal.SIGTERM, before)


def test_where_all_checkpoints_are_damaged_nothing_is_begun_anew(
    ressl: Launch, tiny_config: Path, tmp_path: Path
) -> None:
    assert ressl("pretrain", tiny_config)[0] == 0
    log = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    for path in checkpoint.found(checkpoints_path(tmp_path / "run")):
        (path / checkpoint.MODEL).write_bytes(b"hello")
    for verb in (["evaluate", tmp_path / "run"], ["pretrain", tiny_config], ["resume", tmp_path / "run"]):
        code, out, err = ressl(*verb)
        assert code == 3 and "none of its checkpoints can be used" in err and "Traceback" not in err
        assert (out + err).count("model.safetensors: damaged: it is not what MANIFEST.json says") == 2
        assert "going back" not in out
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == log


def test_where_the_newest_is_damaged_the_one_before_is_taken_and_it_is_said(
    ressl: Launch, tiny_config: Path, tmp_path: Path
) -> None:
    assert ressl("pretrain", tiny_config)[0] == 0
    newest, before = checkpoint.found(checkpoints_path(tmp_path / "run"))
    state = last_state(tmp_path / "run")
    (newest / checkpoint.TRAINING).write_bytes(b"hello")
    code, out, _ = ressl("evaluate", tmp_path / "run", "--no-linear")
    assert code == 0 and f"warning: {newest}" in out and "going back to step-00000004" in out
    code, out, _ = ressl("pretrain", tiny_config)
    assert code == 0 and f"warning: {newest}" in out and "going on after step 4" in out
    assert last_state(tmp_path / "run") == state
    assert checkpoint.found(checkpoints_path(tmp_path / "run")) == [newest, before]


def test_the_best_checkpoint_stays_and_can_be_evaluated(ressl: Launch, tiny_config: Path, tmp_path: Path) -> None:
    rules = ["run.knn_every=1", "optim.epochs=4", "run.checkpoint.keep=1"]
    assert ressl("pretrain", tiny_config, *rules)[0] == 0
    found = {record["step"]: record["knn"] for record in records(tmp_path / "run") if "knn" in record}
    best = max(found, key=lambda step: found[step])
    there = [path.name for path in checkpoint.found(checkpoints_path(tmp_path / "run"))]
    assert there == sorted({"step-00000016", f"step-{best:08d}"}, reverse=True)
    assert ressl("evaluate", tmp_path / "run", "--checkpoint", "best", "--no-linear")[0] == 0
    record = json.loads((tmp_path / "run" / "evaluations.jsonl").read_text())
    assert (record["knn"], record["step"]) == (found[best], best)
    (tmp_path / "run" / "metrics.jsonl").unlink()
    code, _, err = ressl("evaluate", tmp_path / "run", "--checkpoint", "best")
    assert code == 3 and "see run.knn_every" in err


def test_checkpoints_come_by_steps_and_by_the_clock(ressl: Launch, tiny_config: Path, tmp_path: Path) -> None:
    def steps(*rules: str) -> list[int]:
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        assert ressl("pretrain", tiny_config, f"run.out_dir={out}", "run.checkpoint.keep=99", *rules)[0] == 0
        return sorted(int(path.name[5:]) for path in checkpoint.found(checkpoints_path(out)))

    assert steps() == [4, 8] and steps("run.checkpoint.epochs=2") == [8] == steps("run.checkpoint.epochs=0")
    assert steps("run.checkpoint.steps=3") == [3, 4, 6, 8]
    assert steps("run.checkpoint.epochs=0", "run.checkpoint.minutes=0.0000001") == list(range(1, 9))


def test_a_change_can_be_allowed_by_name(ressl: Launch, tiny_config: Path, tmp_path: Path) -> None:
    assert ressl("pretrain", tiny_config, "optim.epochs=1")[0] == 0
    change = ["resume", tmp_path / "run", "optim.epochs=2", "optim.lr=0.01", "--allow-change", "optim.epochs"]
    code, _, err = ressl(*change)
    assert code == 2 and "optim.lr" in err and "optim.epochs" not in err.replace("--allow-change", "")
    code, _, err = ressl(*change, "--allow-change", "optim.lrr")
    assert code == 2 and "--allow-change optim.lrr: no such key; did you mean optim.lr?" in err
    code, out, _ = ressl(*change, "--allow-change", "optim.lr")
    assert code == 0 and "going on after step 4" in out and len(losses(tmp_path / "run")) == 8
    assert "changed: optim.epochs from 1 to 2" in out and "changed: optim.lr from 0.06 to 0.01" in out
    (line,) = lines_of(tmp_path / "run" / "changes.jsonl")
    assert line["changed"] == {"optim.epochs": {"from": 1, "to": 2}, "optim.lr": {"from": 0.06, "to": 0.01}}
    code, out, _ = ressl("resume", tmp_path / "run", "optim.lr=0.06", "--allow-change", "optim")  # a whole section
    assert code == 0 and "the run is complete: 8 steps" in out and "going on" not in out


def test_resuming_what_is_no_run_or_has_no_checkpoint(ressl: Launch, tiny_config: Path, tmp_path: Path) -> None:
    code, _, err = ressl("resume", tmp_path / "nowhere")
    assert code == 2 and "nowhere: no run here" in err
    assert ressl("pretrain", tiny_config, "optim.epochs=1")[0] == 0
    shutil.rmtree(checkpoints_path(tmp_path / "run"))
    code, _, err = ressl("resume", tmp_path / "run")
    assert code == 3 and "checkpoints: no checkpoint here to go on from; its `pretrain` command begins" in err
    config = err.rstrip().removesuffix(")").rpartition("config: ")[2]
    assert ressl("pretrain", config)[0] == 0 and checkpoint.found(checkpoints_path(tmp_path / "run"))


def test_going_on_with_other_images_is_refused(
    ressl: Launch, tiny_config: Path, tiny_data: Path, tmp_path: Path
) -> None:
    images = shutil.copytree(tiny_data / "folder" / "train", tmp_path / "images")
    again = ["pretrain", tiny_config, "optim.epochs=1", f"data.source={{name: folder, train: {images}}}"]
    assert ressl(*again)[0] == 0
    image = images / "colour0" / "000.png"
    image.rename(images / "colour1" / "000.png")  # as many as before, with another label
    code, _, err = ressl(*again)
    assert code == 2 and "the run saw other images than data.source.train has now" in err
    rows = [line.split() for line in err.splitlines()]
    assert ["there", "here"] in rows and ["images", "72", "72"] in rows and "(hash)" in err
    (images / "colour1" / "000.png").unlink()
    code, _, err = ressl(*again)
    assert code == 2 and ["images", "72", "71"] in [line.split() for line in err.splitlines()]


def test_a_run_begun_anew_with_a_change_is_that_of_its_config(ressl: Launch, tiny_config: Path, tmp_path: Path) -> None:
    """It was ended before its first checkpoint; its log is kept."""
    assert ressl("pretrain", tiny_config, "optim.epochs=1")[0] == 0
    for _ in range(2):
        shutil.rmtree(checkpoints_path(tmp_path / "run"))
        code, out, _ = ressl("pretrain", tiny_config, "optim.epochs=1", "encoder.width=8", "--allow-change", "encoder")
        assert code == 0 and "a log of 4 records but no checkpoint: the run begins anew" in out
    assert len(lines_of(tmp_path / "run" / "metrics.old1.jsonl")) == 4
    assert ressl("evaluate", tmp_path / "run", "--no-linear")[0] == 0
