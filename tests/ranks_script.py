"""Run by test_ranks.py as one or several processes: trains the tiny run and leaves what each rank saw and became.

ranks_script.py CONFIG OUT [SECTION.KEY=VALUE]...
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from pipelines import build_loaders
from ressl.batch import Batch
from ressl.batchnorm import set_batchnorm_, shuffled, unshuffled
from ressl.collectives import Collectives
from ressl.config import BatchNorm, LocalBatchNorm, ShuffleBatchNorm, SplitBatchNorm, SyncBatchNorm
from ressl.config_file import load_config
from ressl.guard import Guard
from ressl.recorder import Recorder
from ressl.runtime import Runtime
from ressl.step import build_step
from ressl.trainer import train


class Witness:
    """A ViewLoader that keeps what it hands on."""

    def __init__(self, loader) -> None:
        self.loader, self.seen = loader, []

    @property
    def steps_per_epoch(self) -> int:
        return self.loader.steps_per_epoch

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        for batch in self.loader.epoch(epoch, start_step):
            self.seen.append((batch.index.clone(), batch.weak[0].clone(), batch.strong[0].clone()))
            yield batch


POLICIES: tuple[BatchNorm, ...] = (
    LocalBatchNorm(),
    SyncBatchNorm(name="sync"),
    SplitBatchNorm(name="split", groups=4),
    ShuffleBatchNorm(name="shuffle"),
)


def try_policy(policy: BatchNorm, collectives: Collectives, rank: int) -> dict[str, torch.Tensor]:
    """What a batch-norm layer of the student and one of the teacher make of this rank's 8 images, in float64."""
    draw = torch.Generator().manual_seed(rank)
    images, coefficients = torch.randn(2, 8, 3, 4, 4, generator=draw, dtype=torch.float64)
    images += torch.arange(8 * rank, 8 * rank + 8).view(-1, 1, 1, 1)  # every image has a mean of its own
    student, teacher = nn.Sequential(nn.BatchNorm2d(3)).double(), nn.Sequential(nn.BatchNorm2d(3)).double()
    with torch.no_grad():
        student[0].weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
        student[0].bias.copy_(torch.tensor([-1.0, 0.0, 3.0]))
    for net in (student, teacher):
        set_batchnorm_(net, policy, collectives)
    x = images.clone().requires_grad_()
    out = student(x)
    (out * coefficients).sum().backward()
    keys = teacher(shuffled(policy, collectives, images))
    found = {
        "images": images, "coefficients": coefficients, "out": out.detach(), "gradient": x.grad,
        "weight gradient": student[0].weight.grad, "bias gradient": student[0].bias.grad,
        "mean": student[0].running_mean.clone(), "variance": student[0].running_var.clone(),
        "keys": unshuffled(policy, collectives, keys.detach().flatten(1)).view_as(keys),
        "teacher mean": teacher[0].running_mean.clone(), "teacher variance": teacher[0].running_var.clone(),
    }  # fmt: skip
    guard = Guard(images.device, rows=1, own=1)
    guard.watch_statistics_(student)
    guard.average_statistics_(collectives)
    return found | {"averaged mean": student[0].running_mean, "averaged variance": student[0].running_var}


def try_mean(collectives: Collectives, rank: int) -> dict[str, torch.Tensor]:
    """The mean of this rank's numbers and the others', and its gradient where each rank weighs it its own way."""
    numbers = (torch.arange(3.0) + 10 * rank).requires_grad_()
    mean = collectives.mean(numbers)
    (mean * torch.tensor([1.0, 2.0, 3.0]) * (rank + 1)).sum().backward()
    return {"mean": mean.detach(), "gradient": numbers.grad}


def main() -> None:
    config, out, *overrides = sys.argv[1:]
    cfg = load_config(Path(config), overrides)
    runtime = Runtime(cfg.run)
    torch.manual_seed(cfg.run.seed)
    loaders = build_loaders(cfg, device=runtime.device, rank=runtime.rank, world_size=runtime.world_size)
    step = build_step(cfg, runtime)
    method = step.method
    witness = Witness(loaders.train)
    recorder = Recorder(
        Path(out), Console(quiet=True), every=1, images=cfg.optim.batch_size, rank=1,
        steps_per_epoch=witness.steps_per_epoch, epochs=cfg.optim.epochs,
    )  # fmt: skip
    rows = torch.arange(4 * runtime.world_size).view(-1, 1) + 100.0 * runtime.rank
    with recorder:
        train(step, witness, recorder, cfg.optim)
    step.guarded.average_statistics_(runtime.collectives)
    torch.save(
        {
            "world_size": runtime.world_size,
            "index": torch.cat([index for index, _, _ in witness.seen]),
            "weak": torch.cat([weak for _, weak, _ in witness.seen]),
            "strong": torch.cat([strong for _, _, strong in witness.seen]),
            "queue": method.queue.keys,
            "cursor": method.queue.cursor,
            "student": method.student.state_dict(),
            "policies": {policy.name: try_policy(policy, runtime.collectives, runtime.rank) for policy in POLICIES},
            "mean": try_mean(runtime.collectives, runtime.rank),
            "gathered": runtime.collectives.gather(rows.clone().requires_grad_()),
            "exchanged": runtime.collectives.exchange(rows),
            "images": runtime.collectives.exchange(rows.view(-1, 1, 1, 1).expand(-1, 3, 2, 2)),
            "ragged": runtime.gather_rows(torch.full((runtime.rank + 1, 2), float(runtime.rank))),
        },
        Path(out) / f"rank{runtime.rank}.pt",
    )


if __name__ == "__main__":
    main()
