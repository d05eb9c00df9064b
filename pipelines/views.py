"""Cuts views from frames, a whole batch at a time, on any device: the definition that faster twins are held to.

Antialiased random resized crop, flip, colour jitter in random order, grayscale, Gaussian blur, solarize, normalise: the
order of SimCLR and of ReSSL's strong view. RandAugment, which the paper does not use, comes after solarize and before
normalising, a place of our choice. Every image has its own numbers (`draws.py`); none is read by the host.

Crop, resize, flip and blur are linear along rows and columns, so each is a pair of small matrices per image and
`_separable` is the only place where pixels are mixed. Colours follow torchvision.transforms.functional on floats.
Between the steps images are (B, 3, h, w) float32 in [0, 1], in the order `_separable` leaves them in: line by line.
"""

import math
from functools import partial

import torch
from torch import Tensor

from pipelines.draws import ViewParams
from pipelines.frames import Frames
from pipelines.per_image import grayscale, per_image, where_due
from pipelines.randaugment import randaugment
from ressl.config import ViewConfig

CANVAS_BYTES = 1 << 28  # of float32 images that are resized at a time: one huge image in a batch must not take them all
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


def cut_view(
    frames: Frames,
    params: ViewParams,
    cfg: ViewConfig,
    *,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(B, 3, cfg.size, cfg.size) of `dtype`, normalised, channels_last. Steps without a chance are left out."""
    images = crop_resize_flip(frames, params.box, params.flip, cfg.size)
    if cfg.jitter_prob > 0:
        images = color_jitter(images, params.jitter, params.order, cfg.jitter)
    if cfg.grayscale_prob > 0:
        images = where_due(params.grayscale, grayscale, images)
    if cfg.blur_prob > 0:
        blur = partial(gaussian_blur, max_sigma=cfg.blur_sigma[1])
        images = where_due(params.sigma > 0, blur, images, params.sigma)
    if cfg.solarize_prob > 0:
        images = where_due(params.solarize, solarize, images)
    if cfg.randaugment is not None:
        images = randaugment(images, params.operations, params.reverse, cfg.randaugment[1])
    return normalise(images, mean, std).to(dtype)


def crop_resize_flip(frames: Frames, box: Tensor, flip: Tensor, size: int) -> Tensor:
    """(B, 3, size, size) float32 in [0, 1]: the box (B, 4) of each image, bilinear and antialiased, mirrored by `flip`.

    The box is in fractions of the image (top, left, height, width) and need not lie on the pixel grid. Pixels that it
    only touches take part; none outside does, as if the crop had been cut out before resizing.
    """
    extent = frames.size.float()
    rows = resize_matrix(box[:, 0] * extent[:, 0], box[:, 2] * extent[:, 0], size, frames.extent[0])
    columns = resize_matrix(box[:, 1] * extent[:, 1], box[:, 3] * extent[:, 1], size, frames.extent[1])
    columns = torch.where(flip.view(-1, 1, 1), columns.flip(1), columns)
    at_a_time = max(1, CANVAS_BYTES // (12 * frames.extent[0] * frames.extent[1]))
    starts = zip(*(t.split(at_a_time) for t in (frames.offset, frames.stride, rows, columns)), strict=True)
    parts = [_separable(canvas(frames, offset, stride), r, c) for offset, stride, r, c in starts]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).div_(255)


def canvas(frames: Frames, offset: Tensor, stride: Tensor) -> Tensor:
    """(n, 3, H, W) uint8: n images of `frames`, each at the top left; what lies outside an image is undefined."""
    height, width = frames.extent
    line = torch.arange(height, device=frames.pixels.device)
    start = offset.unsqueeze(1) + line * stride.unsqueeze(1).long()
    # rows below an image may start anywhere; the contract's slack holds only for rows of images
    start = start.clamp(max=frames.pixels.numel() - 3 * width)
    windows = frames.pixels.as_strided((frames.pixels.numel() - 3 * width + 1, 3 * width), (1, 1))
    return windows.index_select(0, start.flatten()).view(-1, height, width, 3).permute(0, 3, 1, 2)


def resize_matrix(start: Tensor, length: Tensor, size: int, extent: int) -> Tensor:
    """(B, size, extent) float32: row i holds the weight of each input pixel in output pixel i.

    The interval [start, start + length) of pixels becomes `size` pixels through a triangle filter, which is widened
    when shrinking (torchvision's antialias=True, PIL's BILINEAR) and cut off at the interval's outermost pixels.
    """
    scale = length / size
    centre = start.unsqueeze(1) + (torch.arange(size, device=start.device) + 0.5) * scale.unsqueeze(1)  # (B, size)
    pixel = torch.arange(extent, device=start.device) + 0.5
    support = scale.clamp(min=1).view(-1, 1, 1)
    weight = (1 - (pixel - centre.unsqueeze(2)).abs() / support).clamp(min=0)
    # an end that lies on the grid but for rounding must not let the next pixel in; the middle one always takes part
    middle = (start + length / 2).floor()
    first = torch.minimum((start + 1e-3).floor(), middle).view(-1, 1, 1)
    last = torch.maximum((start + length - 1e-3).ceil(), middle + 1).view(-1, 1, 1)
    weight = weight * ((pixel > first) & (pixel < last))
    return weight / weight.sum(dim=2, keepdim=True)


def color_jitter(images: Tensor, factors: Tensor, order: Tensor, strength: tuple[float, float, float, float]) -> Tensor:
    """Brightness, contrast, saturation and hue of (B, 3, h, w) images, each image in its own `order` (B, 4).

    Brightness, contrast and saturation blend with black, with the image's mean gray and with its own gray; so all three
    are one blend with a different partner, and a turn of the loop handles whichever is due for each image.
    """
    mixes = [op for op in (BRIGHTNESS, CONTRAST, SATURATION) if strength[op] > 0]
    for turn in range(4):
        due = order[:, turn]
        if mixes:
            gray = grayscale(images)[:, :1]
            mean = gray.mean(dim=(1, 2, 3), keepdim=True)
            partner = torch.where(per_image(due == SATURATION), gray, 0.0)
            partner = torch.where(per_image(due == CONTRAST), mean, partner)
            factor = torch.where(due == HUE, 1.0, factors.gather(1, due.unsqueeze(1)).squeeze(1))
            images = torch.lerp(partner, images, per_image(factor)).clamp_(0, 1)
        if strength[HUE] > 0:
            images = where_due((due == HUE) & (factors[:, HUE] != 0), turn_hue, images, factors[:, HUE])
    return images


def turn_hue(images: Tensor, turn: Tensor) -> Tensor:
    """(B, 3, h, w) images with their HSV hue turned by `turn` (B,), in whole circles."""
    top, low = images.amax(dim=1), images.amin(dim=1)
    chroma = top - low
    r, g, b = images.unbind(1)
    safe = torch.where(chroma == 0, 1.0, chroma)
    sixth = torch.where(top == r, (g - b) / safe, torch.where(top == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    sixth = sixth + 6 * turn.view(-1, 1, 1)
    n = torch.arange(5, 0, -2, device=images.device)  # 5, 3, 1: https://en.wikipedia.org/wiki/HSL_and_HSV, alternative
    k = (sixth.unsqueeze(1) + n.view(3, 1, 1)) % 6
    return top.unsqueeze(1) - chroma.unsqueeze(1) * torch.minimum(k, 4 - k).clamp(0, 1)


def gaussian_blur(images: Tensor, sigma: Tensor, max_sigma: float) -> Tensor:
    """(B, 3, h, w) images, each with its own `sigma` (B,) of at most `max_sigma` pixels; the border's pixels go on
    outside. 0 changes nothing. PIL's blur, which the authors use, approximates this by three box filters."""
    matrix = blur_matrix(sigma, images.shape[2], max_sigma)
    return _separable(images, matrix, matrix)


def blur_matrix(sigma: Tensor, size: int, max_sigma: float) -> Tensor:
    """(B, size, size) float32: row i holds the weight of each input pixel in output pixel i."""
    radius = max(1, math.ceil(3 * max_sigma))
    step = torch.arange(-radius, radius + 1, device=sigma.device)
    tap = torch.exp(-0.5 * (step / sigma.clamp(min=1e-3).unsqueeze(1)) ** 2)  # (B, 2 radius + 1)
    tap = tap / tap.sum(dim=1, keepdim=True)
    # laid out beyond both borders, then folded back: adding where indices repeat has no fixed order on a GPU
    column = torch.arange(size, device=sigma.device).unsqueeze(1) + step + radius  # (size, taps)
    wide = tap.new_zeros(len(sigma), size, size + 2 * radius)
    wide.scatter_(2, column.expand(len(sigma), -1, -1), tap.unsqueeze(1).expand(-1, size, -1))
    matrix = wide[:, :, radius:-radius].clone()
    matrix[:, :, 0] += wide[:, :, :radius].sum(dim=2)
    matrix[:, :, -1] += wide[:, :, -radius:].sum(dim=2)
    return matrix


def solarize(images: Tensor, threshold: float = 128 / 255) -> Tensor:
    """Inverts all values from `threshold` up."""
    return torch.where(images >= threshold, 1 - images, images)


def normalise(images: Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Tensor:
    """(B, 3, h, w), channels_last: subtracts the mean of each channel and divides by its standard deviation."""
    images = images.clone(memory_format=torch.channels_last)
    for c in range(3):
        images[:, c].sub_(mean[c]).div_(std[c])
    return images


def _separable(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """rows (B, h, H) and columns (B, w, W) applied to (B, 3, H, W): (B, 3, h, w) float32.

    In memory a result is (B, h, 3, w): so both products are of matrices as they lie, and only a canvas is copied.
    """
    count, _, height, width = images.shape
    lines = images.transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format)  # (B, H, 3, W)
    out = torch.bmm(rows, lines.reshape(count, height, 3 * width)).view(count, -1, width)  # (B, h * 3, W)
    return torch.bmm(out, columns.transpose(1, 2)).view(count, rows.shape[1], 3, -1).transpose(1, 2)
