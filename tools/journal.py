"""The directory in which a conversion works, and the journal by which it goes on after any interruption.

`<DST>/convert.part/` holds the outputs as far as they are, and a journal of lines `<crc32> <JSON>`: first what is
converted and how, then every chunk of images that is on the disk for good, at the end that all is whole. A chunk's line
is written after its data is on the disk, and chunks in their order only; so whatever moment a process or a machine
dies at, what the journal lists is there, and what lies behind it is written again.
"""

import base64
import fcntl
import json
import os
import re
import time
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ressl.batch import DataError
from tools.encode import Skipped
from tools.output import remove_ours
from tools.rows import ROW

PART = "convert.part"
JOURNAL, OLD = ".journal", ".old"  # no split can have such a name
OUTPUTS = r"[\w-]+(\.(beton|safetensors)(\.index\.npz)?)?|manifest\.json"  # a name alone: a directory of shards
LOCK_SECONDS = 2  # a killed process's workers hold its lock until they are gone too, a moment later


@dataclass(frozen=True, slots=True)
class Chunk:
    """Images that are on the disk, or are left out, one after another in the order of their split."""

    rows: np.ndarray  # ROW, of those that are there
    skipped: tuple[Skipped, ...]


@dataclass(slots=True)
class Past:
    """What an earlier process has done."""

    header: dict[str, Any] | None = None  # None: nothing
    chunks: dict[str, list[Chunk]] = field(default_factory=dict)  # split -> its first chunks
    sealed: dict[str, int] | None = None  # name of each output -> its inode, once all are whole


class WorkDirectory:
    """`<DST>/convert.part/`, held by this process alone until it is closed. Raises DataError where it cannot be."""

    def __init__(self, dst: Path) -> None:
        self.dst, self.path = dst, dst / PART
        if self.path.is_symlink():
            raise DataError(f"{self.path}: is a link, out of which files could not be renamed; remove it")
        self.made = [path for path in (self.path, dst, *dst.parents) if not path.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            foreign = sorted(one.name for one in self.path.iterdir() if one.name not in (JOURNAL, OLD))
            if foreign and not (self.path / JOURNAL).exists():
                raise DataError(f"{self.path}: holds {foreign[0]!r}, which `convert` did not write; move it away")
            self.file = (self.path / JOURNAL).open("a+b", buffering=0)
        except OSError as error:
            raise DataError(f"{dst}: cannot be written: {error.strerror}; choose another place") from None
        try:
            _lock(self.file)
            if not os.path.samestat(os.fstat(self.file.fileno()), (self.path / JOURNAL).stat()):
                raise BlockingIOError  # whoever held it has just finished
        except (BlockingIOError, FileNotFoundError):
            self.file.close()
            raise DataError(f"{dst}: another process is converting into it; wait for it or choose another") from None
        except OSError:  # a file system without locks
            pass
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self.pending: Future[None] | None = None

    def close(self) -> None:
        self.pool.shutdown(wait=True)
        self.file.close()

    # --- the past ---

    def read(self) -> Past:
        """What the journal says, up to a torn or damaged line, behind which it is cut off."""
        past, good = Past(), 0
        self.file.seek(0)
        for line in self.file.readall().splitlines(keepends=True):
            record = _parse(line)
            if record is None:
                break
            good += len(line)
            match record:
                case {"header": header}:
                    past.header = header
                case {"sealed": sealed}:
                    past.sealed = sealed
                case {"split": split, "forget": number}:
                    del past.chunks[split][number:]
                case {"split": split, "chunk": number, "rows": rows, "skipped": skipped}:
                    chunks = past.chunks.setdefault(split, [])
                    if number > len(chunks):
                        raise DataError(f"{self.path}: its journal lacks a line; remove it to begin anew")
                    if number == len(chunks):  # else it was noted twice
                        chunks.append(self._chunk_of(rows, skipped))
        self.file.truncate(good)
        return past

    def _chunk_of(self, rows: str, skipped: list[list[Any]]) -> Chunk:
        try:
            table = np.frombuffer(zlib.decompress(base64.b64decode(rows)), ROW)
            return Chunk(table, tuple(Skipped(i, name, why, tuple(at)) for i, name, why, at in skipped))
        except ValueError:
            raise DataError(f"{self.path}: begun by another version of this program; remove it to begin anew") from None

    def clear(self) -> None:
        """Forgets the past. What `convert` did not write stays."""
        for path in self.path.iterdir():
            if path.name == OLD or _is_ours(path):
                _remove(path)
        self.file.truncate(0)

    def discard(self) -> None:
        """Removes the directory with all of ours that is in it, and those that were made for it and are empty."""
        with suppress(FileNotFoundError):  # it was interrupted where the directory was gone
            self.clear()
        (self.path / JOURNAL).unlink(missing_ok=True)
        for path in (self.path, *self.made):
            with suppress(OSError):  # something else is in it
                path.rmdir()

    # --- the present ---

    def begin(self, header: dict[str, Any]) -> None:
        self._append([{"header": header}])

    def forget(self, split: str, number: int) -> None:
        """Takes back the chunks of a split from `number` on."""
        self._append([{"split": split, "forget": number}])

    def commit(self, chunks: Sequence[tuple[str, int, Chunk]], files: Iterable[Path]) -> None:
        """Notes chunks, each with its split and number, whose data has been written to `files`, once it is on the disk;
        another thread waits for that. Raises the OSError of the commit before."""
        self.settle()
        records = [
            {
                "split": split,
                "chunk": number,
                "rows": base64.b64encode(zlib.compress(chunk.rows.tobytes(), 1)).decode("ascii"),
                "skipped": [list(asdict(one).values()) for one in chunk.skipped],
            }
            for split, number, chunk in chunks
        ]
        self.pending = self.pool.submit(self._commit, records, list(files))

    @property
    def busy(self) -> bool:
        """Whether what was committed is not yet noted."""
        return self.pending is not None and not self.pending.done()

    def settle(self) -> None:
        """Waits until all that was committed is noted. Where that failed, each call raises its OSError: nothing can be
        noted behind a gap."""
        if self.pending is not None:
            self.pending.result()
            self.pending = None

    def _commit(self, records: list[dict[str, Any]], files: list[Path]) -> None:
        for path in files:
            sync(path)
        self._append(records)

    def _append(self, records: list[dict[str, Any]]) -> None:
        """A torn line, of a full disk, is taken back, so that what follows is not lost behind it."""
        end = os.fstat(self.file.fileno()).st_size
        left = b"".join(map(_line, records))
        try:
            while left:
                left = left[os.write(self.file.fileno(), left) :]
            os.fdatasync(self.file.fileno())
        except OSError:
            with suppress(OSError):
                self.file.truncate(end)
            raise

    # --- the end ---

    def seal(self, outputs: Sequence[str]) -> dict[str, int]:
        """Notes that the outputs, files and directories of files, are whole and on the disk."""
        for name in outputs:
            path = self.path / name
            for file in (*(path.iterdir() if path.is_dir() else ()), path):
                sync(file)
        sync(self.path)
        sealed = {name: (self.path / name).stat().st_ino for name in outputs}
        self._append([{"sealed": sealed}])
        return sealed

    def publish(self, sealed: dict[str, int]) -> None:
        """Gives the outputs their names, the last one last, and removes the directory.

        It can be called again whenever it was interrupted. What had a name before is removed at the end. Raises
        DataError where an output is gone.
        """
        old = self.path / OLD
        old.mkdir(exist_ok=True)
        *others, last = sealed
        for name in (*others, last):
            part, target = self.path / name, self.dst / name
            if part.exists():
                if target.exists() and name != last:
                    _remove(old / name)
                    target.rename(old / name)
                part.replace(target)
            elif not target.exists() or target.stat().st_ino != sealed[name]:
                raise DataError(
                    f"{target}: removed or replaced while it was converted; remove {self.path} and begin anew"
                )
            if name == others[-1]:
                sync(self.dst)
        sync(self.dst)
        self.made = []
        self.discard()


def _lock(file: BinaryIO) -> None:
    """Raises BlockingIOError where another process holds the file and does not let go of it soon."""
    end = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                raise
            time.sleep(0.02)


def sync(path: Path) -> None:
    """Waits until a file or directory is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_ours(path: Path) -> bool:
    """Whether it is named as something that a conversion makes beside the journal."""
    return (path.is_dir() or "." in path.name) and re.fullmatch(OUTPUTS, path.name) is not None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        if path.name == OLD:
            for one in path.iterdir():
                _remove(one)
        remove_ours(path)
    else:
        path.unlink(missing_ok=True)


def _line(record: dict[str, Any]) -> bytes:
    text = json.dumps(record).encode("ascii")  # unsorted: splits and outputs have an order
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _parse(line: bytes) -> dict[str, Any] | None:
    """None where the line is not whole."""
    try:
        crc, text = line[:-1].split(b" ", 1)
        if not line.endswith(b"\n") or int(crc, 16) != zlib.crc32(text):
            return None
        record = json.loads(text)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
