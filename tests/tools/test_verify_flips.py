"""200 flipped bytes in each format, drawn anywhere, and exchanged images: each is found, and told where it is."""

import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from pipelines.beton import ALLOCATION, FIELD, FIELDS, HEADER, RAW, metadata_dtype, open_beton
from pipelines.shards import BLOCK, read_index
from pipelines.tensor_file import read_tensor_file
from tools.convert import convert
from tools.verify import verify

COUNT = 14
FORMATS = ("ffcv", "tensor", "webdataset")
Region = tuple[Path, int, int, str]  # file, first byte, end, and how the line begins that tells of a damage there
NOT_ZERO = "byte {place:,}, where nothing is stored, is not 0"


@pytest.fixture
def root(request, tmp_path) -> Iterator[Path]:
    """A data set in the format that a test asks for, of images raw and compressed."""
    for i in range(COUNT):
        path = tmp_path / "src" / "ab"[i % 2] / f"{i:02}.{'jpg' if i % 3 == 0 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        height, width = (240, 300) if i < 8 else (20 + i, 30)
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    to = request.param
    sharding = {"shard_mb": 1} if to == "webdataset" else {}
    convert(str(tmp_path / "src"), tmp_path / to, to, shuffle=True, console=Console(quiet=True), **sharding)
    yield tmp_path / to
    shutil.rmtree(tmp_path)


def flip(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 0x10]))


def regions_of(root: Path, to: str) -> list[Region]:
    """Those in which a damage hides no other: images, gaps and DALI's index files."""
    if to == "ffcv":
        beton = open_beton(root / "train.beton")
        images = zip(beton.data_ptr.tolist(), beton.data_size.tolist(), beton.index.tolist(), strict=True)
        head = HEADER.itemsize + len(FIELDS) * FIELD.itemsize + COUNT * metadata_dtype(FIELDS).itemsize
        first, last = int(beton.data_ptr.min()), int((beton.data_ptr + beton.data_size).max())
        table = beton.length - COUNT * ALLOCATION.itemsize
        gaps = [(beton.path, start, stop, NOT_ZERO) for start, stop in ((head, first), (last, table))]
        return [(beton.path, start, start + size, f"image {index} (") for start, size, index in images] + gaps
    if to == "tensor":
        path = root / "train.safetensors"
        data, pixels = read_tensor_file(path), 8 + int.from_bytes(path.read_bytes()[:8], "little")
        rows = zip(data.offset.tolist(), data.size.long().prod(1).tolist(), data.index.tolist(), strict=True)
        return [(path, pixels + start, pixels + start + 3 * size, f"image {index} (") for start, size, index in rows]
    index = read_index(root / "train")
    tars, regions = [root / "train" / name for name in index.shards], []
    columns = (index.shard, index.offset, index.length, index.index)
    for shard, start, length, image in zip(*(column.tolist() for column in columns), strict=True):
        stop = start + -(-length // BLOCK) * BLOCK + 2 * BLOCK
        regions.append((tars[shard], start - BLOCK, stop, f"image {image} ("))
    for tar in tars:
        size, idx = tar.stat().st_size, tar.with_suffix(".idx")
        regions += [(tar, size - 2 * BLOCK, size, NOT_ZERO), (idx, 0, idx.stat().st_size, "not what was written")]
    return regions


def batches_of(
    places: list[tuple[Path, int]], regions: list[Region]
) -> Iterator[list[tuple[Path, int, Region | None]]]:
    """Places that can be damaged at once: one in each region, and what lies in none of them alone."""
    waiting = []
    for path, place in places:
        found = [region for region in regions if region[0] == path and region[1] <= place < region[2]]
        if found:
            waiting.append((path, place, found[0]))
        else:
            yield [(path, place, None)]
    while waiting:
        batch = list({region: (path, place, region) for path, place, region in waiting}.values())
        yield batch
        waiting = [one for one in waiting if one not in batch]


@pytest.mark.parametrize("root", FORMATS, indirect=True)
def test_about_200_bytes_anywhere_are_each_found(root):
    """As many in each file, and in a .beton as many in its head, its data and its table as in the gaps."""
    to, draw = root.name, np.random.default_rng(7)
    ranges = [(path, 0, path.stat().st_size) for path in sorted(root.rglob("*")) if path.is_file()]
    if to == "ffcv":
        beton = open_beton(root / "train.beton")
        first, last = int(beton.data_ptr.min()), int((beton.data_ptr + beton.data_size).max())
        ranges += [(beton.path, *part) for part in ((0, 6200), (6200, first), (first, last), (last, beton.length))]
        ranges += [(beton.path, beton.length - COUNT * ALLOCATION.itemsize, beton.length)]
    places = [(path, int(draw.integers(start, stop))) for path, start, stop in ranges * (200 // len(ranges) + 1)][:200]
    regions = regions_of(root, to)
    for batch in batches_of(places, regions):
        for path, place, _ in batch:
            flip(path, place)
        console = Console(file=io.StringIO(), width=250)
        assert not verify(root, workers=1, console=console), batch
        if batch[0][2] is not None:  # each is told by itself, and nothing else
            told = [line for line in console.file.getvalue().splitlines() if line.startswith(str(root))]
            assert len(told) == len(batch)
            for path, place, (_, _, _, words) in batch:
                found = [line for line in told if line.startswith(f"{path}: {words.format(place=place)}")]
                assert len(found) == 1, (path, place, told)
        for path, place, _ in batch:
            flip(path, place)
    assert verify(root, console=Console(quiet=True))


@pytest.mark.parametrize("root", ["ffcv", "tensor"], indirect=True)
def test_two_images_of_one_size_in_each_others_place_are_found(root):
    if root.name == "ffcv":
        path, beton = root / "train.beton", open_beton(root / "train.beton")
        starts, sizes = beton.data_ptr.tolist(), beton.data_size
        one, other = np.flatnonzero(beton.mode == RAW)[:2].tolist()
        length = int(sizes[[one, other]].min())  # less than the larger one's: a part of it
    else:
        path = root / "train.safetensors"
        data, pixels = read_tensor_file(path), 8 + int.from_bytes(path.read_bytes()[:8], "little")
        starts = (data.offset + pixels).tolist()
        one, other = np.flatnonzero((data.size == data.size.max(0).values).all(1).numpy())[:2].tolist()
        length = int(3 * data.size[one].long().prod())
        del data
    whole = bytearray(path.read_bytes())
    here, there = (slice(start, start + length) for start in (starts[one], starts[other]))
    whole[here], whole[there] = whole[there], whole[here]
    path.write_bytes(whole)
    console = Console(file=io.StringIO(), width=250)
    assert not verify(root, console=console)
    assert console.file.getvalue().count("CRC-32") == 2
