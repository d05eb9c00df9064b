"""A run, opened as `pretrain` opens it, and the ways in which a profile goes through its step."""

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor

from pipelines import build_source, build_stream
from pipelines.frames import Frames
from pipelines.loader import ViewStream
from pipelines.placement import settle
from ressl.batch import Batch
from ressl.batchnorm import normalised_together
from ressl.config import Config
from ressl.ema import ema_update_
from ressl.method import AnyMethod
from ressl.optim import learning_rate, set_learning_rate_
from ressl.runtime import Runtime
from ressl.step import TrainStep, build_step
from tools.decoding import shown_decoding


@dataclass(frozen=True, slots=True)
class OpenRun:
    cfg: Config
    runtime: Runtime
    stream: ViewStream
    take_step: TrainStep
    held: Frames  # of one micro-batch, on the device
    cores: int
    epochs: Iterator[int]  # not begun yet; their views have full size
    steps: Iterator[int]  # counts those taken

    @property
    def method(self) -> AnyMethod:
        return self.take_step.method

    @property
    def device(self) -> torch.device:
        return self.runtime.device

    @property
    def images(self) -> int:
        """Of a step, this rank's."""
        return self.cfg.optim.batch_size // self.runtime.world_size

    @property
    def total_steps(self) -> int:
        return self.cfg.optim.epochs * self.stream.steps_per_epoch

    def cut(self, frames: Frames) -> Batch:
        return self.stream.cut(frames, full_size_epoch(self.cfg))

    def take(self, batches: Iterator[Batch]) -> None:
        """One step, at the rate of a run that has only begun."""
        step = next(self.steps) % self.total_steps
        lr = learning_rate(step, steps_per_epoch=self.stream.steps_per_epoch, cfg=self.cfg.optim)
        self.take_step(batches, lr=lr, momentum=self.method.momentum(step / self.total_steps))


def full_size_epoch(cfg: Config) -> int:
    """The first epoch whose views are not smaller for a while."""
    return cfg.views.progressive.until if cfg.views.progressive else 0


def open_run(cfg: Config, console: Console) -> OpenRun:
    """Of this process, which may be one of several, once `check_data` has looked at the data. It writes nothing.
    Raises what `pretrain` would."""
    runtime = Runtime(cfg.run.model_copy(update={"tensorboard": False}))  # whose files would lie in the run's directory
    torch.manual_seed(cfg.run.seed)
    per_rank = cfg.optim.batch_size // runtime.world_size // cfg.optim.accumulate
    normalised_together(cfg.encoder.batchnorm, per_rank, runtime.world_size)
    cores = settle(cfg.data.placement, runtime.device)
    said: set[str] = set()

    def report(message: str) -> None:
        if message not in said:  # small sets are gone through many times
            said.add(message)
            console.print(f"warning: {message}", style="yellow", soft_wrap=True)

    rank, world_size = runtime.rank, runtime.world_size
    with shown_decoding(console, enabled=runtime.is_main) as progress:
        source = build_source(
            cfg.data, "train", runtime.device, report, rank=rank, world_size=world_size, cores=cores, progress=progress
        )
    assert source is not None
    stream = build_stream(cfg, source, device=runtime.device, dtype=runtime.dtype, rank=rank, world_size=world_size)
    stream.warm_up()
    take_step = build_step(cfg, runtime)
    take_step.method.train()
    first = full_size_epoch(cfg)
    held = next(stream.frames(first))
    return OpenRun(cfg, runtime, stream, take_step, held, cores, count(first + 1), count())


# --- images ----------------------------------------------------------------------------------------------------------


def feed(run: OpenRun, steps: int) -> Generator[Frames]:
    """Frames of the last `steps` steps of epochs that were not begun yet: other images than those of any feed before,
    as far as the set goes."""
    for epoch, first in _ends_of_epochs(run, steps):
        yield from run.stream.frames(epoch, first)


def places(run: OpenRun, steps: int) -> Iterator[np.ndarray]:
    """Positions (B,) of such images, one array for each micro-batch."""
    for epoch, first in _ends_of_epochs(run, steps):
        yield from run.stream.sampler.epoch(epoch, first)


def _ends_of_epochs(run: OpenRun, steps: int) -> Iterator[tuple[int, int]]:
    while steps > 0:
        taken = min(steps, run.stream.steps_per_epoch)
        yield next(run.epochs), run.stream.steps_per_epoch - taken
        steps -= taken


# --- the step in pieces ----------------------------------------------------------------------------------------------


def step_in_pieces(
    run: OpenRun,
    frames: Iterator[Frames],
    end_of: Callable[[str], None],
    *,
    gradients: Tensor | None = None,
    autocast: Callable[[], AbstractContextManager] | None = None,
) -> None:
    """What `TrainStep` and the loader do in a step, one piece after another; `end_of` is told of each piece when all of
    it was launched. Weights keep still: the rate is 0.

    `gradients` (n,) is summed over the ranks after the backward pass, not beside it. `autocast` instead of the run's.
    """
    runtime, method, carries = run.runtime, run.method, []
    set_learning_rate_(run.take_step.optimizer, 0.0)
    for _ in range(run.cfg.optim.accumulate):
        held = next(frames)
        end_of("wait")
        batch = run.cut(held)
        end_of("views")
        with (autocast or runtime.autocast)():
            student = method.embed(batch.strong)
            end_of("student")
            keys = method.teach(batch.weak)
            end_of("teacher")
            loss = method.compare(student, keys)
            end_of("loss")
        runtime.backward(loss / run.cfg.optim.accumulate)
        end_of("backward")
        carries.append(keys)
        del student, loss  # which hold the graph
    if gradients is not None:
        dist.all_reduce(gradients)
        end_of("all-reduce")
    run.take_step.optimizer.step()
    run.take_step.optimizer.zero_grad(set_to_none=True)
    end_of("optimizer")
    method.queue.push(runtime.collectives.gather(torch.cat(carries)))
    end_of("queue")
    ema_update_(method.teacher, method.student, method.momentum(0.0))
    end_of("ema")
