import copy

import pytest
import torch
from torch import nn

from ressl.ema import ema_update_, held_back, make_teacher, teacher_momentum


def networks() -> tuple[nn.Module, nn.Module]:
    """A teacher and a student whose weights differ, with convolutions in channels_last."""
    torch.manual_seed(0)
    student = nn.Sequential(nn.Conv2d(3, 20, 3), nn.BatchNorm2d(20), nn.Conv2d(20, 7, 1), nn.Linear(5, 33))
    student.to(memory_format=torch.channels_last)
    teacher = make_teacher(student)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(torch.randn_like(p))
    return teacher, student


def test_the_update_is_the_weighted_mean_of_the_parameters() -> None:
    teacher, student = networks()
    expected = [0.9 * t + 0.1 * s for t, s in zip(teacher.parameters(), student.parameters(), strict=True)]
    ema_update_(teacher, student, 0.9)
    torch.testing.assert_close([p.detach() for p in teacher.parameters()], [e.detach() for e in expected])


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99, 0.9996, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_momentum_in_a_tensor_does_what_the_number_does(momentum: float, dtype: torch.dtype) -> None:
    (by_number, student), (by_tensor, _) = networks(), networks()
    before = [p.clone() for p in student.parameters()]
    ema_update_(by_number, student, momentum)
    ema_update_(by_tensor, student, torch.tensor(momentum, dtype=dtype))
    for a, b, s, unchanged in zip(
        by_number.parameters(), by_tensor.parameters(), student.parameters(), before, strict=True
    ):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=5e-7)
        assert torch.equal(s, unchanged)


def test_after_many_updates_the_teacher_arrives_at_the_student() -> None:
    teacher, student = networks()
    for _ in range(40):
        ema_update_(teacher, student, torch.tensor(0.6))
    torch.testing.assert_close(list(teacher.parameters()), [p.detach() for p in student.parameters()])


def test_running_statistics_are_neither_copied_nor_averaged() -> None:
    student = nn.BatchNorm2d(3)
    teacher = make_teacher(student)
    student(torch.randn(4, 3, 5, 5))
    for momentum in (0.5, torch.tensor(0.5)):
        ema_update_(teacher, student, momentum)
    assert torch.equal(teacher.running_mean, torch.zeros(3)) and not torch.equal(student.running_mean, torch.zeros(3))


def test_the_teacher_is_a_separate_frozen_copy() -> None:
    student = nn.Linear(2, 2)
    teacher = make_teacher(student)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert torch.equal(teacher.weight, student.weight) and teacher.weight.data_ptr() != student.weight.data_ptr()


def test_the_momentum_rises_on_a_cosine_as_in_byol() -> None:
    """tau = 1 - (1 - tau_base) * (cos(pi k / K) + 1) / 2."""
    found = [teacher_momentum(done, start=0.99, end=1.0) for done in (0.0, 1 / 3, 0.5, 1.0)]
    assert found == pytest.approx([0.99, 1 - 0.01 * 0.75, 0.995, 1.0], abs=1e-12)


def test_without_an_end_the_momentum_stays() -> None:
    assert {teacher_momentum(done / 10, start=0.999, end=None) for done in range(11)} == {0.999}


def test_it_may_end_where_it_likes() -> None:
    assert teacher_momentum(0.5, start=0.9, end=0.8) == pytest.approx(0.85)
    assert teacher_momentum(1.0, start=0.9, end=0.8) == pytest.approx(0.8)


@pytest.mark.gpu
def test_a_captured_update_is_replayed_with_another_momentum() -> None:
    (captured, student), (eager, _) = ([net.cuda() for net in networks()] for _ in range(2))
    momentum = torch.tensor(0.5, device="cuda", dtype=torch.float64)
    ema_update_(captured, student, momentum)
    ema_update_(eager, student, 0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ema_update_(captured, student, momentum)
    for value in (0.9, 0.99):
        momentum.fill_(value)
        graph.replay()
        ema_update_(eager, student, value)
    torch.testing.assert_close(list(captured.parameters()), list(eager.parameters()))


@pytest.mark.parametrize("momentum", [0.9, torch.tensor(0.9, dtype=torch.float64)])
def test_where_a_step_is_skipped_the_teacher_stays(momentum: float | torch.Tensor) -> None:
    torch.manual_seed(0)
    student = nn.Linear(4, 3)
    teacher, other = make_teacher(student), make_teacher(student)
    with torch.no_grad():
        student.weight.add_(1)
    before = copy.deepcopy(teacher.state_dict())
    ema_update_(teacher, student, held_back(momentum, torch.tensor(True)))
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    ema_update_(teacher, student, held_back(momentum, torch.tensor(False)))
    ema_update_(other, student, 0.9)
    torch.testing.assert_close(teacher.state_dict(), other.state_dict(), rtol=1e-6, atol=1e-7)
