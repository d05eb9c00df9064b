"""Files, and directories of shards, that appear under their names only when they are whole, and several at once.

Each is written as `<path>.part`; what had its name before waits as `<path>.part.old` while the names change.
"""

import fcntl
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from pipelines.shards import INDEX
from ressl.batch import DataError

PART, OLD = ".part", ".old"
SHARD_FILES = rf"{re.escape(INDEX)}|shard-[0-9]{{5,}}\.(tar|idx)"  # all that a directory of shards holds


@contextmanager
def atomic_output(path: Path) -> Iterator[BinaryIO]:
    """A new, empty, seekable file `<path>.part` that becomes `path` when the block ends.

    On any exception, Ctrl-C included, it is removed and an older file at `path` stays as it was. Raises DataError
    where the file cannot be made or another process is writing it; OSError (disk full) comes through.
    """
    with part_file(path) as file:
        yield file
        publish([], file)


@contextmanager
def part_file(path: Path) -> Iterator[BinaryIO]:
    """A new, empty, seekable file `<path>.part`, which is removed when the block ends unless `publish` named it.

    Raises DataError where it cannot be made or another process is writing it.
    """
    part = path.with_name(path.name + PART)
    file = _open_file(part)
    try:
        yield file
    finally:
        if _is_at(file.fileno(), part):
            part.unlink(missing_ok=True)
        with suppress(OSError):  # what could not be flushed has been reported by `publish`, or is not wanted
            file.close()


@contextmanager
def part_directory(path: Path) -> Iterator[Path]:
    """The same for a directory of shards, empty at first. Raises DataError also where `path`, or what a killed process
    may have left beside it, holds anything that `convert` did not write."""
    if path.exists() and not (path / INDEX).is_file():
        raise DataError(f"{path}: exists already and holds no {INDEX}, so it is not replaced; choose another place")
    part = path.with_name(path.name + PART)
    for directory in (path, _old(part)):
        _refuse_foreign(directory)
    handle = _open_directory(part)
    try:
        yield part
    finally:
        if _is_at(handle, part):
            shutil.rmtree(part, ignore_errors=True)
        os.close(handle)


def publish(outputs: Sequence[BinaryIO | Path], last: BinaryIO) -> None:
    """Gives the open files and the directories of the functions above their names: all of them, or none.

    All are on the disk before the first gets its name, and `last` gets its own after all others: that one rename
    decides. On any exception before it, Ctrl-C included, no name has changed. What had a name before is removed
    afterwards. OSError comes through.
    """
    for output in (*outputs, last):
        _sync(output)
    parts = [_part(output) for output in outputs]
    for part in parts:
        if _target(part).exists():
            _remove(_old(part))  # of a process that was killed below
    try:
        try:
            for part in parts:
                if _target(part).exists():
                    _target(part).rename(_old(part))
                part.rename(_target(part))
            _sync_directories(parts)
            _part(last).replace(_target(_part(last)))
            with suppress(OSError):  # it is decided, and an error would say that it is not
                _sync_directories([_part(last)])
        finally:
            _settle(parts, last)
    except KeyboardInterrupt:
        _settle(parts, last)  # again: it may have been interrupted itself
        raise


def _settle(parts: list[Path], last: BinaryIO) -> None:
    """Removes what is old, or takes the renames back. What there is to do is read off the disk, so it can start anew,
    wherever an interruption came. What fails leaves `.part.old`, which the next run clears."""
    decided = _is_at(last.fileno(), _target(_part(last)))
    for part in reversed(parts):
        path, old = _target(part), _old(part)
        with suppress(OSError):
            if decided:
                _remove(old)
                continue
            if not part.exists():
                path.rename(part)
            if old.exists() and not path.exists():
                old.rename(path)


def _part(output: BinaryIO | Path) -> Path:
    return output if isinstance(output, Path) else Path(output.name)


def _target(part: Path) -> Path:
    return part.with_name(part.name.removesuffix(PART))


def _old(part: Path) -> Path:
    return part.with_name(part.name + OLD)


def _is_at(handle: int, path: Path) -> bool:
    """Whether `path` is what is open there: not if it was renamed, or another process made a new one."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except OSError:
        return False


def _sync(output: BinaryIO | Path) -> None:
    if not isinstance(output, Path):
        output.flush()
        os.fsync(output.fileno())
        return
    handle = os.open(output, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_directories(parts: list[Path]) -> None:
    for directory in dict.fromkeys(part.parent for part in parts):
        _sync(directory)


# --- nobody else's ---------------------------------------------------------------------------------------------------


def _open_file(part: Path) -> BinaryIO:
    """Opens and empties `part`, which a killed process may have left."""
    try:
        part.touch()
        file = part.open("r+b")
    except OSError as error:
        raise DataError(f"{part}: cannot be written: {error.strerror or error}") from None
    try:
        _lock(file.fileno(), part)
        file.truncate(0)
    except BaseException:
        file.close()
        raise
    return file


def _open_directory(part: Path) -> int:
    """A handle of the empty directory `part`, which a killed process may have left."""
    try:
        part.mkdir(exist_ok=True)
        handle = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise DataError(f"{part}: cannot be written: {error.strerror}") from None
    try:
        _lock(handle, part)
        _refuse_foreign(part)
        for left in part.iterdir():
            left.unlink()
    except BaseException:
        os.close(handle)
        raise
    return handle


def _lock(handle: int, part: Path) -> None:
    """The lock shows a process that is still alive, and writing."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _is_at(handle, part):
            raise BlockingIOError
    except BlockingIOError:
        raise DataError(f"{part}: another process is writing it; wait for it or choose another place") from None
    except OSError:  # a file system without locks
        pass


def _refuse_foreign(directory: Path) -> None:
    if not directory.exists():
        return
    try:
        foreign = sorted(path.name for path in directory.iterdir() if not _is_shard_file(path))
    except OSError as error:
        raise DataError(f"{directory}: cannot be read: {error.strerror}; choose another place") from None
    if foreign:
        raise DataError(
            f"{directory}: holds {foreign[0]!r}, which `convert` did not write, so nothing in it is removed; "
            "move it away or choose another place"
        )


def _is_shard_file(path: Path) -> bool:
    return re.fullmatch(SHARD_FILES, path.name) is not None and path.is_file() and not path.is_symlink()


def _remove(path: Path) -> None:
    """A file, or a directory of shards, whose other contents are kept, and the directory with them."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    for file in path.iterdir():
        if _is_shard_file(file):
            file.unlink()
    path.rmdir()
