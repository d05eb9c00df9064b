"""Writes WebDataset shards and their index so that the same images always give the same bytes.

Layout: see pipelines/shards.py. DALI's index files have one line for each image, `<ext> <offset> <size> <file name>`
for each of its two files in the tar, as `fn.readers.webdataset(index_paths=...)` reads them.
"""

import tarfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.shards import BLOCK, FORMAT, IMAGE_ARRAYS, INDEX
from ressl.batch import DataError
from tools.index_file import join_names
from tools.rows import PLACE, ROW, SUFFIXES

SHARD_BYTES = 10**9  # a shard is closed once it holds as many bytes, or images
SHARD_IMAGES = 100_000
END = bytes(2 * BLOCK)  # of a tar file
IDX_VERSION = "v1.2"  # of DALI's index files
_EMPTY = tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT)  # a header: its size is at 124, its checksum at 148
_END = _EMPTY[156:]
_SUM = sum(_EMPTY[:124]) + sum(_EMPTY[135:148]) + 8 * ord(" ") + sum(_END)  # the checksum counts itself as spaces


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


class ShardLayout:
    """Where images go, one after another: a shard holds at least one image, and is closed when it has `shard_images`
    of them or the next one would take it above `shard_bytes`."""

    def __init__(self, shard_bytes: int = SHARD_BYTES, shard_images: int = SHARD_IMAGES) -> None:
        self.shard_bytes, self.shard_images = shard_bytes, shard_images
        self.sizes: list[int] = []  # bytes of each shard, without the end of a tar file
        self.images = 0  # in the last shard

    def place(self, _index: int, length: int) -> tuple[int, int]:
        """Number of the shard and first byte of the next image."""
        room = 2 * BLOCK + padded(length) + BLOCK  # two headers, the image and its label
        if not self.sizes or self.images == self.shard_images or self.sizes[-1] + room > self.shard_bytes:
            self.sizes.append(0)
            self.images = 0
        start = self.sizes[-1] + BLOCK
        self.sizes[-1] += room
        self.images += 1
        return len(self.sizes) - 1, start

    def ends(self) -> tuple[int, ...]:
        """Bytes of each shard up to the end of what was placed."""
        return tuple(self.sizes)


def shard_name(number: int) -> str:
    return f"shard-{number:05}.tar"


def member_blocks(index: int, label: int, suffix: str, data: bytes) -> tuple[bytes, bytes, bytes]:
    """What stands in a tar file for an image: the header before its first byte, its data, and what follows them."""
    key, text = f"{index:09}", str(label).encode("ascii")
    fill = bytes(padded(len(data)) - len(data))
    return (
        _tar_header(f"{key}{suffix}", len(data)),
        data,
        fill + _tar_header(f"{key}.cls", len(text)) + text + bytes(BLOCK - len(text)),
    )


def idx_text(rows: np.ndarray, offsets: np.ndarray) -> str:
    """DALI's index of one shard, for ROW and first byte of each of its images."""
    lines = [f"{IDX_VERSION} {len(rows)}"]
    columns = (rows["index"], rows["label"], rows["length"], rows["kind"], offsets)
    for index, label, length, kind, offset in zip(*(column.tolist() for column in columns), strict=True):
        key, suffix = f"{index:09}", SUFFIXES[kind]
        label_start = offset + padded(length) + BLOCK
        image = f"{suffix.removeprefix('.')} {offset} {length} {key}{suffix}"
        lines.append(f"{image} cls {label_start} {len(str(label))} {key}.cls")
    return "\n".join(lines) + "\n"


def finish_shards(
    directory: Path, layout: ShardLayout, rows: np.ndarray, places: np.ndarray, names: Iterable[str]
) -> None:
    """Ends the tar files, and writes DALI's index files and index.npz beside them, for ROW, PLACE and name of every
    image that was placed. Raises DataError where there is none."""
    if not len(rows):
        raise DataError("no image to write")
    for shard, end in enumerate(layout.sizes):
        with (directory / shard_name(shard)).open("r+b") as file:
            file.seek(end)
            file.write(END)
            file.truncate()
        mine = places["file"] == shard
        text = idx_text(rows[mine], places["offset"][mine])
        (directory / shard_name(shard)).with_suffix(".idx").write_text(text, encoding="ascii")
    columns = {name: rows[name] for name in ("length", "crc32", "size", "original", "label", "index")}
    columns |= {"shard": places["file"], "offset": places["offset"]}
    joined, ends = join_names(names)
    columns["name_end"] = ends
    arrays = {name: columns[name].astype(kind) for name, (kind, _) in IMAGE_ARRAYS.items()}
    np.savez(
        directory / INDEX,
        format=np.array(FORMAT),
        shards=np.array([shard_name(shard).encode("ascii") for shard in range(len(layout.sizes))]),
        shard_bytes=np.array(layout.sizes, np.int64) + len(END),
        names=joined,
        **arrays,  # type: ignore[arg-type]
    )


def write_shards(
    directory: Path,
    members: Iterable[Member],
    count: int,
    *,
    shard_bytes: int = SHARD_BYTES,
    shard_images: int = SHARD_IMAGES,
) -> int:
    """Writes up to `count` members into an empty directory in one thread, which defines what `convert` does in many
    processes; returns how many. Raises DataError where there is none."""
    rows, places, layout = np.zeros(count, ROW), np.zeros(count, PLACE), ShardLayout(shard_bytes, shard_images)
    names: list[str] = []
    for member in members:
        i = len(names)
        if i == count:
            raise ValueError(f"more members than the {count} announced")
        shard, offset = places[i] = layout.place(member.index, len(member.data))
        row = {"index": member.index, "label": member.label, "length": len(member.data), "size": member.size}
        row |= {"original": member.original, "kind": SUFFIXES.index(member.suffix), "crc32": zlib.crc32(member.data)}
        for name, value in row.items():
            rows[name][i] = value
        blocks = member_blocks(member.index, member.label, member.suffix, member.data)
        with (directory / shard_name(shard)).open("r+b" if offset > BLOCK else "xb") as file:
            file.seek(offset - BLOCK)
            file.write(b"".join(blocks))
        names.append(member.name)
    finish_shards(directory, layout, rows[: len(names)], places[: len(names)], names)
    return len(names)


def padded(length: int) -> int:
    return -(-length // BLOCK) * BLOCK


def _tar_header(name: str, length: int) -> bytes:
    """A ustar header: a regular file of 1970 that belongs to nobody. tarfile takes twenty times as long for it."""
    key, size = name.encode("ascii"), b"%011o" % length
    total = _SUM + sum(key) + sum(size)
    return b"%b%b%b%b%06o\0 %b" % (key, _EMPTY[len(key) : 124], size, _EMPTY[135:148], total, _END)
