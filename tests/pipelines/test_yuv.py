"""Planes of YUV 4:2:0 and back."""

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import yuv
from pipelines.frames import Frames
from pipelines.yuv import planar_bytes, to_rgb, to_yuv420

SHAPES = [(1, 1), (1, 7), (5, 3), (8, 6), (2, 9), (16, 16)]


def one(image: np.ndarray) -> torch.Tensor:
    return to_yuv420(torch.from_numpy(image[None]))[0]


def planes(images: list[np.ndarray], device: str = "cpu") -> Frames:
    """Images one after another as planes, with no more slack than is asked for, and that of the brightest bytes."""
    size = np.array([image.shape[:2] for image in images], np.int32)
    lengths = planar_bytes(size)
    extent = tuple(size.max(axis=0).tolist())
    flat = [one(image) for image in images]
    assert [len(f) for f in flat] == lengths.tolist()
    count = torch.arange(len(images))
    return Frames(
        pixels=torch.cat([*flat, torch.full((extent[1] + 1,), 255, dtype=torch.uint8)]),
        offset=torch.from_numpy(np.cumsum(lengths) - lengths),
        size=torch.from_numpy(size),
        stride=torch.from_numpy(size[:, 1].copy()),
        original=torch.from_numpy(2 * size),
        index=10 * count,
        label=count,
        extent=extent,
    ).to(torch.device(device))


def rgb(frames: Frames) -> list[np.ndarray]:
    pixels, found = frames.pixels.cpu(), []
    for first, stride, (height, width) in zip(
        frames.offset.tolist(), frames.stride.tolist(), frames.size.tolist(), strict=True
    ):
        rows = [pixels[first + line * stride :][: 3 * width] for line in range(height)]
        found.append(torch.stack(rows).view(height, width, 3).numpy())
    return found


def there_and_back(*images: np.ndarray) -> list[np.ndarray]:
    return rgb(to_rgb(planes(list(images))))


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(height: int, width: int) -> np.ndarray:
    """Colours that change by at most two steps from one pixel to the next."""
    y, x = np.mgrid[:height, :width]
    return np.stack([40 + 2 * x, 200 - 2 * y, 90 + x + y], axis=2).astype(np.uint8)


def steps(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


@pytest.mark.parametrize("shape", SHAPES)
def test_grey_stays_grey(shape):
    grey = np.repeat(noise(*shape)[:, :, :1], 3, axis=2)
    assert steps(there_and_back(grey)[0], grey) <= 1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (17, 130, 201), (255, 255, 255)]
)
def test_one_colour_stays_within_a_rounding(shape, colour):
    flat = np.full((*shape, 3), colour, np.uint8)
    assert steps(there_and_back(flat)[0], flat) <= 2


@pytest.mark.parametrize("shape", [(40, 60), (31, 47)])
def test_smooth_colour_changes_little(shape):
    image = smooth(*shape)
    assert steps(there_and_back(image)[0], image) <= 3


@pytest.mark.parametrize("shape", SHAPES)
def test_a_second_journey_changes_little_where_no_colour_was_clipped(shape):
    once = there_and_back((96 + noise(*shape) // 4).astype(np.uint8))[0]
    assert steps(there_and_back(once)[0], once) <= 2


def test_the_matrix_is_that_of_jpeg():
    image = noise(32, 32).repeat(2, axis=0).repeat(2, axis=1)  # equal in each block of 2 x 2
    theirs = np.asarray(Image.fromarray(image).convert("YCbCr"))
    ours = one(image).numpy()
    assert steps(ours[: 64 * 64].reshape(64, 64), theirs[:, :, 0]) <= 1
    assert steps(ours[64 * 64 :].reshape(2, 32, 32), theirs[::2, ::2, 1:].transpose(2, 0, 1)) <= 1


def test_the_way_back_is_that_of_jpeg():
    image = noise(32, 32).repeat(2, axis=0).repeat(2, axis=1)
    ours = one(image).numpy()
    colour = ours[64 * 64 :].reshape(2, 32, 32).repeat(2, axis=1).repeat(2, axis=2)
    whole = np.concatenate([ours[: 64 * 64].reshape(1, 64, 64), colour]).transpose(1, 2, 0)
    theirs = np.asarray(Image.fromarray(np.ascontiguousarray(whole), mode="YCbCr").convert("RGB"))
    assert steps(there_and_back(image)[0], theirs) <= 1


def test_colour_is_the_mean_of_its_block_and_at_odd_ends_of_what_is_there():
    image = noise(3, 5)
    ours = one(image).numpy()[15:].reshape(2, 2, 3).astype(float)
    padded = np.pad(image, ((0, 1), (0, 1), (0, 0)), mode="edge").astype(float)
    red, green, blue = padded.reshape(2, 2, 3, 2, 3).mean(axis=(1, 3)).transpose(2, 0, 1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    assert np.abs(ours[0] - (128 + (blue - luma) / 1.772)).max() <= 0.51
    assert np.abs(ours[1] - (128 + (red - luma) / 1.402)).max() <= 0.51


def test_images_of_many_sizes_do_not_touch_each_other():
    images = [noise(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    together = there_and_back(*images)
    for image, found in zip(images, together, strict=True):
        assert found.shape == image.shape
        assert np.array_equal(found, there_and_back(image)[0])


def test_a_batch_in_parts_is_the_same(monkeypatch):
    images = [noise(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    whole = there_and_back(*images)
    monkeypatch.setattr(yuv, "CHUNK_PIXELS", 2 * 16 * 16)  # two images at a time
    assert all(np.array_equal(a, b) for a, b in zip(there_and_back(*images), whole, strict=True))


def test_the_result_keeps_the_promises_of_frames():
    held = planes([noise(*shape) for shape in SHAPES])
    found = to_rgb(held)
    assert (found.extent, found.stride.dtype, found.offset.dtype) == ((16, 16), torch.int32, torch.int64)
    for field in ("size", "original", "index", "label"):
        assert torch.equal(getattr(found, field), getattr(held, field))
    last_row = found.offset + found.stride.long() * (found.size[:, 0] - 1)
    assert last_row.max() + 3 * found.extent[1] <= found.pixels.numel()


def test_images_of_one_size_can_go_together(monkeypatch):
    images = [noise(7, 9, seed=i) for i in range(5)]
    expected = torch.stack([one(image) for image in images])
    assert torch.equal(to_yuv420(torch.from_numpy(np.stack(images))), expected)
    monkeypatch.setattr(yuv, "CHUNK_PIXELS", 2 * 7 * 9)
    assert torch.equal(to_yuv420(torch.from_numpy(np.stack(images))), expected)


@pytest.mark.gpu
def test_a_gpu_gives_the_bytes_of_the_cpu():
    images = [noise(*shape, seed=i) for i, shape in enumerate([*SHAPES, (211, 333)])]
    held = planes(images)
    for image in images:
        theirs = to_yuv420(torch.from_numpy(image[None]).cuda())[0].cpu()
        assert steps(theirs.numpy(), one(image).numpy()) <= 1
    on_gpu = to_rgb(held.to(torch.device("cuda")))
    assert all(steps(a, b) <= 1 for a, b in zip(rgb(on_gpu), rgb(to_rgb(held)), strict=True))
