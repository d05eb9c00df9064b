import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ressl import loss as loss_module
from ressl.batch import DataError
from ressl.loss import LossImpl, chosen, relational_loss


def unit(*shape: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def loss(student: Tensor, teacher: Tensor, queue: Tensor, tau_s: float = 0.1, tau_t: float = 0.04) -> Tensor:
    return relational_loss(student, teacher, queue, student_temperature=tau_s, teacher_temperature=tau_t)


def loss_by_loops(student: Tensor, teacher: Tensor, queue: Tensor, tau_s: float, tau_t: float) -> float:
    """The docstring of relational_loss, taken literally, one number at a time."""
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        sim_s = [sum(a * b for a, b in zip(s, q, strict=True)) / tau_s for q in queue.tolist()]
        sim_t = [sum(a * b for a, b in zip(t, q, strict=True)) / tau_t for q in queue.tolist()]
        log_sum_s = math.log(sum(map(math.exp, sim_s)))
        sum_t = sum(map(math.exp, sim_t))
        total -= sum(math.exp(b) / sum_t * (a - log_sum_s) for a, b in zip(sim_s, sim_t, strict=True))
    return total / len(student)


def test_it_is_its_docstring() -> None:
    student, teacher, queue = unit(3, 4, seed=0), unit(3, 4, seed=1), unit(7, 4, seed=2)
    assert loss(student, teacher, queue).item() == pytest.approx(
        loss_by_loops(student, teacher, queue, 0.1, 0.04), rel=1e-12
    )


def test_gradients_are_those_of_finite_differences() -> None:
    student, teacher, queue = unit(3, 4, seed=0).requires_grad_(), unit(3, 4, seed=1), unit(7, 4, seed=2)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, queue), (student,))


def test_only_the_student_gets_a_gradient_and_it_is_the_formula() -> None:
    student, teacher, queue = (
        unit(3, 4, seed=0).requires_grad_(),
        unit(3, 4, seed=1).requires_grad_(),
        unit(7, 4, seed=2),
    )
    loss(student, teacher, queue).backward()
    assert teacher.grad is None and student.grad is not None
    target = (teacher.detach() @ queue.T / 0.04).softmax(1)
    prediction = (student.detach() @ queue.T / 0.1).softmax(1)
    torch.testing.assert_close(student.grad, (prediction - target) @ queue / (0.1 * 3))


def test_the_order_of_the_queue_does_not_matter() -> None:
    student, teacher, queue = unit(3, 4, seed=0), unit(3, 4, seed=1), unit(7, 4, seed=2)
    shuffled = queue[torch.tensor([3, 1, 6, 0, 2, 5, 4])]
    torch.testing.assert_close(loss(student, teacher, shuffled), loss(student, teacher, queue), rtol=1e-12, atol=0)


def test_autocast_does_not_reach_it() -> None:
    student, teacher, queue = (unit(n, 16, seed=n).float() for n in (3, 4, 50))
    plain = loss(student, teacher[:3], queue)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = loss(student, teacher[:3], queue)
    torch.testing.assert_close(mixed, plain, rtol=0, atol=0)


def test_it_is_smallest_where_the_relations_agree() -> None:
    """With equal temperatures the loss is the target's entropy plus a divergence: least at student == teacher."""
    teacher, queue = unit(3, 4, seed=1), unit(7, 4, seed=2)
    student = teacher.clone().requires_grad_()
    loss(student, teacher, queue, 0.1, 0.1).backward()
    torch.testing.assert_close(student.grad, torch.zeros_like(student))


@pytest.mark.parametrize(("dim", "size", "expected"), [(128, 4096, 8.705), (128, 16384, 10.081)])
def test_random_embeddings_give_the_known_value(dim: int, size: int, expected: float) -> None:
    """ln K + 1 / (2 d tau_s^2) in expectation."""
    found = loss(unit(512, dim, seed=0).float(), unit(512, dim, seed=1).float(), unit(size, dim, seed=2).float())
    assert found.item() == pytest.approx(expected, abs=0.03)


# --- the definition and its twins ------------------------------------------------------------------------------------

CASES = [(8, 1, 37, 64), (33, 1, 1000, 100), (64, 1, 5001, 512), (40, 5, 300, 128)]  # B, V, K, D


def rows_of(count: int, views: int, size: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """float64 rows of student, teacher and queue, that are like one another as a trained network's are."""
    teacher = unit(count, dim, seed=1)
    student = F.normalize(unit(count * views, dim, seed=0) + 0.5 * teacher.repeat(views, 1), dim=1)
    queue = F.normalize(unit(size, dim, seed=2) + teacher[torch.arange(size) % count], dim=1)
    return student, teacher, queue


def loss_and_gradient(
    impl: LossImpl, rows: tuple[Tensor, Tensor, Tensor], dtype=torch.float32, tau_s: float = 0.1, tau_t: float = 0.04
) -> tuple[Tensor, Tensor]:
    student, teacher, queue = (x.to(dtype) for x in rows)
    student = student.detach().clone().requires_grad_()
    found = relational_loss(student, teacher, queue, student_temperature=tau_s, teacher_temperature=tau_t, impl=impl)
    (gradient,) = torch.autograd.grad(found, student)
    return found.detach(), gradient


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that are smaller than any of these matrices and divide none of them."""
    monkeypatch.setattr(loss_module, "TILE_ROWS", 7)
    monkeypatch.setattr(loss_module, "TILE", dict.fromkeys(loss_module.TILE, 7 * 13 * 4))


@pytest.mark.usefixtures("small_tiles")
def test_gradients_in_chunks_are_those_of_finite_differences() -> None:
    student, teacher, queue = unit(10, 4, seed=0).requires_grad_(), unit(5, 4, seed=1), unit(17, 4, seed=2)
    assert torch.autograd.gradcheck(
        lambda s: relational_loss(s, teacher, queue, student_temperature=0.1, teacher_temperature=0.04, impl="chunked"),
        (student,),
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("tau_s", "tau_t"), [(0.1, 0.04), (0.04, 0.1), (0.01, 0.01)])
def test_chunks_are_as_exact_as_the_definition(case, tau_s, tau_t) -> None:
    """Errors at most twice those of the definition in float32, or a few roundings of the result where it has none."""
    rows = tuple(x.float().double() for x in rows_of(*case))
    exact = loss_and_gradient("torch", rows, torch.float64, tau_s, tau_t)
    eager = loss_and_gradient("torch", rows, torch.float32, tau_s, tau_t)
    ours = loss_and_gradient("chunked", rows, torch.float32, tau_s, tau_t)
    for mine, theirs, true in zip(ours, eager, exact, strict=True):
        floor = 4 * torch.finfo(torch.float32).eps * true.abs().max()
        assert (mine - true).abs().max() <= max(2 * (theirs - true).abs().max(), floor)


@pytest.mark.usefixtures("small_tiles")
def test_small_chunks_give_the_definition_in_float64() -> None:
    rows = rows_of(9, 3, 50, 20)
    for mine, true in zip(
        *(loss_and_gradient(impl, rows, torch.float64) for impl in ("chunked", "torch")), strict=True
    ):
        torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("impl", ["torch", "chunked", pytest.param("triton", marks=pytest.mark.gpu)])
def test_every_way_keeps_the_promises_of_a_loss(impl: LossImpl) -> None:
    """An incoming gradient counts, the teacher gets none, no gradient is asked for and the loss is the same, autocast
    does not reach it, a bf16 queue is read, and the same inputs give the same bits."""
    device = "cuda" if impl == "triton" else "cpu"
    student, teacher, queue = (x.to(device, torch.float32) for x in rows_of(6, 2, 40, 16))
    student, teacher = student.requires_grad_(), teacher.requires_grad_()

    def compute(queue: Tensor = queue) -> Tensor:
        return relational_loss(student, teacher, queue, student_temperature=0.1, teacher_temperature=0.04, impl=impl)

    found = compute()
    (once,) = torch.autograd.grad(found, student)
    (3 * compute()).backward()
    torch.testing.assert_close(student.grad, 3 * once)
    assert teacher.grad is None
    with torch.no_grad():
        assert torch.equal(compute(), found)
    assert torch.equal(torch.autograd.grad(compute(), student)[0], once)
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(compute(), found)
    short = queue.bfloat16()
    torch.testing.assert_close(compute(short), compute(short.float()), rtol=1e-6, atol=0)


def test_the_queue_may_change_once_chunks_have_given_the_loss() -> None:
    student, teacher, queue = (x.float() for x in rows_of(6, 2, 40, 16))
    student.requires_grad_()
    (expected,) = torch.autograd.grad(
        relational_loss(student, teacher, queue, student_temperature=0.1, teacher_temperature=0.04, impl="chunked"),
        student,
    )
    found = relational_loss(student, teacher, queue, student_temperature=0.1, teacher_temperature=0.04, impl="chunked")
    queue.zero_()
    found.backward()
    assert torch.equal(student.grad, expected)


def test_memory_around_the_rows_is_never_read_in_chunks() -> None:
    rows = tuple(x.float() for x in rows_of(6, 2, 40, 16))
    around = []
    for x in rows:
        room = torch.full((len(x) + 2, 40), math.nan)
        room[1:-1, :16] = x
        around.append(room[1:-1, :16])
    for mine, true in zip(loss_and_gradient("chunked", tuple(around)), loss_and_gradient("chunked", rows), strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-6, atol=1e-8)


def test_compiling_what_is_around_leaves_it_as_it_is() -> None:
    student, teacher, queue = (x.float() for x in rows_of(6, 2, 40, 16))

    def around(student: Tensor) -> Tensor:
        loss = relational_loss(
            2 * student, teacher, queue, student_temperature=0.1, teacher_temperature=0.04, impl="chunked"
        )
        return loss + 1

    results = []
    for function in (around, torch.compile(around, backend="eager")):
        x = student.clone().requires_grad_()
        found = function(x)
        found.backward()
        results.append((found.detach(), x.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_auto_takes_what_suits_the_device_the_precision_and_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "SMALL", 8 * 100 * 4)
    small, double, large = (torch.float32, 100), (torch.float64, 100), (torch.float32, 101)
    for precision, on_gpu, (dtype, keys), expected in (
        ("float32", False, small, "torch"),
        ("float32", True, small, "torch"),
        ("float32", True, large, "chunked"),
        ("tf32", False, large, "chunked"),
        ("tf32", True, small, "triton"),
        ("bf16", True, large, "triton"),
        ("bf16", True, double, "chunked"),
    ):
        assert chosen("auto", precision, (8, 4), keys, dtype, on_gpu=on_gpu) == expected
    assert chosen("auto", "bf16", (8, 513), 100, torch.float32, on_gpu=True) == "torch"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_triton_is_refused_where_it_cannot_be(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    temperatures = {"student_temperature": 0.1, "teacher_temperature": 0.04}
    for rows, message in (
        (torch.zeros(4, 4, dtype=torch.float64), "float32 embeddings of up to 512 numbers, not torch.float64 of 4"),
        (torch.zeros(4, 513), "not torch.float32 of 513: loss_impl=chunked"),
    ):
        rows = rows.to(device)
        with pytest.raises(DataError, match=message):
            relational_loss(rows, rows, rows, impl="triton", **temperatures)
        assert relational_loss(rows, rows, rows, impl="auto", **temperatures).item() == pytest.approx(math.log(4))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    rows = torch.zeros(4, 4)
    with pytest.raises(DataError, match="loss_impl=triton needs a GPU"):
        relational_loss(rows, rows, rows, impl="triton", **temperatures)


PEAK = """
import torch
from torch.nn import functional as F
from ressl.loss import chosen, relational_loss

def level(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

def compute(count, size, impl):
    rows = [F.normalize(torch.randn(n, 128), dim=1) for n in (count, count, size)]
    rows[0].requires_grad_()
    before = level("VmRSS")
    relational_loss(*rows, student_temperature=0.1, teacher_temperature=0.04, impl=impl).backward()
    return level("VmHWM") - before

for impl in ("chunked", "torch"):  # the lower peak first: a process remembers its highest
    compute(8, 64, impl)  # what is loaded and started once
    print(compute(1024, 65536, impl))
"""


def test_chunks_take_a_tenth_of_the_definition_s_memory(repo: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PEAK], cwd=repo, capture_output=True, text=True, check=True)
    chunked, definition = map(int, done.stdout.split())
    assert 0 < chunked <= 0.1 * definition, (chunked, definition)
