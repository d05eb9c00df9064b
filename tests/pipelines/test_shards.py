"""The index of WebDataset shards: images are read from where it says, and nothing damaged is believed."""

import io
import os
import threading
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.images import BadImage
from pipelines.manifest import Manifest, SplitRecord, classes_of, manifest_text
from pipelines.shards import ShardFiles, read_index
from ressl.batch import DataError
from tools.shard_writer import Member, write_shards

COUNT = 9


def member(index: int) -> Member:
    file = io.BytesIO()
    image = np.random.default_rng(index).integers(0, 256, (8 + index, 12, 3), dtype=np.uint8)
    Image.fromarray(image).save(file, "PNG")
    size = (8 + index, 12)
    return Member(file.getvalue(), ".png", size, (2 * size[0], 24), index % 3 - 1, 10 * index, f"c/{index}\u00e9.png")


@pytest.fixture
def root(tmp_path) -> Path:
    write_shards(tmp_path, map(member, range(COUNT)), COUNT, shard_images=2)
    return tmp_path


def change(root: Path, **arrays) -> None:
    """Writes the index anew with other arrays."""
    with np.load(root / "index.npz") as file:
        changed = {name: arrays.get(name, file[name]) for name in file.files}
    np.savez(root / "index.npz", **{name: array for name, array in changed.items() if array is not None})


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def stored(root: Path, name: str) -> np.ndarray:
    with np.load(root / "index.npz") as file:
        return file[name]


def test_images_are_read_in_any_order_and_by_several_threads(root):
    files, wrong = ShardFiles(read_index(root)), []

    def read(seed: int) -> None:
        for i in np.random.default_rng(seed).permutation(np.tile(np.arange(COUNT), 20)).tolist():
            if files.read(i) != member(i).data:
                wrong.append(i)

    readers = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert wrong == []


def test_the_tables_hold_what_was_written(root):
    index = read_index(root)
    assert index.shards == tuple(f"shard-{i:05}.tar" for i in range(5))
    assert index.size.tolist() == [[8 + i, 12] for i in range(COUNT)]
    assert index.original.tolist() == [[16 + 2 * i, 24] for i in range(COUNT)]
    assert index.label.tolist() == [i % 3 - 1 for i in range(COUNT)]
    assert index.index.tolist() == [10 * i for i in range(COUNT)]
    assert index.crc32.tolist() == [zlib.crc32(member(i).data) for i in range(COUNT)]
    assert [index.name(i) for i in range(COUNT)] == [f"c/{i}\u00e9.png" for i in range(COUNT)]
    assert index.classes == ()
    assert ShardFiles(index).where(3) == f"{root}/shard-00001.tar: c/3\u00e9.png"


def test_more_shards_than_may_stay_open_are_read_all_the_same(root):
    before = open_files()
    files = ShardFiles(read_index(root), max_open=2)
    for _ in range(3):
        assert [files.read(i) for i in range(COUNT)] == [member(i).data for i in range(COUNT)]
    assert open_files() == before + 2
    del files
    assert open_files() == before


def test_a_shard_that_is_cut_or_removed_while_it_is_read_is_a_bad_image(root):
    files = ShardFiles(read_index(root))
    files.read(0)
    os.truncate(root / "shard-00000.tar", 600)
    with pytest.raises(BadImage, match=r"the shard ends after 88 of its"):
        files.read(0)
    (root / "shard-00001.tar").unlink()
    with pytest.raises(BadImage, match="cannot be read: no such file"):
        files.read(2)


def rewritten(root: Path) -> Path:
    """The same shards beside `root` with the images of each in another order: files of the same names and sizes."""
    new = root.with_name(root.name + "-new")
    new.mkdir()
    write_shards(new, map(member, [1, 0, 3, 2, 5, 4, 7, 6, 8]), COUNT, shard_images=2)
    assert [stored(new, name).tolist() for name in ("shards", "shard_bytes")] == [
        stored(root, name).tolist() for name in ("shards", "shard_bytes")
    ]
    return new


@pytest.mark.parametrize("max_open", [1, 256])
def test_a_shard_that_was_replaced_since_the_index_was_read_ends_the_run(root, max_open):
    files, open_before = ShardFiles(read_index(root), max_open=max_open), open_files()
    assert [files.read(i) for i in (0, 2)] == [member(i).data for i in (0, 2)]
    new = rewritten(root)
    root.rename(root.with_name(root.name + "-old"))
    new.rename(root)
    assert files.read(0) == member(0).data  # of the file that is still open
    for i in (3, 5, 8) if max_open == 1 else (5, 8):
        with pytest.raises(DataError, match=r"shard-0000\d\.tar: changed since the run began; start it again"):
            files.read(i)
    assert open_files() == open_before + min(max_open, 2)
    assert ShardFiles(read_index(root)).read(0) == member(1).data


def test_a_shard_that_was_written_again_in_place_ends_the_run(root):
    files = ShardFiles(read_index(root))
    for tar in sorted(rewritten(root).glob("*.tar")):
        (root / tar.name).write_bytes(tar.read_bytes())
    with pytest.raises(DataError, match=r"shard-00001\.tar: changed since the run began"):
        files.read(2)


@pytest.mark.parametrize("after", ["replaced", "removed"])
def test_an_index_that_is_replaced_while_it_is_read_is_refused(root, monkeypatch, after):
    """Another process finishes its conversion between the reading of the index and the look at the shards."""
    new, load = rewritten(root), np.load

    def load_late(*args, **kwargs):
        loaded = load(*args, **kwargs)
        if new.exists():
            root.rename(root.with_name(root.name + "-old"))
            new.rename(root)
            if after == "removed":
                (root / "index.npz").unlink()
        return loaded

    monkeypatch.setattr(np, "load", load_late)
    with pytest.raises(DataError, match=r"index\.npz: changed while it was read; start again"):
        read_index(root)
    if after == "replaced":
        assert ShardFiles(read_index(root)).read(0) == member(1).data


def no_words_of_numpy(message: str) -> bool:
    said, words = message.partition("index.npz: ")[2], ("pickle", "context manager", "archive", "attribute", "zipfile")
    return said != "" and not any(word in said for word in words)


def test_what_is_no_index_is_refused(root):
    path = root / "index.npz"
    whole, array = path.read_bytes(), io.BytesIO()
    np.save(array, np.arange(9))
    for data in (b"", b"text", array.getvalue(), b"\x80\x04K\x01."):
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"index\.npz: not a zip file.*; convert .* again") as raised:
            read_index(root)
        assert no_words_of_numpy(str(raised.value))
    for data in (b"PK", whole[: len(whole) // 2], whole[:-1], whole.replace(b"NUMPY", b"DUMMY")):
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"index\.npz: damaged: .*; convert .* again") as raised:
            read_index(root)
        assert no_words_of_numpy(str(raised.value))
    path.unlink()
    with pytest.raises(DataError, match=r"index\.npz: cannot be read: No such file.*webdataset"):
        read_index(root)
    os.mkfifo(path)
    with pytest.raises(DataError, match="not a regular file"):
        read_index(root)


def test_an_index_with_pickled_objects_is_refused(root):
    change(root, label=np.array([print] * COUNT, object))
    with pytest.raises(DataError, match=r"index\.npz: damaged: label cannot be read") as raised:
        read_index(root)
    assert no_words_of_numpy(str(raised.value))


def test_an_index_with_a_member_that_is_no_array_is_refused(root):
    change(root, format=None)
    with zipfile.ZipFile(root / "index.npz", "a") as file:
        file.writestr("format.npy", "ressl-shards-2")
    with pytest.raises(DataError, match=r"index\.npz: damaged: format cannot be read"):
        read_index(root)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("format", np.array(b"ressl-shards-9"), "not an index of the format ressl-shards-2"),
        ("label", None, "damaged: label cannot be read; convert"),
        ("format", None, "damaged: format cannot be read"),
        ("label", np.zeros(COUNT - 1, np.int64), r"label is \(8,\)"),
        ("label", np.zeros(COUNT), "label is .* float64"),
        ("crc32", None, "damaged: crc32 cannot be read; convert"),
        ("crc32", np.zeros(COUNT, np.int64), "crc32 is .* int64"),
        ("size", np.ones((COUNT, 3), np.int32), "size is"),
        ("shard", np.zeros(0, np.int32), "it holds no images"),
        ("names", np.zeros(3), "its names are no bytes"),
        ("shards", np.array([b"../shard-00000.tar"] * 5), "named twice"),
        ("shards", np.array([f"../shard-0000{i}.tar".encode() for i in range(5)]), "no name of a shard"),
        (
            "shards",
            np.array([f"shard-0000{i}.tar".encode() for i in (5, 0, 1, 2, 3)]),
            r"shard-00005\.tar: cannot be read",
        ),
        ("shard_bytes", np.full(5, 7), r"shard-00000\.tar: .* bytes, but index\.npz says 7"),
        ("shard", np.full(COUNT, 5, np.int32), "a shard that does not exist"),
        ("shard", np.full(COUNT, -1, np.int32), "a shard that does not exist"),
        ("offset", np.full(COUNT, 0), "impossible place"),
        ("offset", np.full(COUNT, 513), "impossible place"),
        ("offset", np.full(COUNT, 2**62), "beyond the end"),
        ("offset", np.full(COUNT, 512), "two images at the same place"),
        ("length", np.zeros(COUNT, np.int64), "impossible place"),
        ("length", np.full(COUNT, 2**30), "beyond the end"),
        ("size", np.zeros((COUNT, 2), np.int32), "impossible height"),
        ("size", np.full((COUNT, 2), 65500, np.int32), "impossible height"),
        ("original", np.ones((COUNT, 2), np.int32), "impossible height"),
        ("label", np.full(COUNT, -2), "a label outside"),
        ("index", np.zeros(COUNT, np.int64), "repeated index"),
        ("index", np.arange(COUNT) - 1, "negative"),
        ("name_end", np.zeros(COUNT, np.int64), "names of impossible lengths"),
        ("name_end", np.arange(COUNT)[::-1].copy(), "names of impossible lengths"),
    ],
)
def test_a_damaged_index_is_refused(root, name, value, message):
    change(root, **{name: value})
    if value is None:
        with np.load(root / "index.npz") as file:
            assert name not in file.files
    with pytest.raises(DataError, match=message):
        read_index(root)


def test_a_cut_shard_and_one_that_is_no_file_are_refused(root):
    os.truncate(root / "shard-00002.tar", 512)
    with pytest.raises(DataError, match=r"shard-00002\.tar: 512 bytes, but index\.npz says .*; convert or copy"):
        read_index(root)
    (root / "shard-00002.tar").unlink()
    (root / "shard-00002.tar").mkdir()
    with pytest.raises(DataError, match=r"shard-00002\.tar: not a regular file"):
        read_index(root)


def test_the_sizes_of_shards_are_all_that_is_read_of_them(root):
    """Opening a large set must not take long."""
    size = int(stored(root, "shard_bytes")[0])
    (root / "shard-00000.tar").write_bytes(bytes(size))
    read_index(root)


@pytest.mark.parametrize(
    ("start", "path"), [("", "train"), ("train", "."), ("train/deep", ".."), ("", "train/deep/..")]
)
def test_classes_are_found_wherever_the_path_starts(tmp_path, monkeypatch, start, path):
    root = tmp_path / "train"
    (root / "deep").mkdir(parents=True)
    write_shards(root, map(member, range(COUNT)), COUNT)
    record = SplitRecord("train", COUNT, ("a", "b"), (), {}, 0, "train/index.npz", "", {}, {})
    (tmp_path / "manifest.json").write_text(manifest_text(Manifest({"train": record})))
    monkeypatch.chdir(tmp_path / start)
    assert classes_of(Path(path)) == read_index(Path(path)).classes == ("a", "b")


def test_the_size_of_an_image_is_believed_only_if_the_image_has_it(root):
    size = stored(root, "size")
    size[3] = (12, 11)
    change(root, size=size)
    files = ShardFiles(read_index(root))
    assert files.original(2, (10, 12)) == (20, 24)
    with pytest.raises(BadImage, match=r"11 x 12 pixels \(height x width\), but index\.npz says 12 x 11"):
        files.original(3, (11, 12))
