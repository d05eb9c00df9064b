"""ReSSL: a student on strong views learns its teacher's similarities, on weak views, to a queue of past images.

Zheng et al. 2021, https://arxiv.org/abs/2107.09282. Deviations from the authors' code are marked NOTE.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ressl.batch import Batch
from ressl.batchnorm import set_batchnorm_, shuffled, unshuffled
from ressl.collectives import Collectives
from ressl.config import BatchNorm, Encoder, Method, ReSSLConfig
from ressl.ema import ema_update_, held_back, make_teacher, teacher_momentum
from ressl.encoder import build_encoder
from ressl.loss import relational_loss
from ressl.queue import FeatureQueue


class StepOutput(NamedTuple):
    loss: Tensor  # () float32 at least, with gradient
    carry: tuple[Tensor, ...]  # each (B, ...), no gradient: `after_step` gets them for the global batch, in rank order
    logs: dict[str, Tensor]  # each () float, no gradient, still on the device


class ReSSL(nn.Module):
    """`student` maps (B, 3, h, w) to (B, D) unit rows; the teacher is made from it here."""

    def __init__(self, cfg: ReSSLConfig, student: nn.Module, batchnorm: BatchNorm, collectives: Collectives) -> None:
        super().__init__()
        self.cfg, self.batchnorm, self.collectives = cfg, batchnorm, collectives
        set_batchnorm_(student, batchnorm, collectives)
        self.student = student
        self.teacher = make_teacher(student)
        self.queue = FeatureQueue(cfg.queue_size, cfg.embed_dim, dtype=getattr(torch, cfg.queue_dtype))

    def forward(self, batch: Batch) -> StepOutput:
        student = self.embed(batch.strong)
        keys = self.teach(batch.weak)
        loss = self.compare(student, keys)
        with torch.no_grad():
            agreement = (student.unflatten(0, (-1, len(keys))) * keys).sum(dim=2).mean()
        return StepOutput(loss, (keys,), {"loss": loss.detach(), "agreement": agreement})

    def embed(self, strong: tuple[Tensor, ...]) -> Tensor:
        """The student's embeddings (V * B, D) of V views (B, 3, h, w), one view after another."""
        # each view is a forward pass of its own, so that each is normalised by its own statistics
        return torch.cat([self.student(view) for view in strong])

    @torch.no_grad()
    def teach(self, weak: tuple[Tensor, ...]) -> Tensor:
        """The teacher's embeddings (B, D) of the one weak view."""
        (view,) = weak
        keys = self.teacher(shuffled(self.batchnorm, self.collectives, view))
        return unshuffled(self.batchnorm, self.collectives, keys)

    def compare(self, student: Tensor, keys: Tensor) -> Tensor:
        """The relational loss () of the student's embeddings (V * B, D) against the teacher's (B, D)."""
        return relational_loss(
            student,
            keys,
            self.queue.keys,
            student_temperature=self.cfg.student_temperature,
            teacher_temperature=self.cfg.teacher_temperature,
            impl=self.cfg.loss_impl,
            precision=self.cfg.loss_precision,
        )

    def momentum(self, done: float) -> float:
        """The teacher's momentum where the share `done` of the run is behind it."""
        return teacher_momentum(done, start=self.cfg.teacher_momentum, end=self.cfg.teacher_momentum_end)

    @torch.no_grad()
    def after_step(self, keys: Tensor, *, momentum: float | Tensor, skip: Tensor | None = None) -> None:
        """Once per optimizer step, after it: `keys` (G, D) are the teacher's embeddings of the global batch. Where
        `skip`, () bool on the device, is true, nothing changes.

        NOTE: the authors move the teacher at the start of the next step; the sequence of weights is the same.
        """
        self.queue.push(keys, skip)
        ema_update_(self.teacher, self.student, momentum if skip is None else held_back(momentum, skip))


AnyMethod = ReSSL  # ReSSL | WCL | ..., once there are more: each takes a Batch, gives a StepOutput, has after_step


def build_method(cfg: Method, encoder: Encoder, collectives: Collectives) -> AnyMethod:
    match cfg:
        case ReSSLConfig():
            student = build_encoder(encoder, hidden_dim=cfg.hidden_dim, embed_dim=cfg.embed_dim)
            return ReSSL(cfg, student, encoder.batchnorm, collectives)
