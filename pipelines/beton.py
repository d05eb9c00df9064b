"""FFCV's file format, version 2, as numpy types, and the check that a file is whole before anything maps it.

    header | one descriptor per field | one metadata row per sample | pages of image data | allocation table

FFCV trusts every number in the file: a damaged one gives wrong pixels, a hang or a crash. So `open_beton` comes first.
"""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pipelines.images import MAX_PIXELS
from pipelines.manifest import check_tables
from ressl.batch import DataError

VERSION = 2
MIN_PAGE, MAX_PAGE = 1 << 21, 1 << 31  # bytes; a page size is a power of two
JPG, RAW = 0, 1  # modes of an image
INT_FIELD, IMAGE_FIELD = 1, 2  # type ids
MAX_INT = 2**31 - 1

HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ]
)
FIELD = np.dtype([("type_id", "u1"), ("name", "S16"), ("arguments", "V1024")])
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])

FIELDS = ("image", "label", "index", "height", "width")  # ours; height and width are those before any resizing
STOCK_FIELDS = ("image", "label")


@dataclass(frozen=True, slots=True)
class Beton:
    """The tables of a .beton file with N samples, checked."""

    path: Path
    page_size: int  # bytes
    mode: np.ndarray  # (N,) uint8, JPG or RAW
    size: np.ndarray  # (N, 2) int32, height and width as stored
    original: np.ndarray  # (N, 2) int32, height and width before any resizing
    label: np.ndarray  # (N,) int64, -1 where unknown
    index: np.ndarray  # (N,) int64, the image's entry in its data set
    data_ptr: np.ndarray  # (N,) int64, the first byte of the image's data
    data_size: np.ndarray  # (N,) int64, bytes
    length: int  # of the file, bytes
    identity: tuple[int, ...]  # of the file that was checked: `open_again` knows it by that


def metadata_dtype(fields: tuple[str, ...]) -> np.dtype:
    """One row of the metadata: the image, then 8-byte integers at multiples of 8."""
    return np.dtype([("image", IMAGE), *((name, "<i8") for name in fields[1:])], align=True)


def field_descriptors(fields: tuple[str, ...]) -> np.ndarray:
    """(len(fields),) FIELD: `image`, then integers."""
    descriptors = np.zeros(len(fields), FIELD)
    descriptors["type_id"] = [IMAGE_FIELD] + [INT_FIELD] * (len(fields) - 1)
    descriptors["name"] = fields
    return descriptors


def open_beton(path: Path, *, sealed: bool = False) -> Beton:
    """Reads and checks header and tables; image data is not read. Seconds for a million samples at most.

    Takes files with our fields or with FFCV's usual `image, label`, for which `index` counts up and `original` is the
    stored size. `sealed`: where an index lies beside the file, its checksum of the tables counts too, without which
    another label or another original size cannot be told from the right one. Raises DataError for whatever is not a
    whole, consistent .beton file.
    """
    path = Path(path)
    length = _file_length(path)
    try:
        with path.open("rb") as file:
            identity = _identity(file)
            header = _read_header(path, file, length)
            fields = _read_fields(path, file, header, length)
            samples, table = _read_tables(path, file, header, fields, length)
            first_data = HEADER.itemsize + len(fields) * FIELD.itemsize + samples.nbytes
            _check_allocations(path, samples, table, first_data, header)
            size = np.stack([samples["image"]["height"], samples["image"]["width"]], axis=1).astype(np.int32)
            _check_images(path, samples["image"]["mode"], size, table["size"])
            index, original = _check_identity(path, samples, size)
            if sealed:
                check_tables(path, _tables(file, first_data, int(header["alloc_table_ptr"])))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    return Beton(
        path=path,
        page_size=int(header["page_size"]),
        mode=np.ascontiguousarray(samples["image"]["mode"]),
        size=size,
        original=original,
        label=samples["label"].astype(np.int64),
        index=index,
        data_ptr=table["ptr"].astype(np.int64),
        data_size=table["size"].astype(np.int64),
        length=length,
        identity=identity,
    )


def open_again(beton: Beton) -> BinaryIO:
    """The file that `open_beton` has checked. Raises DataError if it is gone, or if another lies in its place."""
    try:
        file = beton.path.open("rb")
    except OSError as error:
        raise DataError(f"{beton.path}: gone since the run began ({(error.strerror or '').lower()})") from None
    if _identity(file) != beton.identity:
        file.close()
        raise DataError(f"{beton.path}: changed since the run began; start it again")
    return file


def _identity(file: BinaryIO) -> tuple[int, ...]:
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _file_length(path: Path) -> int:
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: {(error.strerror or 'cannot be read').lower()}; make it with `convert`") from None
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path}: not a regular file; give the path of a .beton file")
    if status.st_size == 0:
        raise DataError(f"{path}: the file is empty; convert again")
    return status.st_size


def _read(path: Path, file: BinaryIO, offset: int, dtype: np.dtype, count: int) -> np.ndarray:
    file.seek(offset)
    data = file.read(dtype.itemsize * count)
    if len(data) != dtype.itemsize * count:
        raise DataError(f"{path}: the file ends at byte {offset + len(data):,}, inside a table; convert again")
    return np.frombuffer(data, dtype)


def _read_header(path: Path, file: BinaryIO, length: int) -> np.void:
    if length < HEADER.itemsize:
        raise DataError(f"{path}: {length} bytes are too few for a .beton file; convert again")
    header = _read(path, file, 0, HEADER, 1)[0]
    page_size = int(header["page_size"])
    plausible = MIN_PAGE <= page_size <= MAX_PAGE and page_size & (page_size - 1) == 0
    if not plausible or not 1 <= header["num_fields"] <= 1024:
        raise DataError(f"{path}: not a .beton file, or its header is damaged; convert again")
    if header["version"] != VERSION:
        raise DataError(f"{path}: .beton version {header['version']}, expected {VERSION}; convert again")
    if header["alloc_table_ptr"] == 0:
        raise DataError(f"{path}: its conversion was interrupted (no allocation table); convert again")
    if header["num_samples"] == 0:
        raise DataError(f"{path}: holds no images; convert again")
    return header


def _read_fields(path: Path, file: BinaryIO, header: np.void, length: int) -> tuple[str, ...]:
    count = int(header["num_fields"])
    if HEADER.itemsize + count * FIELD.itemsize > length:
        raise DataError(f"{path}: the file is truncated: it ends inside its field descriptors; convert again")
    found = _read(path, file, HEADER.itemsize, FIELD, count)
    for fields in (FIELDS, STOCK_FIELDS):
        expected = field_descriptors(fields)
        if len(found) == len(fields) and all((found[key] == expected[key]).all() for key in ("type_id", "name")):
            return fields
    names = [f"{field['name'].decode('ascii', 'replace')} (type {field['type_id']})" for field in found[:5]]
    expected_names = f"{', '.join(FIELDS)} or {', '.join(STOCK_FIELDS)} ({IMAGE_FIELD}, then {INT_FIELD})"
    raise DataError(f"{path}: fields {', '.join(map(repr, names))}, expected {expected_names}; convert again")


def _read_tables(
    path: Path, file: BinaryIO, header: np.void, fields: tuple[str, ...], length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Metadata and allocation table, both in the order of the samples."""
    count, table_ptr = int(header["num_samples"]), int(header["alloc_table_ptr"])
    dtype = metadata_dtype(fields)
    start = HEADER.itemsize + len(fields) * FIELD.itemsize
    if table_ptr >= length:
        raise DataError(
            f"{path}: the file is truncated: it has {length:,} bytes, its allocation table should start at "
            f"{table_ptr:,}; convert or copy it again"
        )
    if length - table_ptr != count * ALLOCATION.itemsize:
        entries = (length - table_ptr) / ALLOCATION.itemsize
        raise DataError(
            f"{path}: the allocation table has {entries:,.2f} entries for {count:,} images: the file is truncated, "
            "extended or damaged; convert or copy it again"
        )
    if start + count * dtype.itemsize > table_ptr:
        raise DataError(f"{path}: the tables of {count:,} images overlap: the header is damaged; convert again")
    samples = _read(path, file, start, dtype, count)
    table = _read(path, file, table_ptr, ALLOCATION, count)
    order = np.argsort(table["sample_id"], kind="stable")
    table = table[order]
    if not np.array_equal(table["sample_id"], np.arange(count, dtype=np.uint64)):
        raise DataError(f"{path}: the allocation table does not list each image once; convert again")
    return samples, table


def _tables(file: BinaryIO, first_data: int, table_ptr: int) -> Iterator[bytes]:
    """What comes before the data, and what behind them."""
    file.seek(0)
    yield file.read(first_data)
    file.seek(table_ptr)
    yield file.read()


def _check_allocations(path: Path, samples: np.ndarray, table: np.ndarray, first_data: int, header: np.void) -> None:
    end, page_size = int(header["alloc_table_ptr"]), int(header["page_size"])
    ptr, size = table["ptr"], table["size"]
    # size before the sum: unsigned integers would wrap around
    outside = (ptr < first_data) | (ptr >= end) | (size == 0) | (size > page_size)
    _refuse(path, outside, "the data lies outside the data region")
    _refuse(path, ptr + size > end, "the data lies outside the data region")
    _refuse(path, ptr // page_size != (ptr + size - 1) // page_size, "the data crosses the end of a page")
    _refuse(path, samples["image"]["data_ptr"] != ptr, "image pointer and allocation table differ")
    order = np.argsort(ptr, kind="stable")
    overlapping = np.zeros(len(ptr), bool)
    overlapping[order[1:]] = (ptr[order] + size[order])[:-1] > ptr[order][1:]
    _refuse(path, overlapping, "the data overlaps that of another image")


def _check_images(path: Path, mode: np.ndarray, size: np.ndarray, data_size: np.ndarray) -> None:
    pixels = size.astype(np.int64).prod(axis=1)
    _refuse(path, (mode != JPG) & (mode != RAW), "unknown image mode (neither JPEG nor raw)")
    _refuse(path, (pixels == 0) | (pixels > MAX_PIXELS), "impossible height or width")
    _refuse(path, (mode == RAW) & (data_size != 3 * pixels), "the size of the raw data is not 3 x height x width")


def _check_identity(path: Path, samples: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`index` and `original`, read or made up for a file without them."""
    _refuse(path, (samples["label"] < -1) | (samples["label"] > MAX_INT), "impossible label")
    if samples.dtype.names == STOCK_FIELDS:
        return np.arange(len(samples), dtype=np.int64), size.copy()
    original = np.stack([samples["height"], samples["width"]], axis=1)
    _refuse(path, ((original < size) | (original > MAX_INT)).max(axis=1), "impossible original height or width")
    index = samples["index"].astype(np.int64)
    _refuse(path, index < 0, "negative index")
    order = np.argsort(index, kind="stable")
    repeated = np.zeros(len(index), bool)
    repeated[order[1:]] = np.diff(index[order]) == 0
    _refuse(path, repeated, "the index of another image")
    return index, original.astype(np.int32)


def _refuse(path: Path, bad: np.ndarray, what: str) -> None:
    """Raises DataError when any of the (N,) bool is set."""
    if bad.any():
        places = np.flatnonzero(bad)
        listed = ", ".join(map(str, places[:5])) + ", ..." * (len(places) > 5)
        raise DataError(
            f"{path}: damaged at {len(places):,} of {len(bad):,} images (rows {listed}): {what}; convert again"
        )
