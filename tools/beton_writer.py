"""Writes FFCV's .beton format in one thread and in order, so that the same samples always give the same bytes."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pipelines.beton import (
    ALLOCATION,
    FIELD,
    FIELDS,
    HEADER,
    MAX_PAGE,
    MIN_PAGE,
    VERSION,
    field_descriptors,
    metadata_dtype,
)
from ressl.batch import DataError
from tools.output import atomic_output

PAGE_SIZE = 1 << 23  # bytes, as FFCV's own writer


@dataclass(frozen=True, slots=True)
class EncodedSample:
    data: bytes  # a JPEG file, or height x width x 3 bytes
    mode: int  # pipelines.beton.JPG or RAW
    size: tuple[int, int]  # height, width of the image in `data`
    original: tuple[int, int]  # height, width before any resizing
    label: int  # -1 where unknown
    index: int  # the image's entry in its data set


def write_beton(path: Path, samples: Iterable[EncodedSample], count: int, page_size: int = PAGE_SIZE) -> int:
    """Writes `path` atomically; returns how many samples it holds. See `write_beton_to`."""
    with atomic_output(path) as file:
        return write_beton_to(file, samples, count, page_size)


def write_beton_to(file: BinaryIO, samples: Iterable[EncodedSample], count: int, page_size: int = PAGE_SIZE) -> int:
    """Writes a .beton into an empty, seekable file; returns how many samples it holds.

    Room for the metadata of `count` samples is kept before the data; there may be fewer, as bad images are left out. A
    sample larger than a page doubles the page size: data that fits a page of the smaller size fits one of the larger,
    as both count from the start of the file. Raises DataError where there is no sample, or one above 2 GiB.
    """
    if not MIN_PAGE <= page_size <= MAX_PAGE or page_size & (page_size - 1):
        raise ValueError(f"page_size {page_size} is not a power of two from 2 MiB to 2 GiB")
    dtype = metadata_dtype(FIELDS)
    metadata, table = np.zeros(count, dtype), np.zeros(count, ALLOCATION)
    start = HEADER.itemsize + len(FIELDS) * FIELD.itemsize
    position = _align(start + count * dtype.itemsize, page_size)
    file.seek(position)
    written = 0
    for sample in samples:
        if written == count:
            raise ValueError(f"more samples than the {count} announced")
        length = len(sample.data)
        while length > page_size:
            page_size *= 2
        if page_size > MAX_PAGE:
            raise DataError(
                f"image {sample.index}: {length / 2**30:.1f} GiB encoded; a .beton holds up to 2 GiB an image"
            )
        if position // page_size != (position + length - 1) // page_size:
            position = _align(position, page_size)
            file.seek(position)
        file.write(sample.data)
        height, width = sample.size
        image = (sample.mode, width, height, position)
        metadata[written] = (image, sample.label, sample.index, *sample.original)
        table[written] = (written, position, length)
        position += length
        written += 1
    if written == 0:
        raise DataError("no image to write")
    _write_tables(file, metadata[:written], table[:written], page_size, _align(position, page_size))
    return written


def _write_tables(file: BinaryIO, metadata: np.ndarray, table: np.ndarray, page_size: int, table_ptr: int) -> None:
    header = np.array((VERSION, len(FIELDS), page_size, len(metadata), table_ptr), HEADER)
    file.seek(table_ptr)
    file.write(table.tobytes())
    file.seek(0)
    file.write(header.tobytes() + field_descriptors(FIELDS).tobytes() + metadata.tobytes())


def _align(position: int, page_size: int) -> int:
    return -(-position // page_size) * page_size
