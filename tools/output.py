"""Files that appear under their names only when they are whole; directories in which nobody else's file is touched."""

import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from pipelines.shards import INDEX
from ressl.batch import DataError

PART = ".part"
SHARD_FILES = rf"{re.escape(INDEX)}|shard-[0-9]{{5,}}\.(tar|idx)"  # all that a directory of shards holds


@contextmanager
def atomic_output(path: Path) -> Iterator[BinaryIO]:
    """A new, empty, seekable file `<path>.part` that becomes `path` when the block ends.

    On any exception, Ctrl-C included, it is removed and an older file at `path` stays as it was. Raises DataError
    where the file cannot be made or another process is writing it; OSError (disk full) comes through.
    """
    part = path.with_name(path.name + PART)
    file = _open_file(part)
    try:
        yield file
        file.flush()
        os.fsync(file.fileno())
        part.replace(path)
    finally:
        if _is_at(file.fileno(), part):
            part.unlink(missing_ok=True)
        with suppress(OSError):  # what could not be flushed has been reported, or is not wanted
            file.close()


def make_out(out: Path) -> None:
    """Raises DataError where it cannot be."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"--out {out}: the directory cannot be made: {error.strerror}") from None


def keep(record: Mapping[str, Any], text: str, path: Path) -> list[Path]:
    """A benchmark's text and its record, as `path` with .md and .json."""
    paths = [path.with_name(path.name + suffix) for suffix in (".md", ".json")]
    for one, content in zip(paths, (text, json.dumps(record, indent=1) + "\n"), strict=True):
        with atomic_output(one) as file:
            file.write(content.encode())
    return paths


def expand(path: Path) -> Path:
    """With a user's directory in place of `~`. Raises DataError where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise DataError(f"{path}: no such user; give another place") from None


def refuse_foreign(directory: Path) -> None:
    """Raises DataError where a directory of shards holds anything that `convert` did not write."""
    try:
        foreign = sorted(path.name for path in directory.iterdir() if not _is_shard_file(path))
    except OSError as error:
        raise DataError(f"{directory}: cannot be read: {error.strerror}; choose another place") from None
    if foreign:
        raise DataError(
            f"{directory}: holds {foreign[0]!r}, which `convert` did not write, so nothing in it is removed; "
            "move it away or choose another place"
        )


def remove_ours(directory: Path) -> None:
    """Removes a directory of shards; one that holds anything else is kept, with that."""
    for file in directory.iterdir():
        if _is_shard_file(file):
            file.unlink()
    with suppress(OSError):
        directory.rmdir()


def _is_shard_file(path: Path) -> bool:
    return re.fullmatch(SHARD_FILES, path.name) is not None and path.is_file() and not path.is_symlink()


def _is_at(handle: int, path: Path) -> bool:
    """Whether `path` is what is open there: not if it was renamed, or another process made a new one."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except OSError:
        return False


def _open_file(part: Path) -> BinaryIO:
    """Opens and empties `part`, which a killed process may have left, under a lock that shows whoever still writes."""
    try:
        part.touch()
        file = part.open("r+b")
    except OSError as error:
        raise DataError(f"{part}: cannot be written: {error.strerror or error}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _is_at(file.fileno(), part):
            raise BlockingIOError
    except BlockingIOError:
        file.close()
        raise DataError(f"{part}: another process is writing it; wait for it or choose another place") from None
    except OSError:  # a file system without locks
        pass
    file.truncate(0)
    return file
