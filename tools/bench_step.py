"""Times our training step beside the bare encoders and beside a plain port of the authors' step.

    python -m tools.bench_step [CONFIG] [--batches 32,256] [--rounds 7] [--out DIRECTORY] [SECTION.KEY=VALUE]...

The views are noise of the config's sizes that lies on the device, so no data is needed. One process, one device.
"""

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import cast

import torch
from rich.console import Console
from torch import Tensor, nn

from ressl.batch import Batch, DataError
from ressl.batchnorm import normalised_together
from ressl.config import Config
from ressl.config_file import ConfigError, load_config
from ressl.config_optim import SGDConfig
from ressl.graphs import WARM_UP as BEFORE_CAPTURE
from ressl.method import AnyMethod, StepOutput, build_method
from ressl.runtime import Runtime, launched
from ressl.step import TrainStep, build_step, step_of
from tools.bench_loaders import answer, shuffled
from tools.bench_step_report import Record, markdown, print_report
from tools.eager_port import EagerPort, plain_sgd
from tools.ending import exit_code
from tools.machine import machine, machine_cpu_seconds
from tools.output import keep, make_out

DEFAULTS = {  # by device: the config, what is set in it, images a step
    "cuda": ("configs/imagenet_resnet50_200ep_paper.yaml", ["run.precision=bf16"], [32, 256, 1024]),
    "cpu": ("configs/quickstart.yaml", [], [32, 256]),
}
ARMS = ("ours", "floor", "port-amp", "port-fp32")
WARM_UP = 3  # steps of an arm before its first turn, or as many as a capture needs
NO_MEMORY = ("DefaultCPUAllocator", "ALLOC_FAILED")  # in errors of torch's CPU allocator, cuDNN and cuBLAS
RATE = 1e-3  # of learning, in every arm: no step takes longer for a larger one, and none leaves the usual numbers

Step = Callable[[], object]
Say = Callable[[str], object]


class Unfit(Exception):
    """An arm that the config or the machine's memory does not allow. The message says why."""


class Floor(nn.Module):
    """What no step can do without: the student's forward pass, a loss that costs nothing, the teacher's forward pass.

    It stands in a TrainStep where the method stands, so that backward pass, optimizer, precision, compiled blocks and
    captured graph are those of ours.
    """

    def __init__(self, method: AnyMethod) -> None:
        super().__init__()
        self.student, self.teacher = method.student, method.teacher

    def forward(self, batch: Batch) -> StepOutput:
        loss = torch.stack([self.student(view).mean() for view in batch.strong]).mean()
        with torch.no_grad():
            for view in batch.weak:
                self.teacher(view)
        return StepOutput(loss, (), {})

    def after_step(self, *, momentum: float | Tensor, skip: Tensor | None) -> None:
        """Neither queue nor teacher."""


@dataclass(slots=True)
class Arm:
    step: Step
    peak: int | None  # bytes of the device from its building through its warm-up, without the views; None on a CPU
    seconds: list[float]  # a step, one number a round


# --- what is timed ---------------------------------------------------------------------------------------------------


def make_step(name: str, cfg: Config, runtime: Runtime, batch: Batch) -> Step:
    """One step of an arm of ARMS on `batch`, always the same. Raises Unfit."""
    torch.manual_seed(cfg.run.seed)
    match name:
        case "ours":
            optim = cfg.optim.model_copy(update={"batch_size": len(batch.index), "accumulate": 1})
            sized = cfg.model_copy(update={"optim": optim})
            return _held(build_step(sized, runtime), batch, cfg.method.teacher_momentum)
        case "floor":
            return _held(floor_step(cfg, runtime), batch, 1.0)
        case "port-amp":
            if runtime.dtype == torch.float32:
                raise Unfit(f"run.precision={cfg.run.precision} has no autocast")
            return _held_port(cfg, runtime, batch, runtime.dtype)
        case _:
            return _held_port(cfg, runtime, batch, None)


def floor_step(cfg: Config, runtime: Runtime) -> TrainStep:
    method = build_method(cfg.method, cfg.encoder, runtime.collectives).to(runtime.device)
    # a step asks no more of a method than Floor has
    return step_of(cast(AnyMethod, Floor(method)), cfg, runtime, guarded=False)


def port(cfg: Config, runtime: Runtime, images: int, autocast: torch.dtype | None) -> EagerPort:
    """channels_last under autocast, contiguous without. Raises Unfit."""
    if not isinstance(cfg.optim, SGDConfig):
        raise Unfit(f"optim.name={cfg.optim.name}: the authors train with SGD")
    if cfg.method.queue_size % images:
        raise Unfit(f"their queue takes whole batches: {images} does not divide {cfg.method.queue_size}")
    method = build_method(cfg.method, cfg.encoder, runtime.collectives).to(runtime.device)
    if autocast is None:
        method.to(memory_format=torch.contiguous_format)
    optimizer = plain_sgd(method.student, cfg.optim)
    for group in optimizer.param_groups:
        group["lr"] = RATE
    return EagerPort(method.student, method.teacher, method.queue.keys, cfg.method, optimizer, autocast=autocast)


def noise(cfg: Config, device: torch.device, dtype: torch.dtype, images: int) -> Batch:
    """Views of the config's full sizes, channels_last."""
    rng = torch.Generator(device).manual_seed(cfg.run.seed)

    def view(size: int) -> Tensor:
        rows = torch.randn(images, size, size, 3, generator=rng, device=device, dtype=dtype)
        return rows.permute(0, 3, 1, 2)

    index = torch.arange(images, device=device)
    strong = tuple(view(one.size) for one in cfg.views.strong)
    return Batch(weak=(view(cfg.views.weak.size),), strong=strong, index=index, label=index)


def _held(take_step: TrainStep, batch: Batch, momentum: float) -> Step:
    return lambda: take_step(iter([batch]), lr=RATE, momentum=momentum)


def _held_port(cfg: Config, runtime: Runtime, batch: Batch, autocast: torch.dtype | None) -> Step:
    plain = port(cfg, runtime, len(batch.index), autocast)
    return lambda: plain.step(batch)


def plain_views(batch: Batch) -> Batch:
    """The same views in float32, contiguous."""
    weak, strong = (tuple(view.float().contiguous() for view in views) for views in (batch.weak, batch.strong))
    return Batch(weak=weak, strong=strong, index=batch.index, label=batch.label)


# --- how it is timed -------------------------------------------------------------------------------------------------


def start(name: str, cfg: Config, batch: Batch) -> Arm:
    """An arm that is built and warmed up. Raises Unfit."""
    runtime = Runtime(cfg.run)  # of its own, as it keeps what is built with it
    on_gpu, before = runtime.device.type == "cuda", 0
    if name == "port-fp32":
        batch = plain_views(batch)
    if on_gpu:
        wait(runtime.device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    step = make_step(name, cfg, runtime, batch)
    for _ in range(BEFORE_CAPTURE + 1 if cfg.run.cuda_graphs else WARM_UP):
        step()
    wait(runtime.device)
    return Arm(step, torch.cuda.max_memory_allocated() - before if on_gpu else None, [])


def take_turn(arm: Arm, steps: int, device: torch.device) -> None:
    """The first step is not counted: caches, and blocks of memory, are still those of another arm."""
    arm.step()
    wait(device)
    started = time.perf_counter()
    for _ in range(steps):
        arm.step()
    wait(device)
    arm.seconds.append((time.perf_counter() - started) / steps)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fitting(work: Callable[[], object]) -> str | None:
    """Does the work; returns why it could not be done, where memory or the config forbids it."""
    try:
        work()
    except Unfit as error:
        return str(error)
    except (torch.OutOfMemoryError, MemoryError):
        return "out of memory"
    except RuntimeError as error:
        if not any(word in str(error) for word in NO_MEMORY):
            raise
        return "out of memory"
    return None


def release() -> None:
    """What is no longer held goes back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def bench_batch(
    cfg: Config, runtime: Runtime, images: int, rounds: int, steps: int, left_out: dict[str, str], say: Say
) -> Record:
    """The arms at one number of images a step: seconds a step and peak bytes of each, and the order of each round."""
    views: list[Batch] = []
    arms: dict[str, Arm] = {}
    orders = []

    def enter(name: str) -> None:
        arms[name] = start(name, cfg, views[0])

    def take(name: str) -> None:
        take_turn(arms[name], steps, runtime.device)

    def attempt(name: str, work: Callable[[str], None]) -> None:
        if reason := fitting(partial(work, name)):
            arms.pop(name, None)
            release()
            left_out[f"{name}, batch {images}"] = reason

    if reason := fitting(lambda: views.append(noise(cfg, runtime.device, runtime.dtype, images))):
        left_out[f"batch {images}"] = reason
        return {"images": images, "order": [], "others_share": 0.0, "arms": {}}
    for name in ARMS:
        say(f"batch {images}: building and warming up {name}")
        attempt(name, enter)
    began, mine, all_before = time.perf_counter(), time.process_time(), machine_cpu_seconds()
    for number in range(rounds + 1):  # the first is not counted
        orders.append(shuffled(list(arms), number))
        for name in orders[-1]:
            attempt(name, take)
        say(f"batch {images}: round {number} of {rounds}")
    measured = {name: {"seconds": arm.seconds[1:], "peak_bytes": arm.peak} for name, arm in arms.items()}
    others = machine_cpu_seconds() - all_before - (time.process_time() - mine)
    share = max(0.0, others) / (time.perf_counter() - began) / (os.cpu_count() or 1)
    return {"images": images, "order": orders[1:], "others_share": share, "arms": measured}


def bench(arguments: argparse.Namespace, cfg: Config, say: Say) -> Record:
    """Everything that was measured and how, ready for JSON. Raises DataError and MachineError."""
    runtime, found = Runtime(cfg.run), []
    left_out: dict[str, str] = {}
    batches = arguments.batches or DEFAULTS[runtime.device.type][2]
    for images in batches:
        normalised_together(cfg.encoder.batchnorm, images, 1)
    for images in batches:
        found.append(bench_batch(cfg, runtime, images, arguments.rounds, arguments.steps, left_out, say))
        release()
    if not any(one["arms"] for one in found):
        raise DataError(f"nothing could be timed: {'; '.join(f'{name}: {why}' for name, why in left_out.items())}")
    return {
        "date": str(date.today()),
        "machine": machine(),
        "config": {"name": arguments.config.stem, "set": arguments.overrides, "all": cfg.model_dump(mode="json")},
        "options": {
            "rounds": arguments.rounds,
            "steps": arguments.steps,
            "device": runtime.device.type,
            "convolutions": torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "threads": torch.get_num_threads(),
        },
        "batches": found,
        "left_out": left_out,
    }


# --- the command -----------------------------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.bench_step", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("words", nargs="*", metavar="[CONFIG] [SECTION.KEY=VALUE]...", help="a YAML file, values in it")
    parser.add_argument("--batches", help="images a step, with commas between (32,256 and, on a GPU, 1024)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each arm (7)")
    parser.add_argument("--steps", type=int, default=10, help="steps that are timed in a turn (10)")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="for the tables (docs/results)")
    return parser.parse_intermixed_args(argv)


def check(arguments: argparse.Namespace) -> Config:
    """Puts `config`, `overrides` and `batches` into the arguments. Raises ConfigError and DataError before anything
    long is begun."""
    if launched():
        raise ConfigError("bench_step runs as one process: start it without torchrun")
    for name in ("rounds", "steps"):
        if getattr(arguments, name) < 1:
            raise DataError(f"--{name} {getattr(arguments, name)}: expected at least 1")
    words = (arguments.batches or "").split(",") if arguments.batches is not None else []
    if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        raise DataError(f"--batches {arguments.batches}: expected numbers of images, as in 32,256")
    arguments.batches = list(dict.fromkeys(map(int, words)))
    named = bool(arguments.words) and "=" not in arguments.words[0]
    config, first, _ = DEFAULTS["cuda" if torch.cuda.is_available() else "cpu"]
    arguments.config = Path(arguments.words[0] if named else config)
    arguments.overrides = arguments.words[1:] if named else [*first, *arguments.words]
    cfg = load_config(arguments.config, arguments.overrides)
    make_out(arguments.out)
    return cfg.model_copy(update={"optim": cfg.optim.model_copy(update={"accumulate": 1})})


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)

    def measure() -> tuple[Record, list[Path]]:
        cfg = check(arguments)
        record = bench(arguments, cfg, Console(stderr=True).print)
        kind = "gpu" if record["options"]["device"] == "cuda" else "cpu"
        name = f"step-ratios-{arguments.config.stem}-{kind}-{record['date']}"
        return record, keep(record, markdown(record), arguments.out / name)

    return exit_code(lambda: answer(measure, print_report))


if __name__ == "__main__":
    sys.exit(main())
