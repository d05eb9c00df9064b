"""The relational loss, eq. 4 of ReSSL (https://arxiv.org/abs/2107.09282)."""

import torch
from torch import Tensor


def relational_loss(
    student: Tensor, teacher: Tensor, queue: Tensor, *, student_temperature: float, teacher_temperature: float
) -> Tensor:
    """How far the student's similarities to the queue are from the teacher's. Gradient flows to `student` only.

    for each image i:
        target_i = softmax over j of  teacher_i . queue_j / teacher_temperature
        loss    -= sum over j of  target_ij * log_softmax_j(student_i . queue_j / student_temperature)
    loss /= B

    student, teacher: (B, D), unit rows.  queue: (K, D), unit rows.  Returns: () of their type. Computed in float32 at
    least: a bf16 similarity is off by up to 0.002, which a temperature of 0.04 makes 0.05 in the exponent.
    """
    with torch.autocast(student.device.type, enabled=False):
        target = (teacher.detach() @ queue.T / teacher_temperature).softmax(dim=1)  # (B, K)
        log_prediction = (student @ queue.T / student_temperature).log_softmax(dim=1)  # (B, K)
        return -(target * log_prediction).sum(dim=1).mean()
