"""A conversion that is killed, whole or in part and at whatever moment, goes on and leaves the same bytes.

Converters are forked off the tests, so a kill costs no imports.
"""

import io
import os
import re
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from ressl.batch import DataError
from tools import conversion
from tools import convert as convert_module
from tools.convert import convert
from tools.estimate import spread
from tools.journal import JOURNAL, PART

KILLS = 10
IMAGES = 960  # 60 chunks: ten kills must not reach the end
OPTIONS = {
    "ffcv": {"mode": "smart", "max_side": 120},
    "tensor": {"max_side": 120},
    "webdataset": {"max_side": 200, "shard_mb": 1},
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Pictures that take some milliseconds each, in two classes; one of them is damaged."""
    root = tmp_path_factory.mktemp("photos")
    for i in range(IMAGES):
        path = root / "ab"[i % 2] / f"{i:03}.jpg"
        path.parent.mkdir(exist_ok=True)
        few = np.random.default_rng(i).integers(0, 256, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(few).resize((320, 240 + i % 9), Image.Resampling.NEAREST).save(path)
    (root / "a" / "100.jpg").write_text("text")
    return root


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


# --- converters in processes of their own ----------------------------------------------------------------------------


def start(report: Path, prepare: Callable[[], object], work: Callable[[Console], object]) -> int:
    """Forks a process, in a group of its own, that prepares and works; what it says and how it ends is in `report`."""
    report.unlink(missing_ok=True)
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with report.open("w", buffering=1) as file:
            try:
                prepare()
                work(Console(file=file, width=200))
                file.write("done\n")
            except BaseException as error:
                file.write(f"{type(error).__name__}: {error}\n")
    finally:
        os._exit(0)


def note_often(seconds: float = 0.01) -> None:
    """The journal gets what is written at once, and the estimate is made from a few images."""
    conversion.COMMIT_SECONDS = seconds
    convert_module.spread = partial(spread, count=8)


def state(pid: int) -> str:
    """R, S, T (stopped), Z, or nothing where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def alive(pid: int) -> bool:
    return state(pid) not in ("", "Z")


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def wait_until(is_so: Callable[[], bool], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, f"after {seconds} s: {what}"
        time.sleep(0.002)


def end_of(pid: int, seconds: float) -> None:
    """Waits until the process has ended, and takes note of it."""
    wait_until(lambda: os.waitpid(pid, os.WNOHANG)[0] == pid, seconds, "the converter has not ended")


def noted(dst: Path) -> int:
    """Chunks in the journal."""
    try:
        return max((dst / PART / JOURNAL).read_bytes().count(b"\n") - 1, 0)
    except FileNotFoundError:
        return 0


# --- killed amid the images ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", list(OPTIONS))
def test_ten_kills_at_random_moments_leave_the_same_bytes(photos, tmp_path, to):
    work = partial(convert, str(photos), to=to, workers=2, **OPTIONS[to])
    work(tmp_path / "undisturbed", console=Console(file=io.StringIO()))
    dst, report = tmp_path / "out", tmp_path / "report"
    rng = np.random.default_rng(sorted(OPTIONS).index(to))
    progress, places = [], []
    for kill in range(KILLS):
        before = noted(dst)
        pid = start(report, note_often, lambda console: work(dst, console=console))
        goal = before + int(rng.integers(0, 3))
        wait_until(lambda: (noted(dst) >= goal and len(children(pid)) == 2) or not alive(pid), 20, report.read_text)  # noqa: B023
        time.sleep(rng.uniform(0, 0.03))
        workers = children(pid)
        assert len(workers) == 2, report.read_text()
        if kill % 2:
            os.kill(workers[rng.integers(2)], signal.SIGKILL)
            end_of(pid, 5)
            ends = report.read_text().splitlines()[-1]
            found = re.fullmatch(
                r"WorkerDied: worker [01] of the conversion was killed by SIGKILL \(out of memory\?\)(?: at (.*))?", ends
            )
            assert found, ends
            places.append(found[1])
        else:
            os.kill(pid, signal.SIGKILL)
            end_of(pid, 5)
        wait_until(lambda: not any(map(alive, workers)), 1, "workers live on without the converter")  # noqa: B023
        assert os.listdir(dst) == [PART]
        progress.append(noted(dst) - before)
    assert sum(step > 0 for step in progress) >= KILLS // 2, progress
    assert any(re.fullmatch(r"[ab]/\d{3}\.jpg", place or "") for place in places), places
    work(dst, console=Console(file=io.StringIO()))
    assert contents(dst) == contents(tmp_path / "undisturbed")
    if to == "webdataset":
        assert len(list((dst / "train").glob("*.tar"))) > 2


def test_ctrl_c_keeps_what_is_done_and_says_so(photos, tmp_path):
    work = partial(convert, str(photos), to="ffcv", workers=2, **OPTIONS["ffcv"])
    work(tmp_path / "undisturbed", console=Console(file=io.StringIO()))
    dst, report = tmp_path / "out", tmp_path / "report"
    pid = start(report, note_often, lambda console: work(dst, console=console))
    wait_until(lambda: noted(dst) >= 2 or not alive(pid), 20, "nothing was noted")
    workers = children(pid)
    os.killpg(pid, signal.SIGINT)
    end_of(pid, 5)
    *_, kept, ends = report.read_text().splitlines()
    assert ends == "KeyboardInterrupt: "
    count = re.fullmatch(rf"(\d+) images are kept in {dst / PART}; the same command goes on after them", kept)
    assert count, kept
    assert int(count[1]) >= 32
    assert len(workers) == 2
    wait_until(lambda: not any(map(alive, workers)), 1, "workers live on without the converter")
    assert os.listdir(dst) == [PART]
    said = io.StringIO()
    work(dst, console=Console(file=said, width=200))
    assert f"train: 960 images, 2 classes; goes on after {count[1]} of them" in said.getvalue()
    assert contents(dst) == contents(tmp_path / "undisturbed")


def test_ctrl_c_before_anything_is_done_leaves_nothing(photos, tmp_path):
    dst, report = tmp_path / "new" / "out", tmp_path / "report"
    work = partial(convert, str(photos), dst, "ffcv", workers=2)
    pid = start(report, lambda: note_often(60), lambda console: work(console=console))
    wait_until(lambda: len(children(pid)) == 2 or not alive(pid), 20, "no workers")
    os.killpg(pid, signal.SIGINT)
    end_of(pid, 5)
    assert report.read_text().splitlines()[-1] == "KeyboardInterrupt: "
    assert not (tmp_path / "new").exists()


def test_workers_that_stand_still_are_told_with_their_images(photos, tmp_path):
    dst, report = tmp_path / "out", tmp_path / "report"

    def prepare() -> None:
        note_often()
        conversion.PATIENCE = 0.2

    pid = start(report, prepare, lambda console: convert(str(photos), dst, "tensor", workers=2, console=console))
    wait_until(lambda: noted(dst) >= 1 or not alive(pid), 20, "nothing was noted")
    workers = children(pid)
    told = re.compile(r"nothing has come for 0\.2 s; the workers are at [ab]/\d{3}\.jpg")
    for _ in range(5):  # it may stop between two images
        for worker in workers:
            os.kill(worker, signal.SIGSTOP)
        seen = report.read_text().count("nothing has come")
        wait_until(lambda: report.read_text().count("nothing has come") > seen, 5, "nothing was told")  # noqa: B023
        for worker in workers:
            os.kill(worker, signal.SIGCONT)
        if told.search(report.read_text()):
            break
    assert told.search(report.read_text()), report.read_text()
    end_of(pid, 20)
    assert report.read_text().endswith("done\n")


# --- killed at every system call -------------------------------------------------------------------------------------


class _Countdown:
    """Ends the process at the n-th of the calls that make, move, remove or settle files. A write is half done then."""

    def __init__(self, calls: int) -> None:
        self.left, self.owner = calls, os.getpid()
        for name in ("rename", "replace", "fsync", "fdatasync", "mkdir", "rmdir", "unlink", "write"):
            setattr(os, name, partial(self.call, name, getattr(os, name)))

    def call(self, name: str, real: Callable, *arguments, **options):
        if os.getpid() == self.owner:  # the workers are not counted
            self.left -= 1
            if self.left == 0:
                if name == "write":
                    real(arguments[0], arguments[1][: len(arguments[1]) // 2])
                self.end()
        return real(*arguments, **options)

    def end(self) -> NoReturn:
        os._exit(17)


@pytest.fixture(scope="module")
def two_splits(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("splits")
    for i in range(8):
        path = root / ("train", "val")[i // 4] / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (9, 12, 3), np.uint8)).save(path)
    return root


@pytest.mark.parametrize(
    ("to", "again"), [("ffcv", False), ("tensor", True), ("webdataset", True)], ids=["new", "over older", "directories"]
)
def test_a_death_at_any_system_call_loses_neither_the_old_data_nor_the_new(two_splits, tmp_path, to, again):
    quiet = Console(file=io.StringIO())
    convert(str(two_splits), tmp_path / "new", to, workers=1, console=quiet)
    convert(str(two_splits), tmp_path / "old", to, workers=1, max_side=8, console=quiet)
    new, old = contents(tmp_path / "new"), contents(tmp_path / "old")
    tops = {name.split("/")[0] for name in new}
    assert set(new) == set(old)
    deaths, moments = 0, set()
    while True:
        dst, report = tmp_path / f"out{deaths}", tmp_path / "report"
        if again:
            convert(str(two_splits), dst, to, workers=1, max_side=8, console=quiet)
        work = partial(convert, str(two_splits), dst, to, workers=1, overwrite=again)
        pid = start(report, lambda n=deaths + 1: (note_often(60), _Countdown(n)), lambda console: work(console=console))
        status = os.waitpid(pid, 0)[1]
        if os.waitstatus_to_exitcode(status) != 17:
            assert report.read_text().endswith("done\n")
            break
        deaths += 1
        found = contents(dst) if dst.exists() else {}
        which = {
            top: next(
                (
                    kind
                    for kind, (whole, place) in {
                        "new": (new, ""), "old": (old, ""), "aside": (old, f"{PART}/old/"),
                    }.items()
                    if {name: data for name, data in whole.items() if name.split("/")[0] == top}
                    == {
                        name.removeprefix(place): data
                        for name, data in found.items()
                        if name.startswith(f"{place}{top}/") or name == place + top
                    }
                ),
                "missing",
            )
            for top in tops
        }  # fmt: skip
        moments.add(tuple(which[top] for top in sorted(tops)))
        assert again <= ("missing" not in which.values()), (deaths, which, sorted(found))
        assert list(which.values()).count("aside") <= 1, (deaths, which)
        if which["manifest.json"] == "new":
            assert set(which.values()) == {"new"}, (deaths, which)
        try:
            work(console=quiet)
        except DataError as error:  # only where it had been finished
            assert re.search("exists already", str(error)), (deaths, error)
            assert not again
            assert set(which.values()) == {"new"}
        assert contents(dst) == new, deaths
        assert {path.name for path in dst.iterdir()} == tops, deaths
    assert contents(dst) == new
    assert deaths > 20
    assert len(moments) >= (2 * len(tops) if again else len(tops)), moments  # all the moments between the renames
