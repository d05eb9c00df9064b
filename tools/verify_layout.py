"""What lies where in a converted data set of any format: the tables are checked here, the bytes by `verify_content`."""

import hashlib
import json
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.beton import ALLOCATION, FIELD, FIELDS, HEADER, JPG, RAW, metadata_dtype, open_beton
from pipelines.manifest import SplitRecord
from pipelines.shards import BLOCK, INDEX, ShardIndex, read_index
from pipelines.tensor_file import read_tensor_file
from ressl.batch import DataError
from tools.index_file import SUFFIX, ImageIndex, read_index_file
from tools.output import SHARD_FILES
from tools.shard_writer import END
from tools.verify_report import Report

NO_CHECKSUMS = "no checksums: not made by `convert`, or parted from its index"
DAMAGED = "the structure is damaged"
BETON, TENSORS = ".beton", ".safetensors"


@dataclass(frozen=True, slots=True)
class Stored:
    """N images and the bytes that they and all else take."""

    files: tuple[Path, ...]
    file: np.ndarray  # (N,) int32, which of the files holds the image
    start: np.ndarray  # (N,) int64, its first byte there
    length: np.ndarray  # (N,) int64, bytes of its data
    mode: np.ndarray  # (N,) uint8, JPG (any image file) or RAW
    size: np.ndarray  # (N, 2) int32, height and width of the image in the data
    original: np.ndarray  # (N, 2) int32, height and width before any resizing
    label: np.ndarray  # (N,) int64, -1 where unknown
    index: np.ndarray  # (N,) int64, the image's entry in its data set
    classes: tuple[str, ...] | None  # None where the files do not say
    crc32: np.ndarray | None  # (N,) uint32 of the data; None where there are no checksums
    name: Callable[[int], str]  # of an image in its data set; "" where it is not known
    tables: tuple[tuple[int, int], ...] = ()  # first byte and end of what `tables_sha256` is of, in the only file
    tables_sha256: str = ""
    zeros: tuple[tuple[int, int, int], ...] = ()  # file, first byte and end of what holds nothing
    in_tar: bool = False  # whether each image is a file in a tar file, with its label behind it
    only_jpeg: bool = False  # whether its reader decodes no other image files

    def where(self, i: int) -> str:
        """File, number and name of an image, for messages."""
        name = self.name(i)
        return f"{self.files[self.file[i]]}: image {self.index[i]}{f' ({name})' if name else ''}"


def open_stored(path: Path, record: SplitRecord | None, report: Report) -> Stored | None:
    """Reads the tables of a data file or a directory of shards, and reports all that can be told from them. None where
    they cannot be understood."""
    shards = path.is_dir() if record is None else Path(record.file).suffix not in (BETON, TENSORS)
    index_path = path / INDEX if shards else path.with_name(path.name + SUFFIX)
    if record is not None:
        _check_index_path(index_path, path, record, report)
    try:
        if shards:
            index = read_index(path)
            stored = _of_shards(index)
            _check_shard_files(path, index, report)
        else:
            images = _read_images(index_path, record, report)
            stored = _of_beton(path, images) if path.suffix == BETON else _of_tensors(path, images)
    except DataError as error:
        report.add("structure", str(error))
        if shards:
            _check_each_shard(path, str(error), report)
        report.leave(DAMAGED, "checksums", "decoding", "source")
        return None
    except OSError as error:
        report.add("structure", f"{path}: cannot be read: {error.strerror or error}")
        report.leave(DAMAGED, "checksums", "decoding", "source")
        return None
    report.totals["images"] = len(stored.label)
    if stored.crc32 is None:
        report.leave(NO_CHECKSUMS if record is None else "without the index", "checksums")
    elif record is None:
        report.notes.append(f"no manifest lists it, so {index_path.name} is believed; classes and source are not known")
    if record is not None:
        _check_record(path, stored, record, report)
    return stored


def total_bytes(path: Path) -> int:
    """Of a file, or of the files in a directory that shards consist of; 0 where it is gone."""
    try:
        files = [one for one in path.iterdir() if re.fullmatch(SHARD_FILES, one.name)] if path.is_dir() else [path]
        return sum(file.stat().st_size for file in files)
    except OSError:
        return 0


def by_file(file: np.ndarray, count: int) -> list[np.ndarray]:
    """For each of `count` files, the positions of its images in their order; (N,) `file` says where each image is."""
    order = np.argsort(file, kind="stable")
    return np.split(order, np.searchsorted(file[order], np.arange(1, count)))


def _bytes_of(stored: Stored) -> int:
    """Of its files, as `convert` counts them."""
    files = list(stored.files)
    if stored.in_tar:
        files += [files[0].parent / INDEX, *(file.with_suffix(".idx") for file in files)]
    return sum(file.stat().st_size for file in files if file.is_file())


def _check_index_path(index_path: Path, path: Path, record: SplitRecord, report: Report) -> None:
    expected = index_path.relative_to(path.parent).as_posix()
    if record.index != expected:
        report.add("structure", f"manifest.json: the index of {record.file} is {record.index!r}, expected {expected!r}")
    try:
        if not stat.S_ISREG(index_path.stat().st_mode):  # opening a FIFO would wait for whoever writes to it
            return  # whoever reads it says so
        with index_path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        report.add("structure", f"{index_path}: cannot be read: {error.strerror or error}")
        return
    if digest != record.index_sha256:
        problem = "not the one that manifest.json knows: damaged, or of another conversion"
        report.add(
            "checksums", f"{index_path}: {problem} (SHA-256 {digest[:12]}..., not {record.index_sha256[:12]}...)"
        )


def _read_images(path: Path, record: SplitRecord | None, report: Report) -> ImageIndex | None:
    """The index beside a file; None where there is none, or none that can be read, which is reported."""
    if record is None and not path.exists():
        return None
    try:
        return read_index_file(path)
    except DataError as error:
        report.add("checksums", str(error))
        return None


def _check_record(path: Path, stored: Stored, record: SplitRecord, report: Report) -> None:
    count, size = len(stored.label), _bytes_of(stored)
    if count != record.count:
        report.add("structure", f"{path}: {count:,} images, but manifest.json says {record.count:,}")
    if size != record.bytes:
        report.add("structure", f"{path}: {size:,} bytes, but manifest.json says {record.bytes:,}")
    if stored.classes is not None and stored.classes != record.classes:
        report.add("structure", f"{path}: other classes than manifest.json says")
    for i in np.flatnonzero((stored.label < -1) | (stored.label >= len(record.classes))).tolist():
        label, classes = stored.label[i], len(record.classes)
        report.add("structure", f"{stored.where(i)}: label {label}, outside the {classes:,} classes of manifest.json")
    skipped = [entry["index"] for entry in record.skipped]
    taken = np.sort(np.concatenate([stored.index, np.array(skipped, np.int64)]))
    if not np.array_equal(taken, np.arange(len(taken))):
        text = "do not make up the whole source, each of its entries once"
        report.add(
            "structure", f"{path}: its images and the {len(skipped):,} that manifest.json says were skipped {text}"
        )


# --- FFCV ------------------------------------------------------------------------------------------------------------


def _of_beton(path: Path, images: ImageIndex | None) -> Stored:
    beton = open_beton(path)
    count = len(beton.label)
    _check_images_of_index(path, images, count)
    head = HEADER.itemsize + len(FIELDS) * FIELD.itemsize + count * metadata_dtype(FIELDS).itemsize
    table = beton.length - count * ALLOCATION.itemsize
    order = np.argsort(beton.data_ptr)
    stops = (beton.data_ptr + beton.data_size)[order]
    gaps = zip([head, *stops.tolist()], [*beton.data_ptr[order].tolist(), table], strict=True)
    return Stored(
        files=(path,),
        file=np.zeros(count, np.int32),
        start=beton.data_ptr,
        length=beton.data_size,
        mode=beton.mode,
        size=beton.size,
        original=beton.original,
        label=beton.label,
        index=beton.index,
        classes=None,
        crc32=images.crc32 if images else None,
        name=images.name if images else lambda _: "",
        tables=((0, head), (table, beton.length)),
        tables_sha256=images.tables_sha256 if images else "",
        zeros=tuple((0, start, stop) for start, stop in gaps if start < stop) if images else (),
        only_jpeg=True,
    )


def _check_images_of_index(path: Path, images: ImageIndex | None, count: int) -> None:
    if images is not None and len(images.crc32) != count:
        raise DataError(
            f"{path}{SUFFIX}: of {len(images.crc32):,} images, but the file has {count:,}: one of both is damaged or "
            "of another conversion; convert or copy both again"
        )


# --- tensor files ----------------------------------------------------------------------------------------------------


def _of_tensors(path: Path, images: ImageIndex | None) -> Stored:
    tensors = read_tensor_file(path)
    count = len(tensors.label)
    _check_images_of_index(path, images, count)
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_bytes))
    pixels = 8 + header_bytes + int(header["pixels"]["data_offsets"][0])
    # copies, as the file is mapped: one that is cut would end the process
    size = tensors.size.numpy().copy()
    start = pixels + tensors.offset.numpy()
    length = 3 * size.astype(np.int64).prod(axis=1)
    return Stored(
        files=(path,),
        file=np.zeros(count, np.int32),
        start=start,
        length=length,
        mode=np.full(count, RAW, np.uint8),
        size=size,
        original=tensors.original.numpy().copy(),
        label=tensors.label.numpy().copy(),
        index=tensors.index.numpy().copy(),
        classes=tensors.classes,
        crc32=images.crc32 if images else None,
        name=images.name if images else lambda _: "",
        tables=((0, int(start.min())), (int((start + length).max()), path.stat().st_size)),
        tables_sha256=images.tables_sha256 if images else "",
    )


# --- shards ----------------------------------------------------------------------------------------------------------


def _of_shards(index: ShardIndex) -> Stored:
    return Stored(
        files=tuple(index.root / name for name in index.shards),
        file=index.shard,
        start=index.offset,
        length=index.length.astype(np.int64),
        mode=np.full(len(index.label), JPG, np.uint8),
        size=index.size,
        original=index.original,
        label=index.label,
        index=index.index,
        classes=None,
        crc32=index.crc32,
        name=index.name,
        zeros=tuple((shard, stamp[2] - len(END), stamp[2]) for shard, stamp in enumerate(index.stamps)),
        in_tar=True,
    )


def _check_shard_files(root: Path, index: ShardIndex, report: Report) -> None:
    """Images follow one another as the writer lays them, so that nothing else is in between; and no other files."""
    room = 3 * BLOCK + -(-index.length // BLOCK) * BLOCK
    for (shard, name), mine in zip(enumerate(index.shards), by_file(index.shard, len(index.shards)), strict=True):
        ends = np.cumsum(room[mine])
        if not len(mine) or ends[-1] + len(END) != index.stamps[shard][2]:
            report.add("structure", f"{root / name}: its size is not that of the images that {INDEX} says are in it")
        elif not np.array_equal(index.offset[mine], ends - room[mine] + BLOCK):
            report.add("structure", f"{root / name}: {INDEX} does not say where its images are")
        if not (root / name).with_suffix(".idx").is_file():
            report.add("structure", f"{(root / name).with_suffix('.idx')}: no such file")
    known = {INDEX, *index.shards, *(Path(name).with_suffix(".idx").name for name in index.shards)}
    others = sorted(path.name for path in root.iterdir() if path.name not in known)
    for other in others:
        if other[0] != ".":
            report.add("structure", f"{root / other}: not written by this conversion; remove it")
    if hidden := [other for other in others if other[0] == "."]:  # file managers and NFS leave some
        listed = ", ".join(hidden[:3]) + ", ..." * (len(hidden) > 3)
        report.notes.append(f"hidden files that no reader looks at, which can be removed: {listed}")


def _check_each_shard(root: Path, told: str, report: Report) -> None:
    """The reader of the index stops at the first shard that is missing or has another size: here all are named."""
    if not (root / INDEX).is_file():
        return
    try:
        with np.load(root / INDEX, allow_pickle=False) as file:
            sizes = dict(zip(file["shards"].tolist(), file["shard_bytes"].tolist(), strict=True))
        names = {name.decode("ascii"): size for name, size in sizes.items()}
    except Exception:  # it was told already that the index cannot be read
        return
    for name, size in names.items():
        path = root / name
        found = path.stat().st_size if path.is_file() else None
        if found != size and str(path) not in told and "/" not in name:
            state = "no such file" if found is None else f"{found:,} bytes, but {INDEX} says {size:,}"
            report.add("structure", f"{path}: {state}")
