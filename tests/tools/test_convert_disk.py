"""A disk that is full, before or amid a conversion, is one clear line; when there is room, the same call goes on."""

import errno
import io
import os
import re
import resource
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from ressl.batch import DataError
from tools import conversion
from tools import convert as convert_module
from tools.convert import DiskFull, convert
from tools.estimate import spread
from tools.journal import PART, WorkDirectory

IMAGES = 96
PAGE = 4096  # bytes, in which memory is given to files
OPTIONS = {"ffcv": {"mode": "raw"}, "tensor": {}, "webdataset": {"max_side": 39, "shard_mb": 1}}


def save(path: Path, seed: int, side: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)).save(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Images of 5 kB each."""
    root = tmp_path_factory.mktemp("images")
    for i in range(IMAGES):
        save(root / "ab"[i // 48] / f"{i:02}.png", i, 40)
    return root


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """What a conversion gives where there is room, by format."""
    found = {}
    for to, options in OPTIONS.items():
        root = tmp_path_factory.mktemp(to)
        convert(str(folder), root / "out", to, console=Console(quiet=True), **options)
        found[to] = contents(root / "out")
    return found


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


def fill(disk: Path, room: int) -> None:
    """Leaves `room` bytes, in whole pages."""
    status = os.statvfs(disk)
    with (disk / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(status.f_bavail * status.f_frsize - room // PAGE * PAGE, 1))


class _FillsUp(io.StringIO):
    """Somebody else fills the disk as soon as the estimate has been told."""

    def __init__(self, disk: Path, room: int) -> None:
        super().__init__()
        self.disk, self.room = disk, room

    def write(self, text: str) -> int:
        if "free there" in text:
            fill(self.disk, self.room)
        return super().write(text)


# --- before it begins ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", list(OPTIONS))
def test_what_cannot_fit_is_refused_before_it_begins(folder, disk, to):
    place = disk(100_000)
    expected = (
        r"new/out: the output needs about \d[\d.]* [kM]B, \d+\.\d kB are free there; free some space, or store less"
    )
    with pytest.raises(DiskFull, match=expected):
        convert(str(folder), place / "new" / "out", to, console=Console(quiet=True), **OPTIONS[to])
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("room", [0, PAGE])
def test_a_disk_that_is_full_already_is_told(folder, disk, room):
    place = disk(100_000)
    fill(place, room)
    with pytest.raises(DiskFull, match="space"):
        convert(str(folder), place / "out", "tensor", console=Console(quiet=True))
    assert [path.name for path in place.iterdir()] == ["filler"]


# --- amid it ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def _small_steps(monkeypatch) -> None:
    """Chunks are noted as they come, and little is tried before."""
    monkeypatch.setattr(conversion, "COMMIT_SECONDS", 0.001)
    monkeypatch.setattr(convert_module, "spread", partial(spread, count=8))


def stage(out: Path) -> str:
    """How far a conversion came."""
    if not (out / PART).exists():
        return "nothing"
    if (out / PART / "manifest.json").exists():
        return "manifest"
    if any((out / PART).rglob("*index.npz")):
        return "index"
    with closing(WorkDirectory(out)) as work:
        done = sum(len(chunk.rows) for chunk in work.read().chunks["train"])
    return "all images" if done == IMAGES else "some images"


@pytest.mark.usefixtures("_small_steps")
@pytest.mark.parametrize("to", list(OPTIONS))
def test_a_disk_that_fills_up_at_any_moment_is_told_and_the_rest_is_done_later(folder, whole, disk, to):
    place, stages = disk(64 << 20), set()
    convert(str(folder), place / "out", to, workers=2, console=Console(quiet=True), **OPTIONS[to])
    used = sum(path.stat().st_blocks * 512 for path in place.rglob("*") if path.is_file())
    shutil.rmtree(place / "out")
    rooms = [PAGE, used // 3, used * 2 // 3, *range(used - 6 * PAGE, used + 8 * PAGE, PAGE)]
    for room in rooms:
        call = {"workers": 2, **OPTIONS[to]}
        said = _FillsUp(place, room)
        try:
            convert(str(folder), place / "out", to, console=Console(file=said, width=200), **call)
            stages.add("done")
        except DiskFull as error:
            stages.add(stage(place / "out"))
            clear = r"no space for the output \(no space left on device; [\d.]+ (bytes|kB|MB) free there\); make room"
            assert re.fullmatch(rf"{place}/out: {clear}, and the same command goes on where it stopped", str(error)), (
                error
            )
            assert {path.name for path in place.rglob("*")} & {"filler", PART}
            assert not (place / "out" / "manifest.json").exists()
            (place / "filler").unlink()
            convert(str(folder), place / "out", to, console=Console(quiet=True), **call)
        (place / "filler").unlink(missing_ok=True)
        assert contents(place / "out") == whole[to], room
        shutil.rmtree(place / "out")
    assert stages == {"nothing", "some images", "all images", "index", "manifest", "done"}


@pytest.mark.parametrize("to", ["tensor", "webdataset"])
def test_an_estimate_that_misses_large_images_is_no_harm(disk, tmp_path, to):
    tried = set(spread(np.arange(260)))
    missed = [i for i in range(260) if i not in tried]
    for i in range(260):
        save(tmp_path / "src" / f"{i:03}.png", i, 220 if i in missed[:20] else 8)
    place = disk(2_000_000)
    with pytest.raises(DiskFull, match="no space for the output"):
        convert(str(tmp_path / "src"), place / "out", to, console=Console(quiet=True))
    disk(8_000_000)
    convert(str(tmp_path / "src"), place / "out", to, console=Console(quiet=True))
    convert(str(tmp_path / "src"), tmp_path / "whole", to, console=Console(quiet=True))
    assert contents(place / "out") == contents(tmp_path / "whole")


# --- where no disk can be made ---------------------------------------------------------------------------------------


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file may grow beyond it, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("_small_steps")
@pytest.mark.parametrize("to", list(OPTIONS))
def test_files_that_may_not_grow_are_told_and_finished_later(folder, whole, tmp_path, to):
    data = max(whole[to].values(), key=len)
    start = 8 << 20 if to == "ffcv" else 0
    limits = [1000, *(start + (len(data) - start) * k // 3 for k in (1, 2)), len(data) - 1]
    for limit in limits:
        out = tmp_path / str(limit)
        with file_size_limit(limit), pytest.raises(DiskFull, match=r"no space for the output \(file too large; "):
            convert(str(folder), out, to, console=Console(quiet=True), **OPTIONS[to])
        assert not (out / "manifest.json").exists()
        convert(str(folder), out, to, console=Console(quiet=True), **OPTIONS[to])
        assert contents(out) == whole[to], limit


# --- one call that fails ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_splits(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("splits")
    for i in range(8):
        save(root / ("train", "val")[i // 4] / "ab"[i % 2] / f"{i}.png", i, 12)
    return root


def fail_at(number: int, error: BaseException, patch: pytest.MonkeyPatch) -> None:
    """The n-th call of this process that makes, moves, removes or settles files does nothing but fail."""
    process, calls = os.getpid(), count(1)

    def call(real: Callable, *arguments, **options):
        mine = threading.current_thread() is threading.main_thread() or isinstance(error, OSError)
        if os.getpid() == process and mine and next(calls) == number:
            raise error
        return real(*arguments, **options)

    for name in ("rename", "replace", "fsync", "fdatasync", "mkdir", "rmdir", "unlink", "write"):
        patch.setattr(os, name, partial(call, getattr(os, name)))


@pytest.mark.parametrize(
    ("error", "outcome", "to", "again", "step"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "DiskFull", "tensor", False, 1),
        (OSError(errno.EIO, "Input/output error"), "DataError", "webdataset", True, 3),
        (KeyboardInterrupt(), "KeyboardInterrupt", "webdataset", True, 1),
    ],
    ids=["full", "broken", "ctrl-c"],
)
def test_whatever_call_fails_the_data_is_old_or_new_and_the_next_one_goes_on(
    two_splits, tmp_path, quick, monkeypatch, error, outcome, to, again, step
):
    work = partial(convert, str(two_splits), to=to, workers=1, overwrite=True, console=Console(quiet=True))
    work(dst=tmp_path / "new")
    work(dst=tmp_path / "old", max_side=8)
    new, old = contents(tmp_path / "new"), contents(tmp_path / "old")
    out, outcomes = quick / "out", []
    while outcomes[-6 // step :] != ["none"] * (6 // step):  # to remove an empty directory may fail
        shutil.rmtree(out, ignore_errors=True)
        if again:
            shutil.copytree(tmp_path / "old", out)
        with monkeypatch.context() as patch:
            fail_at(len(outcomes) * step + 1, error, patch)
            try:
                work(dst=out)
                outcomes.append("none")
            except (DataError, DiskFull, KeyboardInterrupt) as raised:
                outcomes.append(type(raised).__name__)
        found = contents(out) if out.exists() else {}
        named = {name: data for name, data in found.items() if not name.startswith(PART)}
        assert all(data in (new[name], old[name]) for name, data in named.items()), len(outcomes)
        if outcomes[-1] == "none" or named.get("manifest.json") == new["manifest.json"]:
            assert named == new, len(outcomes)
        work(dst=out)
        assert contents(out) == new, len(outcomes)
        assert not (out / PART).exists(), len(outcomes)
    assert set(outcomes[3:]) == {outcome, "none"}  # a directory that cannot be made is a DataError, whatever the reason
    assert outcomes.count(outcome) > 20 // step
