"""Converted data with random damage: it is refused by name, it is as it was, or it is a bad image. Never a crash.

A byte of an image can be another one without its format being broken: then only that image is another, and its checksum
tells `verify`.
"""

import dataclasses
import io
import json
import os
import pickle
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pipelines.beton import ALLOCATION, FIELD, FIELDS, HEADER, JPG, RAW, Beton, metadata_dtype, open_beton
from pipelines.ffcv_source import read_sample
from pipelines.images import BadImage, decode_image
from pipelines.manifest import Manifest, SplitRecord, classes_of, manifest_text, read_manifest
from pipelines.shards import ShardFiles, ShardIndex, read_index
from pipelines.tensor_file import FORMAT, TensorFile, read_tensor_file
from ressl.batch import DataError
from tools.beton_writer import EncodedSample, write_beton
from tools.index_file import read_index_file, write_index_file
from tools.shard_writer import Member, write_shards
from tools.tensor_writer import write_tensors_to

COUNT = 6
CLASSES = ("cat", "chêne", "漢字")
HEAD = HEADER.itemsize + len(FIELDS) * FIELD.itemsize
ROWS = HEAD + COUNT * metadata_dtype(FIELDS).itemsize
Regions = list[tuple[int, int]]  # first byte and end of each; damage falls into all of them alike


# --- whole data ------------------------------------------------------------------------------------------------------


def pixels(i: int) -> np.ndarray:
    patches = Image.fromarray(np.random.default_rng(i).integers(0, 256, (3, 4, 3), dtype=np.uint8))
    return np.asarray(patches.resize((20 + i, 16), Image.Resampling.BICUBIC))


def encoded(i: int, file_format: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(i)).save(file, file_format)
    return file.getvalue()


def samples(raw: Callable[[int], bool]) -> list[EncodedSample]:
    stored = [(pixels(i).tobytes(), RAW) if raw(i) else (encoded(i, "JPEG"), JPG) for i in range(COUNT)]
    return [EncodedSample(*one, (16, 20 + i), (32, 60), i % 3, i) for i, one in enumerate(stored)]


def seal(path: Path, images: list[EncodedSample], tables: bytes) -> None:
    """Writes the index beside a file, as `convert` does."""
    crc32 = np.array([zlib.crc32(image.data) for image in images])
    names = (f"{i}.jpg" for i in range(COUNT))
    write_index_file(path.with_name(path.name + ".index.npz"), crc32, names, sha256(tables).hexdigest())


@pytest.fixture
def beton(tmp_path: Path) -> Path:
    path, images = tmp_path / "train.beton", samples(lambda i: i % 2 == 0)
    write_beton(path, images, COUNT, page_size=1 << 21)
    content = path.read_bytes()
    seal(path, images, content[:ROWS] + content[-COUNT * ALLOCATION.itemsize :])
    return path


@pytest.fixture
def tensors(tmp_path: Path) -> Path:
    path, images = tmp_path / "train.safetensors", samples(lambda i: True)
    with path.open("w+b") as file:
        write_tensors_to(file, images, COUNT, CLASSES)
    content, stored = path.read_bytes(), sum(len(image.data) for image in images)
    first = 8 + int.from_bytes(content[:8], "little")
    seal(path, images, content[:first] + content[first + stored :])
    return path


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    root = tmp_path / "out" / "train"
    root.mkdir(parents=True)
    kinds = [("PNG", ".png") if i % 3 else ("JPEG", ".jpg") for i in range(COUNT)]
    members = [
        Member(encoded(i, kind), suffix, (16, 20 + i), (32, 60), i % 3, i, f"é{i}")
        for i, (kind, suffix) in enumerate(kinds)
    ]
    write_shards(root, members, COUNT, shard_images=4)
    skipped = ({"index": 6, "name": "x.jpg", "reason": "truncated"},)
    record = SplitRecord("train", COUNT, CLASSES, skipped, {"grey": 1}, 9, "train/index.npz", "0" * 64, {"to": "w"}, {})
    (root.parent / "manifest.json").write_text(manifest_text(Manifest({"train": record})))
    return root


# --- damage ----------------------------------------------------------------------------------------------------------


def damaged(path: Path, regions: Regions, count: int, seed: int = 0) -> Iterator[bytes]:
    """`count` times, the file at `path` is another one, with what is given here in it. Then it is whole again."""
    whole, draw = path.read_bytes(), np.random.default_rng(seed)
    for number in range(count):
        start, stop = regions[number % len(regions)]
        at, length = int(draw.integers(start, stop)), int(draw.integers(1, 24))
        match int(draw.integers(8)):
            case 0 | 1 | 2:
                new = whole[:at] + bytes([whole[at] ^ (1 << int(draw.integers(8)))]) + whole[at + 1 :]
            case 3:
                new = whole[:at] + draw.bytes(length) + whole[at + length :]
            case 4:
                new = whole[:at] + bytes([0 if number % 2 else 255]) * length + whole[at + length :]
            case 5:
                new = whole[:at]
            case 6:
                new = whole[:at] + whole[at + length :]
            case _:
                new = whole[:at] + draw.bytes(length) + whole[at:]
        replace(path, new)
        yield new
    replace(path, whole)


def replace(path: Path, content: bytes) -> None:
    """By another file, as the one before may be mapped."""
    other = path.with_suffix(".new")
    other.write_bytes(content)
    other.replace(path)


def refused(error: DataError, *names: Path) -> bool:
    text = str(error)
    assert text.startswith(tuple(map(str, names)))
    assert text.isprintable() and len(text) < 600
    return True


def same(one: Any, other: Any) -> bool:
    """All that a table holds; but not what tells one file from another in its place."""
    if isinstance(one, Beton | TensorFile | ShardIndex):
        names = [f.name for f in dataclasses.fields(one) if f.name not in ("identity", "stamps", "length", "pixels")]
        return all(same(getattr(one, name), getattr(other, name)) for name in names)
    if isinstance(one, np.ndarray):
        return bool(np.array_equal(one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


def judge(
    read: Callable[[int], np.ndarray], data: Callable[[int], bytes], images: list[np.ndarray], crc32: np.ndarray
) -> str:
    """What became of the images of damaged data whose tables are whole."""
    found = "the same"
    for i in range(COUNT):
        try:
            image = read(i)
        except BadImage as bad:
            assert str(bad) and str(bad).isprintable()
            return "bad image"
        if not np.array_equal(image, images[i]):
            assert zlib.crc32(data(i)) != crc32[i]
            found = "another image, which its checksum tells"
    return found


# --- .beton and tensor files -----------------------------------------------------------------------------------------


def test_a_damaged_beton_is_refused_or_the_same_or_has_a_bad_image(beton):
    whole = open_beton(beton, sealed=True)
    first, last = int(whole.data_ptr.min()), int((whole.data_ptr + whole.data_size).max())
    regions = [(0, 24), (24, HEAD), (HEAD, ROWS), (first, last), (whole.length - COUNT * 24, whole.length)]
    images = [read_sample(whole, i) for i in range(COUNT)]
    crc32 = read_index_file(beton.with_name("train.beton.index.npz")).crc32
    outcomes = Counter[str]()
    for content in damaged(beton, regions, 500):

        def data(i: int, content: bytes = content) -> bytes:
            return content[whole.data_ptr[i] :][: whole.data_size[i]]

        try:
            open_beton(beton)
        except DataError as error:
            outcomes["refused"] += refused(error, beton)
            continue
        try:
            found = open_beton(beton, sealed=True)
        except DataError as error:
            outcomes["refused by the index alone"] += refused(error, beton)
            continue
        assert same(found, whole)
        outcomes[judge(partial(read_sample, found), data, images, crc32)] += 1
    assert same(open_beton(beton, sealed=True), whole)
    assert len(outcomes) == 5 and min(outcomes.values()) >= 5, outcomes


def test_a_damaged_tensor_file_is_refused_or_the_same_but_for_pixels(tensors):
    whole = read_tensor_file(tensors, sealed=True)
    begin = 8 + int.from_bytes(tensors.read_bytes()[:8], "little")
    last = begin + 3 * int(whole.size.long().prod(1).sum())
    regions = [(0, 8), (8, begin), (begin, last), (last, tensors.stat().st_size)]
    images, crc32 = images_of(whole), read_index_file(tensors.with_name("train.safetensors.index.npz")).crc32
    outcomes = Counter[str]()
    for _ in damaged(tensors, regions, 400):
        try:
            read_tensor_file(tensors)
        except DataError as error:
            outcomes["refused"] += refused(error, tensors)
            continue
        try:
            found = read_tensor_file(tensors, sealed=True)
        except DataError as error:
            outcomes["refused by the index alone"] += refused(error, tensors)
            continue
        assert same(found, whole)
        now = images_of(found)
        outcomes[judge(now.__getitem__, lambda i, now=now: now[i].tobytes(), images, crc32)] += 1
    assert same(read_tensor_file(tensors, sealed=True), whole)
    assert len(outcomes) == 4 and min(outcomes.values()) >= 5, outcomes


def images_of(file: TensorFile) -> list[np.ndarray]:
    rows = zip(file.offset.tolist(), file.size.tolist(), strict=True)
    return [file.pixels[start : start + 3 * h * w].numpy().reshape(h, w, 3).copy() for start, (h, w) in rows]


@pytest.mark.parametrize("harm", ["missing", "damaged", "of another", "fifo", "pickle"])
def test_an_index_that_says_nothing_or_something_else_is_noticed(beton, tensors, harm):
    for path, read in ((beton, open_beton), (tensors, read_tensor_file)):
        index = path.with_name(path.name + ".index.npz")
        content = index.read_bytes()
        index.unlink()
        match harm:
            case "damaged":
                index.write_bytes(content[:-30])
            case "of another":
                seal(path, samples(lambda i: True), b"")
            case "fifo":
                os.mkfifo(index)
            case "pickle":
                index.write_bytes(pickle.dumps({"tables_sha256": np.array(b"x")}))
        assert read(path)
        if harm == "missing":
            assert read(path, sealed=True)
            continue
        words = "are not those that" if harm == "of another" else "not a regular file" if harm == "fifo" else "damaged"
        with pytest.raises(DataError, match=rf"{re.escape(str(path))}.*: .*{words}"):
            read(path, sealed=True)


@pytest.mark.parametrize("classes", ["[" * 100_000, "[" + "9" * 5000 + "]", '{"a": 1}', '"ab"', "[null]", "NaN", "\0"])
def test_class_names_that_are_no_list_of_words_are_refused(tensors, classes):
    save_file(load_file(tensors), tensors, metadata={"format": FORMAT, "classes": classes})
    with pytest.raises(DataError, match="its class names are not a list"):
        read_tensor_file(tensors)


# --- shards ----------------------------------------------------------------------------------------------------------


def test_a_damaged_index_of_shards_is_refused_or_the_same(shards):
    whole, path = read_index(shards), shards / "index.npz"
    size = path.stat().st_size
    outcomes = Counter[str]()
    for _ in damaged(path, [(0, size), (size - 900, size)], 400):
        try:
            found = read_index(shards)
        except DataError as error:
            outcomes["refused"] += refused(error, shards)
            continue
        assert same(found, whole)
        outcomes["the same"] += 1
    assert same(read_index(shards), whole)
    assert len(outcomes) == 2 and min(outcomes.values()) >= 5, outcomes


def test_damaged_shards_are_refused_or_the_same_or_have_a_bad_image(shards):
    whole, path = read_index(shards), shards / "shard-00000.tar"
    files = ShardFiles(whole)
    images = [decode_image(files.read(i)) for i in range(COUNT)]
    outcomes = Counter[str]()
    for _ in damaged(path, [(0, path.stat().st_size)], 400):
        try:
            found = read_index(shards)
        except DataError as error:  # it has another length
            outcomes["refused"] += refused(error, path)
            continue
        assert same(found, whole)
        files = ShardFiles(found)
        outcomes[judge(lambda i, files=files: decode_image(files.read(i)), files.read, images, whole.crc32)] += 1
    assert len(outcomes) == 4 and min(outcomes.values()) >= 5, outcomes


def test_the_dali_source_reads_damaged_shards_or_says_what_is_wrong(shards):
    """What it does before DALI decodes: reading, looking at headers, and decoding what DALI shall not see."""
    pytest.importorskip("nvidia.dali")
    from pipelines.dali_source import DaliSource

    path, index, outcomes = shards / "shard-00000.tar", read_index(shards), Counter[str]()
    options = {"device": torch.device("cpu"), "workers": 1, "max_side": None, "hw_decoder_load": 0.0}
    images = [(start, start + length) for start, length in zip(index.offset[:4], index.length[:4], strict=True)]
    for _ in damaged(path, images, 300):
        told: list[str] = []
        try:
            source = DaliSource(shards, **options, on_corrupt="replace", report=told.append)
            items = source._read(list(range(COUNT)), salt=0)
        except DataError as error:
            outcomes["refused"] += refused(error, path, shards / "index.npz")
            continue
        assert all(item.original == (32, 60) for item in items)
        assert sum(item.position != i for i, item in enumerate(items)) == len(told)
        assert all(line.startswith(f"{path}: é") and line.isprintable() for line in told)
        outcomes["replaced" if told else "read"] += 1
    assert len(outcomes) == 3 and min(outcomes.values()) >= 5, outcomes


# --- the manifest ----------------------------------------------------------------------------------------------------


def test_a_damaged_manifest_is_refused_or_the_same_or_known_as_another(shards):
    """Only `verify` reads the checksum in it: of what training takes from it, a name of a class can be another one."""
    path, whole = shards.parent / "manifest.json", read_manifest(shards.parent)
    outcomes = Counter[str]()
    for content in damaged(path, [(0, path.stat().st_size)], 400):
        try:
            found = read_manifest(shards.parent)
            classes = classes_of(shards)
        except DataError as error:
            outcomes["refused"] += refused(error, path)
            continue
        assert all(isinstance(name, str) for name in classes)
        if found != whole:
            assert manifest_text(found).encode() != content
        outcomes["the same" if found == whole else "another"] += 1
    assert len(outcomes) == 3 and min(outcomes.values()) >= 5, outcomes


ODD = (
    None,
    True,
    -1,
    0.5,
    float("nan"),
    10**30,
    "",
    "x",
    "\ud800",
    "a\0b",
    [],
    [1],
    [None],
    [["a"]],
    {},
    {"a": 1},
    "../x",
)


def test_a_manifest_with_odd_values_is_refused_or_gives_names_of_classes(shards):
    path = shards.parent / "manifest.json"
    raw = json.loads(path.read_text())
    for places in (raw, raw["splits"], raw["splits"]["train"]):
        for key, before in list(places.items()):
            for value in ODD:
                places[key] = value
                path.write_text(json.dumps(raw))
                try:
                    read_manifest(shards.parent)
                    assert all(isinstance(name, str) for name in classes_of(shards))
                except DataError as error:
                    assert refused(error, path)
            places[key] = before
    path.write_text("[" * 100_000)
    with pytest.raises(DataError, match="not a manifest written by `convert`"):
        read_manifest(shards.parent)
