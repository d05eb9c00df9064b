import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ressl.loss import relational_loss


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
