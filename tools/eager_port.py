"""A plain port of the authors' step, as eager torch runs it: what ours is timed against.

Zheng et al. 2021, https://arxiv.org/abs/2107.09282; the order of operations is that of the authors' ImageNet code.
"""

import torch
from torch import Tensor, nn

from ressl.batch import Batch
from ressl.config import ReSSLConfig
from ressl.config_optim import SGDConfig
from ressl.optim import build_optimizer


class EagerPort:
    """One process, one device. Takes over the networks, which must be equal at first, and a copy of `keys` (K, D).

    The teacher moves at the start of a step, so it is one move behind ours when a step ends: `move_teacher` makes up
    for it. The queue is (D, K) in the type of the weights, and each batch must divide K. Where the facts leave a choice
    it is the faster one: the teacher moves in place, gradients are freed and not zeroed.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        keys: Tensor,
        cfg: ReSSLConfig,
        optimizer: torch.optim.Optimizer,
        *,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.student, self.teacher, self.cfg, self.optimizer = student, teacher, cfg, optimizer
        self.queue = keys.T.to(next(student.parameters()).dtype, copy=True).contiguous()
        self.place = torch.zeros(1, dtype=torch.int64, device=keys.device)
        self.autocast = autocast
        self.scaler = torch.amp.GradScaler(keys.device.type, enabled=autocast == torch.float16)

    def step(self, batch: Batch) -> float:
        """Student, queue and, for the step before, teacher change in place. Returns the loss: the host waits for it."""
        with torch.autocast(self.queue.device.type, self.autocast, enabled=self.autocast is not None):
            student = torch.cat([self.student(view) for view in batch.strong])
            self.move_teacher()
            keys = self.teach(batch.weak[0])
            loss = self.compare(student, keys)
        self.enqueue(keys)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.item()

    @torch.no_grad()
    def move_teacher(self) -> None:
        """One parameter after another, in place."""
        momentum = self.cfg.teacher_momentum
        for old, new in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            old.mul_(momentum).add_(new, alpha=1 - momentum)

    @torch.no_grad()
    def teach(self, view: Tensor) -> Tensor:
        """(B, 3, h, w) -> (B, D), normalised in the company of a random order."""
        order = torch.randperm(len(view), device=view.device)
        return self.teacher(view[order])[order.argsort()]

    def compare(self, student: Tensor, keys: Tensor) -> Tensor:
        """(V * B, D) and (B, D) -> the loss (); all similarities are held at once, to two copies of the queue."""
        prediction = student @ self.queue.clone() / self.cfg.student_temperature
        target = keys @ self.queue.clone() / self.cfg.teacher_temperature
        if len(student) > len(keys):
            target = target.repeat(len(student) // len(keys), 1)
        return -(target.softmax(dim=1) * prediction.log_softmax(dim=1)).sum(dim=1).mean()

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        first = int(self.place)  # the host waits for the device
        self.queue[:, first : first + len(keys)] = keys.T
        self.place.fill_((first + len(keys)) % self.queue.shape[1])


def plain_sgd(student: nn.Module, cfg: SGDConfig) -> torch.optim.SGD:
    """Of the same groups as ours, by whatever torch chooses for who says no more."""
    groups = [
        {"params": group["params"], "weight_decay": group["weight_decay"]}
        for group in build_optimizer(student, cfg).param_groups
    ]
    return torch.optim.SGD(groups, lr=cfg.peak_lr, momentum=cfg.momentum, nesterov=cfg.nesterov)
