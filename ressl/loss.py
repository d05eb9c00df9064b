"""The relational loss, eq. 4 of ReSSL (https://arxiv.org/abs/2107.09282), and ways to have it without its matrices.

It is attention to the queue. With  lse(x, tau) = log sum_j exp(x . q_j / tau)  and  avg(x, tau) = sum_j w_j q_j  for
the weights  w = softmax_j(x . q_j / tau),  student row s and its teacher row t have

    loss_i = lse(s, tau_s) - s . avg(t, tau_t) / tau_s
    d loss_i / d s = (avg(s, tau_s) - avg(t, tau_t)) / tau_s

so one pass over the queue gives loss and gradient, row by row, and only a tile of the similarities is ever held.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ressl.batch import DataError

LossImpl = Literal["auto", "torch", "chunked", "triton"]
LossPrecision = Literal["float32", "tf32", "bf16"]
Fused = Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]  # ..., queue, whether with gradient

SMALL = 64 << 20  # bytes of one matrix of similarities up to which `auto` takes the definition
TILE = {"cpu": 8 << 20, "cuda": 64 << 20}  # bytes of similarities that `chunked` holds: caches, launches
TILE_ROWS = 1024  # of these similarities, at most
ROOM = 160 << 10  # bytes of shared memory that a block of `triton` may ask for
WIDEST = 512  # numbers of an embedding, for `triton`


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

    `impl` torch: the definition.  chunked: the same from tiles of the similarities, float32 and float64, any device.
    triton: fused, float32, D up to 512; `precision` is of the factors of its products. auto: see `chosen`. chunked and
    triton compute the gradient in the forward pass: the queue may change after it. Raises DataError where triton is
    asked for and cannot be.
    """
    compute = torch.promote_types(student.dtype, torch.float32)
    rows, teacher = student.to(compute), teacher.detach().to(compute)
    with torch.autocast(student.device.type, enabled=False):
        match chosen(impl, precision, rows.shape, len(queue), rows.dtype, on_gpu=can_fuse(rows.device)):
            case "torch":
                loss = _definition(rows, teacher, queue, student_temperature, teacher_temperature)
            case "chunked":
                loss = _fused(_chunked(student_temperature, teacher_temperature), rows, teacher, queue)
            case "triton":
                loss = _fused(_triton(student_temperature, teacher_temperature, precision), rows, teacher, queue)
    return loss.to(student.dtype)


def can_fuse(device: torch.device) -> bool:
    """Whether the tiles of `triton` fit into the shared memory of a multiprocessor: A100, H100 and their successors."""
    if device.type != "cuda":
        return False
    found = torch.cuda.get_device_properties(device)
    room: int = getattr(found, "shared_memory_per_block_optin", 0)  # torch's own stubs lack it
    return found.major >= 8 and room >= ROOM


def chosen(
    impl: LossImpl, precision: LossPrecision, shape: Sequence[int], keys: int, dtype: torch.dtype, *, on_gpu: bool
) -> Literal["torch", "chunked", "triton"]:
    """What is done for a student's rows of `shape` (V * B, D) and `dtype` against so many keys; `on_gpu`: on one that
    can fuse it. Raises DataError.

    auto: triton on a GPU for tf32 and bf16, which its matrix units multiply. For float32 they do not, and the library's
    products are the fastest: the definition while its similarities are small, else chunked.
    """
    rows, dim = shape
    fits = dtype == torch.float32 and dim <= WIDEST
    if impl == "triton":
        if not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
            raise DataError(
                "method.loss_impl=triton needs a GPU with room for its tiles, such as an A100 or H100: loss_impl=auto "
                "takes what there is"
            )
        if not fits:
            raise DataError(
                f"method.loss_impl=triton takes float32 embeddings of up to {WIDEST} numbers, not {dtype} of {dim}: "
                "loss_impl=chunked takes all"
            )
    if impl != "auto":
        return impl
    if on_gpu and fits and precision != "float32":
        return "triton"
    return "torch" if rows * keys * dtype.itemsize <= SMALL else "chunked"


def _definition(
    student: Tensor, teacher: Tensor, queue: Tensor, student_temperature: float, teacher_temperature: float
) -> Tensor:
    queue = queue.to(student.dtype)
    teacher = teacher.repeat(len(student) // len(teacher), 1)
    target = (teacher @ queue.T / teacher_temperature).softmax(dim=1)  # (V * B, K)
    log_prediction = (student @ queue.T / student_temperature).log_softmax(dim=1)  # (V * B, K)
    return -(target * log_prediction).sum(dim=1).mean()


# --- loss and gradient in one pass -----------------------------------------------------------------------------------


class _LossAndGradient(torch.autograd.Function):
    """Of a function that gives both: the gradient waits for the backward pass, and nothing else does."""

    @staticmethod
    def forward(ctx: Any, fused: Fused, student: Tensor, teacher: Tensor, queue: Tensor) -> Tensor:
        loss, gradient = fused(student, teacher, queue, True)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[None, Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return None, incoming * gradient, None, None


def _fused(fused: Fused, student: Tensor, teacher: Tensor, queue: Tensor) -> Tensor:
    if torch.is_grad_enabled() and student.requires_grad:
        return _LossAndGradient.apply(fused, student, teacher, queue)
    with torch.no_grad():
        loss, _ = fused(student, teacher, queue, False)
    return loss


def _triton(student_temperature: float, teacher_temperature: float, precision: LossPrecision) -> Fused:
    from ressl.kernels.relational_loss import loss_and_gradient

    def fused(student: Tensor, teacher: Tensor, queue: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
        return loss_and_gradient(
            *(student, teacher, queue, student_temperature, teacher_temperature),
            precision=precision, gradient=gradient,
        )  # fmt: skip

    return fused


def _chunked(student_temperature: float, teacher_temperature: float) -> Fused:
    def fused(student: Tensor, teacher: Tensor, queue: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
        lse, average = _attend(student, queue, student_temperature, averages=gradient)
        _, target = _attend(teacher, queue, teacher_temperature, averages=True)
        assert target is not None
        views = (-1, len(teacher))
        agreement = (student.unflatten(0, views) * target).sum(dim=2).flatten()
        loss = (lse - agreement / student_temperature).mean()
        if average is None:
            return loss, None
        average.unflatten(0, views).sub_(target)
        return loss, average.div_(student_temperature * len(student))

    return fused


def _attend(rows: Tensor, queue: Tensor, temperature: float, *, averages: bool) -> tuple[Tensor, Tensor | None]:
    """lse (n,) and, if asked for, avg (n, D) of `rows` (n, D), as at the head of this file."""
    lse = rows.new_empty(len(rows))
    average = torch.zeros_like(rows) if averages else None
    high = max(1, min(TILE_ROWS, len(rows)))
    wide = max(1, min(TILE[rows.device.type] // (high * rows.element_size()), len(queue)))
    tile = rows.new_empty(high * wide)
    for at in range(0, len(rows), high):
        x = rows[at : at + high]
        sums = None if average is None else average[at : at + high]
        top, total = x.new_full((len(x), 1), -torch.inf), x.new_zeros((len(x), 1))
        for keys in queue.split(wide):
            keys = keys.to(x.dtype)
            share = tile[: len(x) * len(keys)].view(len(x), len(keys))
            torch.mm(x, keys.T, out=share).div_(temperature)  # as the definition does: scaled products round otherwise
            before, top = top, torch.maximum(top, share.amax(dim=1, keepdim=True))
            share.sub_(top).exp_()
            shrink = (before - top).exp_()
            total = total.mul_(shrink).add_(share.sum(dim=1, keepdim=True))
            if sums is not None:
                sums.mul_(shrink).addmm_(share, keys)
        if sums is not None:
            sums.div_(total)
        lse[at : at + high] = (top + total.log()).squeeze(1)
    return lse, average
