"""Every byte of a converted data set against its checksum, and every image against its source: in forked processes, by
pread, as a file that is cut while it is mapped ends the process."""

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
from tools.verify_layout import Stored
from tools.verify_report import Column, Report
from tools.verify_source import Source, compare_image

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
    return rest + int((_stops(stored) - _starts(stored)).sum())


def _tasks(work: Work) -> Iterator[Callable[[], Outcome]]:
    stored = work.stored
    if stored.tables_sha256:
        yield partial(_check_tables, stored)
    for file, start, stop in stored.zeros:
        for at in range(start, stop, CHUNK):
            yield partial(_check_zeros, stored, file, at, min(at + CHUNK, stop))
    for batch in _batches(stored, DEEP_IMAGES if work.deep else IMAGES):
        yield partial(_check_batch, work, batch)


def _batches(stored: Stored, images: int) -> Iterator[np.ndarray]:
    """Positions of neighbours in one file that can be read at once."""
    order = np.lexsort((stored.start, stored.file))
    for mine in np.split(order, np.flatnonzero(np.diff(stored.file[order])) + 1):
        starts, stops = _starts(stored)[mine], np.maximum.accumulate(_stops(stored)[mine])
        begin = 0
        while begin < len(mine):
            fit = int(np.searchsorted(stops, starts[begin] + CHUNK, side="right"))
            end = min(max(fit, begin + 1), begin + images)
            yield mine[begin:end]
            begin = end


def _starts(stored: Stored) -> np.ndarray:
    return stored.start - BLOCK if stored.in_tar else stored.start


def _stops(stored: Stored) -> np.ndarray:
    """In a tar file, with the header and the block of the label behind the image."""
    if not stored.in_tar:
        return stored.start + stored.length
    return stored.start + -(-stored.length // BLOCK) * BLOCK + 2 * BLOCK


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


def _idx_problems(stored: Stored, kind: np.ndarray) -> Iterator[str]:
    """DALI's index files hold nothing that the tables do not, but for the (N,) kinds of the image files."""
    for shard, tar in enumerate(stored.files):
        path, mine = tar.with_suffix(".idx"), stored.file == shard
        kinds = kind[mine]
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
    starts, stops = _starts(stored)[batch].tolist(), _stops(stored)[batch].tolist()
    path = stored.files[stored.file[batch[0]]]
    found: list[Found] = []
    kinds = np.full(len(batch), UNKNOWN, np.uint8)
    unlike = 0
    try:
        with path.open("rb") as file:
            whole = _read_or_none(file.fileno(), starts[0], max(stops))
            for k, (i, start, stop) in enumerate(zip(batch.tolist(), starts, stops, strict=True)):
                checked = _check_image(work, i, file.fileno(), start, stop, whole, starts[0])
                found += checked.found
                kinds[k] = checked.kind
                unlike += checked.unlike
    except OSError as error:
        found = [("checksums", f"{stored.where(i)}: cannot be read: {error.strerror}") for i in batch.tolist()]
    return Outcome(found, sum(stops) - sum(starts), batch, kinds, unlike)


def _read_or_none(handle: int, start: int, stop: int) -> memoryview | None:
    """None where that fails, or where it is one large image."""
    try:
        return memoryview(_pread(handle, start, stop)) if stop - start <= 2 * CHUNK else None
    except OSError:
        return None


def _check_image(
    work: Work, i: int, handle: int, start: int, stop: int, whole: memoryview | None, whole_start: int
) -> Checked:
    if whole is not None:
        return _check_bytes(work, i, whole[start - whole_start : stop - whole_start])
    with work.large if stop - start > LARGE else nullcontext():
        try:
            return _check_bytes(work, i, memoryview(_pread(handle, start, stop)))
        except OSError as error:
            problem = f"{work.stored.where(i)}: cannot be read: {error.strerror or error}"
            return Checked([("checksums", problem)])


def _check_bytes(work: Work, i: int, piece: memoryview) -> Checked:
    """For the image's bytes, in a tar file with what stands around them."""
    stored, kind, unlike = work.stored, UNKNOWN, False
    found: list[Found] = []
    first = BLOCK if stored.in_tar else 0
    data = piece[first : first + int(stored.length[i])]
    if len(piece) < int(_stops(stored)[i] - _starts(stored)[i]):
        return Checked([("checksums", f"{stored.where(i)}: the file ends inside it")])
    if stored.crc32 is not None and zlib.crc32(data) != stored.crc32[i]:
        problem = f"CRC-32 of its data is {zlib.crc32(data):08x}, not {stored.crc32[i]:08x}: damaged"
        found.append(("checksums", f"{stored.where(i)}: {problem}"))
    if stored.in_tar:
        kind = _kind(data, piece)
        if not _is_framed(stored, i, piece, data, kind):
            found.append(("checksums", f"{stored.where(i)}: its tar headers, label or padding are not as written"))
    if work.deep:
        problem = _decoding_problem(stored, i, data)
        if problem:
            found.append(("decoding", f"{stored.where(i)}: {problem}"))
        elif work.source is not None and not found:
            problem, unlike = compare_image(stored, work.source, i, bytes(data))
            if problem:
                found.append(("source", f"{stored.where(i)}: {problem}"))
    return Checked(found, kind, unlike)


def _kind(data: memoryview, piece: memoryview) -> int:
    """The entry of SUFFIXES by the image's first bytes, or where they are damaged by its name in the tar file."""
    name = bytes(piece[:100]).rstrip(b"\0")
    named = next((kind for kind, suffix in enumerate(SUFFIXES) if name.endswith(suffix.encode("ascii"))), UNKNOWN)
    return KINDS.get(bytes(data[:2]), named)


def _is_framed(stored: Stored, i: int, piece: memoryview, data: memoryview, kind: int) -> bool:
    """Whether all around the image in its tar file is as the writer would write it."""
    if kind == UNKNOWN:
        return False
    before, _, after = member_blocks(int(stored.index[i]), int(stored.label[i]), SUFFIXES[kind], bytes(data))
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
