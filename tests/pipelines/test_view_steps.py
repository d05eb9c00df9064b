"""Each step of a view against torchvision's, and the blur against Pillow's too, which the paper's authors use.

Deviations are in units of [0, 1]; one step of a byte is 1/255.
"""

import math
from itertools import permutations

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as F  # noqa: N812
from PIL import Image, ImageFilter
from torch import Tensor

from pipelines.draws import draw_view
from pipelines.views import blur_matrix, color_jitter, gaussian_blur, grayscale, normalise, solarize, turn_hue
from ressl.config import ViewConfig

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IN_ORDER = torch.arange(4).repeat(12, 1)  # of the jitter's steps

ROUNDING = 1e-6  # sums of some 100 float32 products of numbers up to 1, taken in another order (measured: 9e-7)
HUE_ROUNDING = 5e-6  # they divide by 6 and round the fraction of a circle, we keep sixths (measured: 2e-6)
# Pillow replaces the Gaussian by three box filters of a fractional width, which differ most in the tails of a wide
# kernel, where a byte's rounding adds 0.5 / 255 (measured on pictures with noise: at most 7.0 and 1.22 steps of a byte)
PIL_BLUR_MAX, PIL_BLUR_MEAN = 10 / 255, 1.6 / 255


def picture(seed: int, height: int, width: int) -> np.ndarray:
    """(H, W, 3) uint8: soft coloured patches under fine noise, as in a photograph."""
    rng = np.random.default_rng(seed)
    patches = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    soft = np.asarray(patches.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return np.clip(soft + rng.integers(-20, 21, soft.shape), 0, 255).astype(np.uint8)


def to_float(image: np.ndarray) -> Tensor:
    """(3, H, W) in [0, 1], as torchvision wants it."""
    return torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255


def worst(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return (ours.double() - theirs.double()).abs().max().item()


def pictures(count: int, height: int, width: int) -> Tensor:
    """(count, 3, height, width) float32."""
    return torch.stack([to_float(picture(seed, height, width)) for seed in range(count)])


# --- colours ---------------------------------------------------------------------------------------------------------

ADJUST = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
ALL = (0.4, 0.4, 0.4, 0.1)  # strengths above 0: no step is left out


@pytest.mark.parametrize(
    ("op", "values"),
    [
        (0, [0.0, 0.6, 0.97, 1.0, 1.4, 3.0]),
        (1, [0.0, 0.6, 0.97, 1.0, 1.4, 3.0]),
        (2, [0.0, 0.6, 0.97, 1.0, 1.4, 3.0]),
        (3, [-0.5, -0.1, -0.003, 0.07, 0.1, 0.5]),
    ],
)
def test_each_jitter_agrees_with_torchvision(op, values):
    images = torch.cat([pictures(6, 33, 29), torch.rand(6, 3, 33, 29, generator=torch.Generator().manual_seed(0))])
    factors = torch.tensor([[1.0, 1, 1, 0]]).repeat(12, 1)
    factors[:, op] = torch.tensor(values * 2)
    ours = color_jitter(images, factors, IN_ORDER, ALL)
    theirs = torch.stack([ADJUST[op](image, factor.item()) for image, factor in zip(images, factors[:, op])])  # noqa: B905
    assert worst(ours, theirs) < (HUE_ROUNDING if op == 3 else ROUNDING)


def test_hues_of_gray_black_white_and_pure_colours_agree_with_torchvision():
    colours = torch.tensor([[i, j, k] for i in (0.0, 0.5, 1.0) for j in (0.0, 0.5, 1.0) for k in (0.0, 0.5, 1.0)])
    images = colours.T.reshape(1, 3, 3, 9)
    for turn in (-0.5, -0.25, 0.1, 0.5):
        ours = turn_hue(images, torch.tensor([turn]))[0]
        assert worst(ours, F.adjust_hue(images[0], turn)) < HUE_ROUNDING


def test_every_image_is_jittered_in_its_own_order():
    orders = torch.tensor(list(permutations(range(4))))
    image = to_float(picture(3, 16, 16))
    factors = torch.tensor([[1.4, 0.5, 1.6, 0.12]])
    ours = color_jitter(image.expand(24, -1, -1, -1), factors.repeat(24, 1), orders, ALL)
    theirs = []
    for order in orders.tolist():
        out = image
        for op in order:
            out = ADJUST[op](out, factors[0, op].item())
        theirs.append(out)
    assert worst(ours, torch.stack(theirs)) < 4 * HUE_ROUNDING
    apart = torch.cdist(ours.flatten(1), ours.flatten(1), p=math.inf)[~torch.eye(24, dtype=torch.bool)]
    assert (apart > 0.01).double().mean() > 0.9  # nearly every other order would have been noticed


@pytest.mark.parametrize("strength", [(0.4, 0.4, 0.0, 0.0), (0.0, 0.0, 0.0, 0.2), (0.0, 0.0, 0.3, 0.1), (0.0,) * 4])
def test_steps_of_strength_zero_can_be_left_out_of_the_jitter(strength):
    images = pictures(20, 8, 8)
    cfg = ViewConfig(size=8, jitter_prob=1.0, jitter=strength)
    params = draw_view(cfg, torch.full((20, 2), 8), torch.arange(20), seed=0, epoch=0, view=1)
    some = color_jitter(images, params.jitter, params.order, strength)
    assert worst(some, color_jitter(images, params.jitter, params.order, ALL)) < ROUNDING


def test_the_mean_of_contrast_is_that_of_each_image():
    images = torch.stack([torch.full((3, 8, 8), 0.2), torch.full((3, 8, 8), 0.8)])
    factors = torch.tensor([[1.0, 0.0, 1.0, 0.0]]).repeat(2, 1)
    assert worst(color_jitter(images, factors, IN_ORDER[:2], ALL), images) < 1e-3  # the weights sum to 0.9999


def test_grayscale_agrees_with_torchvision():
    images = pictures(4, 9, 13)
    assert worst(grayscale(images), F.rgb_to_grayscale(images, 3)) < ROUNDING


def test_solarize_agrees_with_torchvision_and_with_pillow():
    image = picture(0, 40, 40)
    ours = solarize(to_float(image)[None])[0]
    assert worst(ours, F.solarize(to_float(image), 128 / 255)) == 0
    assert worst(ours, F.to_tensor(F.solarize(Image.fromarray(image), 128))) < ROUNDING


def test_normalise_agrees_with_torchvision_and_leaves_its_input_alone():
    images = pictures(3, 9, 13)
    before = images.clone()
    assert worst(normalise(images, MEAN, STD), F.normalize(images, list(MEAN), list(STD))) < ROUNDING
    assert torch.equal(images, before)


# --- blur ------------------------------------------------------------------------------------------------------------


def torchvision_blur(image: Tensor, sigma: float, radius: int) -> Tensor:
    """Theirs mirrors at the border; with the border's pixels put on first, that is not seen."""
    wide = F.pad(image, [radius] * 4, padding_mode="edge")
    return F.gaussian_blur(wide, [2 * radius + 1] * 2, [sigma, sigma])[:, radius:-radius, radius:-radius]


@pytest.mark.parametrize(("size", "largest"), [(32, 2.0), (28, 1.0), (5, 2.0), (48, 3.3)])
def test_the_blur_is_a_gaussian_that_goes_on_over_the_border(size, largest):
    sigmas = torch.linspace(0.1, largest, 8)
    images = pictures(8, size, size)
    ours = gaussian_blur(images, sigmas, largest)
    radius = math.ceil(3 * largest)
    theirs = [torchvision_blur(image, sigma.item(), radius) for image, sigma in zip(images, sigmas, strict=True)]
    assert worst(ours, torch.stack(theirs)) < ROUNDING


def test_a_sigma_of_zero_changes_nothing():
    images = pictures(2, 16, 16)
    assert torch.equal(blur_matrix(torch.zeros(2), 16, 2.0), torch.eye(16).repeat(2, 1, 1))
    assert worst(gaussian_blur(images, torch.zeros(2), 2.0), images) < ROUNDING


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.5, 0.7, 1.0, 1.3, 1.7, 2.0])
def test_the_blur_is_near_that_of_pillow(sigma):
    deviations = []
    for size in (28, 96):
        for seed in range(4):
            image = picture(seed, size, size)
            ours = gaussian_blur(to_float(image)[None], torch.tensor([sigma]), 2.0)[0]
            pil = Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma))
            deviation = (ours - to_float(np.asarray(pil))).abs()
            deviations.append(deviation.mean().item())
            assert deviation.max() < PIL_BLUR_MAX
    assert max(deviations) < PIL_BLUR_MEAN
