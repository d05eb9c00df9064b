"""The fused loss against the definition, on the GPU or, without one, in Triton's interpreter: there in few, large
tiles, as the interpreter takes its time for every tile, but where the tiles themselves are looked at."""

import math
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ressl.kernels.relational_loss import SLOTS, Plan, loss_and_gradient, plan
from ressl.loss import relational_loss

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = [(8, 1, 37, 64), (33, 1, 1000, 100), (64, 1, 5001, 512), (40, 5, 300, 128)]  # B, V, K, D
WARM, SWAPPED, COLD = (0.1, 0.04), (0.04, 0.1), (0.01, 0.01)  # of student and teacher
TF32_BITS, BF16_BITS = 11, 8  # of the mantissa, the hidden one among them


class Inputs(NamedTuple):
    student: Tensor
    teacher: Tensor
    queue: Tensor


def inputs(count: int, views: int, size: int, dim: int, dtype: torch.dtype = torch.float32) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(count * views + count + size, dim, generator=generator, dtype=torch.float64)
    student, teacher, queue = F.normalize(rows, dim=1).split([count * views, count, size])
    student = F.normalize(student + 0.5 * teacher.repeat(views, 1), dim=1)
    queue = F.normalize(queue + teacher[torch.arange(size) % count], dim=1)  # past images: some are like these
    return Inputs(*(x.float().to(DEVICE, dtype) for x in (student, teacher, queue)))


def large_tiles(x: Inputs, splits: int = 2) -> Plan | None:
    """None on a GPU: its own."""
    rows, size = len(x.student) + len(x.teacher), len(x.queue)
    width = max(16, 1 << (x.queue.shape[1] - 1).bit_length())
    length = math.ceil(size / splits)
    high, keys = (max(16, 1 << (n - 1).bit_length()) for n in (rows, length))
    cut = Plan(high, min(keys, (1 << 20) // width), width, 4, 1, length, splits)  # Triton's largest tile has 2**20
    return None if DEVICE.type == "cuda" else cut


def fused(
    x: Inputs, temperatures=WARM, precision="float32", gradient=True, cut: Plan | None = None
) -> tuple[Tensor, Tensor | None]:
    return loss_and_gradient(*x, *temperatures, precision=precision, gradient=gradient, cut=cut or large_tiles(x))


def by_definition(x: Inputs, temperatures=WARM, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    student, teacher, queue = (rows.to(dtype) for rows in x)
    student = student.detach().clone().requires_grad_()
    tau_s, tau_t = temperatures
    loss = relational_loss(student, teacher, queue, student_temperature=tau_s, teacher_temperature=tau_t)
    loss.backward()
    return loss.detach(), student.grad


def worst(found: Tensor, true: Tensor) -> float:
    return (found.double() - true.double()).abs().max().item()


def assert_as_good_as_the_definition(ours: tuple[Tensor, Tensor], x: Inputs, temperatures=WARM) -> None:
    """Errors at most twice those of the definition in float32, or a few roundings of the result where it has none."""
    for mine, eager, true in zip(
        ours, by_definition(x, temperatures, torch.float32), by_definition(x, temperatures), strict=True
    ):
        floor = 4 * torch.finfo(torch.float32).eps * true.abs().max().item()
        assert worst(mine, true) <= max(2 * worst(eager, true), floor)


def rounded(x: Tensor, bits: int) -> Tensor:
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 2**bits).round() / 2**bits, exponent)


@pytest.mark.parametrize(
    ("case", "temperatures"), [*((case, WARM) for case in CASES), (CASES[0], SWAPPED), (CASES[0], COLD)]
)
def test_loss_and_gradient_are_as_exact_as_the_definition_s(case, temperatures) -> None:
    x = inputs(*case)
    assert_as_good_as_the_definition(fused(x, temperatures), x, temperatures)


@pytest.mark.parametrize("dim", [37, 64])
def test_the_tiles_of_a_gpu_give_the_same(dim) -> None:
    """Several blocks of rows, parts of the queue of which the last is partly full, rows read piece by piece."""
    x = inputs(6, 2, 83, dim)
    own = plan(18, 83, dim, precision="float32", queue_bytes=4)
    assert (own.splits > 1, own.length * own.splits > 83, own.depth) == (True, True, 32)
    small = Plan(16, 16, 16, 4, 1, length=48, splits=2)
    for cut, temperatures in ((own, WARM), (small, COLD), (replace(small, length=9, splits=10), WARM)):
        assert_as_good_as_the_definition(fused(x, temperatures, cut=cut), x, temperatures)


@pytest.mark.parametrize(("precision", "bits"), [("tf32", TF32_BITS), ("bf16", BF16_BITS)])
@pytest.mark.parametrize("case", [CASES[0], (6, 5, 300, 128)])
def test_coarser_factors_cost_no_more_than_their_rounding(case, precision, bits) -> None:
    """With rows that the coarse type holds, only the shares are rounded: 2 ** -bits of each, and of their sum too."""
    x = Inputs(*(rounded(rows, bits) for rows in inputs(*case)))
    (loss, gradient), (true_loss, true_gradient) = fused(x, precision=precision), by_definition(x)
    share = 2.0**-bits
    # the average of unit vectors moves by 2 share at most, which the loss sees divided by the temperature
    assert worst(loss, true_loss) <= share * (1 + 2 / WARM[0])
    assert worst(gradient, true_gradient) <= 4 * share / (WARM[0] * len(x.student))
    assert worst(gradient, true_gradient) > 0


@pytest.mark.parametrize(("precision", "bits"), [("tf32", TF32_BITS), ("bf16", BF16_BITS)])
def test_coarser_factors_are_rounded_to_the_nearest(precision, bits) -> None:
    """Rows that the coarse type does not hold give what their rounded copies give, to the bit."""
    x = inputs(*CASES[0])
    x = x._replace(queue=rounded(x.queue, bits))  # a tensor core cuts the last bits of this one off in tf32
    ours, theirs = (fused(y, precision=precision) for y in (x, Inputs(*(rounded(rows, bits) for rows in x))))
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=1e-2)  # its last product takes the student as it is
    assert torch.equal(ours[1], theirs[1])


def test_a_bf16_queue_is_read_as_it_is() -> None:
    x = inputs(*CASES[0])
    x = x._replace(queue=x.queue.bfloat16())
    assert_as_good_as_the_definition(fused(x), x)


def test_memory_around_the_rows_is_never_read() -> None:
    plain = inputs(9, 2, 37, 20)
    around = []
    for rows in plain:
        room = torch.full((len(rows) + 2, 2 * rows.shape[1]), float("nan"), device=DEVICE)
        room[1:-1, : rows.shape[1]] = rows
        around.append(room[1:-1, : rows.shape[1]])
    room = torch.full(((len(plain.queue) + 40) * 20,), float("nan"), device=DEVICE)
    behind = room[: plain.queue.numel()].view_as(plain.queue)
    behind[:] = plain.queue
    expected = fused(plain)
    for x in (Inputs(*around), plain._replace(queue=behind)):
        loss, gradient = fused(x)
        assert torch.equal(loss, expected[0]) and torch.equal(gradient, expected[1])


def test_the_same_rows_give_the_same_bits_and_without_a_gradient_the_same_loss() -> None:
    x = inputs(*CASES[0])
    (loss, gradient), again, (alone, none) = fused(x), fused(x), fused(x, gradient=False)
    assert torch.equal(loss, again[0]) and torch.equal(gradient, again[1]) and torch.equal(loss, alone)
    assert none is None


@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
@pytest.mark.parametrize("queue_bytes", [2, 4])
def test_a_plan_fills_the_gpu_and_keeps_its_parts_small(precision, queue_bytes) -> None:
    for rows in (16, 64, 320, 2048, 8192, 40960, 122880):
        for size, dim in ((4096, 128), (131072, 512), (262144, 65), (7, 64)):
            cut = plan(rows, size, dim, precision=precision, queue_bytes=queue_bytes)
            assert (
                (cut.splits - 1) * cut.length < size <= cut.splits * cut.length
            )  # no part is empty, and none left out
            assert cut.splits == 1 or 4 * cut.splits * rows * dim <= 64 << 20
            programs = math.ceil(rows / cut.rows) * cut.splits
            if size >= 131072 and 4 * rows * dim * SLOTS <= 64 << 20:
                assert programs >= 0.9 * SLOTS


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
@pytest.mark.parametrize("queue_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [(8, 1, 131072, 512), (64, 5, 65536, 512), (256, 1, 4096, 128), (700, 1, 20011, 192)])
def test_sizes_of_real_runs_on_a_gpu(case, queue_dtype, precision) -> None:
    """Coarse factors: as far from the truth as their rounding of similarities, which a temperature divides."""
    x = inputs(*case)
    x = x._replace(queue=x.queue.to(queue_dtype))
    ours = fused(x, precision=precision)
    if precision == "float32":
        assert_as_good_as_the_definition(ours, x)
    else:
        share = 2.0 ** -(TF32_BITS if precision == "tf32" else BF16_BITS)
        true_loss, true_gradient = by_definition(x)
        assert worst(ours[0], true_loss) <= 2 * share / WARM[0]
        assert worst(ours[1], true_gradient) <= share / (WARM[1] * WARM[0] * len(x.student))


@pytest.mark.gpu
def test_extra_memory_is_a_twentieth_of_the_definition_s() -> None:
    x = inputs(4096, 1, 131072, 512)
    peaks = []
    for impl in ("torch", "triton"):
        student = x.student.clone().requires_grad_()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        relational_loss(
            student, x.teacher, x.queue, student_temperature=0.1, teacher_temperature=0.04, impl=impl
        ).backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] <= 0.05 * peaks[0]


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu_and_a_graph_can_hold_it() -> None:
    x = inputs(32, 1, 4096, 128)
    student = x.student.clone().requires_grad_()

    def step() -> Tensor:
        loss = relational_loss(
            student,
            x.teacher,
            x.queue,
            student_temperature=0.1,
            teacher_temperature=0.04,
            impl="auto",
            precision="tf32",
        )
        (slope,) = torch.autograd.grad(loss, student)
        return slope

    expected = step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    graph.replay()
    assert torch.equal(found, expected)
