"""A run, opened as `pretrain` opens it, and the ways in which a profile goes through its step."""

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import count, islice

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor

from pipelines import build_source, build_stream
from pipelines.frames import Frames
from pipelines.loader import ViewStream
from pipelines.placement import settle
from pipelines.prefetch import prefetch
from ressl.batch import Batch
from ressl.batchnorm import normalised_together
from ressl.config import Config
from ressl.ema import ema_update_
from ressl.method import AnyMethod
from ressl.optim import learning_rate, set_learning_rate_
from ressl.recorder import warn
from ressl.runtime import Runtime
from ressl.step import TrainStep, build_step
from tools.decoding import shown_decoding


@dataclass(slots=True)
class Place:
    """How far the feeds have gone through the images."""

    epoch: int
    step: int  # of the epoch, the next one


@dataclass(frozen=True, slots=True)
class OpenRun:
    cfg: Config
    runtime: Runtime
    stream: ViewStream
    take_step: TrainStep
    held: Frames  # of one micro-batch, on the device
    cores: int
    place: Place  # of epochs whose views have full size
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
            warn(console, message)

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
    return OpenRun(cfg, runtime, stream, take_step, held, cores, Place(first + 1, 0), count())


# --- images ----------------------------------------------------------------------------------------------------------


def feed(run: OpenRun, steps: int) -> Generator[Frames]:
    """Frames of the next `steps` steps, prepared as `ViewStream.frames` prepares them. Feeds go through an epoch one
    after another, so no image comes twice before all have come once; a new epoch has an order of its own."""
    source, seed = run.stream.source, run.stream.sampler.seed
    for epoch, positions in _parts(run, steps):
        stream = source.stream(positions, salt=seed + (epoch << 32))
        yield from prefetch(stream, run.device, depth=run.cfg.data.prefetch)


def places(run: OpenRun, steps: int) -> Iterator[np.ndarray]:
    """Positions (B,) of such images, one array for each micro-batch."""
    for _, positions in _parts(run, steps):
        yield from positions


def _parts(run: OpenRun, steps: int) -> Iterator[tuple[int, Iterator[np.ndarray]]]:
    """Epochs, and what is taken of each."""
    place, epoch_steps = run.place, run.stream.steps_per_epoch
    while steps > 0:
        if place.step == epoch_steps:
            place.epoch, place.step = place.epoch + 1, 0
        taken, epoch, first = min(steps, epoch_steps - place.step), place.epoch, place.step
        place.step, steps = first + taken, steps - taken
        yield epoch, islice(run.stream.sampler.epoch(epoch, first), taken * run.cfg.optim.accumulate)


# --- the step in pieces ----------------------------------------------------------------------------------------------


def gradient_buffer(run: OpenRun) -> Tensor | None:
    """Zeros (n,) in the place of a step's gradients, as they travel; None where there is one rank."""
    if run.runtime.world_size == 1:
        return None
    dtype = torch.bfloat16 if run.cfg.run.gradient_compression == "bf16" else torch.float32
    return torch.zeros(sum(p.numel() for p in run.method.student.parameters()), dtype=dtype, device=run.device)


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

    `gradients` (n,) is summed over the ranks after the backward pass, not beside it: once all ranks are there, which
    the piece `ranks` waits for. `autocast` instead of the run's.
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
        dist.all_reduce(gradients[:1])  # one number: what passes until then is the slower ranks' work
        end_of("ranks")
        dist.all_reduce(gradients)
        end_of("all-reduce")
    run.take_step.optimizer.step()
    run.take_step.optimizer.zero_grad(set_to_none=True)
    end_of("optimizer")
    method.queue.push(runtime.collectives.gather(torch.cat(carries)))
    end_of("queue")
    ema_update_(method.teacher, method.student, method.momentum(0.0))
    end_of("ema")
