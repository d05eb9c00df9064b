"""`.beton` files: threads, buffers, the process cache, and files that FFCV's own writer made."""

import io
import os
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from pipelines.sampler import Blocks, Sampler
from ressl.batch import DataError
from tools.beton_writer import EncodedSample, write_beton
from tools.convert import convert

ffcv = pytest.importorskip("ffcv")
from pipelines.beton import JPG, RAW, open_beton  # noqa: E402
from pipelines.ffcv_source import FfcvSource, _paged, read_sample  # noqa: E402

PAGE = 1 << 21  # bytes, the smallest that FFCV reads
KEPT = []  # FFCV's loaders: what numba compiled for them does not leave quietly
SIDE = 512  # two raw images of this side in a page


def open_source(path: Path, **changes) -> FfcvSource:
    return FfcvSource(path, **({"workers": 2, "on_corrupt": "fail", "report": print} | changes))


def image_of(frames, row: int) -> np.ndarray:
    (height, width), stride, first = frames.size[row].tolist(), int(frames.stride[row]), int(frames.offset[row])
    rows = frames.pixels.numpy()[first : first + stride * height].reshape(height, stride)
    return rows[:, : 3 * width].reshape(height, width, 3)


@pytest.fixture(scope="module")
def paged(tmp_path_factory) -> Path:
    """Forty raw images on twenty pages; all bytes of image i are i."""
    path = tmp_path_factory.mktemp("paged") / "train.beton"
    samples = (
        EncodedSample(bytes([i]) * (3 * SIDE * SIDE), RAW, (SIDE, SIDE), (SIDE, SIDE), 0, index=i) for i in range(40)
    )
    write_beton(path, samples, 40, page_size=PAGE)
    return path


def blocks(block: int, window: int, batch_size: int = 4) -> list[np.ndarray]:
    return list(Sampler(40, batch_size, 0, order=Blocks(block, window)).epoch(0))


def pages(path: Path, order: list[np.ndarray]):
    with path.open("rb") as file:
        yield from _paged(open_beton(path), file, order)


def test_a_machine_without_ffcv_is_told_what_to_do(paged, monkeypatch):
    monkeypatch.setitem(sys.modules, "ffcv.libffcv", None)
    with pytest.raises(DataError, match="data.source.name=ffcv needs FFCV; `launch.py doctor` says how"):
        open_source(paged)


def test_it_decodes_with_as_many_threads_as_it_is_given(paged):
    import numba

    for asked in (1, len(os.sched_getaffinity(0))):
        list(open_source(paged, workers=asked).stream([np.arange(2)], salt=0))
        assert numba.get_num_threads() == asked


def test_the_numbers_of_threads_of_torch_and_numba_are_left_to_others(paged):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        list(open_source(paged, workers=1, cache="process").stream([np.arange(2)], salt=0))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_batch_is_only_as_large_as_its_own_images(tmp_path):
    """One huge image in a data set must not make every batch huge."""
    (tmp_path / "images" / "a").mkdir(parents=True)
    for number, side in enumerate((8, 8, 8, 200)):
        Image.new("RGB", (side, side), (number, 0, 0)).save(tmp_path / "images" / "a" / f"{number}.png")
    convert(str(tmp_path / "images"), tmp_path / "out", "ffcv", mode="raw", console=Console(quiet=True))
    small, large = open_source(tmp_path / "out" / "train.beton").stream([np.array([0, 1]), np.array([2, 3])], salt=0)
    assert small.extent == (8, 8) and small.pixels.numel() == 2 * 192 + 24
    assert large.extent == (200, 200)
    assert large.pixels[large.offset[1]] == 3 and large.pixels[large.offset[0]] == 2


# --- the process cache -----------------------------------------------------------------------------------------------


def test_both_caches_give_the_same_images_in_any_order(paged):
    order = [np.array([39, 0, 17, 17]), np.array([1, 38, 2, 5]), np.array([9])]
    for cache in ("os", "process"):
        for frames, positions in zip(open_source(paged, cache=cache).stream(order, salt=0), order, strict=True):
            assert [image_of(frames, row).mean() for row in range(len(positions))] == positions.tolist()


def test_in_the_order_of_blocks_only_a_window_of_the_file_is_in_memory(paged):
    order = blocks(block=2, window=3)  # a block is a page
    (_, memory, _), *_ = list(pages(paged, order))
    assert memory.size // PAGE <= 4 * 3  # the windows that this batch and the three after it, read ahead, lie in
    (_, whole, _), *_ = list(pages(paged, list(Sampler(40, 4, 0).epoch(0))))
    assert whole.size // PAGE > 15


@pytest.mark.parametrize("batches", [1, 4])
def test_an_epoch_that_is_left_early_leaves_no_reader(paged, batches):
    before = set(threading.enumerate())
    epoch = open_source(paged, cache="process").stream(blocks(2, 3), salt=0)
    for _ in range(batches):
        next(epoch)
    assert len(threading.enumerate()) > len(before)
    epoch.close()
    assert set(threading.enumerate()) == before


def test_an_epoch_of_no_batches_is_empty(paged):
    for cache in ("os", "process"):
        assert list(open_source(paged, cache=cache).stream([], salt=0)) == []


# --- files of FFCV's own writer --------------------------------------------------------------------------------------


class Pictures:
    def __len__(self) -> int:
        return 9

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        noise = np.random.default_rng(i).integers(0, 256, (6, 5, 3), dtype=np.uint8)
        return Image.fromarray(noise).resize((60 + 9 * i, 90 - 7 * i), Image.Resampling.BICUBIC), i % 3


@pytest.mark.parametrize("mode", ["jpg", "raw", "smart", "proportion"])
def test_files_of_ffcvs_own_writer_are_decoded_as_ffcv_decodes_them(mode, tmp_path):
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.rgb_image import CenterCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.writer import DatasetWriter

    path, threads = tmp_path / f"{mode}.beton", torch.get_num_threads()
    image = RGBImageField(write_mode=mode, smart_threshold=17000, compress_probability=0.5)
    DatasetWriter(str(path), {"image": image, "label": IntField()}, num_workers=1).from_indexed_dataset(Pictures())
    (frames,) = open_source(path).stream([np.arange(9)], salt=0)
    beton = open_beton(path)
    if mode in ("smart", "proportion"):
        assert set(beton.mode.tolist()) == {JPG, RAW}
    assert frames.label.tolist() == [i % 3 for i in range(9)]
    square = {"image": [CenterCropRGBImageDecoder((16, 16), ratio=1)], "label": None}
    theirs = Loader(str(path), batch_size=9, num_workers=1, order=OrderOption.SEQUENTIAL, pipelines=square)
    KEPT.append(theirs)
    (batch,) = list(theirs)
    torch.set_num_threads(threads)
    for row in range(9):
        ours = image_of(frames, row)
        height, width = ours.shape[:2]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        crop = Image.fromarray(np.ascontiguousarray(ours[top : top + side, left : left + side]))
        expected = np.asarray(crop.resize((16, 16), Image.Resampling.BOX)).astype(int)
        assert np.abs(expected - np.asarray(batch[0][row])).mean() < 6  # OpenCV's area filter, and other roundings
        difference = np.abs(
            ours.astype(int) - read_sample(beton, row)
        )  # FFCV asks libjpeg-turbo for its fast transform
        assert difference.max() <= 16 and difference.mean() < 2


def test_jpegs_that_are_damaged_are_noticed_whatever_ffcv_says(tmp_path):
    """Its decoder gives an image all the same, of whatever was in memory."""

    def jpeg(i: int) -> bytes:
        file = io.BytesIO()
        Pictures()[i][0].save(file, "JPEG", quality=90)
        return file.getvalue()

    sizes = [Pictures()[i][0].size[::-1] for i in range(9)]
    data = [jpeg(i) for i in range(9)]
    data[4] = data[4][: len(data[4]) // 2]
    path = tmp_path / "half.beton"
    samples = (EncodedSample(data[i], JPG, sizes[i], sizes[i], 0, index=i) for i in range(9))
    write_beton(path, samples, 9)
    said = []
    (frames,) = open_source(path, on_corrupt="replace", report=said.append).stream([np.arange(9)], salt=0)
    assert 4 not in frames.index.tolist() and len(said) == 1 and "image 4: its JPEG data is damaged" in said[0]
    with pytest.raises(DataError, match="image 4: its JPEG data is damaged"):
        list(open_source(path).stream([np.arange(9)], salt=0))
