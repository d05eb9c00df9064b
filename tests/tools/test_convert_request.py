"""What makes no sense is refused before anything is read or written."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from ressl.batch import DataError
from tools.convert import convert


def save(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 12, 3), np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    """Two classes of five images."""
    for i in range(10):
        save(tmp_path / "src" / "ab"[i // 5] / f"{i}.png", i)
    return tmp_path / "src"


@pytest.fixture
def output():
    return io.StringIO()


@pytest.fixture
def console(output):
    return Console(file=output, width=200)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "png"}, "--mode png"),
        ({"quality": 0}, "--quality 0"),
        ({"max_side": 0}, "--max-side 0"),
        ({"max_skipped": 2.0}, "--max-skipped 2.0"),
        ({"split": "../evil"}, "--split"),
        ({"jpg_share": 1.5}, "--jpg-share 1.5"),
        ({"check": "none", "shard_mb": 0}, "--check none: not one of decode, header; --shard-mb 0"),
    ],
)
def test_impossible_options_are_refused(folder, tmp_path, console, options, message):
    with pytest.raises(DataError, match=message):
        convert(str(folder), tmp_path / "out", "ffcv", console=console, **options)


@pytest.mark.parametrize(
    ("to", "options", "message"),
    [
        ("tensor", {"mode": "jpg"}, "--mode jpg: changes nothing with --to tensor; leave it out"),
        (
            "tensor",
            {"quality": 80, "check": "header"},
            "--quality 80: changes .*; --check header: changes",
        ),
        ("webdataset", {"mode": "original"}, "--mode original: changes nothing with --to webdataset; leave it out"),
        ("ffcv", {"shard_mb": 7}, "--shard-mb 7: changes nothing with --to ffcv --mode auto; leave it out"),
        ("ffcv", {"jpg_share": 0.2}, "--jpg-share 0.2: changes nothing with --to ffcv --mode auto; leave it out"),
        ("ffcv", {"mode": "jpg", "check": "header"}, "--check header: changes nothing with --to ffcv --mode jpg;"),
        (
            "ffcv",
            {"mode": "raw", "quality": 80},
            "--quality 80: changes nothing with --to ffcv --mode raw; leave it",
        ),
    ],
)
def test_options_that_would_change_nothing_are_refused(folder, tmp_path, console, to, options, message):
    with pytest.raises(DataError, match=message):
        convert(str(folder), tmp_path / "out", to, console=console, **options)
    assert not (tmp_path / "out").exists()


def test_a_destination_that_is_the_source_is_refused(folder, tmp_path, console):
    (tmp_path / "link").symlink_to(folder)
    before = sorted(folder.rglob("*"))
    for dst in (folder, tmp_path / "link", folder / "a", folder / "new"):
        with pytest.raises(DataError, match="is, or lies inside, .*src and would be taken for a class of images"):
            convert(str(folder), dst, "ffcv", console=console)
    assert sorted(folder.rglob("*")) == before


def test_a_destination_that_is_taken_is_refused_before_the_images_are_listed(folder, tmp_path, console, output):
    convert(str(folder), tmp_path / "out", "tensor", console=console)
    told = output.tell()
    with pytest.raises(DataError, match=r"train\.safetensors: exists already"):
        convert(str(folder), tmp_path / "out", "tensor", console=console)
    assert "10 images" not in output.getvalue()[told:]


def test_a_destination_that_cannot_be_made_is_refused(folder, tmp_path, console):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="not a directory"):
        convert(str(folder), tmp_path / "file", "ffcv", console=console)
    with pytest.raises(DataError, match="cannot be written: Not a directory; choose another"):
        convert(str(folder), tmp_path / "file" / "out", "ffcv", console=console)


@pytest.mark.parametrize("split", ["old", "journal", "convert"])
def test_a_split_may_have_any_name(folder, tmp_path, console, split):
    for again in (False, True):
        convert(str(folder), tmp_path / "out", "webdataset", split=split, overwrite=again, console=console)
    convert(str(folder), tmp_path / "plain", "webdataset", console=console)
    found, plain = (
        {path.name: path.read_bytes() for path in directory.iterdir()}
        for directory in (tmp_path / "out" / split, tmp_path / "plain" / "train")
    )
    assert found == plain
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(["manifest.json", split])
