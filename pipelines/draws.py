"""The random numbers of each view, counter-based: a function of (seed, epoch, image index, view) and nothing else.

So an image gets the same views whatever the source, the batch it lies in, the number of ranks, and whether the run was
interrupted. The bits are integer arithmetic and equal on every device. Laws follow torchvision's random transforms.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipelines.sampler import mix64
from ressl.config import ViewConfig

CROP_TRIES = 10  # as torchvision's RandomResizedCrop: a crop that does not fit the image is drawn again, so often
GOLDEN = 0x9E3779B97F4A7C15  # 2**64 divided by the golden ratio
LANES = 2 * CROP_TRIES + 16
OPERATIONS = (  # of RandAugment, Cubuk et al. 2020, in torchvision's order
    "Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate",
    "Brightness", "Color", "Contrast", "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ViewParams:
    """What happens to each of B images to make one view. Everything on the device of the images."""

    box: Tensor  # (B, 4) float32: top, left, height, width of the crop as fractions of the image
    flip: Tensor  # (B,) bool
    jitter: Tensor  # (B, 4) float32: factors of brightness, contrast, saturation (1: none); turn of the hue (0: none)
    order: Tensor  # (B, 4) int64: the order of those four, a permutation of 0 1 2 3
    grayscale: Tensor  # (B,) bool
    sigma: Tensor  # (B,) float32: of the blur, in pixels of the view; 0: none
    solarize: Tensor  # (B,) bool
    operations: Tensor  # (B, n) int64: places in OPERATIONS, in their order; n = 0 without RandAugment
    reverse: Tensor  # (B, n) bool: whether the operation goes the other way, if it has two ways


def draw_view(cfg: ViewConfig, original: Tensor, index: Tensor, *, seed: int, epoch: int, view: int) -> ViewParams:
    """`original` (B, 2) height and width before any resizing, `index` (B,) int64. `view` numbers the views of an image:
    0 for the weak one, 1, 2, ... for the strong ones."""
    u = uniforms(index, seed=seed, epoch=epoch, view=view, lanes=LANES)
    tries, order, rest = u[:, : 2 * CROP_TRIES], u[:, -4:], u[:, 2 * CROP_TRIES : -4]
    top, left, flip, jitter, brightness, contrast, saturation, hue, grayscale, blur, sigma, solarize = rest.unbind(1)

    height, width, fits = _crop_size(cfg, original, tries.view(-1, CROP_TRIES, 2))
    top, left = torch.where(fits, top, 0.5), torch.where(fits, left, 0.5)
    jittered = jitter < cfg.jitter_prob
    strengths = zip(cfg.jitter[:3], (brightness, contrast, saturation), strict=True)
    factors = [torch.where(jittered, _between(max(0.0, 1 - x), 1 + x, v), 1.0) for x, v in strengths]
    turn = torch.where(jittered, _between(-cfg.jitter[3], cfg.jitter[3], hue), 0.0)
    operations, reverse = draw_randaugment(cfg, index, seed=seed, epoch=epoch, view=view)
    return ViewParams(
        box=torch.stack([top * (1 - height), left * (1 - width), height, width], dim=1),
        flip=flip < cfg.flip_prob,
        jitter=torch.stack([*factors, turn], dim=1),
        order=order.argsort(dim=1, stable=True),  # some are equal: one pair in 2**24
        grayscale=grayscale < cfg.grayscale_prob,
        sigma=torch.where(blur < cfg.blur_prob, _between(*cfg.blur_sigma, sigma), 0.0),
        solarize=solarize < cfg.solarize_prob,
        operations=operations,
        reverse=reverse,
    )


def draw_randaugment(cfg: ViewConfig, index: Tensor, *, seed: int, epoch: int, view: int) -> tuple[Tensor, Tensor]:
    """`operations` and `reverse` of a ViewParams, each (B, n), from two lanes an operation behind the other LANES."""
    n = cfg.randaugment[0] if cfg.randaugment else 0
    u = uniforms(index, seed=seed, epoch=epoch, view=view, lanes=2 * n, first=LANES).view(len(index), n, 2)
    return (u[..., 0] * len(OPERATIONS)).long(), u[..., 1] < 0.5


def centre_view(original: Tensor, *, size: int, resize: int) -> ViewParams:
    """The centre square of `size` pixels that is cut out after the shorter side was resized to `resize`."""
    height, width = original.float().unbind(1)
    side = torch.minimum(height, width) * (size / resize)
    fraction_h, fraction_w = side / height, side / width
    box = torch.stack([(1 - fraction_h) / 2, (1 - fraction_w) / 2, fraction_h, fraction_w], dim=1)
    no = torch.zeros(len(box), dtype=torch.bool, device=box.device)
    one, zero = torch.ones_like(side), torch.zeros_like(side)
    order = torch.arange(4, device=box.device).expand(len(box), 4)
    jitter, none = torch.stack([one, one, one, zero], dim=1), order[:, :0]
    return ViewParams(box, no, jitter, order, no, zero, no, operations=none, reverse=none.bool())


def _crop_size(cfg: ViewConfig, original: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B,) height and width as fractions of the image, (B,) whether any crop did fit; u (B, tries, 2).

    The area is uniform, the logarithm of the aspect ratio is uniform, and the first pair that fits the image counts. If
    none does, the largest centred crop of the nearest ratio allowed is taken, here as in torchvision.
    """
    aspect = (original[:, 1] / original[:, 0]).unsqueeze(1)  # width / height
    area = _between(*cfg.crop_scale, u[..., 0])
    low, high = cfg.crop_ratio
    ratio = torch.exp(_between(math.log(low), math.log(high), u[..., 1]))
    height, width = torch.sqrt(area * aspect / ratio), torch.sqrt(area * ratio / aspect)  # (B, tries)
    fits = (height <= 1) & (width <= 1)
    first = fits.int().argmax(dim=1, keepdim=True)
    nearest = aspect.clamp(low, high)
    fallback_h, fallback_w = (aspect / nearest).clamp(max=1), (nearest / aspect).clamp(max=1)
    any_fits = fits.any(dim=1)
    return (
        torch.where(any_fits, height.gather(1, first).squeeze(1), fallback_h.squeeze(1)),
        torch.where(any_fits, width.gather(1, first).squeeze(1), fallback_w.squeeze(1)),
        any_fits,
    )


def uniforms(index: Tensor, *, seed: int, epoch: int, view: int, lanes: int, first: int = 0) -> Tensor:
    """(B, lanes) float32 in [0, 1), multiples of 2**-24: the lanes from `first` on. `index` (B,) int64 decides the row,
    not its place in B."""
    row = _mix64(_mix64(index) ^ view_key(seed, epoch, view))  # (B,)
    lane = torch.arange(first, first + lanes, device=index.device, dtype=torch.int64)
    bits = _mix64(row.unsqueeze(1) + lane * _signed(GOLDEN))
    return _shift_right(bits, 40).float() * 2.0**-24


def view_key(*numbers: int) -> int:
    """Of (seed, epoch, view), as int64, on the host: nothing has to be copied to the device."""
    key = np.zeros(1, np.uint64)
    for number in numbers:
        key = mix64(key + np.uint64(number % 2**64))
    return int(key.view(np.int64)[0])


def _mix64(x: Tensor) -> Tensor:
    """SplitMix64's finaliser after its increment (Steele, Lea, Flood 2014), on int64 that wraps: one to one."""
    x = x + _signed(GOLDEN)
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """A logical shift: int64's own copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _between(low: float, high: float, u: Tensor) -> Tensor:
    return low + (high - low) * u
