"""WebDataset shards: written as other readers of that format expect them, and whole or not at all."""

import hashlib
import io
import os
import subprocess
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from pipelines.images import decode_image
from pipelines.manifest import read_manifest
from pipelines.shards import ShardFiles, read_index
from ressl.batch import DataError
from tools.convert import convert
from tools.shard_writer import Member, write_shards

KINDS = (".jpg", ".png", ".webp", ".bmp", ".tif")


def picture(seed: int, height: int = 40, width: int = 60) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((width, height))


def member(index: int, length: int = 1000) -> Member:
    file = io.BytesIO()
    picture(index).save(file, "PNG")
    return Member(file.getvalue() + bytes(length), ".png", (40, 60), (40, 60), index % 3, index, f"class/{index}.png")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two classes of ten images in five formats, under the suffixes of cameras and of other formats."""
    for i in range(10):
        path = tmp_path / "src" / "ab"[i % 2] / f"{i}{KINDS[i // 2]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i, 40 + i, 60).save(path)
    (tmp_path / "src" / "a" / "0.jpg").rename(tmp_path / "src" / "a" / "0.JPEG")
    (tmp_path / "src" / "b" / "3.png").rename(tmp_path / "src" / "b" / "3.jpg")
    return tmp_path / "src"


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO())


def test_files_are_kept_bit_for_bit_in_tar_files_that_python_and_tar_read(folder, tmp_path, console):
    convert(str(folder), tmp_path / "out", "webdataset", console=console)
    expected = [*sorted((folder / "a").iterdir()), *sorted((folder / "b").iterdir())]
    tar = tmp_path / "out" / "train" / "shard-00000.tar"
    with tarfile.open(tar) as file:
        members = file.getmembers()
        contents = [file.extractfile(one).read() for one in members]
    assert contents[::2] == [path.read_bytes() for path in expected]
    assert contents[1::2] == [b"0"] * 5 + [b"1"] * 5
    kinds = [".jpg", ".png", ".webp", ".bmp", ".tif", ".jpg", ".png", ".webp", ".bmp", ".tif"]  # by content, not name
    assert [one.name for one in members[::2]] == [f"{i:09}{kind}" for i, kind in enumerate(kinds)]
    assert [one.name for one in members[1::2]] == [f"{i:09}.cls" for i in range(10)]
    assert {(one.mtime, one.uid, one.gid, one.uname, one.isreg()) for one in members} == {(0, 0, 0, "", True)}
    listed = subprocess.run(["tar", "tf", tar], capture_output=True, text=True, check=True).stdout
    assert listed.split() == [one.name for one in members]


def test_the_index_says_what_lies_where(folder, tmp_path, console):
    manifest = convert(str(folder), tmp_path / "out", "webdataset", console=console)
    index = read_index(tmp_path / "out" / "train")
    files = ShardFiles(index)
    assert index.classes == manifest.splits["train"].classes == ("a", "b")
    assert (index.label.tolist(), index.index.tolist()) == ([0] * 5 + [1] * 5, list(range(10)))
    for position in range(10):
        name = index.name(position)
        assert files.read(position) == (folder / name).read_bytes()
        assert decode_image(files.read(position)).shape[:2] == tuple(index.size[position])
    assert np.array_equal(index.size, index.original)
    record = manifest.splits["train"]
    assert (record.file, record.count) == ("train", 10)
    assert record.bytes == sum(path.stat().st_size for path in (tmp_path / "out" / "train").iterdir())
    digest = hashlib.sha256((tmp_path / "out" / "train" / "index.npz").read_bytes()).hexdigest()
    assert (record.index, record.index_sha256) == ("train/index.npz", digest)
    assert index.crc32.tolist() == [zlib.crc32(files.read(position)) for position in range(10)]


def test_larger_images_are_encoded_anew_and_smaller_ones_kept(folder, tmp_path, console):
    convert(str(folder), tmp_path / "out", "webdataset", max_side=50, quality=95, console=console)
    convert(str(folder), tmp_path / "kept", "webdataset", max_side=60, console=console)
    index = read_index(tmp_path / "out" / "train")
    assert index.size.max(axis=1).tolist() == [50] * 10
    assert index.original.tolist() == read_index(tmp_path / "kept" / "train").size.tolist()
    for position in range(10):
        data = ShardFiles(index).read(position)
        assert data.startswith(b"\xff\xd8\xff")
        assert decode_image(data).shape[:2] == tuple(index.size[position])
    kept = ShardFiles(read_index(tmp_path / "kept" / "train"))
    assert all(kept.read(i) == (folder / kept.index.name(i)).read_bytes() for i in range(10))


def test_bad_images_are_left_out_and_keep_their_numbers(folder, tmp_path, console):
    (folder / "a" / "2.png").write_text("text")
    os.mkfifo(folder / "b" / "fifo.jpg")
    manifest = convert(str(folder), tmp_path / "out", "webdataset", max_skipped=0.5, console=console)
    skipped = {entry["index"]: entry["reason"] for entry in manifest.splits["train"].skipped}
    assert skipped.keys() == {1, 10}
    assert "FIFO" in skipped[10]
    assert read_index(tmp_path / "out" / "train").index.tolist() == [0, 2, 3, 4, 5, 6, 7, 8, 9]


def test_images_without_files_of_their_own_are_written_losslessly(tmp_path, console):
    images = np.random.default_rng(0).integers(0, 256, (6, 28, 28), dtype=np.uint8)
    for name, array in (("train-images-idx3-ubyte", images), ("train-labels-idx1-ubyte", np.arange(6, dtype=np.uint8))):
        shape = b"".join(length.to_bytes(4, "big") for length in array.shape)
        (tmp_path / "idx").mkdir(exist_ok=True)
        (tmp_path / "idx" / name).write_bytes(bytes([0, 0, 8, array.ndim]) + shape + array.tobytes())
    convert(str(tmp_path / "idx"), tmp_path / "out", "webdataset", console=console)
    files = ShardFiles(read_index(tmp_path / "out" / "train"))
    for i, image in enumerate(images):
        assert np.array_equal(decode_image(files.read(i)), np.repeat(image[:, :, None], 3, axis=2))


def test_the_bytes_do_not_depend_on_the_number_of_threads_or_the_day(folder, tmp_path, console):
    for name, workers in (("one", 1), ("other", 3)):
        convert(str(folder), tmp_path / name, "webdataset", workers=workers, max_side=50, console=console)
    for path in (tmp_path / "one" / "train").iterdir():
        assert path.read_bytes() == (tmp_path / "other" / "train" / path.name).read_bytes()
    assert (tmp_path / "one" / "manifest.json").read_bytes() == (tmp_path / "other" / "manifest.json").read_bytes()


def test_shards_end_at_their_number_of_images_and_of_bytes(tmp_path):
    cases = {"images": {"shard_images": 4}, "bytes": {"shard_bytes": 12_000}, "one": {"shard_bytes": 1}}
    for name, limits in cases.items():
        (tmp_path / name).mkdir()
        assert write_shards(tmp_path / name, map(member, range(10)), 12, **limits) == 10
        index = read_index(tmp_path / name)
        assert index.index.tolist() == list(range(10))
        assert [ShardFiles(index).read(i) for i in range(10)] == [member(i).data for i in range(10)]
        counts = np.bincount(index.shard).tolist()
        assert counts == {"images": [4, 4, 2], "one": [1] * 10}.get(name, counts)
        assert len(counts) > 1
        if name == "bytes":
            sizes = [path.stat().st_size for path in (tmp_path / name).glob("*.tar")]
            assert max(sizes) <= 12_000 + 1024  # the end of a tar file


def test_an_announced_number_that_is_too_small_and_no_image_at_all_are_refused(tmp_path):
    with pytest.raises(ValueError, match="more members than the 2 announced"):
        write_shards(tmp_path, map(member, range(3)), 2)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no image to write"):
        write_shards(tmp_path / "empty", [], 3)


def test_dali_reads_the_shards_by_our_index_files(tmp_path):
    pytest.importorskip("nvidia.dali")
    from nvidia.dali import fn, pipeline_def, types

    write_shards(tmp_path, (member(i, length=0) for i in range(7)), 7, shard_images=3)
    tars = sorted(map(str, tmp_path.glob("*.tar")))

    @pipeline_def(batch_size=7, num_threads=1, device_id=None)
    def graph():
        encoded, label = fn.readers.webdataset(
            paths=tars, index_paths=[tar.replace(".tar", ".idx") for tar in tars], ext=["jpg;png", "cls"]
        )
        return fn.decoders.image(encoded, device="cpu", output_type=types.RGB), label

    images, labels = graph().run()
    assert [labels.at(i).tobytes() for i in range(7)] == [str(i % 3).encode() for i in range(7)]
    assert all(np.array_equal(images.at(i), np.asarray(picture(i))) for i in range(7))


def test_dalis_index_files_are_those_of_its_own_tool(tmp_path):
    tool = pytest.importorskip("wds2idx")
    write_shards(tmp_path, map(member, range(7)), 7)
    creator = tool.IndexCreator(str(tmp_path / "shard-00000.tar"), str(tmp_path / "theirs"), verbose=False)
    creator.create_index()
    creator.close()
    assert (tmp_path / "theirs").read_bytes() == (tmp_path / "shard-00000.idx").read_bytes()


# --- whole or not at all ---------------------------------------------------------------------------------------------


def test_an_error_leaves_nothing_and_an_older_output_stays(folder, tmp_path, console):
    convert(str(folder), tmp_path / "out", "webdataset", console=console)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out" / "train").iterdir()}
    with pytest.raises(DataError, match=r"train: exists already.*--overwrite"):
        convert(str(folder), tmp_path / "out", "webdataset", console=console)
    (folder / "a" / "4.webp").write_bytes(b"")
    for out in ("out", "new"):
        with pytest.raises(DataError, match="cannot be read"):
            convert(str(folder), tmp_path / out, "webdataset", overwrite=True, console=console)
    assert not (tmp_path / "new").exists()
    assert {path.name: path.read_bytes() for path in (tmp_path / "out" / "train").iterdir()} == before
    convert(str(folder), tmp_path / "out", "webdataset", overwrite=True, max_skipped=0.5, console=console)
    assert len(read_index(tmp_path / "out" / "train").label) == 9
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["manifest.json", "train"]
    assert read_manifest(tmp_path / "out").splits["train"].count == 9


def test_a_directory_that_is_not_ours_is_never_replaced(folder, tmp_path, console):
    """Such as the images themselves, where the destination is the source."""
    (tmp_path / "data").mkdir()
    folder.rename(tmp_path / "data" / "train")
    with pytest.raises(DataError, match="is, or lies inside"):
        convert(str(tmp_path / "data"), tmp_path / "data", "webdataset", overwrite=True, console=console)
    assert len(list((tmp_path / "data" / "train").rglob("*.*"))) == 10
