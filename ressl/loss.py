"""The relational loss, eq. 4 of ReSSL (https://arxiv.org/abs/2107.09282)."""

from typing import Literal

import torch
from torch import Tensor

LossImpl = Literal["auto", "torch", "chunked", "triton"]
LossPrecision = Literal["float32", "tf32", "bf16"]


def relational_loss(
    student: Tensor,
    teacher: Tensor,
    queue: Tensor,
    *,
    student_temperature: float,
    teacher_temperature: float,
    impl: LossImpl = "torch",
    precision: LossPrecision = "float32",
) -> Tensor:
    """How far the student's similarities to the queue are from the teacher's. Gradient flows to `student` only.

    for each row i of student:
        target_i = softmax over j of  teacher_(i mod B) . queue_j / teacher_temperature
        loss    -= sum over j of  target_ij * log_softmax_j(student_i . queue_j / student_temperature)
    loss /= rows

    student: (V * B, D), unit rows, V views one after another.  teacher: (B, D), unit rows.  queue: (K, D), unit rows,
    of any type.  Returns: () of the student's type. Computed in float32 at least: a bf16 similarity is off by up to
    0.002, which a temperature of 0.04 makes 0.05 in the exponent.
    """
    with torch.autocast(student.device.type, enabled=False):
        queue = queue.to(student.dtype)
        teacher = teacher.detach().repeat(len(student) // len(teacher), 1)
        target = (teacher @ queue.T / teacher_temperature).softmax(dim=1)  # (V * B, K)
        log_prediction = (student @ queue.T / student_temperature).log_softmax(dim=1)  # (V * B, K)
        return -(target * log_prediction).sum(dim=1).mean()
