"""Views against torchvision, and against Pillow where the paper's authors use it: each step, and all of them in a row.

Deviations that are measured here are in units of [0, 1] before normalising; one step of a byte is 1/255.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as F  # noqa: N812
from PIL import Image, ImageFilter
from torch import Tensor

from pipelines.draws import ViewParams, centre_view, draw_view
from pipelines.frames import Frames, pack
from pipelines.views import (
    canvas,
    crop_resize_flip,
    cut_view,
    resize_matrix,
)
from ressl.config import ViewConfig

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STRONG = ViewConfig(
    size=32, crop_scale=(0.2, 1), jitter_prob=0.8, grayscale_prob=0.2, blur_prob=0.5, solarize_prob=0.3, flip_prob=0.5
)

ROUNDING = 1e-6  # sums of some 100 float32 products of numbers up to 1, taken in another order (measured: 9e-7)
CHAIN_ROUNDING = 3e-5  # roundings above, multiplied by contrasts and by 1 / std of up to 4.5 (measured: 1.2e-5)
# bytes are rounded at each of up to seven steps, and Pillow's hue has 256 (measured on 192 views, steps of a byte: 2.4
# for the worst view, 1.4 over all; without jitter 1.2 and 0.7)
PIL_CHAIN_WORST, PIL_CHAIN_MEAN = 3 / 255, 1.8 / 255
RESIZED_COPY_MEAN = 0.01  # resampled twice, and the pixels at the crop's border reach further out (measured: 0.006)
CENTRE_MAX, CENTRE_MEAN = 0.04, 0.005  # they round the place of the crop to a pixel (measured: 0.026 and 0.0033)


def picture(seed: int, height: int, width: int) -> np.ndarray:
    """(H, W, 3) uint8: soft coloured patches under fine noise, as in a photograph."""
    rng = np.random.default_rng(seed)
    patches = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    soft = np.asarray(patches.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return np.clip(soft + rng.integers(-20, 21, soft.shape), 0, 255).astype(np.uint8)


def to_float(image: np.ndarray) -> Tensor:
    """(3, H, W) in [0, 1], as torchvision wants it."""
    return torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255


def batch(images: list[np.ndarray]) -> Frames:
    sizes = np.array([image.shape[:2] for image in images])
    return pack(images, sizes, np.arange(len(images)), np.full(len(images), -1))


def scattered(images: list[np.ndarray], fill: int) -> Frames:
    """The images with rows apart, one behind another with gaps, in another order, in a buffer full of `fill`."""
    tight = batch(images)
    widths = [3 * image.shape[1] for image in images]
    strides = [width + 7 * i for i, width in enumerate(widths)]
    pixels, offset, at = np.full(1 << 20, fill, np.uint8), np.zeros(len(images), np.int64), 11
    for i in reversed(range(len(images))):
        offset[i] = at
        for row in images[i]:
            pixels[at : at + widths[i]] = row.reshape(-1)
            at += strides[i]
        at += 5
    end = at + 3 * tight.extent[1]
    return replace(
        tight,
        pixels=torch.from_numpy(pixels[:end].copy()),
        offset=torch.from_numpy(offset),
        stride=torch.tensor(strides, dtype=torch.int32),
    )


def pixel_box(image: np.ndarray, top: int, left: int, height: int, width: int) -> list[float]:
    h, w = image.shape[:2]
    return [top / h, left / w, height / h, width / w]


def worst(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return (ours.double() - theirs.double()).abs().max().item()


def plain(count: int, **changes: Tensor) -> ViewParams:
    """Parameters that take the whole image and change nothing."""
    return replace(
        ViewParams(
            box=torch.tensor([[0.0, 0, 1, 1]]).repeat(count, 1),
            flip=torch.zeros(count, dtype=torch.bool),
            jitter=torch.tensor([[1.0, 1, 1, 0]]).repeat(count, 1),
            order=torch.arange(4).repeat(count, 1),
            grayscale=torch.zeros(count, dtype=torch.bool),
            sigma=torch.zeros(count),
            solarize=torch.zeros(count, dtype=torch.bool),
            operations=torch.zeros(count, 0, dtype=torch.int64),
            reverse=torch.zeros(count, 0, dtype=torch.bool),
        ),
        **changes,
    )


# --- crop and resize -------------------------------------------------------------------------------------------------

CROPS = [
    ((50, 70), (10, 20, 16, 16)),  # one to one
    ((50, 70), (0, 0, 50, 70)),  # the whole image, shrunk
    ((90, 33), (41, 3, 48, 29)),  # to its last row, not square
    ((20, 24), (7, 9, 3, 5)),  # enlarged
    ((20, 24), (19, 23, 1, 1)),  # the last pixel
    ((9, 1), (2, 0, 4, 1)),  # an image of one column
    ((1, 1), (0, 0, 1, 1)),
    ((61, 80), (30, 0, 1, 80)),  # one row
    ((3, 120), (0, 5, 3, 111)),
]


@pytest.mark.parametrize("size", [4, 16, 31])
def test_crops_of_ragged_images_agree_with_torchvision(size):
    images = [picture(seed, *shape) for seed, (shape, _) in enumerate(CROPS)]
    box = torch.tensor([pixel_box(image, *crop) for image, (_, crop) in zip(images, CROPS, strict=True)])
    ours = crop_resize_flip(scattered(images, 255), box, torch.zeros(len(box), dtype=torch.bool), size)
    for out, image, (_, crop) in zip(ours, images, CROPS, strict=True):
        theirs = F.resized_crop(to_float(image), *crop, [size, size], antialias=True)
        assert worst(out, theirs) < ROUNDING


def test_many_random_crops_agree_with_torchvision():
    rng = np.random.default_rng(0)
    images = [picture(seed, *rng.integers(1, 80, 2)) for seed in range(100)]
    crops = []
    for image in images:
        h, w = image.shape[:2]
        top, left = int(rng.integers(h)), int(rng.integers(w))
        crops.append((top, left, int(rng.integers(1, h - top + 1)), int(rng.integers(1, w - left + 1))))
    box = torch.tensor([pixel_box(image, *crop) for image, crop in zip(images, crops, strict=True)])
    ours = crop_resize_flip(batch(images), box, torch.zeros(100, dtype=torch.bool), 24)
    theirs = [
        F.resized_crop(to_float(image), *crop, [24, 24], antialias=True)
        for image, crop in zip(images, crops, strict=True)
    ]
    assert worst(ours, torch.stack(theirs)) < ROUNDING


def test_a_crop_agrees_with_pillow_within_its_rounding():
    image = picture(0, 90, 120)
    frames, box = batch([image]), torch.tensor([pixel_box(image, 10, 20, 70, 90)])
    ours = crop_resize_flip(frames, box, torch.tensor([False]), 32)[0]
    pil = Image.fromarray(image).crop((20, 10, 110, 80)).resize((32, 32), Image.Resampling.BILINEAR)
    assert worst(ours, to_float(np.asarray(pil))) < 1.05 / 255  # it rounds after the rows and after the columns


def test_a_flip_mirrors_the_images_it_is_meant_for():
    images = [picture(seed, 20 + seed, 30) for seed in range(4)]
    box = torch.tensor([[0.1, 0.2, 0.5, 0.7]]).repeat(4, 1)
    flip = torch.tensor([True, False, False, True])
    straight = crop_resize_flip(batch(images), box, torch.zeros(4, dtype=torch.bool), 16)
    mixed = crop_resize_flip(batch(images), box, flip, 16)
    for i in range(4):
        assert worst(mixed[i], F.hflip(straight[i]) if flip[i] else straight[i]) < ROUNDING
        assert worst(straight[i], F.hflip(straight[i])) > 0.1


def test_bytes_outside_the_images_never_reach_a_view():
    images = [picture(seed, 8 + 9 * seed, 40 - 7 * seed) for seed in range(5)]
    params = draw_view(STRONG, batch(images).original, torch.arange(5), seed=0, epoch=0, view=1)
    # 255 and 0 around the images, and the images close together
    views = [
        cut_view(frames, params, STRONG, mean=MEAN, std=STD)
        for frames in (scattered(images, 0), scattered(images, 255), batch(images))
    ]
    assert torch.equal(views[0], views[1])
    assert torch.equal(views[0], views[2])


def test_pixels_outside_the_box_never_reach_a_view():
    image = picture(0, 40, 40)
    changed = 255 - image
    changed[10:30, 12:20] = image[10:30, 12:20]
    box = torch.tensor([pixel_box(image, 10, 12, 20, 8)])
    a, b = (crop_resize_flip(batch([x]), box, torch.tensor([False]), 32) for x in (image, changed))
    assert torch.equal(a, b)
    assert not torch.equal(a, crop_resize_flip(batch([changed]), box + 0.02, torch.tensor([False]), 32))


@pytest.mark.parametrize("shape", [(1, 40), (40, 1), (2, 3)])
def test_images_smaller_than_a_pixel_of_the_view_are_spread(shape):
    image = picture(0, *shape)
    out = crop_resize_flip(batch([image]), torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([False]), 8)[0]
    assert worst(out, F.resize(to_float(image), [8, 8], antialias=True)) < ROUNDING


@pytest.mark.parametrize("length", [0.9, 0.02, 1e-3, 1e-5, 0.0])
@pytest.mark.parametrize("start", [0.0, 0.5, 1 - 1e-4, 3 - 5e-4, 3.0, 7.05])
def test_a_box_thinner_than_a_pixel_still_has_weights(start, length):
    matrix = resize_matrix(torch.tensor([start]), torch.tensor([length]), 4, 8)[0]
    assert torch.allclose(matrix.sum(dim=1), torch.ones(4))
    inside = (torch.arange(8) > start - 1.01) & (torch.arange(8) < start + length + 0.01)
    assert matrix[:, ~inside].abs().max() == 0


def test_an_image_a_million_times_wider_than_high_gives_finite_views():
    """Stored resized as 1 x 512, its fallback crop is a thousandth of a pixel wide."""
    image = picture(0, 1, 512)
    original = torch.tensor([[1, 1_000_000]], dtype=torch.int32)
    weak = ViewConfig(size=8)
    for params in (
        draw_view(weak, original, torch.tensor([0]), seed=0, epoch=0, view=0),
        centre_view(original, size=8, resize=8),
    ):
        assert cut_view(batch([image]), params, weak, mean=MEAN, std=STD).isfinite().all()


def test_crops_of_a_resized_copy_look_the_same():
    big = [picture(seed, 96, 128) for seed in range(8)]
    small = [np.asarray(Image.fromarray(image).resize((77, 58), Image.Resampling.BOX)) for image in big]
    frames = batch(big)
    params = draw_view(STRONG, frames.original, frames.index, seed=0, epoch=0, view=1)
    ours = crop_resize_flip(frames, params.box, params.flip, 24)
    copy = crop_resize_flip(batch(small), params.box, params.flip, 24)
    assert (ours - copy).abs().mean() < RESIZED_COPY_MEAN
    shifted = crop_resize_flip(batch(small), params.box * torch.tensor([1, 1, 0.9, 0.9]), params.flip, 24)
    assert (ours - shifted).abs().mean() > 2 * RESIZED_COPY_MEAN  # the bound would notice another crop


@pytest.mark.parametrize(("size", "resize"), [(28, 32), (32, 32), (24, 40)])
def test_the_centre_view_is_resize_and_centre_crop(size, resize):
    """Inside a border of one filter width: at the border we see the crop's pixels only, they see those beyond too."""
    for seed, shape in enumerate([(60, 90), (97, 64), (50, 50)]):
        image = picture(seed, *shape)
        frames = batch([image])
        params = centre_view(frames.original, size=size, resize=resize)
        ours = crop_resize_flip(frames, params.box, params.flip, size)[0]
        theirs = F.center_crop(F.resize(to_float(image), [resize], antialias=True), [size, size])
        inner = (ours - theirs)[:, 1:-1, 1:-1].abs()
        assert inner.max() < CENTRE_MAX
        assert inner.mean() < CENTRE_MEAN
        if shape != (97, 64):  # their places of the crop are whole pixels
            assert inner.max() < ROUNDING


def test_the_canvas_holds_each_image_at_its_top_left():
    images = [picture(seed, 5 + 3 * seed, 20 - 4 * seed) for seed in range(4)]
    frames = scattered(images, 9)
    for out, image in zip(canvas(frames, frames.offset, frames.stride), images, strict=True):
        assert np.array_equal(out[:, : image.shape[0], : image.shape[1]].permute(1, 2, 0).numpy(), image)


def test_large_images_are_resized_a_few_at_a_time_with_the_same_result(monkeypatch):
    frames = batch([picture(seed, 30 + seed, 40 - seed) for seed in range(7)])
    box, flip = torch.tensor([[0.1, 0.2, 0.7, 0.6]]).expand(7, 4), torch.arange(7) % 2 == 0
    at_once = crop_resize_flip(frames, box, flip, 16)
    monkeypatch.setattr("pipelines.views.CANVAS_BYTES", 3 * 12 * 36 * 40)
    assert worst(crop_resize_flip(frames, box, flip, 16), at_once) < 1e-6


# --- all steps in a row -----------------------------------------------------------------------------------------------

ADJUST = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)


def torchvision_blur(image: Tensor, sigma: float, radius: int) -> Tensor:
    """Theirs mirrors at the border; with the border's pixels put on first, that is not seen."""
    wide = F.pad(image, [radius] * 4, padding_mode="edge")
    return F.gaussian_blur(wide, [2 * radius + 1] * 2, [sigma, sigma])[:, radius:-radius, radius:-radius]


def on_the_grid(frames: Frames, params: ViewParams) -> tuple[ViewParams, list[list[int]]]:
    """The parameters with boxes rounded to pixels, which torchvision needs, and these boxes."""
    extent = frames.size.repeat(1, 2).float()
    boxes = (params.box * extent).round()
    boxes[:, 2:] = boxes[:, 2:].clamp(min=1)
    boxes[:, :2] = torch.minimum(boxes[:, :2], extent[:, :2] - boxes[:, 2:])
    return replace(params, box=boxes / extent), boxes.int().tolist()


def in_torchvision(image: np.ndarray, params: ViewParams, i: int, box: list[int], cfg: ViewConfig) -> Tensor:
    out = F.resized_crop(to_float(image), *box, [cfg.size, cfg.size], antialias=True)
    out = F.hflip(out) if params.flip[i] else out
    for op in params.order[i].tolist():
        out = ADJUST[op](out, params.jitter[i, op].item())
    out = F.rgb_to_grayscale(out, 3) if params.grayscale[i] else out
    out = torchvision_blur(out, params.sigma[i].item(), 6) if params.sigma[i] > 0 else out
    return F.solarize(out, 128 / 255) if params.solarize[i] else out


def in_pillow(image: np.ndarray, params: ViewParams, i: int, box: list[int], cfg: ViewConfig) -> Tensor:
    """What the authors' code does to an image: bytes all the way."""
    top, left, height, width = box
    out = Image.fromarray(image).crop((left, top, left + width, top + height))
    out = out.resize((cfg.size, cfg.size), Image.Resampling.BILINEAR)
    out = F.hflip(out) if params.flip[i] else out
    for op in params.order[i].tolist():
        out = ADJUST[op](out, params.jitter[i, op].item())
    out = F.to_grayscale(out, 3) if params.grayscale[i] else out
    out = out.filter(ImageFilter.GaussianBlur(params.sigma[i].item())) if params.sigma[i] > 0 else out
    return F.to_tensor(F.solarize(out, 128) if params.solarize[i] else out)


@pytest.mark.parametrize("epoch", range(3))
def test_a_strong_view_is_the_same_chain_in_torchvision(epoch):
    images = [picture(seed, 40 + 3 * seed, 100 - 2 * seed) for seed in range(24)]
    frames = scattered(images, 255)
    drawn = draw_view(STRONG, frames.original, frames.index, seed=5, epoch=epoch, view=1)
    params, boxes = on_the_grid(frames, drawn)
    ours = cut_view(frames, params, STRONG, mean=MEAN, std=STD)
    for i, image in enumerate(images):
        theirs = F.normalize(in_torchvision(image, params, i, boxes[i], STRONG), list(MEAN), list(STD))
        assert worst(ours[i], theirs) < CHAIN_ROUNDING


def test_a_strong_view_is_near_the_same_chain_in_pillow():
    cfg = STRONG.model_copy(update={"solarize_prob": 0.0})  # a byte's rounding would be inverted at the threshold
    images = [picture(seed, 40 + 3 * seed, 100 - 2 * seed) for seed in range(24)]
    frames = batch(images)
    drawn = draw_view(cfg, frames.original, frames.index, seed=6, epoch=0, view=1)
    params, boxes = on_the_grid(frames, drawn)
    ours = cut_view(frames, params, cfg, mean=(0, 0, 0), std=(1, 1, 1))
    theirs = torch.stack([in_pillow(image, params, i, boxes[i], cfg) for i, image in enumerate(images)])
    deviation = (ours - theirs).abs().mean(dim=(1, 2, 3))
    assert deviation.max() < PIL_CHAIN_WORST
    assert deviation.mean() < PIL_CHAIN_MEAN


def test_a_view_of_an_image_does_not_depend_on_its_batch():
    images = [picture(seed, 30 + seed, 50) for seed in range(9)]
    frames = batch(images)
    params = draw_view(STRONG, frames.original, frames.index, seed=0, epoch=0, view=1)
    whole = cut_view(frames, params, STRONG, mean=MEAN, std=STD)
    for i, image in enumerate(images):
        alone = ViewParams(*(getattr(params, name)[i : i + 1] for name in params.__slots__))
        assert worst(cut_view(batch([image]), alone, STRONG, mean=MEAN, std=STD)[0], whole[i]) < CHAIN_ROUNDING


def test_steps_with_a_probability_of_zero_are_left_out():
    frames = batch([picture(seed, 30, 30) for seed in range(4)])
    yes = torch.ones(4, dtype=torch.bool)
    everything = {
        "jitter": torch.tensor([[0.5, 1.4, 0.2, 0.3]]).repeat(4, 1),
        "grayscale": yes,
        "sigma": torch.full((4,), 1.5),
        "solarize": yes,
    }
    probabilities = {"sigma": "blur_prob"}  # the others are called as their parameters are
    untouched = cut_view(frames, plain(4), ViewConfig(size=16), mean=MEAN, std=STD)
    assert torch.equal(cut_view(frames, plain(4, **everything), ViewConfig(size=16), mean=MEAN, std=STD), untouched)
    for name, value in everything.items():
        params, cfg = plain(4, **{name: value}), ViewConfig(size=16, **{probabilities.get(name, f"{name}_prob"): 0.1})
        assert worst(cut_view(frames, params, cfg, mean=MEAN, std=STD), untouched) > 0.1, name


@pytest.mark.parametrize("cfg", [STRONG, ViewConfig(size=20)], ids=["strong", "weak"])
def test_views_are_channels_last_and_of_the_type_asked_for(cfg):
    frames = batch([picture(seed, 30 + seed, 50) for seed in range(5)])
    params = draw_view(cfg, frames.original, frames.index, seed=0, epoch=0, view=1)
    full = cut_view(frames, params, cfg, mean=MEAN, std=STD)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        views = cut_view(frames, params, cfg, mean=MEAN, std=STD, dtype=dtype)
        assert views.dtype == dtype
        assert views.shape == (5, 3, cfg.size, cfg.size)
        assert views.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(views, full.to(dtype))  # rounded once, at the end


def test_the_frames_are_not_changed():
    frames = batch([picture(seed, 30, 30) for seed in range(3)])
    before = frames.pixels.clone()
    params = draw_view(STRONG, frames.original, frames.index, seed=0, epoch=0, view=1)
    cut_view(frames, params, STRONG, mean=MEAN, std=STD)
    assert torch.equal(frames.pixels, before)


@pytest.mark.gpu
def test_views_on_the_gpu_are_those_on_the_cpu():
    """There every step is worked out for all images and chosen afterwards: another path through `where_due`."""
    frames = batch([picture(seed, 30 + seed, 50) for seed in range(32)])
    params = draw_view(STRONG, frames.original, frames.index, seed=0, epoch=0, view=1)
    ours = cut_view(frames, params, STRONG, mean=MEAN, std=STD)
    moved = ViewParams(*(getattr(params, name).cuda() for name in params.__slots__))
    theirs = cut_view(frames.to(torch.device("cuda")), moved, STRONG, mean=MEAN, std=STD)
    assert worst(ours, theirs.cpu()) < 1e-3
