"""Times the parts of a run's step on this machine, alone and together, and writes a table.

    python -m tools.bench configs/quickstart.yaml [--rounds 5] [--steps 10] [--out DIRECTORY] [SECTION.KEY=VALUE]...

Each part runs `steps` steps a round and the rounds are interleaved, so that whatever else the machine does falls on all
parts alike; the median and the range over the rounds are given. It needs the config's data on disk.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from pipelines import build_loaders
from pipelines.loader import ViewStream
from ressl.batch import Batch, DataError
from ressl.config import Config
from ressl.config_file import ConfigError, load_config
from ressl.runtime import MachineError, Runtime
from ressl.step import build_step
from tools.machine import machine
from tools.output import keep, make_out


@dataclass(frozen=True, slots=True)
class Part:
    name: str
    run: Callable[[int], None]  # so many steps


def measure(parts: list[Part], *, steps: int, rounds: int, wait: Callable[[], None]) -> dict[str, list[float]]:
    """Seconds a step of each part, one number a round, after a round that is not counted."""
    seconds: dict[str, list[float]] = {part.name: [] for part in parts}
    for number in range(rounds + 1):
        for part in parts:
            wait()
            started = time.perf_counter()
            part.run(steps)
            wait()
            if number:
                seconds[part.name].append((time.perf_counter() - started) / steps)
    return seconds


def step_parts(cfg: Config, steps: int) -> tuple[list[Part], Callable[[], None]]:
    """The parts of the run's step, and a function that waits for the device."""
    runtime = Runtime(cfg.run)
    torch.manual_seed(cfg.run.seed)
    stream = build_loaders(cfg, device=runtime.device, dtype=runtime.dtype).train
    assert isinstance(stream, ViewStream)
    if stream.steps_per_epoch < steps:
        raise DataError(f"--steps {steps}, but an epoch has only {stream.steps_per_epoch}")
    # batches are micro-batches: one makes a step here
    one = {"accumulate": 1, "batch_size": cfg.optim.batch_size // cfg.optim.accumulate}
    take_step = build_step(cfg.model_copy(update={"optim": cfg.optim.model_copy(update=one)}), runtime)
    take_step.method.train()
    held_frames = next(iter(stream.frames(0)))
    held = stream.cut(held_frames, 0)

    def train_on(batch: Batch) -> None:
        take_step(iter([batch]), lr=cfg.optim.peak_lr, momentum=take_step.method.momentum(0))

    def frames(steps: int) -> None:
        for _ in zip(range(steps), stream.frames(0), strict=False):
            pass

    def views(steps: int) -> None:
        for _ in range(steps):
            stream.cut(held_frames, 0)

    def training(steps: int) -> None:
        for _ in range(steps):
            train_on(held)

    def together(steps: int) -> None:
        for _, batch in zip(range(steps), stream.epoch(0), strict=False):
            train_on(batch)

    def wait() -> None:
        if runtime.device.type == "cuda":
            torch.cuda.synchronize()

    parts = [
        Part("frames", frames),
        Part("views", views),
        Part("training step", training),
        Part("all together", together),
    ]
    return parts, wait


def report(cfg: Config, seconds: dict[str, list[float]]) -> list[tuple[str, str, str, str]]:
    """Rows: part, milliseconds a step, images a second, range of the latter."""
    rows = []
    images = cfg.optim.batch_size // cfg.optim.accumulate
    for name, values in seconds.items():
        median = statistics.median(values)
        low, high = images / max(values), images / min(values)
        rows.append((name, f"{1000 * median:,.1f}", f"{images / median:,.0f}", f"{low:,.0f} to {high:,.0f}"))
    return rows


def markdown(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, and the machine that it is of."""
    lines = [f"# {title}", "", f"`{machine()}`", "", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="SECTION.KEY=VALUE")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds (5)")
    parser.add_argument("--steps", type=int, default=10, help="steps of each part in a round (10)")
    parser.add_argument("--out", type=Path, help="directory for a markdown and a JSON file")
    arguments = parser.parse_args()
    try:
        cfg = load_config(arguments.config, arguments.overrides)
        if arguments.out:
            make_out(arguments.out)
        parts, wait = step_parts(cfg, arguments.steps)
        seconds = measure(parts, steps=arguments.steps, rounds=arguments.rounds, wait=wait)
    except (ConfigError, DataError, MachineError) as error:
        print(f"ressl: error: {error}", file=sys.stderr)
        return 4 if isinstance(error, MachineError) else 2
    columns = ("part", "ms a step", "images/s", "range of images/s")
    rows = report(cfg, seconds)
    title = f"{arguments.config.stem}, batch {cfg.optim.batch_size}, {arguments.rounds} interleaved rounds"
    table = Table(*columns, title=title, title_justify="left", caption=str(machine()), caption_justify="left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    if arguments.out:
        name = f"step-{arguments.config.stem}-{'gpu' if torch.cuda.is_available() else 'cpu'}-{date.today()}"
        record = {"machine": machine(), "config": cfg.model_dump(mode="json"), "seconds_a_step": seconds}
        keep(record, markdown(title, columns, rows), arguments.out / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
