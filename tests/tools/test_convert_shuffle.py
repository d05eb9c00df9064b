"""`convert --shuffle`: the same images under the same numbers, in an order that mixes the classes."""

import io

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from pipelines.beton import open_beton
from pipelines.sampler import permutation
from pipelines.shards import read_index
from pipelines.tensor_file import read_tensor_file
from tools.convert import convert


@pytest.fixture
def console():
    return Console(file=io.StringIO())


@pytest.fixture
def folder(tmp_path):
    """Two classes of five images of noise."""
    for i in range(10):
        path = tmp_path / "src" / "ab"[i // 5] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (9 + i, 20, 3), np.uint8)).save(path)
    return tmp_path / "src"


def contents(directory, to):
    """{index: (label, bytes as stored)} of a converted train split, in the order of its images."""
    if to == "ffcv":
        beton = open_beton(directory / "train.beton")
        parts = zip(beton.data_ptr.tolist(), beton.data_size.tolist(), strict=True)
        images = [beton.path.read_bytes()[start : start + length] for start, length in parts]
        return dict(zip(beton.index.tolist(), zip(beton.label.tolist(), images, strict=True), strict=True))
    if to == "tensor":
        data = read_tensor_file(directory / "train.safetensors")
        ends = zip(data.offset.tolist(), data.size.prod(dim=1).tolist(), strict=True)
        images = [data.pixels[start : start + 3 * pixels].numpy().tobytes() for start, pixels in ends]
        return dict(zip(data.index.tolist(), zip(data.label.tolist(), images, strict=True), strict=True))
    shards = read_index(directory / "train")
    rows = zip(shards.shard, shards.offset, shards.length, strict=True)
    images = [(shards.root / shards.shards[s]).read_bytes()[at : at + length] for s, at, length in rows]
    return dict(zip(shards.index.tolist(), zip(shards.label.tolist(), images, strict=True), strict=True))


@pytest.mark.parametrize("to", ["ffcv", "tensor", "webdataset"])
def test_shuffled_images_are_the_same_ones_in_another_order(folder, tmp_path, console, to):
    (folder / "a" / "4.png").write_text("text")
    options = {"max_skipped": 0.5, "console": console}
    plain = convert(str(folder), tmp_path / "plain", to, **options)
    manifests = [
        convert(str(folder), tmp_path / d, to, shuffle=True, workers=w, **options) for d, w in (("x", 1), ("y", 4))
    ]
    assert manifests[0] == manifests[1]  # with the digests of the files
    record = manifests[0].splits["train"]
    assert (record.options["shuffle"], plain.splits["train"].options["shuffle"]) == (True, False)
    assert record.skipped == plain.splits["train"].skipped
    sorted_images, mixed = contents(tmp_path / "plain", to), contents(tmp_path / "x", to)
    assert sorted_images == mixed
    assert list(sorted_images) == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert list(mixed) == [i for i in permutation(10, 0, 0).tolist() if i != 4]


def test_shuffled_images_of_one_file_are_mixed_in_chunks_too(tmp_path, console):
    """Images of an IDX file are encoded by the dozens."""
    array = np.random.default_rng(0).integers(0, 256, (200, 28, 28), np.uint8)
    (tmp_path / "mnist").mkdir()
    for name, data in (("images-idx3", array), ("labels-idx1", np.arange(200, dtype=np.uint8) // 20)):
        header = bytes([0, 0, 8, data.ndim]) + b"".join(n.to_bytes(4, "big") for n in data.shape)
        (tmp_path / "mnist" / f"train-{name}-ubyte").write_bytes(header + data.tobytes())
    for name, shuffle in (("out", True), ("plain", False)):
        convert(str(tmp_path / "mnist"), tmp_path / name, "tensor", shuffle=shuffle, split="train", console=console)
    mixed = contents(tmp_path / "out", "tensor")
    assert mixed == contents(tmp_path / "plain", "tensor")
    assert list(mixed) == permutation(200, 0, 0).tolist()
