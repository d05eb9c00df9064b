import torch
from torch import nn

from ressl.ema import ema_update_, make_teacher


def test_the_update_is_the_weighted_mean_of_the_parameters() -> None:
    student, teacher = nn.Linear(2, 2), nn.Linear(2, 2)
    expected = [0.9 * t + 0.1 * s for t, s in zip(teacher.parameters(), student.parameters(), strict=True)]
    ema_update_(teacher, student, 0.9)
    torch.testing.assert_close(list(teacher.parameters()), expected)


def test_running_statistics_are_neither_copied_nor_averaged() -> None:
    student = nn.BatchNorm2d(3)
    teacher = make_teacher(student)
    student(torch.randn(4, 3, 5, 5))
    ema_update_(teacher, student, 0.5)
    assert torch.equal(teacher.running_mean, torch.zeros(3)) and not torch.equal(student.running_mean, torch.zeros(3))


def test_the_teacher_is_a_separate_frozen_copy() -> None:
    student = nn.Linear(2, 2)
    teacher = make_teacher(student)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert torch.equal(teacher.weight, student.weight) and teacher.weight.data_ptr() != student.weight.data_ptr()
