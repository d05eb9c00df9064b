"""A converted data set is proved whole, and whatever is wrong with it is found and named."""

import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from pipelines.beton import FIELD, FIELDS, HEADER, metadata_dtype, open_beton
from pipelines.shards import BLOCK, read_index
from pipelines.tensor_file import read_tensor_file
from ressl.batch import DataError
from tools.convert import convert
from tools.verify import verify

COUNT = 14  # images that are stored; one more is damaged
QUIET = Console(quiet=True)


def noise(seed: int, height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """src/, two classes of images, and ffcv/, tensor/ and webdataset/ that were made of it."""
    root = tmp_path_factory.mktemp("whole")
    for i in range(COUNT):
        path = root / "src" / "ab"[i % 2] / f"{i:02}.{'jpg' if i % 3 == 0 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        (noise(i, 240, 300) if i < 8 else noise(i, 20 + i, 30)).save(path)
    (root / "src" / "a" / "05.jpg").write_bytes(b"not an image")
    for to in ("ffcv", "tensor", "webdataset"):
        sharding = {"shard_mb": 1} if to == "webdataset" else {}
        convert(str(root / "src"), root / to, to, max_skipped=0.5, shuffle=True, console=QUIET, **sharding)
    return root


@pytest.fixture
def copy(whole, tmp_path) -> Iterator[Callable[[str], Path]]:
    """Gives a data set that may be damaged."""
    yield lambda to: Path(shutil.copytree(whole / to, tmp_path / to))
    shutil.rmtree(tmp_path)


def check(path: Path, **options) -> tuple[bool, str]:
    """Whether it is whole, and what was printed."""
    console = Console(file=io.StringIO(), width=250)
    good = verify(path, console=console, **options)
    return good, console.file.getvalue()


def flip(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 0x10]))


def row_of(text: str) -> list[str]:
    """The cells of the table's only row."""
    (line,) = [line for line in text.splitlines() if line.startswith("│")]
    return [cell.strip() for cell in line.strip("│").split("│")]


@pytest.mark.parametrize("to", ["ffcv", "tensor", "webdataset"])
def test_what_convert_wrote_is_whole(whole, to):
    good, text = check(whole / to)
    assert good
    assert row_of(text)[3:] == ["ok", "ok", "not checked", "not checked"]
    assert "decoding, source not checked: --deep does it" in text
    good, text = check(whole / to, deep=True)
    assert good
    assert row_of(text)[:2] == ["train", str(COUNT)]
    assert row_of(text)[3:] == ["ok"] * 4


@pytest.mark.parametrize("name", ["ffcv/train.beton", "tensor/train.safetensors", "webdataset/train"])
def test_one_file_or_directory_of_shards_is_found_in_the_manifest(whole, monkeypatch, name):
    good, text = check(whole / name, deep=True)
    assert good
    assert row_of(text)[3:] == ["ok"] * 4
    if name == "webdataset/train":
        monkeypatch.chdir(whole / name)
        assert row_of(check(Path(), deep=True)[1])[3:] == ["ok"] * 4


# --- each byte -------------------------------------------------------------------------------------------------------


def in_beton(root: Path) -> dict[str, tuple[Path, int]]:
    """A byte of each region."""
    path = root / "train.beton"
    beton = open_beton(path)
    head = HEADER.itemsize + len(FIELDS) * FIELD.itemsize
    return {
        "header": (path, 5),
        "field's arguments": (path, HEADER.itemsize + 500),
        "label": (path, head + metadata_dtype(FIELDS).fields["label"][1]),
        "gap before the data": (path, int(beton.data_ptr.min()) - 1),
        "gap behind the data": (path, int((beton.data_ptr + beton.data_size).max())),
        "image": (path, int(beton.data_ptr[3]) + 50),
        "table": (path, beton.length - 1),
    }


def in_tensors(root: Path) -> dict[str, tuple[Path, int]]:
    path = root / "train.safetensors"
    data, whole = read_tensor_file(path), path.read_bytes()
    start = whole.index(b"  \x00") if b"  \x00" in whole[:4096] else 8 + int.from_bytes(whole[:8], "little")
    pixels = 8 + int.from_bytes(whole[:8], "little")
    slack = pixels + int((data.offset + 3 * data.size.long().prod(1)).max())
    return {
        "length of the header": (path, 0),
        "header": (path, 100),
        "room behind the header": (path, min(start, pixels) - 1),
        "image": (path, pixels + int(data.offset[5]) + 10),
        "slack": (path, slack + 1),
        "table": (path, len(whole) - 9),
    }


def in_shards(root: Path) -> dict[str, tuple[Path, int]]:
    index = read_index(root / "train")
    path, start, length = root / "train" / "shard-00000.tar", int(index.offset[0]), int(index.length[0])
    label = start + -(-length // BLOCK) * BLOCK + BLOCK
    return {
        "tar header": (path, start - BLOCK + 140),
        "image": (path, start + length // 2),
        "padding": (path, start + length),
        "header of the label": (path, label - BLOCK + 3),
        "label": (path, label),
        "behind the label": (path, label + 300),
        "end": (path, path.stat().st_size - 1),
        "idx": (root / "train" / "shard-00001.idx", 20),
    }


REGIONS = {"ffcv": in_beton, "tensor": in_tensors, "webdataset": in_shards}
INDEX = {"ffcv": "train.beton.index.npz", "tensor": "train.safetensors.index.npz", "webdataset": "train/index.npz"}


@pytest.mark.parametrize("to", REGIONS)
def test_a_flipped_byte_is_found_wherever_it_is(copy, to):
    root = copy(to)
    index = root / INDEX[to]
    places = REGIONS[to](root) | {"index": (index, index.stat().st_size // 2), "index's end": (index, 0)}
    for region, (path, place) in places.items():
        flip(path, place)
        good, text = check(root)
        assert not good, region
        assert "\n" + str(root) in text, region  # at least one line that begins with the file
        flip(path, place)
    assert check(root)[0]


@pytest.mark.parametrize("to", REGIONS)
def test_each_damaged_image_is_named_and_no_other(copy, to):
    root = copy(to)
    path, place = REGIONS[to](root)["image"]
    flip(path, place)
    good, text = check(root)
    assert not good
    assert row_of(text)[3:5] == ["ok", "1 problem"]
    (line,) = [line for line in text.splitlines() if "CRC-32" in line]
    assert line.startswith(f"{path}: image ")
    assert ".jpg" in line or ".png" in line
    assert "damaged" in line
    assert "again" in text.splitlines()[-2]


# --- files -----------------------------------------------------------------------------------------------------------


def cut(path: Path, count: int) -> None:
    os.truncate(path, path.stat().st_size - count)


def extend(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


DATA = {
    "ffcv": ["train.beton", "train.beton.index.npz"],
    "tensor": ["train.safetensors", "train.safetensors.index.npz"],
    "webdataset": ["train/shard-00000.tar", "train/shard-00001.tar", "train/shard-00001.idx", "train/index.npz"],
}
FILES = [(to, name) for to, names in DATA.items() for name in names]


@pytest.mark.parametrize(("to", "name"), FILES)
def test_a_cut_an_extended_and_a_missing_file_are_named(copy, to, name):
    root = copy(to)
    path = root / name
    for harm in (lambda: cut(path, 1), lambda: cut(path, path.stat().st_size // 2), lambda: extend(path), path.unlink):
        before = path.read_bytes()
        harm()
        good, text = check(root)
        assert not good
        assert f"\n{path}: " in text or f"\n{path}'" in text
        path.write_bytes(before)
    assert check(root)[0]


def test_all_shards_that_are_missing_or_cut_are_named(copy):
    root = copy("webdataset")
    (root / "train" / "shard-00000.tar").unlink()
    cut(root / "train" / "shard-00001.tar", 10)
    good, text = check(root)
    assert not good
    assert "shard-00000.tar: cannot be read" in text
    assert "shard-00001.tar: " in text
    assert row_of(text)[4] == "not checked"
    assert "checksums not checked: the structure is damaged" in text


def test_files_that_do_not_belong_to_the_shards_are_named(copy):
    root = copy("webdataset")
    (root / "train" / "notes.txt").write_text("mine")
    shutil.copy(root / "train" / "shard-00000.tar", root / "train" / "shard-00002.tar")
    good, text = check(root)
    assert not good
    assert "notes.txt: not written by this conversion" in text
    assert "shard-00002.tar: not written by this conversion" in text


def test_hidden_files_among_the_shards_are_a_note_and_nothing_wrong(copy):
    root = copy("webdataset")
    for name in (".DS_Store", ".nfs000001"):
        (root / "train" / name).write_bytes(bytes(1000))
    good, text = check(root)
    assert good
    assert "train: hidden files that no reader looks at, which can be removed: .DS_Store, .nfs000001" in text


def test_data_that_the_manifest_does_not_list_is_a_note(copy, whole):
    root = copy("ffcv")
    (root / "val.beton").write_bytes(b"junk")
    shutil.copytree(whole / "webdataset" / "train", root / "shards")
    good, text = check(root)
    assert good
    for name in ("shards", "val.beton"):
        assert f"{root / name}: not in manifest.json, so not checked; `verify {root / name}` does it" in text
    assert text.count("so not checked") == 2


@pytest.mark.parametrize(
    ("to", "name"),
    [*((to, name) for to, name in FILES), *((to, "manifest.json") for to in DATA)],
)
def test_a_fifo_in_place_of_a_file_is_named_and_never_waited_for(copy, to, name):
    path = copy(to) / name
    path.unlink()
    os.mkfifo(path)
    good, text = check(path.parents[len(Path(name).parts) - 1])
    assert not good
    assert f"\n{path}: " in text


@pytest.mark.parametrize("to", REGIONS)
def test_an_index_of_another_conversion_is_found(copy, whole, tmp_path, to):
    """Of the same images, in another order or at another quality: all of its own checks pass."""
    root = copy(to)
    other = tmp_path / "other"
    convert(str(whole / "src"), other, to, max_skipped=0.5, console=QUIET)
    shutil.copy(other / INDEX[to], root / INDEX[to])
    good, text = check(root)
    assert not good
    assert f"{INDEX[to]}: not the one that manifest.json knows" in text


def test_splits_have_a_row_each_and_cannot_stand_in_for_each_other(tmp_path):
    for split in ("train", "val"):
        for i in range(4):
            path = tmp_path / "src" / split / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise(i + 10 * len(split), 10, 12).save(path)
    root = tmp_path / "out"
    convert(str(tmp_path / "src"), root, "tensor", console=QUIET)
    good, text = check(root, deep=True)
    assert good
    assert [line.split()[1] for line in text.splitlines() if line.startswith("│")] == ["train", "val"]
    assert text.count("│ ok ") == 8
    for suffix in ("", ".index.npz"):
        train, val, aside = (root / f"{name}.safetensors{suffix}" for name in ("train", "val", "aside"))
        train.rename(aside)
        val.rename(train)
        aside.rename(val)
    good, text = check(root)
    assert not good
    assert text.count("not the one that manifest.json knows") == 2
    good, text = check(root, deep=True)
    assert text.count("not the image of its source") == 8
    train.rename(aside)
    val.rename(train)
    aside.rename(val)
    good, text = check(root)
    assert not good
    assert text.count("CRC-32") == 8


def test_the_file_of_a_killed_writer_is_found(copy):
    root = copy("ffcv")
    path = root / "train.beton"
    header = np.fromfile(path, HEADER, 1)
    header["alloc_table_ptr"] = 0
    with path.open("r+b") as file:
        file.write(header.tobytes())
    good, text = check(root)
    assert not good
    assert "its conversion was interrupted" in text


def test_an_interrupted_conversion_is_told_how_to_go_on(tmp_path):
    (tmp_path / "convert.part").mkdir()
    with pytest.raises(DataError, match=r"its conversion was interrupted; the same `convert` goes on"):
        verify(tmp_path, console=QUIET)


# --- files alone -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ffcv/train.beton", "tensor/train.safetensors"])
def test_a_file_without_its_index_is_checked_as_far_as_it_can_be(whole, tmp_path, name):
    path = Path(shutil.copy(whole / name, tmp_path))
    good, text = check(path, deep=True)
    assert good
    assert row_of(text)[3:] == ["ok", "not checked", "ok", "not checked"]
    assert "checksums not checked: no checksums: not made by `convert`, or parted from its index" in text
    assert "source not checked: no manifest.json says what it was made of" in text
    shutil.copy(whole / f"{name}.index.npz", tmp_path)
    good, text = check(path)
    assert good
    assert row_of(text)[3:5] == ["ok", "ok"]
    assert "no manifest lists it" in text
    path.unlink()


def test_shards_without_a_manifest_are_checked_by_their_own_index(copy):
    root = copy("webdataset")
    (root / "manifest.json").unlink()
    good, text = check(root / "train", deep=True)
    assert good
    assert row_of(text)[3:6] == ["ok", "ok", "ok"]
    flip(*in_shards(root)["label"])
    assert not check(root / "train")[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such file or directory"),
        (lambda path: path.mkdir(), "holds neither manifest.json nor index.npz"),
        (lambda path: path.write_text("text"), r"neither \.beton nor \.safetensors"),
        (lambda path: (path / "a").mkdir(parents=True) or (path / "a" / "x.tar").touch(), "shards without index.npz"),
        (os.mkfifo, "neither a file nor a directory"),
    ],
)
def test_what_cannot_be_verified_is_refused(tmp_path, make, message):
    make(tmp_path / "x")
    with pytest.raises(DataError, match=message):
        verify(tmp_path / "x", console=QUIET)


@pytest.mark.parametrize("name", ["x" * 300, "~nobody-of-this-name/data"])
def test_a_path_that_cannot_be_is_refused(name):
    with pytest.raises(DataError, match="file name too long|no such user"):
        verify(Path(name), console=QUIET)
