"""The fused twin of `ressl/loss.py` for GPUs: the loss and its gradient in one pass over the queue.

1 attend    every row of student and teacher, each with its own temperature, over one part of the queue: a tile of the
            queue is read once, as keys and as values. The parts are computed side by side, as flash-decoding does
            (https://crfm.stanford.edu/2023/10/12/flashdecoding.html), so that few rows fill a GPU too
2 combine   the parts of a row in a fixed order, then its loss and its gradient

Rows are unit vectors, so exp(x . q / tau - 1 / tau) never overflows: a running maximum is kept only at temperatures so
low that it could underflow. The same inputs give the same bits. The host reads nothing.
"""

# mypy: disallow-untyped-defs=False
# a kernel gets its types when it is compiled for its arguments

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

Precision = Literal["float32", "tf32", "bf16"]

SLOTS = 132  # multiprocessors of an H200; elsewhere another number would be better, and would change the last bits
PARTS = 64 << 20  # bytes that the parts' sums may take
COLDEST = 0.03  # with a fixed maximum the smallest share is exp(-2 / tau); below this the running one is kept
SPLITS = tl.constexpr(8)  # that a program of `combine` reads at a time


@dataclass(frozen=True, slots=True)
class Plan:
    """How a call is cut into programs. A program: `rows` rows against `length` keys, `keys` at a time."""

    rows: int
    keys: int
    depth: int  # numbers of a row that a similarity takes at a time: all of them, or a part
    warps: int
    stages: int
    length: int
    splits: int


@cache
def plan(rows: int, size: int, dim: int, *, precision: Precision, queue_bytes: int) -> Plan:
    """For `rows` rows of student and teacher, `size` keys of `dim` numbers, `queue_bytes` bytes each.

    The sums of a program, rows x dim float32, stay in registers and take at most half of a multiprocessor's. The tiles
    are the largest that compile for sm_90 without a spill; tests/ressl/kernels/test_compile.py compiles them.
    """
    width = max(16, triton.next_power_of_2(dim))
    high, keys, warps, stages, resident = _tile(width, precision, queue_bytes)
    high = min(high, max(16, triton.next_power_of_2(rows)))
    depth = min(32, width) if precision == "float32" else width
    blocks, tiles = triton.cdiv(rows, high), triton.cdiv(size, keys)
    # A part costs its tiles, two more to start, and three passes of its sums over the memory. Programs run in waves.
    fixed = 2 + 3 * high / keys
    most = max(1, min(tiles, PARTS // (4 * rows * dim)))
    waves = {n: triton.cdiv(blocks * n, SLOTS * resident) for n in range(1, min(most, SLOTS * resident) + 1)}
    best = min(waves, key=lambda n: waves[n] * (triton.cdiv(tiles, n) + fixed))
    length = triton.cdiv(tiles, best) * keys
    return Plan(high, keys, depth, warps, stages, length, triton.cdiv(size, length))


def _tile(width: int, precision: Precision, queue_bytes: int) -> tuple[int, int, int, int, int]:
    """Rows, keys, warps, stages, and how many such programs a multiprocessor holds at once."""
    match precision:
        case "float32":  # by FMA: operands pass through registers, so they are narrow
            return {256: (64, 32, 8, 1, 1), 512: (32, 32, 8, 1, 1)}.get(width, (32, 64, 4, 1, 2))
        case "tf32":
            return {256: (32, 32, 4, 2, 2), 512: (32, 16, 8, 2, 1)}.get(width, (64, 32, 4, 2, 2))
        case "bf16":
            # a float32 queue passes through registers on its way, beside which 64 rows of 512 sums do not fit
            wide = (64, 32, 8, 3, 1) if queue_bytes == 2 else (32, 32, 8, 2, 1)
            return {256: (64, 32, 8, 2, 1), 512: wide}.get(width, (64, 64, 4, 2, 2))


def loss_and_gradient(
    student: Tensor,
    teacher: Tensor,
    queue: Tensor,
    student_temperature: float,
    teacher_temperature: float,
    *,
    precision: Precision,
    gradient: bool,
    cut: Plan | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The loss () float32 and, if asked for, its gradient (V * B, D) float32 with respect to `student`.

    student: (V * B, D) float32, unit rows.  teacher: (B, D) float32, unit rows.  queue: (K, D) float32 or bfloat16,
    unit rows. D is 512 at most. `precision` float32: exact products.  tf32: of factors with 10 bits of mantissa.
    bf16: with 7. Similarities and sums are float32 in all. Beside the result it takes the rows once more, and at most
    64 MiB, or the size of the rows where that is more. `cut` None: as `plan` says.
    """
    (students, dim), rows, size = student.shape, len(student) + len(teacher), len(queue)
    queue, device = queue.contiguous(), student.device
    cut = cut or plan(rows, size, dim, precision=precision, queue_bytes=queue.element_size())
    width = max(16, triton.next_power_of_2(dim))
    scales = [math.log2(math.e) / tau for tau in (student_temperature, teacher_temperature)]
    with torch.cuda.device_of(student):
        x = _factors(student, teacher, precision)
        top, total = (torch.empty((cut.splits, rows), device=device) for _ in range(2))
        sums = torch.empty((cut.splits, rows, dim), device=device)
        attend_kernel[(triton.cdiv(rows, cut.rows), cut.splits)](
            *(x, queue, top, total, sums, students, rows, size, *scales, cut.length),
            D=dim, WIDTH=width, DEPTH=cut.depth, ROWS=cut.rows, KEYS=cut.keys, FACTORS=precision,
            RUNNING=min(student_temperature, teacher_temperature) < COLDEST, STAGES=cut.stages,
            UPCAST=triton.knobs.runtime.interpret, num_warps=cut.warps, enable_fp_fusion=True,
        )  # fmt: skip
        losses = torch.empty(students, device=device)
        slope = torch.empty((students, dim), device=device) if gradient else losses
        combine_kernel[(students,)](
            *(student.contiguous(), top, total, sums, losses, slope, students, rows, len(teacher), cut.splits),
            *(1 / student_temperature, 1 / (student_temperature * students)),
            D=dim, WIDTH=width, SPLITS_UP=triton.next_power_of_2(cut.splits), GRADIENT=gradient,
            num_warps=4, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip
    return losses.mean(), slope if gradient else None


def _factors(student: Tensor, teacher: Tensor, precision: Precision) -> Tensor:
    """Student's rows, then teacher's, as the products take them."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    x = torch.empty((len(student) + len(teacher), student.shape[1]), dtype=dtype, device=student.device)
    x[: len(student)] = student
    x[len(student) :] = teacher
    if precision == "tf32":
        # to the nearest, as in _tf32: a tensor core would cut the bits off
        x.view(torch.int32).add_(0x1000).bitwise_and_(-0x2000)
    return x


@triton.jit(do_not_specialize=["students", "rows"])
def attend_kernel(
    x, queue, top, total, sums, students, rows, size, student_scale, teacher_scale, length,
    D: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    FACTORS: tl.constexpr, RUNNING: tl.constexpr, STAGES: tl.constexpr, UPCAST: tl.constexpr,
) -> None:  # fmt: skip
    """A program: ROWS rows against keys [part * length, (part + 1) * length). It writes for each row the exponent's
    maximum, the sum of the shares 2 ** (exponent - maximum), and the keys' sum by these shares (splits, rows, D)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    begin = tl.program_id(1) * length
    end = tl.minimum(begin + length, size)
    queue += begin.to(tl.int64) * D
    column = tl.arange(0, WIDTH)
    scale = tl.where(row < students, student_scale, teacher_scale)
    x += row.to(tl.int64)[:, None] * D
    if DEPTH == WIDTH:
        factors = tl.load(x + column[None, :], _inside(there, column, D, WIDTH), 0.0)
    highest = tl.full((ROWS,), float("-inf"), tl.float32) if RUNNING else scale
    weight = tl.zeros((ROWS,), tl.float32)
    summed = tl.zeros((ROWS, WIDTH), tl.float32)
    for at in tl.range(begin, end, KEYS, num_stages=STAGES):
        place = tl.arange(0, KEYS)
        known = at + place < end
        tile = queue + place[:, None] * D
        if DEPTH == WIDTH:
            keys = tl.load(tile + column[None, :], _inside(known, column, D, WIDTH), 0.0)
            keys = _factor(keys, FACTORS)
            similarity = tl.zeros((ROWS, KEYS), tl.float32)
            similarity = _dot(factors, tl.trans(keys), similarity, FACTORS, UPCAST)
        else:
            similarity = tl.zeros((ROWS, KEYS), tl.float32)
            for deep in range(0, WIDTH, DEPTH):
                part = deep + tl.arange(0, DEPTH)
                factors = tl.load(x + part[None, :], _inside(there, part, D, WIDTH), 0.0)
                keys = tl.load(tile + part[None, :], _inside(known, part, D, WIDTH), 0.0)
                similarity = _dot(factors, tl.trans(_factor(keys, FACTORS)), similarity, FACTORS, UPCAST)
            keys = tl.load(tile + column[None, :], _inside(known, column, D, WIDTH), 0.0)
            keys = _factor(keys, FACTORS)
        exponent = tl.where(known[None, :], similarity * scale[:, None], float("-inf"))
        if RUNNING:
            before = highest
            highest = tl.maximum(highest, tl.max(exponent, 1))
            shrink = tl.exp2(before - highest)
            weight *= shrink
            summed *= shrink[:, None]
        share = tl.exp2(exponent - highest[:, None])
        # rounded before they are summed, so that the weights of the average add up to one
        share = _factor(_tf32(share) if FACTORS == "tf32" else share, FACTORS)
        weight += tl.sum(share.to(tl.float32), 1)
        summed = _dot(share, keys, summed, FACTORS, UPCAST)
        queue += KEYS * D
    out = tl.program_id(1).to(tl.int64) * rows + row
    tl.store(top + out, highest, there)
    tl.store(total + out, weight, there)
    tl.store(sums + out[:, None] * D + column[None, :], summed, _inside(there, column, D, WIDTH))


@triton.jit(do_not_specialize=["students", "rows", "teachers", "splits"])
def combine_kernel(
    x, top, total, sums, losses, gradient, students, rows, teachers, splits, sharpness, factor,
    D: tl.constexpr, WIDTH: tl.constexpr, SPLITS_UP: tl.constexpr, GRADIENT: tl.constexpr,
) -> None:  # fmt: skip
    """A program: the loss of one row of the student and, with GRADIENT, `factor` times the difference of averages."""
    row = tl.program_id(0)
    column = tl.arange(0, WIDTH)
    inside = column < D
    target, _ = _average(top, total, sums, students + row % teachers, rows, splits, D, WIDTH, SPLITS_UP, True)
    average, lse = _average(top, total, sums, row, rows, splits, D, WIDTH, SPLITS_UP, GRADIENT)
    at = row.to(tl.int64) * D + column
    agreement = tl.sum(tl.load(x + at, inside, 0.0) * target)
    tl.store(losses + row, lse - agreement * sharpness)
    if GRADIENT:
        tl.store(gradient + at, (average - target) * factor, inside)


@triton.jit
def _average(
    top, total, sums, row, rows, splits,
    D: tl.constexpr, WIDTH: tl.constexpr, SPLITS_UP: tl.constexpr, AVERAGES: tl.constexpr,
):  # fmt: skip
    """avg (WIDTH,) of a row, without AVERAGES zero, and lse ()."""
    column = tl.arange(0, WIDTH)
    part = tl.arange(0, SPLITS_UP)
    tops = tl.load(top + part.to(tl.int64) * rows + row, part < splits, float("-inf"))
    highest = tl.max(tops, 0)
    totals = tl.load(total + part.to(tl.int64) * rows + row, part < splits, 0.0)
    weight = tl.sum(tl.exp2(tops - highest) * totals, 0)
    summed = tl.zeros((WIDTH,), tl.float32)
    if AVERAGES:
        for first in range(0, splits, SPLITS):
            some = first + tl.arange(0, SPLITS)
            at = some.to(tl.int64) * rows + row
            shrink = tl.exp2(tl.load(top + at, some < splits, float("-inf")) - highest)
            known = (some < splits)[:, None] & (column < D)[None, :]
            summed += tl.sum(shrink[:, None] * tl.load(sums + at[:, None] * D + column[None, :], known, 0.0), 0)
    return summed / weight, (highest + tl.log2(weight)) * 0.6931471805599453


@triton.jit
def _inside(line, column, D: tl.constexpr, WIDTH: tl.constexpr):
    """(lines, columns): masks of whole rows cost no registers."""
    inside = line[:, None]
    if D != WIDTH:
        inside = inside & (column < D)[None, :]
    return inside


@triton.jit
def _factor(x, FACTORS: tl.constexpr):
    return x.to(tl.bfloat16 if FACTORS == "bf16" else tl.float32)


@triton.jit
def _tf32(x):
    """To the nearest number with 10 bits of mantissa, which a tensor core takes as it is."""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def _dot(a, b, c, FACTORS: tl.constexpr, UPCAST: tl.constexpr):
    """UPCAST: for the interpreter, which multiplies the bits of a bfloat16."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, c, input_precision="tf32" if FACTORS == "tf32" else "ieee")
