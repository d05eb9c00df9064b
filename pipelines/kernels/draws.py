"""The twin of `draw_view` in `pipelines/draws.py` for GPUs: one kernel draws all numbers of a view.

The bits are the same, and so are all floats but a crop's: its last bits, as they take an exponential and a root. A try
may then fit into the image here and not there, about one in ten million.
"""

# mypy: disallow-untyped-defs=False
# a kernel gets its types when it is compiled for its arguments

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipelines.draws import CROP_TRIES, LANES, ViewParams, draw_randaugment, view_key
from pipelines.draws import GOLDEN as GOLDEN_UNSIGNED
from ressl.config import ViewConfig

BLOCK = 128  # images of a program

TRIES, ORDER = tl.constexpr(CROP_TRIES), tl.constexpr(LANES - 4)  # ORDER: the first of its four lanes
GOLDEN = tl.constexpr(GOLDEN_UNSIGNED - (1 << 64))
FIRST_FACTOR = tl.constexpr(0xBF58476D1CE4E5B9 - (1 << 64))
SECOND_FACTOR = tl.constexpr(0x94D049BB133111EB - (1 << 64))


def draw_views(
    cfgs: Sequence[ViewConfig], original: Tensor, index: Tensor, *, seed: int, epoch: int, first_view: int
) -> list[ViewParams]:
    """`draw_view` of each of `cfgs`, whose views are numbered from `first_view` on. `original` (B, 2) is the height and
    width before any resizing, `index` (B,) int64."""
    original, index = original.contiguous(), index.contiguous()
    with torch.cuda.device_of(index):
        views = enumerate(cfgs, first_view)
        return [_draw_view(cfg, original, index, seed=seed, epoch=epoch, view=view) for view, cfg in views]


def _draw_view(cfg: ViewConfig, original: Tensor, index: Tensor, *, seed: int, epoch: int, view: int) -> ViewParams:
    count, device = len(index), index.device
    box, jitter = torch.empty((count, 4), device=device), torch.empty((count, 4), device=device)
    order = torch.empty((count, 4), dtype=torch.int64, device=device)
    flip, grayscale, solarize = (torch.empty(count, dtype=torch.bool, device=device) for _ in range(3))
    sigma = torch.empty(count, device=device)
    if cfg.randaugment is None:
        operations, reverse = order[:, :0], order[:, :0].bool()
    else:
        operations, reverse = draw_randaugment(cfg, index, seed=seed, epoch=epoch, view=view)
    low, high = cfg.crop_ratio
    ratio = (low, high, *_span(math.log(low), math.log(high)))
    factors = tuple(number for x in cfg.jitter[:3] for number in _span(max(0.0, 1 - x), 1 + x))
    chances = (cfg.flip_prob, cfg.jitter_prob, cfg.grayscale_prob, cfg.blur_prob, cfg.solarize_prob)
    _draw_kernel[(triton.cdiv(count, BLOCK),)](
        *(original, index, box, flip, jitter, order, grayscale, sigma, solarize, count, view_key(seed, epoch, view)),
        *(_span(*cfg.crop_scale), ratio, chances, factors),
        *(_span(-cfg.jitter[3], cfg.jitter[3]), _span(*cfg.blur_sigma)),
        SIZE=BLOCK, num_warps=4, num_stages=1, enable_fp_fusion=False,
    )  # fmt: skip
    return ViewParams(box, flip, jitter, order, grayscale, sigma, solarize, operations, reverse)


def _span(low: float, high: float) -> tuple[float, float]:
    """Taken on the host, in double precision, as the definition does."""
    return float(low), float(high - low)


@triton.jit(do_not_specialize=["count", "key"])
def _draw_kernel(
    original, index, box, flip, jitter, order, grayscale, sigma, solarize, count, key,
    area, ratio, chances, factors, turn, width, SIZE: tl.constexpr,
):  # fmt: skip
    """A program: the numbers of SIZE images. A pair of `area`, `factors`, `turn`, `width`: the lowest, and how far the
    highest is from it; `ratio`: the lowest and the highest, and such a pair of their logarithms."""
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    inside = at < count
    read = tl.minimum(at, count - 1)
    row = _mix64(_mix64(tl.load(index + read)) ^ key)
    lane: tl.constexpr = 2 * TRIES

    aspect = tl.div_rn(tl.load(original + 2 * read + 1).to(tl.float32), tl.load(original + 2 * read).to(tl.float32))
    height, width_, fits = _crop_size(row, aspect, area, ratio, SIZE)
    top = tl.where(fits, _uniform(row, lane, SIZE), 0.5)
    left = tl.where(fits, _uniform(row, lane + 1, SIZE), 0.5)
    tl.store(box + 4 * at, top * (1 - height), inside)
    tl.store(box + 4 * at + 1, left * (1 - width_), inside)
    tl.store(box + 4 * at + 2, height, inside)
    tl.store(box + 4 * at + 3, width_, inside)

    tl.store(flip + at, _uniform(row, lane + 2, SIZE) < chances[0], inside)
    jittered = _uniform(row, lane + 3, SIZE) < chances[1]
    for i in tl.static_range(3):
        factor = factors[2 * i] + factors[2 * i + 1] * _uniform(row, lane + 4 + i, SIZE)
        tl.store(jitter + 4 * at + i, tl.where(jittered, factor, 1.0), inside)
    hue = turn[0] + turn[1] * _uniform(row, lane + 7, SIZE)
    tl.store(jitter + 4 * at + 3, tl.where(jittered, hue, 0.0), inside)

    tl.store(grayscale + at, _uniform(row, lane + 8, SIZE) < chances[2], inside)
    blurred = _uniform(row, lane + 9, SIZE) < chances[3]
    tl.store(sigma + at, tl.where(blurred, width[0] + width[1] * _uniform(row, lane + 10, SIZE), 0.0), inside)
    tl.store(solarize + at, _uniform(row, lane + 11, SIZE) < chances[4], inside)
    _store_order(order + 4 * at, row, inside, SIZE)


@triton.jit
def _crop_size(row, aspect, area, ratio, SIZE: tl.constexpr):
    """Height and width as fractions of the image, and whether any try did fit: the first that did counts."""
    nearest = tl.minimum(tl.maximum(aspect, ratio[0]), ratio[1])
    height = tl.minimum(tl.div_rn(aspect, nearest), 1.0)
    width = tl.minimum(tl.div_rn(nearest, aspect), 1.0)
    found = aspect < 0  # not yet
    for i in range(TRIES):
        part = area[0] + area[1] * _uniform(row, 2 * i, SIZE)
        drawn = tl.exp(ratio[2] + ratio[3] * _uniform(row, 2 * i + 1, SIZE))
        high, wide = tl.sqrt_rn(tl.div_rn(part * aspect, drawn)), tl.sqrt_rn(tl.div_rn(part * drawn, aspect))
        fits = (high <= 1) & (wide <= 1)
        height, width = tl.where(fits & ~found, high, height), tl.where(fits & ~found, wide, width)
        found = found | fits
    return height, width, found


@triton.jit
def _store_order(order, row, inside, SIZE: tl.constexpr):
    """The places in a stable sort."""
    a, b = _uniform(row, ORDER, SIZE), _uniform(row, ORDER + 1, SIZE)
    c, d = _uniform(row, ORDER + 2, SIZE), _uniform(row, ORDER + 3, SIZE)
    tl.store(order + _how_many(b < a, c < a, d < a), 0, inside)
    tl.store(order + _how_many(a <= b, c < b, d < b), 1, inside)
    tl.store(order + _how_many(a <= c, b <= c, d < c), 2, inside)
    tl.store(order + _how_many(a <= d, b <= d, c <= d), 3, inside)


@triton.jit
def _how_many(x, y, z):
    return x.to(tl.int32) + y.to(tl.int32) + z.to(tl.int32)


@triton.jit
def _uniform(row, lane, SIZE: tl.constexpr):
    bits = _mix64(row + tl.full((SIZE,), lane, tl.int64) * GOLDEN)
    return ((bits >> 40) & 0xFFFFFF).to(tl.float32) * (1.0 / (1 << 24))


@triton.jit
def _mix64(x):
    """On int64 that wraps, where >> copies the sign: so what it copied is cut off."""
    x = x + GOLDEN
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * FIRST_FACTOR
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * SECOND_FACTOR
    return x ^ ((x >> 31) & ((1 << 33) - 1))
