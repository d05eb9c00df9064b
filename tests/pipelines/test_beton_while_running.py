"""A `.beton` file that changes while it is read: the run stops with its name, before one wrong image is given out.

Also what its tables promise and its data do not keep, which only the decoder can tell.
"""

import io
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.beton import JPG, RAW
from pipelines.frames import stand_in
from pipelines.images import decode_image
from pipelines.resident_source import ResidentSource
from ressl.batch import DataError
from ressl.config import ResidentSource as Config
from tools.beton_writer import EncodedSample, write_beton

pytest.importorskip("ffcv")
from pipelines.ffcv_source import FfcvSource  # noqa: E402

PAGE = 1 << 21  # bytes
COUNT, SIDE = 16, 512  # two raw images in a page
BATCHES = np.split(np.arange(COUNT), COUNT // 2)
CACHES = ["os", "process"]
OTHER_DECODER = 2  # mean steps of a byte, between FFCV's JPEG library and Pillow's


def open_source(path: Path, **changes) -> FfcvSource:
    return FfcvSource(path, **({"workers": 2, "on_corrupt": "fail", "report": print} | changes))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Raw images, all bytes of image i are i; every fourth one is a JPEG."""
    path = tmp_path_factory.mktemp("whole") / "train.beton"
    write_beton(path, map(sample, range(COUNT)), COUNT, page_size=PAGE)
    return path


def sample(i: int, value: int | None = None) -> EncodedSample:
    grey = bytes([i if value is None else value]) * (3 * SIDE * SIDE)
    data = jpeg(Image.frombytes("RGB", (SIDE, SIDE), grey)) if i % 4 == 3 else grey
    return EncodedSample(data, JPG if i % 4 == 3 else RAW, (SIDE, SIDE), (SIDE, SIDE), 0, index=i)


def jpeg(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


@pytest.fixture
def path(whole, tmp_path) -> Path:
    copied = tmp_path / "train.beton"
    copied.write_bytes(whole.read_bytes())
    return copied


def image_of(frames, row: int) -> np.ndarray:
    (height, width), first = frames.size[row].tolist(), int(frames.offset[row])
    return frames.pixels.numpy()[first : first + 3 * height * width].reshape(height, width, 3)


def indices(frames) -> list[int]:
    """Those of the images, each of which must be what its index says."""
    found = []
    for one in frames:
        for row, index in enumerate(one.index.tolist()):
            assert np.abs(image_of(one, row).astype(int) - index).max() <= 1
            found.append(index)
    return found


# --- the whole file --------------------------------------------------------------------------------------------------


def other(path: Path) -> Path:
    """A whole file of the same size, of other images under the same numbers."""
    made = path.with_name("other.beton")
    write_beton(made, (sample(i, COUNT - i) for i in range(COUNT)), COUNT, page_size=PAGE)
    return made


def put_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


CHANGES: dict[str, Callable[[Path], object]] = {
    "cut": lambda path: os.truncate(path, 2 * PAGE),
    "emptied": lambda path: os.truncate(path, 0),
    "extended": lambda path: path.open("ab").write(b"x"),
    "written again": lambda path: path.write_bytes(other(path).read_bytes()),  # in place, as `cp` does
}
PLACES: dict[str, Callable[[Path], object]] = {
    "removed": Path.unlink,
    "replaced": lambda path: other(path).rename(path),
    "directory": put_directory,
    "dangling": lambda path: (path.unlink(), path.symlink_to("gone")),
}


@pytest.mark.parametrize("on_corrupt", ["replace", "fail"])
@pytest.mark.parametrize("name", [*CHANGES, *PLACES])
@pytest.mark.parametrize("cache", CACHES)
def test_a_file_that_changes_between_epochs_ends_the_run_with_its_name(path, cache, name, on_corrupt):
    said: list[str] = []
    source = open_source(path, cache=cache, on_corrupt=on_corrupt, report=said.append)
    assert indices(source.stream(BATCHES, salt=0)) == list(range(COUNT))
    (CHANGES | PLACES)[name](path)
    with pytest.raises(DataError, match=rf"{path}: (changed|gone) since the run began") as stopped:
        list(source.stream(BATCHES, salt=1))
    assert said == [] and "\n" not in str(stopped.value)


@pytest.mark.parametrize("on_corrupt", ["replace", "fail"])
@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("cache", CACHES)
def test_a_file_that_changes_in_an_epoch_ends_the_run_before_it_gives_anything_else(path, cache, name, on_corrupt):
    said, got, before = [], [], set(threading.enumerate())
    with pytest.raises(DataError, match=rf"{path}: (changed since the run began|ends at byte)"):
        for frames in open_source(path, cache=cache, on_corrupt=on_corrupt, report=said.append).stream(BATCHES, salt=0):
            got += indices([frames])
            if len(got) == 4:
                CHANGES[name](path)
    assert got == [0, 1, 2, 3]
    assert said == [] and set(threading.enumerate()) <= before


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("cache", CACHES)
def test_a_file_that_loses_its_name_in_an_epoch_is_read_to_the_epoch_s_end(path, cache, name):
    stream = open_source(path, cache=cache).stream(BATCHES, salt=0)
    got = indices([next(stream)])
    PLACES[name](path)
    assert got + indices(stream) == list(range(COUNT))


@pytest.mark.parametrize("name", [*CHANGES, *PLACES])
def test_a_file_that_changes_as_it_is_decoded_once_is_not_held(path, name):
    def decoder():
        source = open_source(path)
        (CHANGES | PLACES)[name](path)
        return source

    with pytest.raises(DataError, match=rf"{path}: "):
        ResidentSource(path, Config(name="resident", train=path), torch.device("cpu"), decoder=decoder)


CUT_AT_ANY_MOMENT = """
import os, sys, threading, time
from pathlib import Path
import numpy as np
from pipelines.ffcv_source import FfcvSource
from ressl.batch import DataError

path, data = Path(sys.argv[1]), Path(sys.argv[1]).read_bytes()
order = np.split(np.arange(16), 8)
ends = []
for number in range(16):
    path.write_bytes(data)
    source = FfcvSource(path, workers=2, cache=("os", "process")[number % 2], on_corrupt="replace", report=ends.append)
    cutter = threading.Timer(0.0007 * number, os.truncate, [path, (number % 5) * (1 << 21)])
    cutter.start()
    try:
        while True:
            for frames in source.stream(order, salt=0):
                for first, i in zip(frames.offset.tolist(), frames.index.tolist(), strict=True):
                    assert abs(frames.pixels[first : first + 786432].int() - i).max() <= 1
    except DataError as error:
        ends.append(str(error))
    cutter.join()
assert len(ends) == 16 and all(path.name + ": " in end for end in ends), ends
print("survived")
"""


def test_a_file_that_is_cut_at_any_moment_never_ends_the_process(path, repo):
    """In a process of its own, which a mapped file would end by a signal."""
    done = subprocess.run(
        [sys.executable, "-c", CUT_AT_ANY_MOMENT, path], cwd=repo, capture_output=True, text=True, check=False,
        timeout=200,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "survived\n"), done.stderr[-2000:]


# --- one image -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [5, 7])  # raw, JPEG
def test_data_that_the_disk_does_not_give_are_replaced_or_end_the_run(path, position):
    """The file is as it was: only this image's bytes are not to be had."""
    source, said = open_source(path), []
    pointers = source.beton.data_ptr.copy()
    pointers[position] = source.beton.length - 5
    source.beton = replace(source.beton, data_ptr=pointers)
    reason = f"{path}: image {position}: the file ends after 5 of its {source.beton.data_size[position]:,} bytes"
    with pytest.raises(DataError, match=re.escape(f"{reason} (data.on_corrupt=replace goes on without it)")):
        list(source.stream(BATCHES, salt=0))
    source.on_corrupt, source.report = "replace", said.append
    other = stand_in(position, 0, 0, COUNT)
    assert indices(source.stream(BATCHES, salt=0)) == [other if i == position else i for i in range(COUNT)]
    assert said == [f"{reason}; replaced by {path}: image {other}"]


PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((64, 48))
OTHER_SIZES = [(63, 48), (64, 47), (66, 50), (32, 24), (128, 96), (72, 54), (48, 64), (1, 1)]  # width, height


@pytest.mark.parametrize("size", OTHER_SIZES)
@pytest.mark.parametrize("cache", CACHES)
def test_a_jpeg_of_another_size_than_the_table_s_is_damaged_and_stands_in_for_none(tmp_path, cache, size):
    """FFCV's decoder would scale it to what fits, and leave the rest of the image as it was."""
    data = [jpeg(PICTURE.resize(size) if i != 3 else PICTURE) for i in range(9)]
    path, said = tmp_path / "other.beton", []
    write_beton(path, (EncodedSample(data[i], JPG, (48, 64), (48, 64), 0, index=i) for i in range(9)), 9)
    source = open_source(path, cache=cache, on_corrupt="replace", report=said.append)
    (frames,) = source.stream([np.array([3])], salt=0)
    assert np.abs(image_of(frames, 0).astype(int) - decode_image(data[3])).mean() < OTHER_DECODER and said == []
    (frames,) = source.stream([np.array([4])], salt=0)
    assert frames.index.tolist() == [3] and np.array_equal(image_of(frames, 0), decode_image(data[3]))
    assert said[0].startswith(f"{path}: image 4: its JPEG data is damaged; replaced by {path}: image 3")
    source.on_corrupt = "fail"
    with pytest.raises(DataError, match="image 4: its JPEG data is damaged"):
        list(source.stream([np.array([4])], salt=0))


def test_every_kind_of_odd_file_in_it_is_decoded_as_by_pillow_or_refused(odd_images, tmp_path):
    """Files whose tables are whole but whose data are not what `convert` writes: nothing goes by in silence."""
    root, outcomes = odd_images
    files = {name: root / name for name in outcomes if (root / name).is_file()}
    data = {name: file.read_bytes() or b"\0" for name, file in files.items()}
    path = tmp_path / "odd.beton"
    samples = (EncodedSample(d, JPG, (48, 64), (48, 64), 0, index=i) for i, d in enumerate(data.values()))
    write_beton(path, samples, len(data))
    source, taken = open_source(path), set()
    for position, (name, content) in enumerate(data.items()):
        try:
            (frames,) = source.stream([np.array([position])], salt=0)
        except DataError as refused:
            assert str(refused).startswith(f"{path}: image {position}: its JPEG data is damaged"), name
            continue
        taken.add(name)
        if name != "other pixels.jpg":  # values far out of range, that each decoder clips in its own way
            assert np.abs(image_of(frames, 0).astype(int) - decode_image(content)).mean() < OTHER_DECODER, name
    whole = {name for name in files if outcomes[name] == (48, 64) or name == "unreadable.jpg"}
    jpegs = {name for name in whole if data[name][:2] == b"\xff\xd8"}
    assert taken == jpegs - {"cmyk.jpg"}  # which `convert` stores as RGB
