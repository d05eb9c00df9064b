"""Writes a decoded data set as one safetensors file, image by image: memory holds the tables, never the pixels."""

import json
from collections.abc import Iterable
from typing import BinaryIO

import numpy as np

from pipelines.tensor_file import FORMAT
from ressl.batch import DataError
from tools.beton_writer import EncodedSample

# name, dtype, shape after the first dimension; after the pixels, and by falling alignment
TABLES = (
    ("offset", "<i8", ()),
    ("label", "<i8", ()),
    ("index", "<i8", ()),
    ("size", "<i4", (2,)),
    ("original", "<i4", (2,)),
)
TYPE_NAMES = {"<i8": "I64", "<i4": "I32"}


def write_tensors_to(file: BinaryIO, samples: Iterable[EncodedSample], count: int, classes: tuple[str, ...]) -> int:
    """Writes up to `count` raw samples into an empty, seekable file; returns how many. See pipelines/tensor_file.py.

    safetensors starts with a JSON header that may end in spaces: room is kept for it, and it is written last. Raises
    DataError where there is no sample.
    """
    room = len(_header(count, 10**18, classes)) // 8 * 8 + 8
    tables = {name: np.zeros((count, *shape), dtype) for name, dtype, shape in TABLES}
    file.seek(8 + room)
    pixels = written = widest = 0
    for sample in samples:
        if written == count:
            raise ValueError(f"more samples than the {count} announced")
        file.write(sample.data)
        row = {"offset": pixels, "label": sample.label, "index": sample.index}
        for name, value in (row | {"size": sample.size, "original": sample.original}).items():
            tables[name][written] = value
        pixels += len(sample.data)
        widest = max(widest, sample.size[1])
        written += 1
    if written == 0:
        raise DataError("no image to write")
    slack = 3 * widest + (-(pixels + 3 * widest)) % 8  # the tables that follow start at a multiple of 8
    file.write(bytes(slack))
    for name, _, _ in TABLES:
        file.write(tables[name][:written].tobytes())
    file.seek(0)
    file.write(room.to_bytes(8, "little") + _header(written, pixels + slack, classes).ljust(room))
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
