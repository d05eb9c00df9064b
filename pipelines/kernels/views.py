"""The fused twin of `pipelines/views.py` for GPUs: every view of a batch in one to four kernels.

1 crop         crop, resize and flip straight from the frames' bytes, then the colours that come before the contrast
2 colours      the contrast, which needs the mean of a whole image, and the colours after it
3, 4 blur      along the rows, along the columns

The last of a view's kernels also normalises and writes it: a view without contrast and blur is one kernel. Between
kernels images are (B, 3, size, size) float32. A program works on a part of one image, so steps that are not due for an
image are branched over, and its view is the same, bit for bit, whatever else is in the batch. The host reads nothing.

Products are rounded before they are added, as in the definition, but for the sums over taps: a tap's place is a number
of some hundred pixels, and one more rounding of it is seen in the view.
"""

import math
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from pipelines.draws import ViewParams
from pipelines.frames import Frames
from pipelines.kernels.blur import blur_columns_kernel, blur_rows_kernel
from pipelines.kernels.colours import colour_kernel
from pipelines.kernels.crop import crop_kernel
from pipelines.randaugment import randaugment
from pipelines.views import CONTRAST, normalise
from ressl.config import ViewConfig

TILE = (16, 32)  # pixels, high and wide, of a program of the crop
COLOUR_BLOCK = 512  # pixels
BLUR_BLOCK = 1024  # values, as they lie in a plane
BLUR_TILE = (32, 32)  # rows, and values of a row as they lie in the finished view
OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}


def cut_views(
    frames: Frames,
    params: Sequence[ViewParams],
    cfgs: Sequence[ViewConfig],
    *,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, ...]:
    """Each (B, 3, size, size) of `dtype` (float32, bfloat16 or float16), normalised, channels_last."""
    with torch.cuda.device_of(frames.pixels):
        views = zip(params, cfgs, strict=True)
        return tuple(_cut_view(frames, p, cfg, mean, std, dtype) for p, cfg in views)


def _cut_view(
    frames: Frames,
    params: ViewParams,
    cfg: ViewConfig,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    dtype: torch.dtype,
) -> Tensor:
    """RandAugment, which is no one's default, is the definition's own, between the last kernel and normalising."""
    if cfg.randaugment is None:
        return _launch(frames, params, cfg, mean, std, dtype)
    images = _launch(frames, params, cfg, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), torch.float32)
    images = randaugment(images, params.operations, params.reverse, cfg.randaugment[1])
    return normalise(images, mean, std).to(dtype)


def _launch(
    frames: Frames,
    params: ViewParams,
    cfg: ViewConfig,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    dtype: torch.dtype,
) -> Tensor:
    count, size = len(frames.offset), cfg.size
    jitters = cfg.jitter_prob > 0 and max(cfg.jitter) > 0
    contrast, blurs = jitters and cfg.jitter[CONTRAST] > 0, cfg.blur_prob > 0
    grays, solarizes = cfg.grayscale_prob > 0, cfg.solarize_prob > 0
    device = frames.pixels.device
    view = torch.empty((count, 3, size, size), dtype=dtype, device=device, memory_format=torch.channels_last)
    planes = torch.empty((count, 3, size, size), device=device) if contrast or blurs else view
    tiles = triton.cdiv(size, TILE[0]) * triton.cdiv(size, TILE[1])
    partial = torch.empty((count, tiles), device=device) if contrast else planes  # without contrast no one reads it
    offset, stride, extent = (t.contiguous() for t in (frames.offset, frames.stride, frames.size))
    jitter, order, grayscale = (t.contiguous() for t in (params.jitter, params.order, params.grayscale))
    end = (params.solarize.contiguous(), mean, tuple(1 / s for s in std))
    crop_kernel[(count * tiles,)](
        *(frames.pixels, offset, stride, extent, params.box.contiguous(), params.flip.contiguous()),
        *(jitter, order, grayscale, *end, planes, partial),
        SIZE=size, HIGH=TILE[0], WIDE=TILE[1], JITTER=jitters, CONTRAST=contrast, GRAY=grays and not contrast,
        SOLARIZE=solarizes, LAST=not (contrast or blurs), **OPTIONS,
    )  # fmt: skip
    if contrast:
        colour_kernel[(count * triton.cdiv(size * size, COLOUR_BLOCK),)](
            *(planes, partial, jitter, order, grayscale, *end, planes if blurs else view),
            SIZE=size, TILES=tiles, BLOCK=COLOUR_BLOCK, GRAY=grays, SOLARIZE=solarizes, LAST=not blurs, **OPTIONS,
        )  # fmt: skip
    if blurs:
        lines, sigma = torch.empty_like(planes), params.sigma.contiguous()
        radius = max(1, math.ceil(3 * cfg.blur_sigma[1]))
        blur_rows_kernel[(count * triton.cdiv(3 * size * size, BLUR_BLOCK),)](
            planes, sigma, lines, SIZE=size, RADIUS=radius, BLOCK=BLUR_BLOCK, **OPTIONS
        )
        blur_columns_kernel[(count * triton.cdiv(size, BLUR_TILE[0]) * triton.cdiv(3 * size, BLUR_TILE[1]),)](
            *(planes, lines, sigma, *end, view),
            SIZE=size, RADIUS=radius, HIGH=BLUR_TILE[0], WIDE=BLUR_TILE[1], SOLARIZE=solarizes, **OPTIONS,
        )  # fmt: skip
    return view
