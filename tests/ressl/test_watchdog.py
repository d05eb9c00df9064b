import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ressl import watchdog as watchdog_module
from ressl.watchdog import Beat, Watchdog, late, watched


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """faulthandler would end the tests with the process, were Python's lock held for so long on a busy machine."""
    monkeypatch.setattr(watchdog_module, "LOCKED_S", 3600.0)


@pytest.mark.usefixtures("no_locks")
def test_a_rank_that_goes_on_is_left_alone(tmp_path: Path) -> None:
    ended: list[str] = []
    with Watchdog(tmp_path / "w", rank=0, world_size=1, seconds=1.0, end=ended.append) as watchdog:
        for step in range(20):
            watchdog.at("step", step)
            time.sleep(0.1)
    assert ended == [] and not (tmp_path / "w").exists()


# A rank that hangs as its last argument says: in Python, in a C call that keeps Python's lock, or not at all, while
# another has failed.
RANK = """
import ctypes, os, sys, time
from pathlib import Path
from ressl.watchdog import Watchdog

directory, seconds, how = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3]

def end(message):
    print(message, flush=True)
    os._exit(6)

with Watchdog(directory, rank=0, world_size=1, seconds=seconds, end=end, lost=lambda: how == "lost") as watchdog:
    watchdog.at("step", 7)
    time.sleep(0.5)
    watchdog.at("data")
    print("hanging", flush=True)
    if how == "locked":
        ctypes.PyDLL(None).sleep(60)
    time.sleep(60)
"""


def hang(directory: Path, seconds: float, how: str, repo: Path) -> tuple[int, str, str, float]:
    environment = os.environ | {"PYTHONPATH": str(repo)}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", RANK, str(directory), str(seconds), how], capture_output=True, text=True, check=False,
        env=environment, timeout=60,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr, time.monotonic() - began


def test_one_that_hangs_ends_with_its_stacks_and_says_where(tmp_path: Path, repo: Path) -> None:
    code, said, _, took = hang(tmp_path / "w", 1.0, "python", repo)
    assert code == 6 and took < 40
    assert "rank 0 hung for" in said and "after step 7, waiting for data; the stacks of all ranks are in" in said
    stacks = (tmp_path / "w" / "stacks-rank0.txt").read_text()
    assert "rank 0, at data since step 7" in stacks and 'File "<string>"' in stacks and "Thread" in stacks


def test_one_that_keeps_python_s_lock_ends_too(tmp_path: Path, repo: Path) -> None:
    code, _, err, took = hang(tmp_path / "w", 1.0, "locked", repo)
    assert code != 0 and took < 40 and "Timeout" in err and 'File "<string>"' in err


def test_one_whose_fellow_has_failed_does_not_wait_for_it(tmp_path: Path, repo: Path) -> None:
    code, said, err, took = hang(tmp_path / "w", 0.0, "lost", repo)
    assert (code, said, err) == (1, "hanging\n", "") and took < 40


def test_without_a_limit_it_waits(tmp_path: Path, repo: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(repo)}
    command = [sys.executable, "-c", RANK, str(tmp_path / "w"), "0", "python"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout and process.stdout.readline() == "hanging\n"
        time.sleep(1.5)
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)


# --- who is late -----------------------------------------------------------------------------------------------------


def beat(rank: int, step: int, stage: str, since: float = 100.0, seen: float = 160.0) -> Beat:
    return Beat(rank, step, stage, since, seen)


def test_a_rank_that_gives_no_sign_of_life_is_named() -> None:
    said = late([beat(0, 8, "step"), beat(1, 7, "step", seen=110.0)])
    assert said.startswith(
        "rank 1 has given no sign of life for 50 s, and was at step 7 then: it is stopped, or its machine is lost"
    )


def test_a_rank_that_has_taken_fewer_steps_is_named() -> None:
    assert late([beat(0, 8, "step"), beat(1, 7, "data")]) == "rank 1 hung for 60 s after step 7, waiting for data"


def test_of_those_at_one_step_the_one_that_is_elsewhere_is_named() -> None:
    beats = [beat(0, 8, "saving"), beat(1, 8, "step"), beat(2, 8, "step")]
    assert late(beats) == "rank 0 hung for 60 s after step 8, while saving"


def test_where_all_are_alike_all_are_named() -> None:
    assert late([beat(0, 8, "step"), beat(1, 8, "step")]) == "ranks 0, 1 hung for 60 s after step 8, in the step"


@pytest.mark.usefixtures("no_locks")
def test_a_rank_is_named_even_where_nothing_can_be_written(tmp_path: Path) -> None:
    ended: list[str] = []
    (tmp_path / "file").touch()
    with Watchdog(tmp_path / "file", rank=3, world_size=4, seconds=0.2, end=ended.append) as watchdog:
        watchdog.at("evaluation", 5)
        deadline = time.monotonic() + 30
        while not ended and time.monotonic() < deadline:
            time.sleep(0.05)
    assert "rank 3 hung for" in ended[0] and "after step 5, in an evaluation" in ended[0]


# --- the stream ------------------------------------------------------------------------------------------------------


def test_it_is_told_who_has_the_turn_and_closes_what_it_was_given(tmp_path: Path) -> None:
    watchdog = Watchdog(tmp_path, rank=0, world_size=1, seconds=0, end=print)
    told, closed = [], []

    def items():
        try:
            for item in range(3):
                told.append(watchdog.stage)
                yield item
        finally:
            closed.append(True)

    stream = watched(items(), watchdog, "data", "step")
    for item in stream:
        told.append(watchdog.stage)
        if item == 1:
            break
    stream.close()  # type: ignore[attr-defined]
    assert told == ["data", "step", "data", "step"] and closed == [True]
