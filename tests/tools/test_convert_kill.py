"""A conversion that is killed, whole or in part and at whatever moment, goes on and leaves the same bytes.

Converters are forked off the tests, so a kill costs no imports.
"""

import io
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from ressl.batch import DataError
from tools import conversion, crew
from tools import convert as convert_module
from tools.convert import convert
from tools.estimate import spread
from tools.journal import JOURNAL, PART

KILLS = 10
DEAD = 17  # exit status
IMAGES = 320
CHUNKS = 64  # of five images each
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


@pytest.fixture
def quick(tmp_path) -> Iterator[Path]:
    """A directory in memory where there is room, as a disk takes its time for every fsync."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK) or shutil.disk_usage(memory).free < 1 << 28:
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as name:
        yield Path(name)


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


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


@pytest.fixture(scope="module")
def undisturbed(photos, tmp_path_factory) -> Callable[[str], dict[str, bytes]]:
    """What a conversion gives that nothing interrupts, by format."""

    @cache
    def convert_to(to: str) -> dict[str, bytes]:
        root = tmp_path_factory.mktemp(to)
        convert(str(photos), root / "out", to, console=Console(quiet=True), **OPTIONS[to])
        return contents(root / "out")

    return convert_to


@pytest.mark.parametrize("to", list(OPTIONS))
def test_ten_kills_at_random_moments_leave_the_same_bytes(photos, undisturbed, tmp_path, quick, to):
    work = partial(convert, str(photos), quick / "out", to, workers=2, **OPTIONS[to])
    dst, report = quick / "out", tmp_path / "report"
    rng = np.random.default_rng(sorted(OPTIONS).index(to))
    gained, named, kills = [], [], 0
    while kills < KILLS:
        if (before := noted(dst)) > CHUNKS // 2:  # finished, and begun anew
            work(console=Console(quiet=True))
            assert contents(dst) == undisturbed(to)
            shutil.rmtree(dst)
            before = 0
        pid = start(report, note_often, lambda console: work(console=console))
        goal = before + int(rng.integers(3))
        wait_until(lambda: (noted(dst) >= goal and len(children(pid)) == 2) or not alive(pid), 20, report.read_text)  # noqa: B023
        time.sleep(rng.uniform(0, 0.03))
        workers = children(pid)
        victim = workers[rng.integers(2)] if kills % 2 and len(workers) == 2 else pid
        os.kill(victim, signal.SIGKILL)
        end_of(pid, 5)
        if dst.exists() and PART not in names(dst):  # it was faster
            shutil.rmtree(dst)
            continue
        if victim != pid:
            last = report.read_text().splitlines()[-1]
            death = r"WorkerDied: worker [01] of the conversion was killed by SIGKILL \(out of memory\?\)(?: at (.*))?"
            assert re.fullmatch(death, last), last
            named.append(re.fullmatch(death, last)[1])
        wait_until(lambda: not any(map(alive, workers)), 1, "workers live on without the converter")  # noqa: B023
        assert names(dst) == [PART] if dst.exists() else victim != pid  # it leaves nothing if nothing was noted
        gained.append(noted(dst) - before)
        kills += 1
    assert sum(chunks > 0 for chunks in gained) >= KILLS // 2, gained
    assert any(re.fullmatch(r"[ab]/\d{3}\.jpg", name or "") for name in named), named
    work(console=Console(quiet=True))
    assert contents(dst) == undisturbed(to)
    if to == "webdataset":
        assert len(list((dst / "train").glob("*.tar"))) > 2


def test_ctrl_c_keeps_what_is_done_and_says_so(photos, undisturbed, tmp_path, quick):
    dst, report = quick / "out", tmp_path / "report"
    work = partial(convert, str(photos), to="ffcv", workers=2, **OPTIONS["ffcv"])
    pid = start(report, note_often, lambda console: work(dst, console=console))
    wait_until(lambda: noted(dst) >= 2 or not alive(pid), 20, "nothing was noted")
    workers = children(pid)
    os.killpg(pid, signal.SIGINT)
    end_of(pid, 5)
    *_, kept, ends = report.read_text().splitlines()
    assert ends == "KeyboardInterrupt: "
    found = re.fullmatch(rf"(\d+) images are kept in {dst / PART}; the same command goes on after them", kept)
    assert found, kept
    assert len(workers) == 2
    wait_until(lambda: not any(map(alive, workers)), 1, "workers live on without the converter")
    assert names(dst) == [PART]
    said = io.StringIO()
    work(dst, console=Console(file=said, width=200))
    went_on = re.search(r"train: 320 images, 2 classes; goes on after (\d+) of them", said.getvalue())
    assert went_on, said.getvalue()
    assert int(went_on[1]) - int(found[1]) in (0, 1)  # one may be the damaged one
    assert int(found[1]) >= 10
    assert contents(dst) == undisturbed("ffcv")


def test_ctrl_c_before_anything_is_done_leaves_nothing(photos, tmp_path, quick):
    """Also while it forks, where Python itself forgets it."""
    dst, report = quick / "new" / "out", tmp_path / "report"
    work = partial(convert, str(photos), dst, "ffcv", workers=4)
    for delay in np.linspace(0, 0.01, 12):
        pid = start(report, lambda: note_often(60), lambda console: work(console=console))
        wait_until(lambda: len(children(pid)) > 0 or not alive(pid), 20, "no workers")  # noqa: B023
        time.sleep(delay)
        os.killpg(pid, signal.SIGINT)
        end_of(pid, 5)
        assert report.read_text().splitlines()[-1] == "KeyboardInterrupt: "
        assert not (quick / "new").exists()


def test_workers_that_stand_still_are_told_with_their_images(photos, tmp_path, quick):
    dst, report = tmp_path / "out", tmp_path / "report"

    def prepare() -> None:
        note_often()
        crew.PATIENCE = 0.2

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


def test_workers_that_stand_still_while_the_size_is_foretold_are_told_too(photos, tmp_path, quick):
    report = tmp_path / "report"

    def prepare() -> None:
        crew.PATIENCE = 0.2

    work = partial(convert, str(photos), quick / "out", "ffcv", mode="jpg", workers=2)
    pid = start(report, prepare, lambda console: work(console=console))
    wait_until(lambda: len(children(pid)) == 2 or not alive(pid), 20, "no workers")
    workers = children(pid)
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    wait_until(lambda: "nothing has come for 0.2 s" in report.read_text(), 5, "nothing was told")
    assert "expected, from" not in report.read_text()
    for worker in workers:
        os.kill(worker, signal.SIGCONT)
    end_of(pid, 20)
    assert report.read_text().endswith("done\n")


# --- killed at every system call -------------------------------------------------------------------------------------


def die_at(call: int) -> None:
    """This process ends at the n-th of its calls that make, move, remove or settle files. A write is half done then."""
    note_often(60)
    owner, calls = os.getpid(), count(1)

    def shim(name: str, real: Callable, *arguments, **options):
        if os.getpid() == owner and next(calls) == call:  # the workers are not counted
            if name == "write":
                real(arguments[0], arguments[1][: len(arguments[1]) // 2])
            os._exit(DEAD)
        return real(*arguments, **options)

    for name in ("rename", "replace", "fsync", "fdatasync", "mkdir", "rmdir", "unlink", "write"):
        setattr(os, name, partial(shim, name, getattr(os, name)))


@pytest.fixture(scope="module")
def two_splits(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("splits")
    for i in range(8):
        path = root / ("train", "val")[i // 4] / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (9, 12, 3), np.uint8)).save(path)
    return root


def standing(root: dict[str, bytes], top: str, new: dict[str, bytes], old: dict[str, bytes]) -> str:
    """Where an output is: new, old, aside (the old one, waiting to be removed) or missing."""
    for kind, data, place in (("new", new, ""), ("old", old, ""), ("aside", old, f"{PART}/.old/")):
        whole = {place + name: one for name, one in data.items() if name.split("/")[0] == top}
        if whole == {name: one for name, one in root.items() if f"{name}/".startswith(f"{place}{top}/")}:
            return kind
    return "missing"


def stands(out: Path, tops: list[str], new: dict[str, bytes], old: dict[str, bytes]) -> tuple[str, ...]:
    """Where each output is."""
    found = contents(out) if out.exists() else {}
    return tuple(standing(found, top, new, old) for top in tops)


@pytest.mark.parametrize(
    ("to", "again"), [("ffcv", False), ("tensor", True), ("webdataset", True)], ids=["new", "over older", "directories"]
)
def test_a_death_at_any_system_call_loses_neither_the_old_data_nor_the_new(two_splits, tmp_path, quick, to, again):
    said = Console(quiet=True)
    work = partial(convert, str(two_splits), to=to, workers=1, overwrite=again, console=said)
    work(dst=tmp_path / "new")
    work(dst=tmp_path / "old", max_side=8)
    new, old = contents(tmp_path / "new"), contents(tmp_path / "old")
    tops = sorted({name.split("/")[0] for name in new})
    moments, deaths, ends = set(), 0, [DEAD, DEAD]
    while ends[1] == DEAD:  # the second of them dies at the later call
        # two at a time: the second dies one call later than the first
        outs, reports = ([place / name for name in "01"] for place in (quick, tmp_path))
        pids = []
        for late, (out, report) in enumerate(zip(outs, reports, strict=True)):
            shutil.rmtree(out, ignore_errors=True)
            if again:
                shutil.copytree(tmp_path / "old", out)
            pids.append(start(report, partial(die_at, deaths + late + 1), lambda _: work(dst=out)))  # noqa: B023
        ends = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        for out in outs[: ends.count(DEAD)]:
            moment = stands(out, tops, new, old)
            moments.add(moment)
            assert not again or "missing" not in moment, (deaths, moment)
            assert moment.count("aside") <= 1, (deaths, moment)
            assert dict(zip(tops, moment, strict=True))["manifest.json"] != "new" or set(moment) == {"new"}, moment
            try:
                work(dst=out)
            except DataError as error:  # there is nothing to go on with where only the tidying was left
                assert "exists already" in str(error)
                assert not again
                assert set(moment) == {"new"}
            assert contents(out) == new, deaths
            assert names(out) == tops, deaths
            deaths += 1
    out, report = outs[1], reports[1]
    assert report.read_text() == "done\n"
    assert contents(out) == new
    assert deaths > 20
    assert len(moments) > (2 * len(tops) - 2 if again else len(tops)), moments  # all between the renames were met
