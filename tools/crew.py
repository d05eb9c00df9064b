"""Forked processes that encode images and write them where they belong.

The parent hands out chunks of images; a worker encodes a chunk, tells how long each image became, is told where each
goes, and writes it there. So image data never passes through the parent, and yet the bytes of the output depend neither
on the number of workers nor on their speed. A worker ends with its parent, however that ends.
"""

import mmap
import os
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

import numpy as np

from ressl.batch import DataError
from tools.encode import Encoded, Options, Skipped, encode
from tools.estimate import Sample, sample_image
from tools.forked import WorkerDied, fork_workers
from tools.image_sets.image_set import ImageSet
from tools.rows import PLACE, ROW, SUFFIXES
from tools.shard_writer import BLOCK, member_blocks

PATIENCE = 60  # seconds without any news after which a person is told
NOTHING = -1  # in place of an image's index


@dataclass(frozen=True, slots=True)
class Encode:
    split: str
    chunk: int
    indices: list[int]


@dataclass(frozen=True, slots=True)
class Encodings:
    """What became of a chunk: the worker keeps the data until it is told where to write it."""

    split: str
    chunk: int
    rows: np.ndarray  # ROW, of the images that were not left out
    skipped: list[Skipped]


@dataclass(frozen=True, slots=True)
class Write:
    split: str
    chunk: int
    files: dict[int, Path]  # for the numbers in `places`
    places: np.ndarray  # PLACE, for each of the rows


@dataclass(frozen=True, slots=True)
class Written:
    split: str
    chunk: int


@dataclass(frozen=True, slots=True)
class Measure:
    """Encodes images and throws the result away."""

    split: str
    indices: list[int]


@dataclass(frozen=True, slots=True)
class Measured:
    samples: list[Sample]


@dataclass(frozen=True, slots=True)
class Failed:
    error: Exception | str  # or what a bug has to say


Task = Encode | Write | Measure
News = Encodings | Written | Measured | Failed


class Crew:
    """`count` workers that know `sets`; to be closed, or used in a `with`, which ends them at once."""

    def __init__(self, sets: dict[str, ImageSet], options: Options, count: int) -> None:
        self.sets = sets
        self.at = np.frombuffer(mmap.mmap(-1, 16 * count), np.int64).reshape(count, 2)  # split and image, by worker
        self.at[:] = NOTHING
        self.heard = time.monotonic()
        self.workers = fork_workers(_work, [(sets, options, at) for at in self.at], "convert")

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *_: object) -> None:
        self.workers.end()

    def send(self, worker: int, task: Task) -> None:
        """Raises WorkerDied, and what a worker did."""
        try:
            self.workers.connections[worker].send(task)
        except OSError:
            while True:  # up to what it said last: why it ended
                self._receive_from(worker)

    def receive(self, timeout: float) -> list[tuple[int, News]]:
        """News of the workers, by number; nothing after `timeout` seconds. Raises WorkerDied, and what a worker did."""
        if ready := wait(self.workers.connections, timeout):
            self.heard = time.monotonic()
        return [(worker, self._receive_from(worker)) for worker in map(self.workers.connections.index, ready)]  # type: ignore[arg-type]

    def _receive_from(self, worker: int) -> News:
        try:
            message = self.workers.connections[worker].recv()
        except (EOFError, OSError):
            raise self._death(worker) from None
        match message:
            case Failed(error=Exception() as error):
                raise error
            case Failed(error=text):
                raise RuntimeError(f"a worker failed:\n{text}")
        return message

    def standstill(self) -> str:
        """What a person should be told once nothing has come for PATIENCE seconds, and again as long after that; else
        nothing."""
        if time.monotonic() - self.heard < PATIENCE:
            return ""
        self.heard = time.monotonic()
        return f"nothing has come for {PATIENCE} s; the workers are at {self.whereabouts() or 'no image'}"

    def whereabouts(self) -> str:
        """The image that each worker is at, for those that are at one."""
        names = (self._image_of(worker) for worker in range(len(self.workers.processes)))
        return ", ".join(name for name in names if name)

    def _image_of(self, worker: int) -> str:
        split, index = self.at[worker].tolist()
        return list(self.sets.values())[split].name(index) if split != NOTHING else ""

    def _death(self, worker: int) -> WorkerDied:
        image = self._image_of(worker)
        how = self.workers.death(worker)
        return WorkerDied(f"worker {worker} of the conversion {how}{f' at {image}' if image else ''}")


def _work(connection: Connection, sets: dict[str, ImageSet], options: Options, at: np.ndarray) -> None:
    """What a worker does until its parent is gone."""
    held: dict[tuple[str, int], list[Encoded]] = {}
    files: dict[Path, int] = {}
    measured = False
    numbers = {split: number for number, split in enumerate(sets)}
    try:
        while True:
            match connection.recv():
                case Encode(split=split, chunk=chunk, indices=indices):
                    encoded, skipped = _encode_all(sets[split], options, indices, at, numbers[split])
                    held[split, chunk] = encoded
                    rows = np.array([one.row for one in encoded], ROW)
                    connection.send(Encodings(split, chunk, rows, skipped))
                case Write(split=split, chunk=chunk, files=paths, places=places):
                    _write_all(held.pop((split, chunk)), places, paths, files, options.to == "webdataset")
                    connection.send(Written(split, chunk))
                case Measure(split=split, indices=indices):
                    samples = []
                    for i in indices:
                        at[:] = numbers[split], i
                        if not measured:  # the first image of a process takes ten times as long
                            sample_image(sets[split], options, i)
                            measured = True
                        samples.append(sample_image(sets[split], options, i))
                    at[:] = NOTHING
                    connection.send(Measured(samples))
    except (EOFError, BrokenPipeError, ConnectionResetError):  # the parent is gone
        pass
    except (OSError, DataError) as error:
        connection.send(Failed(error))
    except MemoryError:
        connection.send(Failed(DataError("not enough memory for the images in work; use fewer --workers")))
    except Exception:
        connection.send(Failed(traceback.format_exc()))


def _encode_all(
    images: ImageSet, options: Options, indices: Sequence[int], at: np.ndarray, number: int
) -> tuple[list[Encoded], list[Skipped]]:
    encoded: list[Encoded] = []
    skipped: list[Skipped] = []
    for i in indices:
        at[:] = number, i
        match encode(images, options, i):
            case Encoded() as one:
                encoded.append(one)
            case Skipped() as one:
                skipped.append(one)
    at[:] = NOTHING
    return encoded, skipped


def _write_all(
    encoded: list[Encoded], places: np.ndarray, paths: dict[int, Path], files: dict[Path, int], members: bool
) -> None:
    """Writes each image at its place; files stay open until others are written to. OSError comes through."""
    for path in set(files).difference(paths.values()):
        os.close(files.pop(path))
    for path in paths.values():
        if path not in files:
            files[path] = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    for one, (number, offset) in zip(encoded, places.tolist(), strict=True):
        if members:
            row = one.row
            blocks = member_blocks(int(row["index"]), int(row["label"]), SUFFIXES[row["kind"]], one.data)
            _write_at(files[paths[number]], blocks, offset - BLOCK)
        else:
            _write_at(files[paths[number]], (one.data,), offset)


def _write_at(file: int, blocks: Sequence[bytes], offset: int) -> None:
    total = sum(map(len, blocks))
    written = os.pwritev(file, blocks, offset)
    if written < total:  # the disk is full, or the image is beyond what one call writes
        rest = memoryview(b"".join(blocks))[written:]
        while rest:
            written = os.pwrite(file, rest, offset + total - len(rest))
            rest = rest[written:]


assert PLACE.names == ("file", "offset")  # the order in which _write_all takes them apart
