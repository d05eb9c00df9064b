"""A converted data set is compared with what it was made of, and with its own manifest."""

import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from pipelines.beton import ALLOCATION, FIELD, FIELDS, HEADER, metadata_dtype
from pipelines.manifest import SplitRecord, read_manifest
from ressl.batch import DataError
from tools.convert import convert
from tools.index_file import read_index_file, write_index_file
from tools.verify import verify
from tools.verify_content import check_content
from tools.verify_layout import open_stored
from tools.verify_report import Report
from tools.verify_source import find_source

FORMATS = ("ffcv", "tensor", "webdataset")


def smooth(seed: int, height: int, width: int) -> Image.Image:
    colours = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """src/, twelve images in three classes, one of them damaged; and a data set of it in each format."""
    root = tmp_path_factory.mktemp("whole")
    for i in range(12):
        path = root / "src" / "abc"[i % 3] / f"{i:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        smooth(i, 80 if i % 2 else 40, 70).save(path, quality=85)
    (root / "src" / "b" / "04.jpg").write_bytes(b"not an image")
    for to in FORMATS:
        convert(str(root / "src"), root / to, to, max_skipped=0.5, console=Console(quiet=True))
    return root


@pytest.fixture
def source(whole, tmp_path) -> Path:
    """May be changed."""
    return Path(shutil.copytree(whole / "src", tmp_path / "src"))


def check(path: Path, **options) -> tuple[bool, str]:
    """Whether it is whole, and what was printed."""
    console = Console(file=io.StringIO(), width=250)
    good = verify(path, deep=True, console=console, **options)
    return good, console.file.getvalue()


def cells(text: str) -> list[str]:
    """What the table's only row says of structure, checksums, decoding and source."""
    (line,) = [line for line in text.splitlines() if line.startswith("│")]
    return [cell.strip() for cell in line.strip("│").split("│")][3:]


def change_manifest(root: Path, change: Callable[[dict], None]) -> None:
    raw = json.loads((root / "manifest.json").read_text())
    change(raw["splits"]["train"])
    seal_manifest(root, raw)


def seal_manifest(root: Path, raw: dict) -> None:
    """With the checksum of what it says now, as an edited manifest would be refused for that alone."""
    raw["sha256"] = hashlib.sha256(json.dumps(raw["splits"], sort_keys=True).encode()).hexdigest()
    (root / "manifest.json").write_text(json.dumps(raw, indent=1, sort_keys=True) + "\n")


# --- the source ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", FORMATS)
def test_the_source_is_found_where_it_is_now(whole, source, to):
    good, text = check(whole / to, source=str(source))
    assert good, text
    assert cells(text) == ["ok"] * 4


@pytest.mark.parametrize("to", FORMATS)
def test_a_source_that_is_gone_is_said_and_is_nothing_wrong(source, tmp_path, to):
    convert(str(source), tmp_path / "out", to, max_skipped=0.5, console=Console(quiet=True))
    source.rename(tmp_path / "elsewhere")
    good, text = check(tmp_path / "out")
    assert good, text
    assert cells(text)[:3] == ["ok"] * 3
    assert cells(text)[3] == "not checked"
    assert f"source not checked: {source}: no such directory" in text
    assert "--source says where it is now\n" in text
    with pytest.raises(DataError, match="no such"):
        check(tmp_path / "out", source=str(source))


@pytest.mark.parametrize("to", FORMATS)
def test_an_image_that_was_replaced_in_the_source_is_found_by_its_pixels(whole, source, to):
    smooth(99, 80, 70).save(source / "a" / "03.jpg", quality=85)
    smooth(98, 60, 70).save(source / "c" / "05.jpg", quality=85)
    (source / "b" / "07.jpg").write_text("damaged since")
    good, text = check(whole / to, source=str(source))
    assert not good
    assert cells(text) == ["ok", "ok", "ok", "3 problems"]
    assert "(a/03.jpg): not the image of its source (PSNR " in text
    assert "(c/05.jpg): its source gives another size: 60 x 70, not 80 x 70" in text
    assert "(b/07.jpg): its source cannot be converted any more: not an image" in text
    assert "the source is not what they were made of" in text


@pytest.mark.parametrize("to", FORMATS)
def test_entries_that_came_went_or_moved_are_named(whole, source, to):
    (source / "c" / "11.jpg").rename(source / "c" / "12.jpg")
    good, text = check(whole / to, source=str(source))
    assert not good
    assert "image 11 (c/11.jpg): that entry of its source is c/12.jpg" in text
    assert cells(text)[3] == "1 problem"
    smooth(5, 40, 70).save(source / "c" / "13.jpg")
    assert "made of 12 entries, but its source has 13" in check(whole / to, source=str(source))[1]
    (source / "a" / "00.jpg").unlink()
    (source / "c" / "13.jpg").unlink()
    good, text = check(whole / to, source=str(source))
    assert not good
    assert "made of 12 entries, but its source has 11" in text
    assert "skipped entry 5 was b/04.jpg, but its source has another there" in text


@pytest.mark.parametrize("to", FORMATS)
def test_another_label_in_the_source_is_found(whole, source, to):
    """The directories change their names, and so the classes their numbers, but no file's name is another."""
    for image in [*(source / "a").iterdir(), *(source / "c").iterdir()]:
        image.rename(image.with_name("x" + image.name))
    good, text = check(whole / to, source=str(source))
    assert not good
    (source / "a").rename(source / "d")
    good, text = check(whole / to, source=str(source))
    assert "its source has other classes than manifest.json says" in text


def test_labels_that_were_changed_with_all_checksums_are_found_by_the_source(whole, tmp_path):
    root = Path(shutil.copytree(whole / "ffcv", tmp_path / "ffcv"))
    path, index_path = root / "train.beton", root / "train.beton.index.npz"
    data = bytearray(path.read_bytes())
    head, row = HEADER.itemsize + len(FIELDS) * FIELD.itemsize, metadata_dtype(FIELDS)
    rows = np.frombuffer(data, row, 11, head).copy()
    assert rows["label"][[0, 10]].tolist() == [0, 2]
    rows["label"][[0, 10]] = [2, 0]
    data[head : head + rows.nbytes] = rows.tobytes()
    path.write_bytes(data)
    index = read_index_file(index_path)
    table = len(data) - 11 * ALLOCATION.itemsize
    digest = hashlib.sha256(data[: head + rows.nbytes] + data[table:]).hexdigest()
    write_index_file(index_path, index.crc32, map(index.name, range(11)), digest)
    sealed = hashlib.sha256(index_path.read_bytes()).hexdigest()
    change_manifest(root, lambda record: record.update(index_sha256=sealed))
    console = Console(file=io.StringIO(), width=250)
    assert verify(root, console=console), console.file.getvalue()
    good, text = check(root)
    assert not good
    assert "image 0 (a/00.jpg): label 2, but 0 in its source" in text
    assert "(c/11.jpg): label 0, but 2 in its source" in text
    assert cells(text) == ["ok", "ok", "ok", "2 problems"]


def test_images_that_another_version_of_a_codec_would_write_otherwise_are_like_their_source(whole, tmp_path):
    """Another quality stands for another version of Pillow."""
    root = Path(shutil.copytree(whole / "ffcv", tmp_path / "ffcv"))
    change_manifest(root, lambda record: record["options"].update(quality=92))
    good, text = check(root)
    assert good, text
    assert "6 images are not what encoding them now would give, but look the same" in text
    change_manifest(root, lambda record: record["options"].update(quality=5))
    good, text = check(root)
    assert not good
    assert "not the image of its source (PSNR" in text


@pytest.mark.parametrize("mode", ["original", "smart", "jpg", "raw"])
def test_images_of_every_mode_are_compared(source, tmp_path, mode):
    (source / "a" / "00.jpg").unlink()
    smooth(0, 40, 70).save(source / "a" / "00.png")
    convert(str(source), tmp_path / "out", "ffcv", mode=mode, max_skipped=0.5, console=Console(quiet=True))
    good, text = check(tmp_path / "out")
    assert good, text
    assert cells(text) == ["ok"] * 4


@pytest.mark.parametrize("to", FORMATS)
def test_resized_images_are_compared(source, tmp_path, to):
    convert(str(source), tmp_path / "out", to, max_side=72, max_skipped=0.5, console=Console(quiet=True))
    good, text = check(tmp_path / "out")
    assert good, text
    assert cells(text) == ["ok"] * 4


def test_a_split_that_the_source_does_not_have_is_said(whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole / "tensor", out)
    change_manifest(out, lambda record: record["source"].update(split="test"))
    good, text = check(out, source=str(whole / "src"))
    assert good, text
    assert cells(text)[3] == "not checked"
    assert f"source not checked: {whole / 'src'} has no split test, only train" in text


def test_a_file_that_was_taken_without_being_decoded_is_decoded(source, tmp_path):
    path = source / "a" / "03.jpg"
    data = path.read_bytes()
    middle = len(data) * 2 // 3
    path.write_bytes(data[:middle] + b"\xff\xd9")  # it ends as a whole file does
    convert(str(source), tmp_path / "out", "webdataset", check="header", max_skipped=0.5, console=Console(quiet=True))
    good, text = check(tmp_path / "out")
    assert not good
    assert cells(text)[:3] == ["ok", "ok", "1 problem"]
    assert "(a/03.jpg): cannot be decoded" in text


@pytest.mark.parametrize(
    ("to", "mode", "suffix"),
    [("webdataset", "auto", "png"), ("webdataset", "auto", "jpg"), ("ffcv", "original", "jpg")],
)
def test_kept_files_have_the_bytes_of_their_source_and_not_only_its_looks(tmp_path, to, mode, suffix):
    """Every other file is written again: a pixel differs by a bit, or nothing but how it is compressed."""
    for i in range(6):
        path = tmp_path / "src" / "ab"[i % 2] / f"{i}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        smooth(i, 40, 70).save(path)
    convert(str(tmp_path / "src"), tmp_path / "out", to, mode=mode, console=Console(quiet=True))
    assert check(tmp_path / "out")[0]
    for path in (tmp_path / "src" / "b").iterdir():
        pixels = np.array(Image.open(path))
        pixels[0, 0, 0] ^= 1
        Image.fromarray(pixels).save(path, **({"compress_level": 1} if suffix == "png" else {"quality": 95}))
    good, text = check(tmp_path / "out")
    assert not good
    assert cells(text) == ["ok", "ok", "ok", "3 problems"]
    assert text.count("not the bytes of its source, though stored as they were (PSNR") == 3
    assert "look the same" not in text


@pytest.mark.parametrize(("to", "mode"), [("tensor", "auto"), ("ffcv", "raw"), ("webdataset", "auto")])
def test_what_is_stored_without_loss_has_the_pixels_of_its_source(tmp_path, to, mode):
    images = np.random.default_rng(0).integers(0, 256, (6, 9, 8), dtype=np.uint8)
    source = tmp_path / "src"
    source.mkdir()

    def write() -> None:
        for what, array in (("images-idx3", images), ("labels-idx1", np.arange(6, dtype=np.uint8))):
            shape = b"".join(side.to_bytes(4, "big") for side in array.shape)
            (source / f"train-{what}-ubyte").write_bytes(bytes([0, 0, 8, array.ndim]) + shape + array.tobytes())

    write()
    convert(str(source), tmp_path / "out", to, mode=mode, console=Console(quiet=True))
    assert check(tmp_path / "out")[0]
    images[4, 0, 0] ^= 1
    write()
    good, text = check(tmp_path / "out")
    assert not good
    assert cells(text)[3] == "1 problem"
    assert "[4]): not the pixels of its source, though stored without loss (PSNR" in text


@pytest.mark.parametrize("to", FORMATS)
def test_an_entry_that_was_skipped_but_can_be_read_is_named(whole, source, to):
    smooth(4, 40, 70).save(source / "b" / "04.jpg", quality=85)
    good, text = check(whole / to, source=str(source))
    assert not good
    assert cells(text) == ["ok", "ok", "ok", "1 problem"]
    (line,) = [line for line in text.splitlines() if "was skipped, but can be read" in line]
    assert line.startswith(f"{whole / to}/train")
    assert "entry 5 (b/04.jpg) was skipped, but can be read: changed since, or left out wrongly (not an image" in line


def test_what_images_are_compared_with_is_said_first(whole, source):
    text = check(whole / "ffcv", source=str(source))[1]
    assert text.startswith(f"train: each image is compared with train of image folder {source}")


@pytest.mark.parametrize("made", [False, True])
def test_a_data_set_of_torchvision_is_not_downloaded_to_be_compared(whole, tmp_path, monkeypatch, made):
    root, place = Path(shutil.copytree(whole / "tensor", tmp_path / "tensor")), tmp_path / "data" / "torchvision"
    monkeypatch.chdir(tmp_path)
    if made:
        place.mkdir(parents=True)
    change_manifest(root, lambda record: record["source"].update(place="torchvision:MNIST"))
    good, text = check(root)
    assert good, text
    assert cells(text)[3] == "not checked"
    assert "source not checked: torchvision:MNIST: cannot be read" in text
    with pytest.raises(DataError, match=r"torchvision:MNIST: cannot be read.*elsewhere"):
        check(root, source="torchvision:MNIST:elsewhere")
    assert sorted(path.name for path in tmp_path.rglob("*MNIST*")) == []


def test_an_archive_that_changes_while_it_is_compared_is_told_in_one_line(source, tmp_path):
    tar = tmp_path / "src.tar"
    with tarfile.open(tar, "w") as file:
        file.add(source, "src")
    convert(str(tar), tmp_path / "out", "ffcv", max_skipped=0.5, console=Console(quiet=True))
    (record,) = read_manifest(tmp_path / "out").splits.values()
    report = Report("train")
    stored = open_stored(tmp_path / "out" / record.file, record, report)
    found = find_source(stored, record, None, None, report)
    os.utime(tar, (1, 1))
    with pytest.raises(DataError, match=rf"^{tar}: changed"):
        check_content(stored, report, deep=True, source=found, workers=2, advance=lambda *_: None)


# --- the manifest ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 10}, "11 images, but manifest.json says 10"),
        ({"bytes": 100}, "bytes, but manifest.json says 100"),
        ({"bytes": "100"}, "what it says of train cannot be"),
        ({"file": "other.beton"}, r"other.beton"),
        ({"file": "../train.beton"}, "what it says of train cannot be"),
        ({"index": "other.npz"}, "the index of train.beton is 'other.npz', expected 'train.beton.index.npz'"),
        ({"index_sha256": "0" * 64}, "not the one that manifest.json knows"),
        ({"classes": ["a", "b"]}, "label 2, outside the 2 classes"),
        ({"classes": ["a", "b", "x"]}, "its source has other classes"),
        ({"skipped": []}, "do not make up the whole source"),
        ({"skipped": [{"index": 4, "name": "b/04.jpg", "reason": ""}]}, "do not make up the whole source"),
        ({"skipped": [{"index": 5, "name": "b/09.jpg", "reason": ""}]}, "skipped entry 5 was b/09.jpg"),
        ({"skipped": [{"index": 5}]}, "what it says of train cannot be"),
        ({"skipped": [3]}, "what it says of train cannot be"),
        ({"skipped": [{"index": True, "name": "b/04.jpg", "reason": ""}]}, "what it says of train cannot be"),
        ({"skipped": [{"index": 5, "name": "b/04.jpg", "reason": 5}]}, "what it says of train cannot be"),
        ({"changes": []}, "what it says of train cannot be"),
        ({"changes": {"grey": "1"}}, "what it says of train cannot be"),
        ({"changes": {"grey": -1}}, "what it says of train cannot be"),
        ({"count": True}, "not a manifest written by `convert`"),
        ({"bytes": True}, "what it says of train cannot be"),
        ({"file": "a\0b.beton"}, "what it says of train cannot be"),
        ({"file": "\ud800.beton"}, "what it says of train cannot be"),
        (
            {"source": {"description": 1, "place": "x", "labels": None, "split": "train"}},
            "what it says of train cannot",
        ),
        ({"source": {"description": "", "place": "a\0b", "labels": None, "split": "train"}}, "its source is no place"),
        ({"source": {"description": "", "place": "x", "labels": "a\0b", "split": "train"}}, "its source is no place"),
        ({"source": {"description": "", "place": "\ud800", "labels": None, "split": "t"}}, "or its source are damaged"),
        ({"options": {"to": "ffcv", "quality": "90"}}, "its options or its source are damaged"),
        ({"options": {"to": "ffcw"}}, "its options or its source are damaged"),
        ({"options": 1}, "what it says of train cannot be"),
        ({"source": {"description": "", "labels": None, "split": "train"}}, "its options or its source are damaged"),
        ({"source": {"place": "x", "labels": 5, "split": "train"}}, "its options or its source are damaged"),
        ({"extra": 1}, "not a manifest written by `convert`"),
    ],
)
def test_a_manifest_that_says_what_is_not_so_is_found(whole, tmp_path, change, message):
    root = Path(shutil.copytree(whole / "ffcv", tmp_path / "ffcv"))
    assert not change.keys() - {"extra", *SplitRecord.__slots__}
    change_manifest(root, lambda record: record.update(change))
    good, text = check(root)
    assert not good
    assert message in text


def test_a_manifest_without_any_split_is_refused(whole, tmp_path):
    root = Path(shutil.copytree(whole / "tensor", tmp_path / "tensor"))
    raw = json.loads((root / "manifest.json").read_text())
    raw["splits"] = {}
    seal_manifest(root, raw)
    with pytest.raises(DataError, match="lists nothing"):
        check(root)


def test_a_flipped_byte_of_the_manifest_is_found_wherever_it_is(whole, tmp_path):
    root = Path(shutil.copytree(whole / "webdataset", tmp_path / "webdataset"))
    path = root / "manifest.json"
    before = path.read_bytes()
    missed = []
    for place in range(0, len(before), 23):
        path.write_bytes(before[:place] + bytes([before[place] ^ 0x01]) + before[place + 1 :])
        if verify(root, workers=1, console=Console(quiet=True)):
            missed.append(place)
    assert missed == []
