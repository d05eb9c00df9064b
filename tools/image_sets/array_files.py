"""Arrays of pixels as image sets, and the files that hold them: in a directory, or in an archive read in place."""

import gzip
import io
import stat
import tarfile
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

import numpy as np

from ressl.batch import DataError
from tools.image_sets.image_set import ImageSet
from tools.image_sets.members import stamp_of

MAX_UNPACKED = 1 << 30  # bytes of an archive that are read into memory
ARCHIVES = (".tar.gz", ".tgz", ".tar")
UNREADABLE = (tarfile.TarError, EOFError, zlib.error, OSError)


@dataclass(frozen=True, slots=True)
class Files:
    """Where the files of a data set are."""

    place: Path  # the directory that holds them, or the archive
    inside: str = ""  # their directory in the archive

    def path(self, name: str) -> Path:
        """For messages; it can be opened unless it lies in an archive."""
        return self.place / self.inside / name

    def holder(self, name: str) -> Path:
        return self.place if self.inside else self.place / name


@dataclass(frozen=True, slots=True)
class Holder:
    """A file that holds the next `count` images of a set."""

    path: Path  # of the archive, if it lies in one
    name: str
    count: int


def array_set(
    images: np.ndarray,
    labels: np.ndarray,
    classes: tuple[str, ...],
    holders: Sequence[Holder],
    *,
    identity: str,
    notes: tuple[str, ...] = (),
) -> ImageSet:
    """From (N, H, W) grey or (N, H, W, 3) RGB uint8, with any strides, and (N,) labels."""
    ends = list(accumulate(holder.count for holder in holders))

    def locate(i: int) -> tuple[Holder, int]:
        holder = holders[bisect_right(ends, i)]
        return holder, i - ends[bisect_right(ends, i)] + holder.count

    def name(i: int) -> str:
        holder, row = locate(i)
        return f"{holder.name}[{row}]"

    def read(i: int) -> np.ndarray:
        image = images[i]
        return np.repeat(image[:, :, None], 3, axis=2) if image.ndim == 2 else np.ascontiguousarray(image)

    return ImageSet(
        labels=labels.astype(np.int64),
        classes=classes,
        name=name,
        read=read,
        stamp=lambda i: stamp_of(locate(i)[0].path),
        identity=identity,
        notes=notes,
        chunk=min(1024, max(16, (1 << 22) // (images.shape[1] * images.shape[2] * 3))),
    )


def checksum(*arrays: np.ndarray) -> str:
    return "-".join(f"{zlib.crc32(np.ascontiguousarray(array).data):08x}" for array in arrays)


# --- files, in directories and archives ------------------------------------------------------------------------------


def find_files(root: Path, packed: str, directory: str, marker: str, names: Sequence[str]) -> Files | None:
    """Where one of `names` is: in a place that has the published name, or that holds the file `marker` too."""
    if packed == directory:
        if root.stat().st_size > MAX_UNPACKED:
            raise _too_large(root)
        return Files(root, directory)
    for place in (root, root / directory):
        named = place.absolute().name == directory
        if (named or is_file(place / marker)) and holds_any(Files(place), names):
            return Files(place)
    return None


def holds_any(files: Files, names: Iterable[str]) -> bool:
    """An archive is taken to be whole: looking would unpack it."""
    return bool(files.inside) or any(is_file(files.place / name) for name in names)


def directory_in_archive(path: Path, known: Sequence[str]) -> str:
    """Which of the directories `known` an archive begins with; empty for any other file.

    Raises DataError for an archive that cannot be read and is named like one of a known directory.
    """
    if not path.name.lower().endswith(ARCHIVES) or not is_file(path):
        return ""
    try:
        with _unpacked(path) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
            tops = (PurePosixPath(member.name).parts[:1] for member in islice(archive, 3))
            first = next((top[0] for top in tops if top), "")
    except UNREADABLE as error:
        if any(path.name.startswith(name[:8]) for name in known):  # the archives begin like their directories
            raise DataError(f"{path}: damaged archive ({error}); get it again") from None
        return ""
    return first if first in known else ""


def read_files(files: Files, names: Sequence[str]) -> dict[str, bytes]:
    """An archive is read to its end, where the checksum is. Raises DataError."""
    if not files.inside:
        return {name: read_file(files.place / name) for name in names}
    found: dict[str, bytes] = {}
    try:
        with _unpacked(files.place) as stream:
            with tarfile.open(fileobj=stream, mode="r|") as archive:
                for member in archive:
                    if stream.tell() + member.size > MAX_UNPACKED:
                        raise _too_large(files.place)
                    parts = PurePosixPath(member.name).parts
                    wanted = member.isreg() and parts[-2:-1] == (files.inside,) and parts[-1] in names
                    if wanted and (file := archive.extractfile(member)) is not None:
                        found[parts[-1]] = file.read()
            while stream.read(1 << 20):
                if stream.tell() > MAX_UNPACKED:
                    raise _too_large(files.place)
    except UNREADABLE as error:
        raise DataError(f"{files.place}: damaged archive ({error}); get it again") from None
    missing = [name for name in names if name not in found]
    if missing:
        raise DataError(f"{files.place}: no {files.inside}/{missing[0]} in it; get it again")
    return found


@contextmanager
def _unpacked(path: Path) -> Iterator[BinaryIO]:
    """tarfile would unpack it too, but does not look at the checksum."""
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        with cast(BinaryIO, gzip.GzipFile(fileobj=file)) if packed else file as stream:
            yield stream


def read_file(path: Path) -> bytes:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a FIFO would wait for whoever writes to it
            raise DataError(f"{path}: not a regular file; get it again")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def unpack(path: Path, data: bytes) -> bytes:
    """What a gzip file holds, unless it is too large for memory. Raises DataError."""
    parts, total = [], 0
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            while part := file.read(1 << 20):
                parts.append(part)
                total += len(part)
                if total > MAX_UNPACKED:
                    raise _too_large(path)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: damaged gzip file ({error}); get it again") from None
    return b"".join(parts)


def is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long, a directory that may not be read
        return False


def _too_large(path: Path) -> DataError:
    return DataError(f"{path}: more than {MAX_UNPACKED >> 30} GiB unpacked; unpack it first and give the directory")


def lines_of(data: bytes, path: Path) -> tuple[str, ...]:
    """Those of a text file that are not blank."""
    try:
        return tuple(filter(None, map(str.strip, data.decode().split("\n"))))
    except UnicodeDecodeError:
        raise DataError(f"{path}: not a text file; get it again") from None


def check_size(size: int, record: int, published: int, path: Path) -> None:
    if size == 0 or size % record:
        raise DataError(
            f"{path}: {size:,} bytes, expected {published * record:,} ({record:,} for each image); get it again"
        )


def check_labels(labels: np.ndarray, classes: tuple[str, ...], path: Path) -> None:
    wrong = labels[(labels < 0) | (labels >= len(classes))]
    if len(wrong):
        raise DataError(f"{path}: label {wrong[0]}, expected labels below {len(classes)}")


def not_as_published(name: str, count: int, published: int) -> tuple[str, ...]:
    return () if count == published else (f"{name}: {count:,} images; as published it has {published:,}",)
