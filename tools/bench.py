"""Times the parts of a run's step on this machine, alone and together, and writes a table.

    python -m tools.bench configs/quickstart.yaml [--rounds 5] [--steps 10] [--out DIRECTORY] [SECTION.KEY=VALUE]...

Each part runs `steps` steps a round and the rounds are interleaved, so that whatever else the machine does falls on all
parts alike; the median and the range over the rounds are given. It needs the config's data on disk.
"""

import argparse
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from pathlib import Path

import torch
from PIL import features
from rich.console import Console
from rich.table import Table

from pipelines import build_loaders
from pipelines.loader import ViewStream
from ressl.batch import Batch, DataError
from ressl.config import Config
from ressl.config_file import ConfigError, load_config
from ressl.method import build_method
from ressl.optim import build_optimizer
from ressl.runtime import MachineError, Runtime
from ressl.step import TrainStep

PACKAGES = ("torchvision", "triton", "numpy", "pillow", "numba", "ffcv", "nvidia-dali-cuda130", "nvidia-dali-cuda120")


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
    method = build_method(cfg.method, cfg.encoder, runtime.collectives).to(runtime.device).train()
    take_step = TrainStep(method, build_optimizer(method.student, cfg.optim), runtime, accumulate=1)
    held_frames = next(iter(stream.frames(0)))
    held = stream.cut(held_frames, 0)

    def train_on(batch: Batch) -> None:
        take_step(iter([batch]), lr=cfg.optim.peak_lr, momentum=method.momentum(0))

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


def machine() -> dict[str, str | int]:
    """What a figure depends on: the hardware, and the versions of what decodes and computes. What is not there is left
    out."""
    found: dict[str, str | int | None] = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cpu": _first(Path("/proc/cpuinfo"), r"model name\s*:\s*(.+)") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 1e9:,.0f} GB",
        "driver": _first(Path("/proc/driver/nvidia/version"), r"Module\s+(?:for \S+\s+)?([\d.]+)"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "libjpeg-turbo of Pillow": features.version("libjpeg_turbo"),
    }
    found |= {name: _version(name) for name in PACKAGES}
    return {name: value for name, value in found.items() if value is not None}


def _first(file: Path, pattern: str) -> str | None:
    """What the pattern's group matches first in a file of the kernel's."""
    try:
        match = re.search(pattern, file.read_text())
    except OSError:
        return None
    return match.group(1).strip() if match else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


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
        arguments.out.mkdir(parents=True, exist_ok=True)
        name = f"step-{arguments.config.stem}-{'gpu' if torch.cuda.is_available() else 'cpu'}-{date.today()}"
        lines = [f"# {title}", "", f"`{machine()}`", "", "| " + " | ".join(columns) + " |", "|---|---|---|---|"]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        (arguments.out / f"{name}.md").write_text("\n".join(lines) + "\n")
        record = {"machine": machine(), "config": cfg.model_dump(mode="json"), "seconds_a_step": seconds}
        (arguments.out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
