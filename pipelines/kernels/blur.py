"""The last two kernels of a blurred view: the Gaussian along the rows, then along the columns."""

# mypy: disallow-untyped-defs=False
# a kernel gets its types when it is compiled for its arguments

import triton
import triton.language as tl

from pipelines.kernels.colours import finish


@triton.jit
def blur_rows_kernel(planes, sigma, out, SIZE: tl.constexpr, RADIUS: tl.constexpr, BLOCK: tl.constexpr) -> None:
    """A program: BLOCK values of the planes of one image, blurred along their rows. `out` stays undefined for images
    that are not to be blurred."""
    BLOCKS: tl.constexpr = (3 * SIZE * SIZE + BLOCK - 1) // BLOCK
    image, block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    width = tl.load(sigma + image)
    if width > 0:
        at = block * BLOCK + tl.arange(0, BLOCK)
        inside = at < 3 * SIZE * SIZE
        first = image.to(tl.int64) * (3 * SIZE * SIZE)
        at = tl.minimum(at, 3 * SIZE * SIZE - 1)
        x = at % SIZE
        value = _blur(planes + first + at - x, x, 1, width, SIZE, RADIUS)
        tl.store(out + first + at, value, inside)


@triton.jit
def blur_columns_kernel(
    planes, lines, sigma, solarize, mean, scale, out,
    SIZE: tl.constexpr, RADIUS: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr, SOLARIZE: tl.constexpr,
) -> None:  # fmt: skip
    """A program: HIGH x WIDE values of one view, as they lie in it, from `lines` blurred along the rows, or from
    `planes` where the image is not to be blurred."""
    ACROSS: tl.constexpr = (3 * SIZE + WIDE - 1) // WIDE
    TILES: tl.constexpr = (SIZE + HIGH - 1) // HIGH * ACROSS
    image, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    y = (tile // ACROSS * HIGH + tl.arange(0, HIGH))[:, None]
    at = (tile % ACROSS * WIDE + tl.arange(0, WIDE))[None, :]
    inside = (y < SIZE) & (at < 3 * SIZE)
    channel, line = at % 3, tl.minimum(y, SIZE - 1)
    column = image.to(tl.int64) * (3 * SIZE * SIZE) + channel * (SIZE * SIZE) + tl.minimum(at // 3, SIZE - 1)
    width = tl.load(sigma + image)
    if width > 0:
        value = _blur(lines + column, line, SIZE, width, SIZE, RADIUS)
    else:
        value = tl.load(planes + column + line * SIZE)
    due = tl.load(solarize + image) if SOLARIZE else False
    shift = tl.where(channel == 0, mean[0], tl.where(channel == 1, mean[1], mean[2]))
    factor = tl.where(channel == 0, scale[0], tl.where(channel == 1, scale[1], scale[2]))
    value = finish(value, due, shift, factor, SOLARIZE)
    first = out + image.to(tl.int64) * (3 * SIZE * SIZE)
    tl.store(first + y * (3 * SIZE) + at, value.to(out.dtype.element_ty), inside)


@triton.jit
def _blur(line, place, STEP: tl.constexpr, sigma, SIZE: tl.constexpr, RADIUS: tl.constexpr):
    """The Gaussian at `place` of a line of SIZE values, STEP apart, whose ends go on.

    Taps below exp(-18) are left out: all of them together weigh less than a rounding."""
    sigma = tl.maximum(sigma, 1e-3)
    reach = tl.minimum(tl.ceil(6 * sigma), RADIUS * 1.0).to(tl.int32)
    value = tl.load(line + place * STEP)
    total = 1.0
    for k in range(1, reach + 1):
        ratio = k / sigma
        weight = tl.exp(-0.5 * ratio * ratio)
        before = tl.load(line + tl.maximum(place - k, 0) * STEP)
        after = tl.load(line + tl.minimum(place + k, SIZE - 1) * STEP)
        value = tl.fma(weight, before + after, value)
        total += 2 * weight
    return value / total
