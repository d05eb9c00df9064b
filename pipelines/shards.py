"""WebDataset shards: tar files of original image bytes, and one index for random access to them.

A directory holds `shard-00000.tar`, ... with `<key>.<ext>` (the image file as it was) and `<key>.cls` (its label as
text) of every image, `shard-00000.idx`, ... for DALI's own reader of such files, and `index.npz` for ours: where each
image lies, its size, label and name. So the sampler decides the order, and reading an image is one pread.
"""

import os
import re
import stat
import threading
import weakref
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import numpy as np

from pipelines.images import MAX_BYTES, MAX_PIXELS, BadImage
from pipelines.manifest import classes_of
from ressl.batch import DataError

INDEX = "index.npz"
FORMAT = b"ressl-shards-2"
BLOCK = 512  # bytes; of a tar file, where everything starts at a multiple of it
MAX_OPEN = 256  # shards that stay open; a process may have 1,024 files on most systems
AGAIN = "convert or copy the directory again"
ZIP = b"PK"  # how a zip file begins

Stamp = tuple[int, int, int, int]  # tells one file from another in its place: device, inode, bytes, nanoseconds

# kind of dtype and shape after the first dimension: S arrays have a row for each shard, N arrays for each image
SHARD_ARRAYS: dict[str, tuple[str, tuple[int, ...]]] = {
    "shards": ("S", ()),  # file names
    "shard_bytes": ("i8", ()),  # of each file
}
IMAGE_ARRAYS: dict[str, tuple[str, tuple[int, ...]]] = {
    "shard": ("i4", ()),
    "offset": ("i8", ()),
    "length": ("i8", ()),
    "crc32": ("u4", ()),
    "size": ("i4", (2,)),
    "original": ("i4", (2,)),
    "label": ("i8", ()),
    "index": ("i8", ()),
    "name_end": ("i8", ()),
}


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """N images in S shards, checked against the sizes of the files."""

    root: Path
    shards: tuple[str, ...]  # names of the tar files in root
    stamps: tuple[Stamp, ...]  # of the tar files, when they were checked
    shard: np.ndarray  # (N,) int32, which shard holds the image
    offset: np.ndarray  # (N,) int64, its first byte in the shard
    length: np.ndarray  # (N,) int64, bytes of the image file
    crc32: np.ndarray  # (N,) uint32, of those bytes, as zlib defines it; compared by `verify` only
    size: np.ndarray  # (N, 2) int32, height and width as stored
    original: np.ndarray  # (N, 2) int32, height and width before any resizing
    label: np.ndarray  # (N,) int64, -1 where unknown
    index: np.ndarray  # (N,) int64, the image's entry in the data set that was converted
    names: np.ndarray  # (bytes,) uint8, the images' names there in UTF-8, one after another
    name_end: np.ndarray  # (N,) int64, where each name ends
    classes: tuple[str, ...]  # label i is classes[i]; from manifest.json beside the directory, () without it

    def name(self, position: int) -> str:
        """Of the image in the data set that was converted."""
        start = int(self.name_end[position - 1]) if position else 0
        return self.names[start : int(self.name_end[position])].tobytes().decode("utf-8", "replace")


def read_index(root: Path) -> ShardIndex:
    """Reads index.npz in `root` and checks all but the images themselves. Raises DataError for anything not whole."""
    path = Path(root) / INDEX
    arrays, stamp = _load(path)
    problem = _find_type_problem(arrays)
    if problem is None:
        shards = tuple(name.decode("ascii", "replace") for name in arrays["shards"].tolist())
        stamps = _check_files(path.parent, shards, arrays["shard_bytes"])
        classes = classes_of(path.parent)
        problem = _find_problem(arrays, classes)
    if problem is not None:
        raise DataError(f"{path}: damaged: {problem}; {AGAIN}")
    _check_unchanged(path, stamp)
    fields = {name: arrays[name] for name in (*IMAGE_ARRAYS, "names")}
    return ShardIndex(root=path.parent, shards=shards, stamps=stamps, classes=classes, **fields)


def point_to_shards(root: Path) -> None:
    """Raises DataError where shards lie in `root` without an index, or one directory below it: what to give instead."""
    places = sorted({tar.parent for pattern in ("*.tar", "*/*.tar") for tar in Path(root).glob(pattern)})
    indexed = [str(place) for place in places if (place / INDEX).is_file()]
    if indexed:
        choice = "one of them" if len(indexed) > 1 else "that"
        raise DataError(f"{root}: the shards are in {' and '.join(indexed)}; give {choice}")
    if places:
        raise DataError(f"{places[0]}: shards without {INDEX}; convert again with `convert --to webdataset`")


class ShardFiles:
    """Reads images out of the shards, from any number of threads at once."""

    def __init__(self, index: ShardIndex, max_open: int = MAX_OPEN) -> None:
        self.index, self.max_open = index, max_open
        self.files: dict[int, FileIO] = {}  # those that stay open, until this object goes
        self.lock = threading.Lock()
        weakref.finalize(self, _close_all, self.files)

    def read(self, position: int) -> bytes:
        """The file of an image as it was.

        Raises BadImage, whose message is the reason only, and DataError for a shard that is no more the one whose index
        was read: each of its images would be another one.
        """
        shard, length = int(self.index.shard[position]), int(self.index.length[position])
        try:
            file = self.files.get(shard) or self._open(shard)
            data = os.pread(file.fileno(), length, int(self.index.offset[position]))
            if shard not in self.files:
                file.close()
        except OSError as error:
            raise BadImage(f"cannot be read: {(error.strerror or str(error)).lower()}") from None
        if len(data) != length:
            raise BadImage(f"the shard ends after {len(data):,} of its {length:,} bytes")
        return data

    def original(self, position: int, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of an image before any resizing. Raises BadImage unless `size` is the stored one, which is
        what others have reckoned with."""
        height, width = self.index.size[position].tolist()
        if size != (height, width):
            raise BadImage(
                f"{size[0]} x {size[1]} pixels (height x width), but {INDEX} says {height} x {width}; {AGAIN}"
            )
        height, width = self.index.original[position].tolist()
        return height, width

    def where(self, position: int) -> str:
        """Shard and name of an image, for messages."""
        shard = self.index.root / self.index.shards[int(self.index.shard[position])]
        return f"{shard}: {self.index.name(position)}"

    def _open(self, shard: int) -> FileIO:
        with self.lock:
            file = self.files.get(shard)
            if file is None:
                path = self.index.root / self.index.shards[shard]
                file = FileIO(path)
                if _stamp(os.fstat(file.fileno())) != self.index.stamps[shard]:
                    file.close()
                    raise DataError(f"{path}: changed since the run began; start it again")
                if len(self.files) < self.max_open:
                    self.files[shard] = file
            return file


def _close_all(files: dict[int, FileIO]) -> None:
    for file in files.values():
        file.close()


# --- checks ----------------------------------------------------------------------------------------------------------


def _load(path: Path) -> tuple[dict[str, np.ndarray], Stamp]:
    hint = "give a directory made by `convert --to webdataset`"
    arrays: dict[str, np.ndarray] = {}
    part = "its table of contents"  # what is being read
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise DataError(f"{path}: not a regular file; {hint}")
        with path.open("rb") as opened:
            stamp = _stamp(os.fstat(opened.fileno()))
            if opened.read(len(ZIP)) != ZIP:  # numpy would take it for a pickle
                raise DataError(f"{path}: not a zip file, as {INDEX} is; {AGAIN}")
            opened.seek(0)
            with np.load(opened, allow_pickle=False) as file:
                for part in ("format", "names", *SHARD_ARRAYS, *IMAGE_ARRAYS):
                    arrays[part] = _array(file[part])
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or 'damaged'}; {hint}") from None
    except Exception:  # zipfile and numpy raise a dozen types for damaged data, in words that help nobody
        raise DataError(f"{path}: damaged: {part} cannot be read; {AGAIN}") from None
    if arrays["format"].shape != () or arrays["format"].dtype.kind != "S" or arrays["format"].item() != FORMAT:
        raise DataError(
            f"{path}: not an index of the format {FORMAT.decode()}; make one with `convert --to webdataset`"
        )
    return arrays, stamp


def _array(value: object) -> np.ndarray:
    """numpy gives bytes for what is no array."""
    if not isinstance(value, np.ndarray):
        raise TypeError
    return value


def _stamp(status: os.stat_result) -> Stamp:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _check_unchanged(path: Path, stamp: Stamp) -> None:
    """Shards that were looked at before this are those of the index, as a conversion replaces the directory."""
    try:
        unchanged = _stamp(path.stat()) == stamp
    except OSError:
        unchanged = False
    if not unchanged:
        raise DataError(f"{path}: changed while it was read; start again")


def _find_type_problem(arrays: dict[str, np.ndarray]) -> str | None:
    for layout in (SHARD_ARRAYS, IMAGE_ARRAYS):
        first = arrays[next(iter(layout))]
        count = len(first) if first.ndim else 0
        if count == 0:
            return "it holds no images"
        for name, (kind, shape) in layout.items():
            array = arrays[name]
            right = array.dtype.kind == "S" if kind == "S" else array.dtype == np.dtype(kind)
            if not right or array.shape != (count, *shape):
                return f"{name} is {array.shape} {array.dtype}, expected {(count, *shape)} {kind}"
    if arrays["names"].dtype != np.uint8 or arrays["names"].ndim != 1:
        return "its names are no bytes"
    return None


def _check_files(root: Path, shards: tuple[str, ...], sizes: np.ndarray) -> tuple[Stamp, ...]:
    if len(set(shards)) != len(shards):
        raise DataError(f"{root / INDEX}: damaged: a shard is named twice; {AGAIN}")
    stamps = []
    for name, size in zip(shards, sizes.tolist(), strict=True):
        if not re.fullmatch(r"shard-[0-9]{5,}\.tar", name):
            raise DataError(f"{root / INDEX}: damaged: {name!r} is no name of a shard; {AGAIN}")
        try:
            status = (root / name).stat()
        except OSError as error:
            raise DataError(f"{root / name}: cannot be read: {error.strerror}; {AGAIN}") from None
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{root / name}: not a regular file; {AGAIN}")
        if status.st_size != size:
            raise DataError(f"{root / name}: {status.st_size:,} bytes, but {INDEX} says {size:,}; {AGAIN}")
        stamps.append(_stamp(status))
    return tuple(stamps)


def _find_problem(arrays: dict[str, np.ndarray], classes: tuple[str, ...]) -> str | None:
    shard, offset, length = arrays["shard"], arrays["offset"], arrays["length"]
    size, original, label, index = (arrays[name] for name in ("size", "original", "label", "index"))
    ends, names = arrays["name_end"], arrays["names"]
    if shard.min() < 0 or shard.max() >= len(arrays["shards"]):
        return "an image in a shard that does not exist"
    if offset.min() < BLOCK or (offset % BLOCK).any() or length.min() < 1 or length.max() > MAX_BYTES:
        return "an image at an impossible place"
    if (offset > arrays["shard_bytes"][shard] - length).any():
        return "an image beyond the end of its shard"
    order = np.lexsort((offset, shard))
    same = shard[order[1:]] == shard[order[:-1]]
    if (same & (offset[order[1:]] - offset[order[:-1]] < length[order[:-1]])).any():
        return "two images at the same place"
    if size.min() < 1 or (size.prod(axis=1, dtype=np.int64) > MAX_PIXELS).any() or (original < size).any():
        return "an impossible height or width"
    if label.min() < -1 or (classes and label.max() >= len(classes)):
        return f"a label outside the {len(classes)} classes"
    if index.min() < 0 or len(np.unique(index)) != len(index):
        return "a negative or repeated index"
    if ends[0] < 0 or (np.diff(ends) < 0).any() or ends[-1] != len(names):
        return "names of impossible lengths"
    return None
