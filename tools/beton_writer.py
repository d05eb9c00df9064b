"""Writes FFCV's .beton format so that the same images always give the same bytes, wherever that was interrupted.

Room for the metadata of all images is kept before the data; there may be fewer, as bad ones are left out.
"""

import hashlib
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
from tools.rows import PLACE, ROW

PAGE_SIZE = 1 << 23  # bytes, as FFCV's own writer


@dataclass(frozen=True, slots=True)
class EncodedSample:
    data: bytes  # a JPEG file, or height x width x 3 bytes
    mode: int  # pipelines.beton.JPG or RAW
    size: tuple[int, int]  # height, width of the image in `data`
    original: tuple[int, int]  # height, width before any resizing
    label: int  # -1 where unknown
    index: int  # the image's entry in its data set


class BetonLayout:
    """Where the data of up to `count` images goes, one after another, each within a page.

    An image larger than a page doubles the page size: data that fits a page of the smaller size fits one of the larger,
    as both count from the start of the file.
    """

    def __init__(self, count: int, page_size: int = PAGE_SIZE) -> None:
        if not MIN_PAGE <= page_size <= MAX_PAGE or page_size & (page_size - 1):
            raise ValueError(f"page_size {page_size} is not a power of two from 2 MiB to 2 GiB")
        self.count, self.page_size = count, page_size
        head = HEADER.itemsize + len(FIELDS) * FIELD.itemsize + count * metadata_dtype(FIELDS).itemsize
        self.position = _align(head, page_size)

    def place(self, index: int, length: int) -> tuple[int, int]:
        """File number and first byte of the next image, the data set's entry `index`. Raises DataError above 2 GiB."""
        while length > self.page_size:
            self.page_size *= 2
        if self.page_size > MAX_PAGE:
            raise DataError(f"image {index}: {length / 2**30:.1f} GiB encoded; a .beton holds up to 2 GiB an image")
        if self.position // self.page_size != (self.position + length - 1) // self.page_size:
            self.position = _align(self.position, self.page_size)
        start, self.position = self.position, self.position + length
        return 0, start

    def ends(self) -> tuple[int, ...]:
        """Bytes of each file up to the end of what was placed."""
        return (self.position,)

    def tables(self, rows: np.ndarray, places: np.ndarray) -> tuple[bytes, int, bytes]:
        """What comes before the data, where the allocation table starts, and that table, for ROW and PLACE of every
        image that was placed."""
        metadata, table = np.zeros(len(rows), metadata_dtype(FIELDS)), np.zeros(len(rows), ALLOCATION)
        image = metadata["image"]
        image["mode"], image["height"], image["width"] = rows["mode"], rows["size"][:, 0], rows["size"][:, 1]
        image["data_ptr"] = places["offset"]
        metadata["label"], metadata["index"] = rows["label"], rows["index"]
        metadata["height"], metadata["width"] = rows["original"][:, 0], rows["original"][:, 1]
        table["sample_id"], table["ptr"], table["size"] = np.arange(len(rows)), places["offset"], rows["length"]
        table_ptr = _align(self.position, self.page_size)
        header = np.array((VERSION, len(FIELDS), self.page_size, len(rows), table_ptr), HEADER)
        return header.tobytes() + field_descriptors(FIELDS).tobytes() + metadata.tobytes(), table_ptr, table.tobytes()


def finish_beton(file: BinaryIO, layout: BetonLayout, rows: np.ndarray, places: np.ndarray) -> str:
    """Writes the tables around the data. Returns their SHA-256, hexadecimal: see `tools.index_file`."""
    if not len(rows):
        raise DataError("no image to write")
    head, table_ptr, table = layout.tables(rows, places)
    file.seek(table_ptr)
    file.write(table)
    file.truncate()
    file.seek(0)
    file.write(head)
    return hashlib.sha256(head + table).hexdigest()


def write_beton(path: Path, samples: Iterable[EncodedSample], count: int, page_size: int = PAGE_SIZE) -> int:
    """Writes `path` atomically in one thread, which defines what `convert` does in many processes; returns how many
    samples it holds. Raises DataError where there is none, or one above 2 GiB."""
    rows, places, layout = np.zeros(count, ROW), np.zeros(count, PLACE), BetonLayout(count, page_size)
    written = 0
    with atomic_output(path) as file:
        for sample in samples:
            if written == count:
                raise ValueError(f"more samples than the {count} announced")
            places[written] = place = layout.place(sample.index, len(sample.data))
            row = {"index": sample.index, "label": sample.label, "length": len(sample.data), "mode": sample.mode}
            for name, value in (row | {"size": sample.size, "original": sample.original}).items():
                rows[name][written] = value
            file.seek(place[1])
            file.write(sample.data)
            written += 1
        finish_beton(file, layout, rows[:written], places[:written])
    return written


def _align(position: int, page_size: int) -> int:
    return -(-position // page_size) * page_size
