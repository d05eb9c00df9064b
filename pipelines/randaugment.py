"""RandAugment, Cubuk et al. 2020, https://arxiv.org/abs/1909.13719: n operations, each any of 14, all of one magnitude.

Operations and magnitudes are those of torchvision.transforms.RandAugment: 31 magnitudes, nearest pixels, black where
nothing is. Each image has its own operations, so they are worked out in three groups, of which an image takes one a
turn: movements are one sampling with a matrix for each image, blends one mixture with a partner for each image, and
what maps bytes to bytes is one look-up in a table for each channel. Nothing is read by the host.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.draws import OPERATIONS
from pipelines.per_image import grayscale, per_image, where_due

(
    IDENTITY, SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y, ROTATE,
    BRIGHTNESS, COLOUR, CONTRAST, SHARPNESS,
    POSTERIZE, SOLARIZE, AUTOCONTRAST, EQUALIZE,
) = range(len(OPERATIONS))  # fmt: skip
MAGNITUDES = 30  # the largest; 0 is the smallest


def randaugment(images: Tensor, operations: Tensor, reverse: Tensor, magnitude: int) -> Tensor:
    """(B, 3, h, w) float32 in [0, 1], of at least 3 x 3 pixels -> the same.

    `operations` (B, n) int64 are places in OPERATIONS, in their order. `reverse` (B, n) bool turns those around that
    have two ways: movements and blends. `magnitude` is of 0 .. 30. Values stay floats between the operations: only
    posterize, solarize, autocontrast and equalize see the nearest bytes.
    """
    for op, reversed_ in zip(operations.unbind(1), reverse.unbind(1), strict=True):
        sign = torch.where(reversed_, -1.0, 1.0)
        moves, blends = (op >= SHEAR_X) & (op <= ROTATE), (op >= BRIGHTNESS) & (op <= SHARPNESS)
        images = where_due(moves, partial(move, magnitude=magnitude), images, op, sign)
        images = where_due(blends, partial(blend, magnitude=magnitude), images, op, sign)
        images = where_due(op >= POSTERIZE, partial(look_up, magnitude=magnitude), images, op)
    return images


def move(images: Tensor, op: Tensor, sign: Tensor, magnitude: int) -> Tensor:
    """Shears by up to 0.3 from the top left, shifts by up to 150 / 331 of the side, or turns by up to 30 degrees about
    the centre; `op` and `sign` are (B,)."""
    height, width = images.shape[2:]
    share = magnitude / MAGNITUDES
    # written out, not as a product of matrices: those may be rounded to ten bits on a GPU
    y = (torch.arange(height, device=images.device) + (0.5 - height / 2)).unsqueeze(1)
    x = torch.arange(width, device=images.device) + (0.5 - width / 2)

    def amount(operation: int, most: float) -> Tensor:
        return torch.where(op == operation, most * sign, 0.0).view(-1, 1, 1)

    angle = amount(ROTATE, math.radians(30) * share)
    across, down = amount(SHEAR_X, 0.3 * share), amount(SHEAR_Y, 0.3 * share)
    right = amount(TRANSLATE_X, int(150 / 331 * width * share))
    below = amount(TRANSLATE_Y, int(150 / 331 * height * share))
    from_x = x * angle.cos() - y * angle.sin() + (y + height / 2) * across - right  # (B, h, w)
    from_y = x * angle.sin() + y * angle.cos() + (x + width / 2) * down - below
    grid = torch.stack([from_x * (2 / width), from_y * (2 / height)], dim=3)
    return F.grid_sample(images, grid, mode="nearest", padding_mode="zeros", align_corners=False)


def blend(images: Tensor, op: Tensor, sign: Tensor, magnitude: int) -> Tensor:
    """Away from black, the own gray, the mean gray or the smoothed image by up to 0.9 of the difference, or towards it;
    `op` and `sign` are (B,)."""
    gray = grayscale(images)[:, :1]
    partner = torch.where(per_image(op == COLOUR), gray, 0.0)
    partner = torch.where(per_image(op == CONTRAST), gray.mean(dim=(1, 2, 3), keepdim=True), partner)
    partner = torch.where(per_image(op == SHARPNESS), smooth(images), partner)
    return torch.lerp(partner, images, per_image(1 + 0.9 * magnitude / MAGNITUDES * sign)).clamp_(0, 1)


def smooth(images: Tensor) -> Tensor:
    """Pillow's SMOOTH: the mean of 3 x 3 pixels in which the middle one counts five times; the border stays."""
    out = images.clone()
    inner = out[:, :, 1:-1, 1:-1]
    inner.copy_((9 * F.avg_pool2d(images, 3, stride=1) + 4 * inner) / 13)
    return out


def look_up(images: Tensor, op: Tensor, magnitude: int) -> Tensor:
    """Posterize, solarize, autocontrast or equalize; `op` is (B,)."""
    values = images.mul(255).round_().long().flatten(2)  # (B, 3, h * w)
    return byte_tables(values, op, magnitude).div_(255).gather(2, values).view(images.shape)


def byte_tables(values: Tensor, op: Tensor, magnitude: int) -> Tensor:
    """(B, 3, 256) float32: what becomes of each byte in each channel; `values` (B, 3, pixels) int64 of 0 .. 255."""
    byte = torch.arange(256, device=values.device)
    count = values.new_zeros(*values.shape[:2], 256).scatter_add_(2, values, torch.ones_like(values))
    low = torch.where(count > 0, byte, 255).amin(dim=2, keepdim=True)
    high = torch.where(count > 0, byte, 0).amax(dim=2, keepdim=True)
    stretched = ((byte - low) * (255 / (high - low).clamp(min=1))).clamp(0, 255)
    # Pillow's equalize: the brightest byte does not count towards the step, and half a step is added for rounding
    step = (values.shape[2] - count.gather(2, high)) // 255
    below = count.cumsum(dim=2) - count
    spread = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)

    table = torch.where(high > low, stretched, byte)
    table = torch.where(_each(op == EQUALIZE), torch.where(step > 0, spread, byte), table)
    table = torch.where(_each(op == POSTERIZE), byte & -(1 << round(4 * magnitude / MAGNITUDES)), table)
    bright = byte * MAGNITUDES >= 255 * (MAGNITUDES - magnitude)
    return torch.where(_each(op == SOLARIZE), torch.where(bright, 255 - byte, byte), table)


def _each(values: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1)."""
    return values.view(-1, 1, 1)
