"""What was interrupted is gone on with only where all is as it was, and what differs is named."""

import io
import os
import re
import shutil
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image
from rich.console import Console

from ressl.batch import DataError
from tools import journal
from tools.convert import convert
from tools.journal import JOURNAL, PART, WorkDirectory

QUIET = Console(quiet=True)


def save(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def noise(seed: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> Path:
    """`src`, whose 6th image is damaged, and so many of its last that `out` was given up there."""
    root = tmp_path_factory.mktemp("interrupted")
    for i in range(96):
        save(root / "src" / "ab"[i // 48] / f"{i:02}.png", noise(i, 9, 12))
    for i in (5, 92, 93):
        (root / "src" / "ab"[i // 48] / f"{i:02}.png").write_text("text")
    with pytest.raises(DataError, match="3 or more of 96 images cannot be read.*--max-skipped"):
        go_on(root, root / "out", max_skipped=0.025)
    return root


def go_on(root: Path, out: Path, to: str = "tensor", **options):
    arguments = {"workers": 1, "max_skipped": 1, "console": QUIET} | options
    return convert(str(root / "src"), out, to, **arguments)


@pytest.fixture
def copy(interrupted, tmp_path) -> Path:
    """The same, to be changed: with all times as they were."""
    shutil.copytree(interrupted, tmp_path / "copy")
    return tmp_path / "copy"


def refused(copy: Path, message: str, to: str = "tensor", **options) -> None:
    """The call is refused and harms nothing."""
    before = contents(copy / "out")
    with pytest.raises(DataError, match=message) as raised:
        go_on(copy, copy / "out", to, **options)
    assert "--restart" in str(raised.value)
    assert contents(copy / "out") == before


@pytest.mark.parametrize(
    ("began", "now", "difference"),
    [
        ({"to": "tensor"}, {"max_side": 10}, "--max-side was None, is 10"),
        ({"to": "tensor"}, {"exif_rotate": True}, "--exif-rotate was False, is True"),
        ({"to": "tensor"}, {"shuffle": True}, "--shuffle was False, is True"),
        ({"to": "ffcv", "mode": "jpg"}, {"quality": 80}, "--quality was 90, is 80"),
        ({"to": "ffcv"}, {"mode": "raw"}, "--mode was auto, is raw; --quality was 90, is of no use"),
        ({"to": "ffcv", "mode": "smart"}, {"jpg_share": 0.25}, "--jpg-share was 0.5, is 0.25"),
        (
            {"to": "ffcv", "mode": "smart"},
            {"mode": "jpg"},
            "--mode was smart, is jpg; --jpg-share was 0.5, is of no use",
        ),
        ({"to": "ffcv", "mode": "original"}, {"check": "header"}, "--check was decode, is header"),
        ({"to": "webdataset"}, {"shard_mb": 7}, "--shard-mb was 1000, is 7"),
        (
            {"to": "webdataset"},
            {"check": "header", "quality": 80},
            "--quality was 90, is 80; --check was decode, is header",
        ),
        (
            {"to": "tensor"},
            {"to": "webdataset"},
            "--to was tensor, is webdataset; --quality was of no use, is 90; --check was of no use, is decode; "
            "--shard-mb was of no use, is 1000",
        ),
    ],
    ids=lambda given: "-".join(map(str, given.values())) if isinstance(given, dict) else "",
)
def test_another_option_is_refused_and_named(copy, began, now, difference):
    with pytest.raises(DataError, match="--max-skipped"):
        go_on(copy, copy / "out", **began, max_skipped=0.025, restart=True)
    refused(copy, f"holds an interrupted conversion of something else: {re.escape(difference)}", **began | now)


def test_all_that_differs_is_named_together(copy):
    (copy / "src" / "a" / "more.png").write_bytes((copy / "src" / "a" / "01.png").read_bytes())
    message = r"--max-side was None, is 10; --exif-rotate was False, is True; train had 96 images, has 97; repeat"
    refused(copy, message, max_side=10, exif_rotate=True)


def test_restart_begins_anew_with_what_was_refused(copy):
    edit("a/07.png", copy / "src")
    for options in ({}, {"to": "webdataset"}):
        refused(copy, "changed|--to was", **options)
        shutil.copytree(copy / "out", copy / "again")
        go_on(copy, copy / "again", **options, restart=True)
        go_on(copy, copy / "elsewhere", **options)
        assert contents(copy / "again") == contents(copy / "elsewhere")
        for name in ("again", "elsewhere"):
            shutil.rmtree(copy / name)


def remove(src: Path) -> None:
    (src / "a" / "07.png").unlink()


def rename(src: Path) -> None:
    (src / "a" / "07.png").rename(src / "a" / "070.png")


def move_to_another_class(src: Path) -> None:
    (src / "b").rename(src / "c")


def add_an_empty_class(src: Path) -> None:
    (src / "aa").mkdir()


def edit(name: str, src: Path) -> None:
    """As many bytes, another time."""
    (src / name).write_bytes(bytes((src / name).stat().st_size))
    os.utime(src / name, ns=(10**18, 10**18))


def replace_by_another_of_that_time(src: Path) -> None:
    status = (src / "a" / "07.png").stat()
    save(src / "a" / "07.png", noise(7, 10, 12))
    os.utime(src / "a" / "07.png", ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove, "train had 96 images, has 95"),
        (rename, "the names, the labels or the archives of the source's train have changed"),
        (move_to_another_class, "the names, the labels or the archives of the source's train have changed"),
        (add_an_empty_class, "the names, the labels or the archives of the source's train have changed"),
        (partial(edit, "a/07.png"), r"train: a/07\.png has changed since the conversion was interrupted"),
        (replace_by_another_of_that_time, r"train: a/07\.png has changed since the conversion was interrupted"),
    ],
    ids=["removed", "renamed", "class", "empty class", "edited", "size"],
)
def test_a_source_that_has_changed_is_refused_and_the_difference_is_named(copy, change, message):
    change(copy / "src")
    refused(copy, message)


@pytest.mark.parametrize("to", ["tensor", "ffcv", "webdataset"])
def test_an_image_that_was_left_out_and_is_another_one_now_is_tried_again(copy, to):
    """What was written from its chunk on is cut off, and made again."""
    with pytest.raises(DataError, match="--max-skipped"):
        go_on(copy, copy / "out", to, max_skipped=0.025, restart=True)
    save(copy / "src" / "a" / "05.png", noise(5, 40, 30))
    said = io.StringIO()
    manifest = go_on(copy, copy / "out", to, console=Console(file=said, width=200))
    assert "train: 96 images, 2 classes; goes on after 4 of them" in said.getvalue()
    assert [one["index"] for one in manifest.splits["train"].skipped] == [92, 93]
    go_on(copy, copy / "whole", to)
    assert contents(copy / "out") == contents(copy / "whole")


def test_to_try_an_image_again_can_be_interrupted_too(copy):
    save(copy / "src" / "a" / "05.png", noise(5, 40, 30))
    for _ in range(2):
        with pytest.raises(DataError, match=r"2 or more of 96 images cannot be read.*--max-skipped"):
            go_on(copy, copy / "out", max_skipped=0.015)
        with closing(WorkDirectory(copy / "out")) as work:
            rows = np.concatenate([chunk.rows for chunk in work.read().chunks["train"]])
        assert rows["index"].tolist() == list(range(len(rows)))
        assert len(rows) > 40
    shutil.copy(copy / "src" / "a" / "06.png", copy / "src" / "a" / "05.png")  # it is stored now
    refused(copy, r"train: a/05\.png has changed since the conversion was interrupted")


def test_what_changes_in_images_that_are_still_to_come_is_taken_as_it_is(copy):
    save(copy / "src" / "b" / "92.png", noise(1, 9, 12))
    go_on(copy, copy / "out")
    go_on(copy, copy / "whole")
    assert contents(copy / "out") == contents(copy / "whole")


def test_another_source_is_refused(copy, tmp_path):
    for i in range(96):
        save(tmp_path / "other" / "src" / "ab"[i // 48] / f"{i:02}.png", noise(i + 1, 9, 12))
    with pytest.raises(DataError, match=r"train: a/00\.png has changed since the conversion was interrupted"):
        go_on(tmp_path / "other", copy / "out")


def test_other_labels_are_refused(copy):
    lines = [f"{'ab'[i // 48]}/{i:02}.png {i % 3}\n" for i in range(96)]
    labels = copy / "labels.txt"
    labels.write_text("".join(lines))
    refused(copy, "the names, the labels or the archives of the source's train have changed", labels=labels)


def test_other_software_is_refused(copy, monkeypatch):
    was = PIL.__version__
    monkeypatch.setattr(PIL, "__version__", "0.1")
    refused(copy, f"Pillow was {was}, is 0.1")


@pytest.mark.parametrize("changed", [{"workers": 3}, {"max_skipped": 0.5}, {"overwrite": True}])
def test_what_does_not_decide_the_bytes_may_change(copy, changed):
    go_on(copy, copy / "out", **changed)
    go_on(copy, copy / "whole")
    assert contents(copy / "out") == contents(copy / "whole")


# --- what the work directory holds -----------------------------------------------------------------------------------


def test_a_conversion_goes_on_after_a_journal_that_was_cut_or_damaged_anywhere(copy):
    whole = (copy / "out" / PART / JOURNAL).read_bytes()
    assert whole.count(b"\n") >= 4
    go_on(copy, copy / "whole")
    expected, went_on = contents(copy / "whole"), set()
    for number, position in enumerate(np.linspace(0, len(whole) - 1, 24).astype(int)):
        out = copy / str(position)
        shutil.copytree(copy / "out", out)
        damaged = bytearray(whole) if number % 2 else bytearray(whole[:position])
        if number % 2:
            damaged[position] ^= 1 << number % 8
        (out / PART / JOURNAL).write_bytes(damaged)
        said = io.StringIO()
        go_on(copy, out, console=Console(file=said, width=200))
        assert contents(out) == expected, position
        went_on.add("goes on after" in said.getvalue())
    assert went_on == {True, False}


def test_data_that_is_shorter_than_the_journal_says_is_refused(copy):
    os.truncate(copy / "out" / PART / "train.safetensors", 5000)
    refused(copy, r"train\.safetensors: 5,000 bytes, but [\d,]+ were written before; --restart begins anew")
    go_on(copy, copy / "out", restart=True)
    go_on(copy, copy / "whole")
    assert contents(copy / "out") == contents(copy / "whole")


def test_a_second_converter_is_refused_while_the_first_one_works(copy, monkeypatch):
    monkeypatch.setattr(journal, "LOCK_SECONDS", 0.1)
    work = WorkDirectory(copy / "out")
    before = contents(copy / "out")
    for restart in (False, True):
        with pytest.raises(
            DataError, match="out: another process is converting into it; wait for it or choose another"
        ):
            go_on(copy, copy / "out", restart=restart)
    work.close()
    assert contents(copy / "out") == before


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("name", ["notes.txt", "photos/1.jpg"])
def test_a_foreign_file_in_the_work_directory_is_kept(copy, name, restart):
    path = copy / "out" / PART / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    go_on(copy, copy / "out", restart=restart)
    go_on(copy, copy / "whole")
    assert contents(copy / "out") == contents(copy / "whole") | {f"{PART}/{name}": b"mine"}
    with pytest.raises(DataError, match=rf"convert\.part: holds '{name.split('/')[0]}'.*move it away"):
        go_on(copy, copy / "out", overwrite=True)


def test_a_foreign_file_among_shards_in_the_work_directory_is_kept(copy):
    with pytest.raises(DataError, match="--max-skipped"):
        go_on(copy, copy / "shards", "webdataset", max_skipped=0.025)
    (copy / "shards" / PART / "train" / "notes.txt").write_text("mine")
    before = contents(copy / "shards")
    with pytest.raises(DataError, match=r"train: holds 'notes\.txt', which `convert` did not write.*move it away"):
        go_on(copy, copy / "shards", "webdataset")
    assert contents(copy / "shards") == before
