"""Every byte is read once, in threads; each image that is damaged, cut off or unreadable is told by its name."""

import io
import threading
import zlib
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


def test_the_threads_end_when_a_check_is_interrupted(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(bytes(300))

    def interrupt(*_: int) -> None:
        raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        check_content(two_images(path), Report("train"), deep=False, source=None, workers=2, advance=interrupt)
    assert threading.active_count() == before
