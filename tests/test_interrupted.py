"""Runs of two ranks that are stopped, at any moment and by any signal, and go on to the same bits."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ressl import checkpoint
from ressl.run_dir import checkpoints_path, lines_of, metrics_path

RULES = ["optim.epochs=3", "run.knn_every=1", "run.checkpoint.steps=3"]
TIMES = ("images_per_s", "evaluation_s")


@pytest.fixture(scope="module")
def tiny(write_tiny_config: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def undisturbed(tiny: Path, forked_ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of such a run."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    pids = forked_ranks.start(tiny, *RULES, f"run.out_dir={out}", log=out.with_suffix(".log"))
    assert forked_ranks.wait(pids) == [0, 0], out.with_suffix(".log").read_text()
    return out


def ended_as(out: Path, other: Path) -> bool:
    paths = [checkpoint.found(checkpoints_path(run))[0] for run in (out, other)]
    states = [
        [(path / name).read_bytes() for name in (checkpoint.MODEL, checkpoint.TRAINING, checkpoint.MANIFEST)]
        for path in paths
    ]
    logs = [
        [{k: v for k, v in record.items() if k not in TIMES} for record in lines_of(metrics_path(run))]
        for run in (out, other)
    ]
    return states[0] == states[1] and logs[0] == logs[1]


def await_step(out: Path, step: int) -> None:
    _until(lambda: any(record["step"] >= step for record in lines_of(metrics_path(out))))


def await_save(out: Path, step: int) -> None:
    await_step(out, step)
    _until(lambda: any(checkpoints_path(out).glob(f"{checkpoint.MAKING}*")) or _done(out), pause=0)


def await_start(out: Path, step: int) -> None:
    """Signals are caught from before the first step on."""
    _until(lambda: all((out / "watch" / f"rank{rank}.json").exists() for rank in (0, 1)))


def _done(out: Path) -> bool:
    return len(checkpoint.found(checkpoints_path(out))) > 1


def _until(condition: Callable[[], bool], *, pause: float = 0.002) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(pause)


@pytest.mark.parametrize(
    ("name", "ranks", "moment", "step"),
    [
        ("SIGTERM", [0, 1], await_step, 2), ("SIGTERM", [1], await_step, 5), ("SIGUSR1", [0], await_step, 7),
        ("SIGUSR1", [0, 1], await_start, 0), ("SIGINT", [0, 1], await_save, 2), ("SIGINT", [1], await_step, 4),
        ("SIGHUP", [0], await_step, 8), ("SIGTERM", [0, 1], await_save, 5),
    ],
)  # fmt: skip
def test_a_signal_to_any_rank_saves_and_ends_all_and_the_run_goes_on_to_the_same_bits(
    name: str, ranks: list[int], moment: Callable[[Path, int], None], step: int, tiny: Path, undisturbed: Path,
    forked_ranks, tmp_path: Path,
) -> None:  # fmt: skip
    out, log = tmp_path / "run", tmp_path / "log"
    slow = {"what": "slow", "rank": 1, "steps": list(range(12))}  # so that the signal comes amid the run
    pids = forked_ranks.start(tiny, *RULES, f"run.out_dir={out}", log=log, fault=slow)
    moment(out, step)
    for rank in ranks:
        os.kill(pids[rank], signal.Signals[name])
    sent = time.monotonic()
    assert forked_ranks.wait(pids) == [0, 0], log.read_text()  # with a launcher, which is told by a mark, 75 otherwise
    assert time.monotonic() - sent < 30
    (told,) = [line for line in log.read_text().splitlines() if line.startswith("ressl: stopped after step ")]
    stopped_at = int(told.split()[4].rstrip(","))
    assert stopped_at < 12 and [*log.parent.glob("tmp*/stopped")]
    found = checkpoint.newest(checkpoints_path(out))
    assert found is not None and found[1].about.step == stopped_at and found[2] == []

    assert forked_ranks.wait(forked_ranks.start(tiny, *RULES, f"run.out_dir={out}", log=log)) == [0, 0], log.read_text()
    assert f"going on after step {stopped_at}" in log.read_text() and ended_as(out, undisturbed)


def test_four_ranks_go_on_to_the_same_bits_too(tiny: Path, forked_ranks, tmp_path: Path) -> None:
    """Sums over four depend on the groups in which they are made."""
    straight, out, log = tmp_path / "straight", tmp_path / "run", tmp_path / "log"
    pids = forked_ranks.start(tiny, *RULES, f"run.out_dir={straight}", log=log, ranks=4)
    assert forked_ranks.wait(pids) == [0, 0, 0, 0], log.read_text()
    slow = {"what": "slow", "rank": 3, "steps": list(range(12))}
    pids = forked_ranks.start(tiny, *RULES, f"run.out_dir={out}", log=log, ranks=4, fault=slow)
    await_step(out, 5)
    os.kill(pids[2], signal.SIGTERM)
    assert forked_ranks.wait(pids) == [0, 0, 0, 0] and "ressl: stopped after step " in log.read_text()
    assert forked_ranks.wait(forked_ranks.start(tiny, *RULES, f"run.out_dir={out}", log=log, ranks=4)) == [0, 0, 0, 0]
    assert ended_as(out, straight)


def test_a_run_goes_on_with_another_number_of_ranks_in_the_same_order(
    tiny: Path, undisturbed: Path, forked_ranks, tmp_path: Path
) -> None:
    """4 -> 2 -> 1 ranks. What batch norm sees together is the same with all of them, so only rounding differs."""
    settings = ["encoder.batchnorm={name: sync}", "optim.epochs=3", "optim.lr=0.01"]
    straight, log = tmp_path / "straight", tmp_path / "log"
    pids = forked_ranks.start(tiny, *settings, f"run.out_dir={straight}", log=log, ranks=1)
    assert forked_ranks.wait(pids) == [0], log.read_text()
    out = tmp_path / "run"
    for ranks, stop in ((4, 3), (2, 6), (1, None)):
        slow = {"what": "slow", "rank": 0, "steps": list(range(12))} if stop else None
        pids = forked_ranks.start(tiny, *settings, f"run.out_dir={out}", log=log, ranks=ranks, fault=slow)
        if stop:
            await_step(out, stop)
            os.kill(pids[0], signal.SIGTERM)
        assert set(forked_ranks.wait(pids)) == {0}, log.read_text()
    said = log.read_text()
    assert "the run had 4 ranks and has 2 now" in said and "the run had 2 ranks and has 1 now" in said
    one, other = (lines_of(metrics_path(run)) for run in (out, straight))
    assert [record["step"] for record in one] == [record["step"] for record in other] == list(range(1, 13))
    assert [r["loss"] for r in one] == pytest.approx([r["loss"] for r in other], rel=1e-3)
    states = [checkpoint.read(checkpoint.found(checkpoints_path(run))[0]).model for run in (out, straight)]
    for key, value in states[1].items():
        if "tracked" not in key:
            torch.testing.assert_close(states[0][key], value, rtol=0, atol=1e-3, msg=key)


def test_in_float64_one_two_and_four_ranks_train_alike(tiny: Path, forked_ranks, tmp_path: Path) -> None:
    """Fifty steps; to the last bit they cannot, as sums are made in another order."""
    found = []
    for ranks in (1, 2, 4):
        out, settings = tmp_path / str(ranks), ["encoder.batchnorm={name: sync}"]
        pids = forked_ranks.start(
            tiny, *settings, f"run.out_dir={out}", log=tmp_path / "log", ranks=ranks, float64=50
        )  # fmt: skip
        assert set(forked_ranks.wait(pids)) == {0}, (tmp_path / "log").read_text()
        found.append(torch.load(out / "method.pt", weights_only=True))
    for other in found[1:]:
        for key, value in found[0].items():
            if value.is_floating_point():
                assert value.dtype == torch.float64 or "queue" in key
                error = (other[key] - value).abs().max() / value.abs().max().clamp_min(1e-12)
                assert error < 1e-6, (key, float(error))
