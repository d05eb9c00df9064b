"""Every kind of odd image through the converter, to every format: converted by one rule, or named and left out."""

import io
import os
import time

import pytest
from rich.console import Console

from pipelines.beton import open_beton
from pipelines.shards import ShardFiles, read_index
from pipelines.tensor_file import read_tensor_file
from ressl.batch import DataError
from tools.convert import convert
from tools.verify import verify

FORMATS = [("ffcv", "jpg"), ("ffcv", "original"), ("ffcv", "smart"), ("tensor", "auto"), ("webdataset", "auto")]


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.fixture
def odd(odd_images):
    """The directory, the images that can be read with their sizes, and the others with the reason."""
    root, outcomes = odd_images
    outcomes = {name: found for name, found in outcomes.items() if name != "directory.jpg"}  # it is looked into
    if os.geteuid() == 0:
        outcomes["unreadable.jpg"] = (48, 64)
    good = {name: found for name, found in outcomes.items() if isinstance(found, tuple)}
    return root, good, {name: found for name, found in outcomes.items() if name not in good}


def sizes(directory, to) -> dict[int, tuple[int, int]]:
    """Height and width by index."""
    match to:
        case "ffcv":
            found = open_beton(directory / "train.beton")
        case "tensor":
            found = read_tensor_file(directory / "train.safetensors")
        case _:
            found = read_index(directory / "train")
    return dict(zip(found.index.tolist(), map(tuple, found.size.tolist()), strict=True))


@pytest.mark.parametrize(("to", "mode"), FORMATS)
def test_each_is_converted_or_left_out_with_its_reason(odd, tmp_path, console, to, mode):
    root, good, bad = odd
    began = time.monotonic()
    manifest = convert(str(root), tmp_path / "out", to, mode=mode, max_skipped=1.0, console=console)
    assert time.monotonic() - began < 30
    record = manifest.splits["train"]
    reasons = {entry["name"]: entry["reason"] for entry in record.skipped}
    assert reasons.keys() == bad.keys()
    assert {name: reason for name, reason in reasons.items() if bad[name] not in reason} == {}
    names = sorted([*good, *bad])
    assert {names[index]: size for index, size in sizes(tmp_path / "out", to).items()} == good
    assert verify(tmp_path / "out", deep=True, console=console), console.file.getvalue()


@pytest.mark.parametrize(("to", "mode"), FORMATS)
def test_without_leave_to_skip_the_first_ends_it_in_one_line(odd, tmp_path, console, to, mode):
    root, _, bad = odd
    with pytest.raises(DataError, match=r"images cannot be read, 1\.00% may be left out.*--max-skipped") as error:
        convert(str(root), tmp_path / "out", to, mode=mode, console=console)
    assert "\n" not in str(error.value)
    assert any(name in str(error.value) and reason in str(error.value) for name, reason in bad.items())
    assert not (tmp_path / "out").exists()


def test_what_was_done_to_them_is_counted(odd, tmp_path, console):
    root, _, _ = odd
    manifest = convert(str(root), tmp_path / "pixels", "tensor", max_skipped=1.0, console=console)
    assert manifest.splits["train"].changes == {"CMYK": 1, "16-bit": 2, "palette": 1, "alpha": 1, "grey": 2}
    text = console.file.getvalue()
    assert "1 CMYK, 2 16-bit, 1 palette, 1 alpha, 2 grey" in text
    manifest = convert(str(root), tmp_path / "originals", "ffcv", mode="original", max_skipped=1.0, console=console)
    anew = {"png named.jpg", "bmp named.jpg", "webp.webp", "tiff.tif", "cmyk.jpg", "rgba.png", "palette.png"}
    anew |= {"16-bit grey.png", "16-bit rgb.png", "garbage behind.jpg"}
    assert manifest.splits["train"].changes["encoded anew"] == len(anew)
    manifest = convert(str(root), tmp_path / "files", "webdataset", max_skipped=1.0, console=console)
    assert manifest.splits["train"].changes == {}


def test_a_rotation_is_applied_where_that_is_asked_for(odd, tmp_path, console):
    root, good, bad = odd
    position = sorted([*good, *bad]).index("rotated.jpg")
    for to, mode in FORMATS:
        where = tmp_path / f"{to}-{mode}"
        manifest = convert(str(root), where, to, mode=mode, max_skipped=1.0, exif_rotate=True, console=console)
        assert sizes(where, to)[position] == (64, 48)
        assert manifest.splits["train"].changes["rotated"] == 1
        assert verify(where, deep=True, console=console), console.file.getvalue()
    index = read_index(tmp_path / "webdataset-auto" / "train")
    kept = ShardFiles(index).read(index.index.tolist().index(sorted([*good, *bad]).index("good.jpg")))
    assert kept == (root / "good.jpg").read_bytes()
