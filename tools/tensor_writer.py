"""Writes a decoded data set as one safetensors file. See pipelines/tensor_file.py.

safetensors starts with a JSON header that may end in spaces: room is kept for it, and it is written last.
"""

import hashlib
import json
from collections.abc import Iterable
from typing import BinaryIO

import numpy as np

from pipelines.tensor_file import FORMAT
from ressl.batch import DataError
from tools.beton_writer import EncodedSample
from tools.rows import PLACE, ROW

# name, dtype, shape after the first dimension; after the pixels, and by falling alignment
TABLES = (
    ("offset", "<i8", ()),
    ("label", "<i8", ()),
    ("index", "<i8", ()),
    ("size", "<i4", (2,)),
    ("original", "<i4", (2,)),
)
TYPE_NAMES = {"<i8": "I64", "<i4": "I32"}


class TensorLayout:
    """Where the pixels of up to `count` images go, one after another."""

    def __init__(self, count: int, classes: tuple[str, ...]) -> None:
        self.classes, self.room = classes, len(_header(count, 10**18, classes)) // 8 * 8 + 8
        self.position = self.start = 8 + self.room

    def place(self, _index: int, length: int) -> tuple[int, int]:
        """File number and first byte of the next image."""
        start, self.position = self.position, self.position + length
        return 0, start

    def ends(self) -> tuple[int, ...]:
        """Bytes of each file up to the end of what was placed."""
        return (self.position,)


def finish_tensors(file: BinaryIO, layout: TensorLayout, rows: np.ndarray, places: np.ndarray) -> str:
    """Writes the header before the pixels and the tables behind them, for ROW and PLACE of every image that was placed.
    Returns the SHA-256 of both, hexadecimal. Raises DataError where there is no image."""
    if not len(rows):
        raise DataError("no image to write")
    pixels, widest = layout.position - layout.start, int(rows["size"][:, 1].max())
    slack = 3 * widest + (-(pixels + 3 * widest)) % 8  # the tables that follow start at a multiple of 8
    tables = {name: rows[name] for name, _, _ in TABLES if name != "offset"}
    tables["offset"] = places["offset"] - layout.start
    tail = bytes(slack) + b"".join(tables[name].astype(dtype).tobytes() for name, dtype, _ in TABLES)
    file.seek(layout.position)
    file.write(tail)
    file.truncate()
    head = layout.room.to_bytes(8, "little") + _header(len(rows), pixels + slack, layout.classes).ljust(layout.room)
    file.seek(0)
    file.write(head)
    return hashlib.sha256(head + tail).hexdigest()


def write_tensors_to(file: BinaryIO, samples: Iterable[EncodedSample], count: int, classes: tuple[str, ...]) -> int:
    """Writes up to `count` raw samples into an empty, seekable file in one thread, which defines what `convert` does in
    many processes; returns how many. Raises DataError where there is none."""
    rows, places, layout = np.zeros(count, ROW), np.zeros(count, PLACE), TensorLayout(count, classes)
    written = 0
    for sample in samples:
        if written == count:
            raise ValueError(f"more samples than the {count} announced")
        places[written] = place = layout.place(sample.index, len(sample.data))
        row = {"index": sample.index, "label": sample.label, "size": sample.size, "original": sample.original}
        for name, value in row.items():
            rows[name][written] = value
        file.seek(place[1])
        file.write(sample.data)
        written += 1
    finish_tensors(file, layout, rows[:written], places[:written])
    return written


def _header(count: int, pixels: int, classes: tuple[str, ...]) -> bytes:
    metadata = {"format": FORMAT, "classes": json.dumps(classes)}
    header: dict[str, object] = {"__metadata__": metadata}
    header["pixels"] = {"dtype": "U8", "shape": [pixels], "data_offsets": [0, pixels]}
    end = pixels
    for name, dtype, shape in TABLES:
        start, end = end, end + count * np.dtype((dtype, shape)).itemsize
        header[name] = {"dtype": TYPE_NAMES[dtype], "shape": [count, *shape], "data_offsets": [start, end]}
    return json.dumps(header).encode("ascii")
