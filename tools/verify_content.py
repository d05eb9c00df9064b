"""Every byte of a converted data set against its checksum, and every image against its source: in forked processes, by
pread, as a file that is cut while it is mapped ends the process. What is done for each image is done in Python's own
numbers: with tiny images, looking single ones up in numpy's arrays would take longer than all else."""

import hashlib
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from multiprocessing.synchronize import Lock

import numpy as np

from pipelines.beton import RAW
from pipelines.images import BadImage, decoded_size
from pipelines.shards import BLOCK
from tools.encode import KINDS
from tools.forked import run_forked
from tools.rows import ROW, SUFFIXES
from tools.shard_writer import idx_text, member_blocks
from tools.verify_layout import Stored, by_file
from tools.verify_report import Column, Report
from tools.verify_source import Source, compare_image, try_skipped

CHUNK = 8 << 20  # bytes that a process reads at once
LARGE = 8 * CHUNK  # bytes of an image from which on one at a time is read
IMAGES, DEEP_IMAGES = 1024, 32  # that a process checks at once
UNKNOWN = 255  # in place of an entry of SUFFIXES
Found = tuple[Column, str]  # a problem
Advance = Callable[[int, int], None]  # bytes and images that were checked


@dataclass(frozen=True, slots=True)
class Work:
    """What the processes share."""

    stored: Stored
    deep: bool
    source: Source | None  # what each image is compared with
    large: Lock  # held by the process that reads a large image, so that memory is bounded


@dataclass(frozen=True, slots=True)
class Outcome:
    found: list[Found]
    checked: int  # bytes
    positions: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))  # images that were checked
    kinds: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint8))  # an entry of SUFFIXES of each of them
    unlike: int = 0  # images that are like their source, but not to the bit


@dataclass(frozen=True, slots=True)
class Entry:
    """One image to be checked: a row of Stored, and its first byte and end with all that is read with it."""

    i: int
    start: int
    stop: int
    length: int
    crc32: int  # -1 where there is none
    index: int
    label: int


@dataclass(frozen=True, slots=True)
class Checked:
    """One image."""

    found: list[Found]
    kind: int = UNKNOWN  # entry of SUFFIXES
    unlike: bool = False  # it is like its source, but not to the bit


def check_content(
    stored: Stored, report: Report, *, deep: bool, source: Source | None, workers: int, advance: Advance
) -> None:
    """Reads all and reports what is wrong. With `deep`, images are decoded, and compared with `source` if given."""
    work = Work(stored, deep, source, get_context("fork").Lock())
    kind = np.full(len(stored.label), UNKNOWN, np.uint8)
    unlike = 0
    with closing(run_forked(list(_tasks(work)), workers or len(os.sched_getaffinity(0)), "verify")) as outcomes:
        for outcome in outcomes:
            for column, line in outcome.found:
                report.add(column, line)
            kind[outcome.positions] = outcome.kinds
            unlike += outcome.unlike
            advance(outcome.checked, len(outcome.positions))
    if unlike:
        report.notes.append(f"{unlike:,} images are not what encoding them now would give, but look the same")
    if stored.in_tar:
        for problem in _idx_problems(stored, kind):
            report.add("checksums", problem)


def content_bytes(stored: Stored) -> int:
    """How many bytes `check_content` will read."""
    rest = sum(stop - start for _, start, stop in stored.zeros)
    if stored.tables_sha256:
        rest += sum(stop - start for start, stop in stored.tables)
    starts, stops = _span(stored, stored.start, stored.length)
    return rest + int((stops - starts).sum())


def _tasks(work: Work) -> Iterator[Callable[[], Outcome]]:
    stored = work.stored
    if stored.tables_sha256:
        yield partial(_check_tables, stored)
    for file, start, stop in stored.zeros:
        for at in range(start, stop, CHUNK):
            yield partial(_check_zeros, stored, file, at, min(at + CHUNK, stop))
    for batch in _batches(stored, DEEP_IMAGES if work.deep else IMAGES):
        yield partial(_check_batch, work, batch)
    left_out = work.source.skipped if work.source else ()
    for at in range(0, len(left_out), DEEP_IMAGES):
        yield partial(_check_skipped, work, range(at, min(at + DEEP_IMAGES, len(left_out))))


def _batches(stored: Stored, images: int) -> Iterator[np.ndarray]:
    """Positions of neighbours in one file that can be read at once."""
    all_starts, all_stops = _span(stored, stored.start, stored.length)
    for unordered in by_file(stored.file, len(stored.files)):
        mine = unordered[np.argsort(stored.start[unordered])]
        starts, stops = all_starts[mine], np.maximum.accumulate(all_stops[mine])
        begin = 0
        while begin < len(mine):
            fit = int(np.searchsorted(stops, starts[begin] + CHUNK, side="right"))
            end = min(max(fit, begin + 1), begin + images)
            yield mine[begin:end]
            begin = end


def _span(stored: Stored, start: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First byte and end of what is read for images: in a tar file, with the header before them, and with the header
    and the block of the label behind them."""
    if not stored.in_tar:
        return start, start + length
    return start - BLOCK, start + -(-length // BLOCK) * BLOCK + 2 * BLOCK


# --- all but the images ----------------------------------------------------------------------------------------------


def _check_tables(stored: Stored) -> Outcome:
    path, digest, size = stored.files[0], hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            for start, stop in stored.tables:
                for at in range(start, stop, CHUNK):
                    data = _pread(file.fileno(), at, min(at + CHUNK, stop))
                    digest.update(data)
                    size += len(data)
    except OSError as error:
        return Outcome([("checksums", f"{path}: its tables cannot be read: {error.strerror or error}")], size)
    if digest.hexdigest() == stored.tables_sha256:
        return Outcome([], size)
    problem = "its tables are not those that were written: damaged, or the index is of another conversion"
    return Outcome([("checksums", f"{path}: {problem}")], size)


def _check_zeros(stored: Stored, file: int, start: int, stop: int) -> Outcome:
    path, problem = stored.files[file], ""
    try:
        with path.open("rb") as opened:
            data = _pread(opened.fileno(), start, stop)
        places = np.flatnonzero(np.frombuffer(data, np.uint8))
        if len(data) < stop - start:
            problem = f"the file ends before byte {stop:,}"
        elif len(places):
            problem = f"byte {start + places[0]:,}, where nothing is stored, is not 0"
    except OSError as error:
        problem = f"bytes {start:,} to {stop:,} cannot be read: {error.strerror or error}"
    return Outcome([("checksums", f"{path}: {problem}")] if problem else [], stop - start)


def _check_skipped(work: Work, positions: range) -> Outcome:
    assert work.source is not None
    place = work.stored.files[0].parent if work.stored.in_tar else work.stored.files[0]
    problems = (try_skipped(work.source, k) for k in positions)
    return Outcome([("source", f"{place}: {problem}") for problem in problems if problem], 0)


def _idx_problems(stored: Stored, kind: np.ndarray) -> Iterator[str]:
    """DALI's index files hold nothing that the tables do not, but for the (N,) kinds of the image files."""
    for tar, mine in zip(stored.files, by_file(stored.file, len(stored.files)), strict=True):
        path, kinds = tar.with_suffix(".idx"), kind[mine]
        if (kinds == UNKNOWN).any():  # damaged images, which were told: what else is in the file cannot be known
            continue
        rows = np.zeros(len(kinds), ROW)
        rows["kind"] = kinds
        for name, column in (("index", stored.index), ("label", stored.label), ("length", stored.length)):
            rows[name] = column[mine]
        expected = idx_text(rows, stored.start[mine]).encode("ascii")
        try:
            if path.is_file() and path.read_bytes() != expected:
                yield f"{path}: not what was written"
        except OSError as error:
            yield f"{path}: cannot be read: {error.strerror or error}"


def _pread(handle: int, start: int, stop: int) -> bytes:
    """Less where the file ends before."""
    parts = []
    while start < stop and (part := os.pread(handle, min(stop - start, 1 << 30), start)):
        parts.append(part)
        start += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


# --- images ----------------------------------------------------------------------------------------------------------


def _check_batch(work: Work, batch: np.ndarray) -> Outcome:
    stored = work.stored
    entries = _entries(stored, batch)
    first, last = entries[0].start, max(entry.stop for entry in entries)
    found: list[Found] = []
    kinds = np.full(len(batch), UNKNOWN, np.uint8)
    unlike = 0
    try:
        with stored.files[stored.file[batch[0]]].open("rb") as file:
            whole = _read_or_none(file.fileno(), first, last)
            for k, entry in enumerate(entries):
                if whole is None:
                    checked = _check_alone(work, entry, file.fileno())
                else:
                    checked = _check_image(work, entry, whole[entry.start - first : entry.stop - first])
                found += checked.found
                kinds[k] = checked.kind
                unlike += checked.unlike
    except OSError as error:
        found = [("checksums", f"{stored.where(i)}: cannot be read: {error.strerror}") for i in batch.tolist()]
    return Outcome(found, sum(entry.stop - entry.start for entry in entries), batch, kinds, unlike)


def _entries(stored: Stored, batch: np.ndarray) -> list[Entry]:
    start, length = stored.start[batch], stored.length[batch]
    crc32 = np.full(len(batch), -1) if stored.crc32 is None else stored.crc32[batch]
    columns = (batch, *_span(stored, start, length), length, crc32, stored.index[batch], stored.label[batch])
    return [Entry(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def _read_or_none(handle: int, start: int, stop: int) -> memoryview | None:
    """None where that fails, or where it is one large image."""
    try:
        return memoryview(_pread(handle, start, stop)) if stop - start <= 2 * CHUNK else None
    except OSError:
        return None


def _check_alone(work: Work, entry: Entry, handle: int) -> Checked:
    with work.large if entry.stop - entry.start > LARGE else nullcontext():
        try:
            return _check_image(work, entry, memoryview(_pread(handle, entry.start, entry.stop)))
        except OSError as error:
            problem = f"{work.stored.where(entry.i)}: cannot be read: {error.strerror or error}"
            return Checked([("checksums", problem)])


def _check_image(work: Work, entry: Entry, piece: memoryview) -> Checked:
    """For its bytes, in a tar file with what stands around them."""
    stored, kind, unlike = work.stored, UNKNOWN, False
    found: list[Found] = []
    if len(piece) < entry.stop - entry.start:
        return Checked([("checksums", f"{stored.where(entry.i)}: the file ends inside it")])
    first = BLOCK if stored.in_tar else 0
    data = piece[first : first + entry.length]
    crc32 = zlib.crc32(data)
    if entry.crc32 not in (-1, crc32):
        problem = f"CRC-32 of its data is {crc32:08x}, not {entry.crc32:08x}: damaged"
        found.append(("checksums", f"{stored.where(entry.i)}: {problem}"))
    if stored.in_tar:
        kind = _kind(data, piece)
        if not _is_framed(entry, piece, data, kind):
            found.append(
                ("checksums", f"{stored.where(entry.i)}: its tar headers, label or padding are not as written")
            )
    if work.deep:
        problem = _decoding_problem(stored, entry.i, data)
        if problem:
            found.append(("decoding", f"{stored.where(entry.i)}: {problem}"))
        elif work.source is not None and not found:
            problem, unlike = compare_image(stored, work.source, entry.i, bytes(data))
            if problem:
                found.append(("source", f"{stored.where(entry.i)}: {problem}"))
    return Checked(found, kind, unlike)


def _kind(data: memoryview, piece: memoryview) -> int:
    """The entry of SUFFIXES by the image's first bytes, or where they are damaged by its name in the tar file."""
    kind = KINDS.get(bytes(data[:2]))
    if kind is not None:
        return kind
    name = bytes(piece[:100]).rstrip(b"\0")
    return next((kind for kind, suffix in enumerate(SUFFIXES) if name.endswith(suffix.encode("ascii"))), UNKNOWN)


def _is_framed(entry: Entry, piece: memoryview, data: memoryview, kind: int) -> bool:
    """Whether all around the image in its tar file is as the writer would write it."""
    if kind == UNKNOWN:
        return False
    before, _, after = member_blocks(entry.index, entry.label, SUFFIXES[kind], bytes(data))
    return bytes(piece[:BLOCK]) == before and bytes(piece[BLOCK + len(data) :]) == after


def _decoding_problem(stored: Stored, i: int, data: memoryview) -> str:
    """Empty where the image decodes to the size in the tables."""
    height, width = stored.size[i].tolist()
    if stored.mode[i] == RAW:
        expected = 3 * height * width
        return "" if len(data) == expected else f"{len(data):,} bytes of pixels, expected {expected:,}"
    if stored.only_jpeg and data[:2] != b"\xff\xd8":
        return "not a JPEG"
    if stored.only_jpeg and data[-2:] != b"\xff\xd9":
        return "its JPEG data has no end"
    try:
        found = decoded_size(bytes(data))
    except BadImage as error:
        return str(error)
    return "" if found == (height, width) else f"{found[0]} x {found[1]} pixels, but its tables say {height} x {width}"
