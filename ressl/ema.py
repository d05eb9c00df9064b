"""The teacher: a slow copy of the student."""

import copy
import math

import torch
from torch import Tensor, nn


def make_teacher(student: nn.Module) -> nn.Module:
    """A frozen copy. Its batch-norm layers keep running statistics of their own, as in the authors' code."""
    return copy.deepcopy(student).requires_grad_(False)


@torch.no_grad()
def ema_update_(teacher: nn.Module, student: nn.Module, momentum: float | Tensor) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, parameters only, in place.

    Both are laid out alike in memory, as `make_teacher` leaves them. `momentum` may be a () tensor on the device, so
    that a captured step can be replayed with another one: the host never reads it. In float64 it keeps the digits of
    1 - momentum.
    """
    slow: list[Tensor] = list(teacher.parameters())
    fast: list[Tensor] = list(student.parameters())
    if isinstance(momentum, Tensor):
        # foreach's lerp takes no weight from the device in one kernel, but SGD's update does, and is the same thing:
        # slow - (momentum - 1) * (fast - 1 * slow). It reads both and writes one, 12 bytes a float32 parameter.
        torch._fused_sgd_(
            slow,
            fast,
            [],
            weight_decay=-1.0,
            momentum=0.0,
            lr=(momentum - 1).float(),
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
        )
    else:
        torch._foreach_lerp_(slow, fast, 1 - momentum)


def held_back(momentum: float | Tensor, skip: Tensor) -> Tensor:
    """`momentum` as a () float64 tensor on the device of `skip`, () bool; where that is true, 1: nothing moves."""
    if not isinstance(momentum, Tensor):
        momentum = torch.full((), momentum, dtype=torch.float64, device=skip.device)
    return torch.where(skip, torch.ones_like(momentum), momentum)


def teacher_momentum(done: float, *, start: float, end: float | None) -> float:
    """Of the step at which the share `done` of the run is behind: from `start` to `end` on a cosine, or constant.

    Grill et al. 2020 (BYOL, https://arxiv.org/abs/2006.07733), section 3.3.
    """
    return start if end is None else end - (end - start) * (math.cos(math.pi * done) + 1) / 2
