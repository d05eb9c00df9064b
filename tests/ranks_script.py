"""Run by test_ranks.py as one or several processes: trains the tiny run and leaves what each rank saw and became.

ranks_script.py CONFIG OUT [SECTION.KEY=VALUE]...
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console

from pipelines import build_loaders
from ressl.batch import Batch
from ressl.batchnorm import average_statistics_
from ressl.config_file import load_config
from ressl.method import build_method
from ressl.optim import build_optimizer
from ressl.recorder import Recorder
from ressl.runtime import Runtime
from ressl.step import TrainStep
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


def main() -> None:
    config, out, *overrides = sys.argv[1:]
    cfg = load_config(Path(config), overrides)
    runtime = Runtime(cfg.run)
    torch.manual_seed(cfg.run.seed)
    loaders = build_loaders(cfg, device=runtime.device, rank=runtime.rank, world_size=runtime.world_size)
    method = build_method(cfg.method, cfg.encoder, runtime.collectives).to(runtime.device)
    witness = Witness(loaders.train)
    recorder = Recorder(
        Path(out), Console(quiet=True), every=1, images=cfg.optim.batch_size, rank=1,
        steps_per_epoch=witness.steps_per_epoch, epochs=cfg.optim.epochs,
    )  # fmt: skip
    rows = torch.arange(4 * runtime.world_size).view(-1, 1) + 100.0 * runtime.rank
    with recorder:
        step = TrainStep(method, build_optimizer(method.student, cfg.optim), runtime, accumulate=cfg.optim.accumulate)
        train(step, witness, recorder, cfg.optim)
    average_statistics_(method, runtime.collectives)
    torch.save(
        {
            "world_size": runtime.world_size,
            "index": torch.cat([index for index, _, _ in witness.seen]),
            "weak": torch.cat([weak for _, weak, _ in witness.seen]),
            "strong": torch.cat([strong for _, _, strong in witness.seen]),
            "queue": method.queue.keys,
            "cursor": method.queue.cursor,
            "student": method.student.state_dict(),
            "exchanged": runtime.collectives.exchange(rows),
            "images": runtime.collectives.exchange(rows.view(-1, 1, 1, 1).expand(-1, 3, 2, 2)),
            "ragged": runtime.gather_rows(torch.full((runtime.rank + 1, 2), float(runtime.rank))),
        },
        Path(out) / f"rank{runtime.rank}.pt",
    )


if __name__ == "__main__":
    main()
