"""Colours of pixels, as in `pipelines/views.py`, and the second kernel of a view, from the contrast on."""

# mypy: disallow-untyped-defs=False
# a kernel gets its types when it is compiled for its arguments

import triton
import triton.language as tl

from pipelines.per_image import LUMA
from pipelines.views import CONTRAST, HUE, SATURATION

RED, GREEN, BLUE = (tl.constexpr(weight) for weight in LUMA)
IS_CONTRAST, IS_SATURATION, IS_HUE = tl.constexpr(CONTRAST), tl.constexpr(SATURATION), tl.constexpr(HUE)
THRESHOLD = tl.constexpr(128 / 255)  # of solarize


@triton.jit
def colour_kernel(
    planes, partial, jitter, order, grayscale, solarize, mean, scale, out,
    SIZE: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr, GRAY: tl.constexpr, SOLARIZE: tl.constexpr,
    LAST: tl.constexpr,
) -> None:  # fmt: skip
    """A program: BLOCK pixels of one image, from its contrast on. Not LAST: `out` is `planes`, changed in place, and
    images that stay as they are stay untouched."""
    BLOCKS: tl.constexpr = (SIZE * SIZE + BLOCK - 1) // BLOCK
    image, block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    factors, order = jitter + 4 * image, order + 4 * image
    gray = tl.load(grayscale + image) if GRAY else False
    if LAST | gray | _jittered(factors):
        pixel = block * BLOCK + tl.arange(0, BLOCK)
        inside = pixel < SIZE * SIZE
        first = planes + image.to(tl.int64) * (3 * SIZE * SIZE) + pixel
        r = tl.load(first, inside, 0.0)
        g = tl.load(first + SIZE * SIZE, inside, 0.0)
        b = tl.load(first + 2 * SIZE * SIZE, inside, 0.0)

        tile = tl.arange(0, triton.next_power_of_2(TILES))
        sums = tl.load(partial + image.to(tl.int64) * TILES + tile, tile < TILES, 0.0)
        average, factor = tl.sum(sums) / (SIZE * SIZE), tl.load(factors + IS_CONTRAST)
        r, g, b = _blend(average, r, factor), _blend(average, g, factor), _blend(average, b, factor)
        r, g, b = jitter_colours(r, g, b, factors, order, turn_of_contrast(order) + 1, 4)
        if GRAY:
            r, g, b = to_gray(r, g, b, gray)
        store(out, image, pixel, inside, r, g, b, solarize, mean, scale, SIZE, SOLARIZE, LAST)


@triton.jit
def _jittered(factors):
    mixed = (tl.load(factors) != 1) | (tl.load(factors + 1) != 1) | (tl.load(factors + 2) != 1)
    return mixed | (tl.load(factors + 3) != 0)


@triton.jit
def turn_of_contrast(order) -> tl.tensor:
    place = 0
    for turn in tl.static_range(1, 4):
        place = tl.where(tl.load(order + turn) == IS_CONTRAST, turn, place)
    return place


@triton.jit
def jitter_colours(r, g, b, factors, order, first, last) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The turns first .. last - 1 of an image's order, none of which is the contrast's."""
    for turn in range(first, last):
        op = tl.load(order + turn)
        factor = tl.load(factors + op)
        if op == IS_HUE:
            if factor != 0:
                r, g, b = _turn_hue(r, g, b, factor)
        else:
            if factor != 1:
                partner = tl.where(op == IS_SATURATION, gray_of(r, g, b), 0.0)
                r, g, b = _blend(partner, r, factor), _blend(partner, g, factor), _blend(partner, b, factor)
    return r, g, b


@triton.jit
def _blend(partner, value, factor):
    """torch.lerp, by its two formulas, clamped."""
    near = partner + factor * (value - partner)
    far = value - (value - partner) * (1 - factor)
    return clamp(tl.where(tl.abs(factor) < 0.5, near, far))


@triton.jit
def clamp(value) -> tl.tensor:
    return tl.minimum(tl.maximum(value, 0.0), 1.0)


@triton.jit
def gray_of(r, g, b) -> tl.tensor:
    return RED * r + GREEN * g + BLUE * b


@triton.jit
def to_gray(r, g, b, due) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    gray = gray_of(r, g, b)
    return tl.where(due, gray, r), tl.where(due, gray, g), tl.where(due, gray, b)


@triton.jit
def _turn_hue(r, g, b, turn):
    top, low = tl.maximum(tl.maximum(r, g), b), tl.minimum(tl.minimum(r, g), b)
    chroma = top - low
    apart = tl.where(top == r, g - b, tl.where(top == g, b - r, r - g))
    corner = tl.where(top == r, 0.0, tl.where(top == g, 2.0, 4.0))
    sixth = corner + apart / tl.where(chroma == 0, 1.0, chroma) + 6 * turn
    return _channel(top, chroma, sixth + 5), _channel(top, chroma, sixth + 3), _channel(top, chroma, sixth + 1)


@triton.jit
def _channel(top, chroma, k):
    k = k - 6 * tl.floor(k * (1 / 6))  # 0 or 6 but for rounding: the same colour
    return top - chroma * clamp(tl.minimum(k, 4 - k))


@triton.jit
def store(
    out, image, pixel, inside, r, g, b, solarize, mean, scale,
    SIZE: tl.constexpr, SOLARIZE: tl.constexpr, LAST: tl.constexpr,
) -> None:  # fmt: skip
    """LAST: as pixels, finished. Else as planes."""
    first = out + image.to(tl.int64) * (3 * SIZE * SIZE)
    if LAST:
        due = tl.load(solarize + image) if SOLARIZE else False
        r = finish(r, due, mean[0], scale[0], SOLARIZE)
        g = finish(g, due, mean[1], scale[1], SOLARIZE)
        b = finish(b, due, mean[2], scale[2], SOLARIZE)
    STEP: tl.constexpr = 1 if LAST else SIZE * SIZE
    first += pixel * (3 if LAST else 1)
    tl.store(first, r.to(out.dtype.element_ty), inside)
    tl.store(first + STEP, g.to(out.dtype.element_ty), inside)
    tl.store(first + 2 * STEP, b.to(out.dtype.element_ty), inside)


@triton.jit
def finish(value, solarize, mean, scale, SOLARIZE: tl.constexpr) -> tl.tensor:
    if SOLARIZE:
        value = tl.where(solarize & (value >= THRESHOLD), 1 - value, value)
    return (value - mean) * scale
