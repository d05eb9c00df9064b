"""Writes WebDataset shards and their index in one thread and in order, so that the same images give the same bytes.

Layout: see pipelines/shards.py. DALI's index files have one line for each image, `<ext> <offset> <size> <file name>`
for each of its two files in the tar, as `fn.readers.webdataset(index_paths=...)` reads them.
"""

import hashlib
import os
import tarfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pipelines.shards import BLOCK, FORMAT, IMAGE_ARRAYS, INDEX
from ressl.batch import DataError

SHARD_BYTES = 10**9  # a shard is closed once it holds as many bytes, or images
SHARD_IMAGES = 100_000
IDX_VERSION = "v1.2"  # of DALI's index files


@dataclass(frozen=True, slots=True)
class Member:
    """One image of a shard."""

    data: bytes  # an image file
    suffix: str  # .jpg, ...
    size: tuple[int, int]  # height, width of the image in `data`
    original: tuple[int, int]  # height, width before any resizing
    label: int  # -1 where unknown
    index: int  # the image's entry in its data set; also its key in the tar
    name: str  # in its data set


def write_shards(
    directory: Path,
    members: Iterable[Member],
    count: int,
    *,
    shard_bytes: int = SHARD_BYTES,
    shard_images: int = SHARD_IMAGES,
) -> int:
    """Writes shards, DALI's index files and index.npz into an empty directory; returns how many images they hold.

    Up to `count` members are taken. A shard holds at least one image, and is closed when it has `shard_images` of them
    or the next one would take it above `shard_bytes`. The index holds each shard's SHA-256 (`shard_sha256`) to be
    compared by whoever copies or keeps the files: `read_index` demands it, but compares only the shards' sizes, as
    reading all of them would take too long at each start. Raises DataError where there is no member.
    """
    rows = {name: np.zeros((count, *shape), kind) for name, (kind, shape) in IMAGE_ARRAYS.items()}
    names: list[bytes] = []
    written, shards, shard = 0, list[tuple[str, int, str]](), None
    try:
        for member in members:
            if written == count:
                raise ValueError(f"more members than the {count} announced")
            room = 2 * BLOCK + _padded(len(member.data)) + BLOCK  # two headers, the image and its label
            if shard is not None and (shard.images == shard_images or shard.position + room > shard_bytes):
                shards.append(shard.close())
                shard = None
            if shard is None:
                shard = Shard(directory, f"shard-{len(shards):05}")
            names.append(member.name.encode("utf-8", "replace"))
            end = int(rows["name_end"][written - 1]) if written else 0
            row = {"shard": len(shards), "offset": shard.add(member), "length": len(member.data), "size": member.size}
            row |= {"original": member.original, "label": member.label, "index": member.index}
            for name, value in (row | {"name_end": end + len(names[-1])}).items():
                rows[name][written] = value
            written += 1
        if shard is None:
            raise DataError("no image to write")
        shards.append(shard.close())
    finally:
        if shard is not None:
            shard.abandon()
    _write_index(directory / INDEX, shards, {name: array[:written] for name, array in rows.items()}, b"".join(names))
    return written


class Shard:
    """A tar file that is being written, and DALI's index of it."""

    def __init__(self, directory: Path, name: str) -> None:
        self.path, self.position, self.lines = directory / f"{name}.tar", 0, list[str]()
        self.digest = hashlib.sha256()
        self.file: BinaryIO = self.path.open("xb")

    @property
    def images(self) -> int:
        return len(self.lines)

    def add(self, member: Member) -> int:
        """Appends an image and its label. Returns the image's first byte in the file."""
        key, label = f"{member.index:09}", str(member.label).encode("ascii")
        start = self._append(f"{key}{member.suffix}", member.data)
        label_start = self._append(f"{key}.cls", label)
        suffix = member.suffix.removeprefix(".")
        image = f"{suffix} {start} {len(member.data)} {key}{member.suffix}"
        self.lines.append(f"{image} cls {label_start} {len(label)} {key}.cls\n")
        return start

    def close(self) -> tuple[str, int, str]:
        """Name, bytes and SHA-256 (hexadecimal) of the finished file."""
        self._write(bytes(2 * BLOCK))  # the end of a tar file
        _finish(self.file)
        with self.path.with_suffix(".idx").open("xb") as idx:
            idx.write(f"{IDX_VERSION} {len(self.lines)}\n{''.join(self.lines)}".encode("ascii"))
            _finish(idx)
        return self.path.name, self.position, self.digest.hexdigest()

    def abandon(self) -> None:
        with suppress(OSError):  # what could not be flushed has been reported before
            self.file.close()

    def _append(self, name: str, data: bytes) -> int:
        header = tarfile.TarInfo(name)  # its other fields say 1970 and nobody
        header.size = len(data)
        self._write(header.tobuf(tarfile.USTAR_FORMAT))
        start = self.position
        self._write(data + bytes(_padded(len(data)) - len(data)))
        return start

    def _write(self, data: bytes) -> None:
        self.file.write(data)
        self.digest.update(data)
        self.position += len(data)


def _write_index(path: Path, shards: list[tuple[str, int, str]], rows: dict[str, np.ndarray], names: bytes) -> None:
    files, sizes, digests = zip(*shards, strict=True)
    with path.open("xb") as file:
        np.savez(
            file,
            format=np.array(FORMAT),
            shards=np.array([name.encode("ascii") for name in files]),
            shard_bytes=np.array(sizes, np.int64),
            shard_sha256=np.array([digest.encode("ascii") for digest in digests]),
            names=np.frombuffer(names, np.uint8),
            **rows,  # type: ignore[arg-type]
        )
        _finish(file)


def _padded(length: int) -> int:
    return -(-length // BLOCK) * BLOCK


def _finish(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
