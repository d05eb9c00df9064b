"""The work of a conversion: chunks of images through the crew, to their places, into the journal, to whole files."""

import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipelines.sampler import permutation
from ressl.batch import DataError
from tools.beton_writer import BetonLayout, finish_beton
from tools.crew import Crew, Encode, Encodings, Write, Written
from tools.encode import Options, Skipped, printable
from tools.image_sets.image_set import ImageSet
from tools.index_file import SUFFIX as INDEX_SUFFIX
from tools.index_file import write_index_file
from tools.journal import Chunk, WorkDirectory
from tools.output import refuse_foreign
from tools.rows import PLACE, ROW
from tools.shard_writer import ShardLayout, finish_shards, shard_name
from tools.tensor_writer import TensorLayout, finish_tensors

AHEAD = 3  # chunks that a worker has before it
COMMIT_SECONDS = 0.1  # between two notes in the journal, at least


@dataclass(slots=True)
class SplitWork:
    """One split of the source on its way into one output."""

    name: str
    images: ImageSet
    output: Path  # file or directory in the work directory
    order: np.ndarray  # (N,) int64, entries of the set in the order in which they are stored
    layout: BetonLayout | TensorLayout | ShardLayout
    chunk: int  # images of each chunk, but the last; may change as long as there is none
    chunks: list[Chunk] = field(default_factory=list)  # those that have their places, in order
    places: list[np.ndarray] = field(default_factory=list)  # PLACE of each chunk's rows
    committed: int = 0  # chunks that are in the journal, or on their way there
    written: set[int] = field(default_factory=set)  # chunks that are written
    waiting: dict[int, tuple[int, Chunk]] = field(default_factory=dict)  # encoded before their turn: worker, chunk

    @property
    def count(self) -> int:
        """Chunks in all."""
        return -(-len(self.order) // self.chunk)

    @property
    def skipped(self) -> list[Skipped]:
        return [one for chunk in self.chunks for one in chunk.skipped]

    @property
    def done(self) -> int:
        """Images that are in the journal, or on their way there."""
        return min(self.committed * self.chunk, len(self.order))

    def indices(self, chunk: int) -> list[int]:
        return [int(i) for i in self.order[chunk * self.chunk : (chunk + 1) * self.chunk]]

    def file(self, number: int) -> Path:
        return self.output / shard_name(number) if isinstance(self.layout, ShardLayout) else self.output


@dataclass(slots=True)
class Telling:
    """What a person is told while it runs."""

    advance: Callable[[SplitWork, int, int], None]  # images and bytes that were just placed
    skipped: Callable[[SplitWork, Skipped], None]  # may refuse to go on
    say: Callable[[str], None]


def open_split(name: str, images: ImageSet, output: Path, options: Options) -> SplitWork:
    """With chunks of up to the source's own size; fewer of a small set, so that all workers have some to the end."""
    total = len(images.labels)
    order = permutation(total, 0, 0) if options.shuffle else np.arange(total)
    return SplitWork(name, images, output, order, open_layout(images, options), min(images.chunk, max(4, total // 64)))


def open_layout(images: ImageSet, options: Options) -> BetonLayout | TensorLayout | ShardLayout:
    match options.to:
        case "ffcv":
            return BetonLayout(len(images.labels))
        case "tensor":
            return TensorLayout(len(images.labels), tuple(map(printable, images.classes)))
        case "webdataset":
            return ShardLayout(options.shard_mb * 10**6)


def still_true(split: SplitWork, past: list[Chunk]) -> list[Chunk]:
    """The first chunks of the past, up to one with an image that could not be read and is another one now: it is tried
    again. Raises DataError where an image that is stored has changed."""
    for chunk in past:
        for index, stamp in zip(chunk.rows["index"].tolist(), map(tuple, chunk.rows["stamp"].tolist()), strict=True):
            if split.images.stamp(index) != stamp:
                name = printable(split.images.name(index))
                raise DataError(
                    f"{split.name}: {name} has changed since the conversion was interrupted; --restart begins anew"
                )
    changed = (any(split.images.stamp(one.index) != one.stamp for one in chunk.skipped) for chunk in past)
    return past[: next((number for number, other in enumerate(changed) if other), len(past))]


def go_back(split: SplitWork, past: list[Chunk]) -> None:
    """Takes up what an earlier process has done. What it wrote behind that is cut off. Raises DataError where the
    output is not what it was."""
    for chunk in past:
        place_chunk(split, chunk)
    split.committed = len(past)
    directory = split.output if isinstance(split.layout, ShardLayout) else None
    if directory is not None:
        directory.mkdir(exist_ok=True)
        refuse_foreign(directory)
    ends = split.layout.ends() if past else ()
    kept = {split.file(number): end for number, end in enumerate(ends)}
    for path, end in kept.items():
        found = path.stat().st_size if path.exists() else 0
        if found < end and any(len(chunk.rows) for chunk in past):
            raise DataError(f"{path}: {found:,} bytes, but {end:,} were written before; --restart begins anew")
        if path.exists():
            with path.open("r+b") as file:
                file.truncate(end)
    for path in directory.iterdir() if directory is not None else (split.output,):
        if path not in kept:
            path.unlink(missing_ok=True)


def place_chunk(split: SplitWork, chunk: Chunk) -> np.ndarray:
    """Gives the next chunk's images their places."""
    places = np.empty(len(chunk.rows), PLACE)
    columns = (chunk.rows["index"].tolist(), chunk.rows["length"].tolist())
    for i, (index, length) in enumerate(zip(*columns, strict=True)):
        places[i] = split.layout.place(index, length)
    split.chunks.append(chunk)
    split.places.append(places)
    return places


def write_all(splits: list[SplitWork], crew: Crew, work: WorkDirectory, telling: Telling) -> None:
    """Encodes and writes all that is not yet there. Whatever ends it, what was written is noted."""
    todo = deque((split, chunk) for split in splits for chunk in range(split.committed, split.count))
    try:
        _follow({split.name: split for split in splits}, todo, crew, work, telling)
    except BaseException:
        with suppress(OSError):  # as a disk that is full
            _commit(splits, work)
            work.settle()
        raise


def _follow(
    splits: dict[str, SplitWork],
    todo: deque[tuple[SplitWork, int]],
    crew: Crew,
    work: WorkDirectory,
    telling: Telling,
) -> None:
    """Hands out the chunks and answers the workers until all are written."""
    left = len(todo)
    noted = time.monotonic()
    for worker in (*range(len(crew.workers.processes)),) * AHEAD:
        _assign(crew, worker, todo)
    while left:
        for worker, message in crew.receive(timeout=1.0):
            match message:
                case Encodings(split=name, chunk=number, rows=rows, skipped=skipped):
                    splits[name].waiting[number] = (worker, Chunk(rows, tuple(skipped)))
                    _place_waiting(splits[name], crew, telling)
                case Written(split=name, chunk=number):
                    splits[name].written.add(number)
                    left -= 1
                    _assign(crew, worker, todo)
        now = time.monotonic()
        if now - noted >= COMMIT_SECONDS and not work.busy:
            _commit(list(splits.values()), work)
            noted = now
        if standstill := crew.standstill():
            telling.say(standstill)
    _commit(list(splits.values()), work)
    work.settle()


def _assign(crew: Crew, worker: int, todo: deque[tuple[SplitWork, int]]) -> None:
    if todo:
        split, chunk = todo.popleft()
        crew.send(worker, Encode(split.name, chunk, split.indices(chunk)))


def _place_waiting(split: SplitWork, crew: Crew, telling: Telling) -> None:
    """Places the chunks whose turn it is, and tells their workers."""
    while (number := len(split.chunks)) in split.waiting:
        worker, chunk = split.waiting.pop(number)
        places = place_chunk(split, chunk)
        for one in chunk.skipped:
            telling.skipped(split, one)
        files = {file: split.file(file) for file in dict.fromkeys(places["file"].tolist())}
        crew.send(worker, Write(split.name, number, files, places))
        telling.advance(split, len(chunk.rows) + len(chunk.skipped), int(chunk.rows["length"].sum()))


def _commit(splits: list[SplitWork], work: WorkDirectory) -> None:
    """Notes what is written, up to the first chunk that is not. Interrupted anywhere, it can be called again."""
    chunks: list[tuple[str, int, Chunk]] = []
    files: dict[Path, None] = {}
    ends: list[tuple[SplitWork, int]] = []
    for split in splits:
        end = split.committed
        while end in split.written:
            chunks.append((split.name, end, split.chunks[end]))
            files |= dict.fromkeys(split.file(int(number)) for number in np.unique(split.places[end]["file"]))
            end += 1
        ends.append((split, end))
    if chunks:
        work.commit(chunks, files)
        for split, end in ends:  # an interruption before this notes chunks twice, which does no harm
            split.committed = end


def finish(split: SplitWork) -> tuple[np.ndarray, list[Path]]:
    """Writes the tables of a split whose images are all written. Returns its ROW, and the outputs: its index last.
    Raises DataError where no image could be read."""
    rows = np.concatenate([chunk.rows for chunk in split.chunks] or [np.empty(0, ROW)])
    places = np.concatenate(split.places or [np.empty(0, PLACE)])
    names = (printable(split.images.name(i)) for i in rows["index"].tolist())
    if isinstance(split.layout, ShardLayout):
        finish_shards(split.output, split.layout, rows, places, names)
        return rows, [split.output]
    with split.output.open("r+b") as file:
        if isinstance(split.layout, BetonLayout):
            tables = finish_beton(file, split.layout, rows, places)
        else:
            tables = finish_tensors(file, split.layout, rows, places)
    index = split.output.with_name(split.output.name + INDEX_SUFFIX)
    write_index_file(index, rows["crc32"], names, tables)
    return rows, [split.output, index]
