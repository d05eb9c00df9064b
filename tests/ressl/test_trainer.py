import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from ressl.batch import Batch
from ressl.collectives import alone
from ressl.config import LocalBatchNorm, ReSSLConfig, RunConfig
from ressl.config_optim import SGDConfig
from ressl.encoder import unit_rows
from ressl.method import ReSSL
from ressl.optim import build_optimizer
from ressl.recorder import Recorder
from ressl.runtime import Runtime
from ressl.step import TrainStep
from ressl.trainer import train

STEPS, IMAGES = 3, 8


class Linear(nn.Module):
    """An encoder in which no image depends on another."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 6)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return unit_rows(self.layer(images.flatten(1)))


class RandomBatches:
    """The same images for every number of micro-batches."""

    def __init__(self, accumulate: int) -> None:
        self.accumulate, self.steps_per_epoch = accumulate, STEPS

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        gen = torch.Generator().manual_seed(epoch)
        views = torch.randn(STEPS * IMAGES, 2, 3, 2, 2, generator=gen)
        for part in views.split(IMAGES // self.accumulate):
            index = torch.arange(len(part))
            yield Batch(weak=(part[:, 0],), strong=(part[:, 1],), index=index, label=index)


def trained(tmp_path: Path, accumulate: int = 1) -> ReSSL:
    torch.manual_seed(0)
    cfg = ReSSLConfig(name="ressl", hidden_dim=1, embed_dim=6, queue_size=20, teacher_momentum=0.5)
    method = ReSSL(cfg, Linear(), LocalBatchNorm(), alone())
    optim = SGDConfig(name="sgd", epochs=2, batch_size=IMAGES, accumulate=accumulate, lr=0.1, warmup_epochs=0.5)
    runtime = Runtime(RunConfig(out_dir=tmp_path, device="cpu"))
    console = Console(file=io.StringIO())
    with Recorder(tmp_path, console, every=1, images=IMAGES, steps_per_epoch=STEPS, epochs=2) as recorder:
        step = TrainStep(method, build_optimizer(method.student, optim), runtime, accumulate=accumulate)
        steps = train(step, RandomBatches(accumulate), recorder, optim)
    assert steps == 2 * STEPS
    return method


@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_micro_batches_compute_the_same_as_the_whole_batch(accumulate: int, tmp_path: Path) -> None:
    whole, parts = trained(tmp_path), trained(tmp_path, accumulate)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_training_is_the_literal_loop(tmp_path: Path) -> None:
    """Student by SGD, queue and teacher after each step, the learning rate of each step."""
    torch.manual_seed(0)
    student = Linear()
    queue = nn.functional.normalize(torch.randn(20, 6), dim=1)
    teacher = [p.detach().clone() for p in student.parameters()]
    momentum = [torch.zeros_like(p) for p in student.parameters()]
    rates = [0.0, 0.1 / 1.5, *(0.05 * (1 + torch.cos(torch.tensor(torch.pi * (s - 1.5) / 4.5))) for s in range(2, 6))]
    batches = [batch for epoch in range(2) for batch in RandomBatches(1).epoch(epoch)]
    for step, (batch, lr) in enumerate(zip(batches, rates, strict=True)):
        keys = unit_rows(batch.weak[0].flatten(1) @ teacher[0].T + teacher[1])
        target = (keys @ queue.T / 0.04).softmax(1)
        loss = -(target * (student(batch.strong[0]) @ queue.T / 0.1).log_softmax(1)).sum(1).mean()
        gradients = torch.autograd.grad(loss, list(student.parameters()))
        with torch.no_grad():
            for i, p in enumerate(student.parameters()):
                momentum[i] = 0.9 * momentum[i] + gradients[i] + 1e-4 * p
                p.sub_(lr * momentum[i])
                teacher[i] = 0.5 * teacher[i] + 0.5 * p
        queue[[(step * IMAGES + row) % 20 for row in range(IMAGES)]] = keys

    method = trained(tmp_path)
    torch.testing.assert_close(list(method.student.parameters()), list(student.parameters()), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(list(method.teacher.parameters()), teacher, rtol=1e-5, atol=1e-6, check_stride=False)
    torch.testing.assert_close(method.queue.keys, queue, rtol=1e-5, atol=1e-6)
