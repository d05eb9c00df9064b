"""The first kernel of every view: crop, resize and flip from the frames' bytes, and the colours up to the contrast.

Each pixel sums its taps straight from the bytes, which the cache holds: a first pass along the rows would read a third
as much of them, but write and read an image of floats.
"""

# mypy: disallow-untyped-defs=False
# a kernel gets its types when it is compiled for its arguments

import triton
import triton.language as tl

from pipelines.kernels.colours import clamp, gray_of, jitter_colours, store, to_gray, turn_of_contrast


@triton.jit
def crop_kernel(
    pixels, offset, stride, extent, box, flip, jitter, order, grayscale, solarize, mean, scale, out, partial,
    SIZE: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr, JITTER: tl.constexpr, CONTRAST: tl.constexpr,
    GRAY: tl.constexpr, SOLARIZE: tl.constexpr, LAST: tl.constexpr,
) -> None:  # fmt: skip
    """A program: HIGH x WIDE pixels of one view. LAST: `out` is the view, else planes of float32; `partial` (B, tiles)
    gets the sum of the gray of the tile's pixels, in front of the contrast."""
    ACROSS: tl.constexpr = (SIZE + WIDE - 1) // WIDE
    TILES: tl.constexpr = (SIZE + HIGH - 1) // HIGH * ACROSS
    image, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    y = (tile // ACROSS * HIGH + tl.arange(0, HIGH))[:, None]
    x = (tile % ACROSS * WIDE + tl.arange(0, WIDE))[None, :]
    inside = (y < SIZE) & (x < SIZE)
    from_x = tl.where(tl.load(flip + image), SIZE - 1 - x, x)
    first = pixels + tl.load(offset + image)
    r, g, b = _resize(
        first, tl.load(stride + image), extent + 2 * image, box + 4 * image,
        tl.minimum(y, SIZE - 1), tl.minimum(tl.maximum(from_x, 0), SIZE - 1), SIZE, HIGH, WIDE,
    )  # fmt: skip
    if JITTER:
        r, g, b = clamp(r), clamp(g), clamp(b)
        turns = turn_of_contrast(order + 4 * image) if CONTRAST else 4
        r, g, b = jitter_colours(r, g, b, jitter + 4 * image, order + 4 * image, 0, turns)
    if CONTRAST:
        tl.store(partial + image.to(tl.int64) * TILES + tile, tl.sum(tl.where(inside, gray_of(r, g, b), 0.0)))
    if GRAY:
        r, g, b = to_gray(r, g, b, tl.load(grayscale + image))
    store(out, image, y * SIZE + x, inside, r, g, b, solarize, mean, scale, SIZE, SOLARIZE, LAST)


@triton.jit
def _resize(
    first, stride, extent, box, y, x, SIZE: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """Colours of the pixels y (HIGH, 1), x (1, WIDE) of a view, in [0, 1], from the image whose bytes begin at `first`.

    The tap counts are those of the image, and no address is outside of it."""
    row, centre_y, support_y, last_y, taps_y = _axis(box, extent, y, SIZE)
    column, centre_x, support_x, last_x, taps_x = _axis(box + 1, extent + 1, x, SIZE)
    r = tl.zeros((HIGH, WIDE), tl.float32)
    g, b = r, r
    sum_y = tl.zeros((HIGH, 1), tl.float32)
    sum_x = tl.zeros((1, WIDE), tl.float32)
    for j in range(taps_y):
        weight_y = _weight(row + j, centre_y, support_y, last_y)
        line = first + tl.minimum(row + j, last_y - 1).to(tl.int64) * stride
        line_r = tl.zeros((HIGH, WIDE), tl.float32)
        line_g, line_b = line_r, line_r
        sum_x = tl.zeros((1, WIDE), tl.float32)
        for i in range(taps_x):
            weight_x = _weight(column + i, centre_x, support_x, last_x)
            at = line + 3 * tl.minimum(column + i, last_x - 1)
            line_r = tl.fma(weight_x, tl.load(at).to(tl.float32), line_r)
            line_g = tl.fma(weight_x, tl.load(at + 1).to(tl.float32), line_g)
            line_b = tl.fma(weight_x, tl.load(at + 2).to(tl.float32), line_b)
            sum_x += weight_x
        r, g, b = tl.fma(weight_y, line_r, r), tl.fma(weight_y, line_g, g), tl.fma(weight_y, line_b, b)
        sum_y += weight_y
    total = sum_y * sum_x * 255.0
    return tl.div_rn(r, total), tl.div_rn(g, total), tl.div_rn(b, total)


@triton.jit
def _axis(box, extent, at, SIZE: tl.constexpr):
    """The triangle filter of `resize_matrix` for pixels `at` of the view: the first tap and the centre of each, and for
    all of them the support, the end of the pixels that take part, and the number of taps."""
    extent = tl.load(extent)
    begin, length = tl.load(box) * extent, tl.load(box + 2) * extent
    scale = tl.div_rn(length, SIZE * 1.0)
    centre = begin + (at + 0.5) * scale
    support = tl.maximum(scale, 1.0)
    middle = tl.floor(begin + length * 0.5)
    first = tl.minimum(tl.floor(begin + 1e-3), middle).to(tl.int32)
    last = tl.maximum(tl.ceil(begin + length - 1e-3), middle + 1).to(tl.int32)
    first = tl.minimum(tl.maximum(first, 0), extent - 1)
    last = tl.minimum(tl.maximum(last, first + 1), extent)
    tap = tl.maximum(tl.floor(centre - support + 0.5).to(tl.int32), first)
    return tap, centre, support, last, tl.ceil(2 * support).to(tl.int32)


@triton.jit
def _weight(tap, centre, support, last):
    """Not divided by the support: the sum of weights takes care of it."""
    return tl.where(tap < last, tl.maximum(support - tl.abs(tap + 0.5 - centre), 0.0), 0.0)
