"""Every byte is read once, in forked processes; what is damaged, cut off or unreadable is told by the image's name."""

import io
import multiprocessing
import resource
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from pipelines.beton import RAW
from pipelines.shards import read_index
from tools.shard_writer import Member, write_shards
from tools.verify import verify
from tools.verify_content import check_content
from tools.verify_layout import Stored
from tools.verify_report import Report


def check(path: Path) -> tuple[bool, str]:
    """Whether it is whole, and what was printed."""
    console = Console(file=io.StringIO(), width=250)
    good = verify(path, console=console)
    return good, console.file.getvalue()


def member(index: int) -> Member:
    file = io.BytesIO()
    pixels = np.random.default_rng(index).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "BMP")  # all of one size
    return Member(file.getvalue(), ".bmp", (12, 10), (12, 10), index % 3, index, f"{index}.bmp")


def test_exchanged_shards_of_one_size_are_found(tmp_path):
    write_shards(tmp_path, map(member, range(4)), 4, shard_images=2)
    one, other, aside = (tmp_path / name for name in ("shard-00000.tar", "shard-00001.tar", "aside"))
    one.rename(aside)
    other.rename(one)
    aside.rename(other)
    good, text = check(tmp_path)
    assert not good
    assert text.count("CRC-32") == 4


def test_only_the_first_problems_are_shown_and_all_are_counted(tmp_path):
    write_shards(tmp_path, map(member, range(30)), 30)
    tar = tmp_path / "shard-00000.tar"
    with tar.open("r+b") as file:
        for start in read_index(tmp_path).offset.tolist():
            file.seek(start + 100)
            file.write(bytes(50))
    good, text = check(tmp_path)
    assert not good
    assert " 30 problems " in text
    assert text.count("CRC-32") == 20
    assert "and 10 further problems" in text


def two_images(path: Path) -> Stored:
    """In the first 200 bytes of a file, with 100 bytes behind them."""
    return Stored(
        files=(path,),
        file=np.zeros(2, np.int32),
        start=np.array([0, 100]),
        length=np.array([100, 100]),
        mode=np.full(2, RAW, np.uint8),
        size=np.ones((2, 2), np.int32),
        original=np.ones((2, 2), np.int32),
        label=np.zeros(2, np.int64),
        index=np.arange(2),
        classes=None,
        crc32=np.full(2, zlib.crc32(bytes(100)), np.uint32),
        name="image-{}.jpg".format,
        zeros=((0, 200, 300),),
    )


WRONG = f"CRC-32 of its data is {zlib.crc32(b'x'):08x}, not {zlib.crc32(bytes(1)):08x}: damaged"
ERRORS = {"gone": "cannot be read: No such file or directory", "failing": "cannot be read: Input/output error"}


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ("whole", []),
        ("cut", ["the file ends before byte 300", "image 1 (image-1.jpg): the file ends inside it"]),
        *(
            (state, [f"bytes 200 to 300 {error}", *(f"image {i} (image-{i}.jpg): {error}" for i in range(2))])
            for state, error in ERRORS.items()
        ),
    ],
)
def test_a_file_that_vanishes_is_cut_or_fails_while_it_is_read_is_told_of_each_image(tmp_path, state, expected):
    path = tmp_path / "data"
    if state == "failing":
        path = Path("/proc/self/mem")  # there is nothing at its byte 0: as where a disk is damaged
    elif state != "gone":
        path.write_bytes(bytes(300 if state == "whole" else 150))
    report = Report("train")
    check_content(two_images(path), report, deep=False, source=None, workers=2, advance=lambda *_: None)
    assert sorted(report.lines) == sorted(f"{path}: {line}" for line in expected)


def test_the_processes_end_when_a_check_is_interrupted(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(bytes(300))

    def interrupt(*_: int) -> None:
        raise KeyboardInterrupt

    before = set(multiprocessing.active_children())
    with pytest.raises(KeyboardInterrupt):
        check_content(two_images(path), Report("train"), deep=False, source=None, workers=2, advance=interrupt)
    assert set(multiprocessing.active_children()) == before


def test_an_image_takes_no_longer_where_there_are_many_others(tmp_path):
    """200,000 images of one byte: in time that grows with the square of their number, they would take half a minute."""
    count, path = 200_000, tmp_path / "data"
    path.write_bytes(bytes(count - 1) + b"x")
    stored = replace(
        two_images(path),
        **{name: np.zeros(count, kind) for name, kind in (("file", np.int32), ("label", np.int64))},
        **{name: np.arange(count) for name in ("start", "index")},
        **{name: np.ones((count, 2), np.int32) for name in ("size", "original")},
        length=np.ones(count, np.int64),
        mode=np.full(count, RAW, np.uint8),
        crc32=np.full(count, zlib.crc32(b"\0"), np.uint32),
        zeros=(),
    )
    report, before = Report("train"), resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    check_content(stored, report, deep=False, source=None, workers=2, advance=lambda *_: None)
    assert report.lines == [f"{path}: image 199999 (image-199999.jpg): {WRONG}"]
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 5
