"""Times the optimizers and the teacher's update on a config's networks against the bytes that they cannot but move.

    python -m tools.bench_update configs/quickstart.yaml [--rounds 5] [--steps N] [--out DIRECTORY]
                                 [SECTION.KEY=VALUE]...

The floor of a part is the memory traffic of its job at the rate at which this device copies a large tensor. Baselines
are the same jobs as others write them: a loop over the parameters, torch's optimizers without their fused kernels. The
rounds are interleaved; the median and the range over the rounds are given. It needs no data.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ressl.batch import DataError
from ressl.config import Config
from ressl.config_file import ConfigError, load_config
from ressl.config_optim import AdamWConfig, LARSConfig, SGDConfig
from ressl.ema import ema_update_
from ressl.method import build_method
from ressl.optim import build_optimizer
from ressl.runtime import MachineError, Runtime
from tools.bench import Part, markdown, measure
from tools.machine import machine
from tools.output import keep, make_out

COPY = "copy of a large tensor"
COPIED = 1 << 25  # float32 values: 128 MiB, more than caches hold
RATE, MOMENTUM = 1e-3, 0.999
COLUMNS = ("part", "ms", "range of ms", "bytes a parameter", "times the floor", "as fast as the baseline")
Seconds = dict[str, list[float]]


@dataclass(frozen=True, slots=True)
class Job:
    name: str
    run: Callable[[], object]
    floor: int  # bytes a float32 parameter that the job cannot but read and write
    baseline: str | None = None  # the job that does the same as others write it


def jobs(student: nn.Module, teacher: nn.Module) -> list[Job]:
    """Everything that is timed. All of them move the same student, whose gradients are made here."""
    for p in student.parameters():
        p.grad = torch.randn_like(p)
    common: dict[str, Any] = {"epochs": 1, "batch_size": 1, "lr": RATE, "warmup_epochs": 0.0, "weight_decay": 1e-4}
    sgd = build_optimizer(student, SGDConfig(name="sgd", **common))
    lars = build_optimizer(student, LARSConfig(name="lars", **common))
    adamw = build_optimizer(student, AdamWConfig(name="adamw", **common))
    plain: dict[str, Any] = {"lr": RATE, "weight_decay": 1e-4, "fused": False, "foreach": False}
    plain_sgd = torch.optim.SGD(student.parameters(), momentum=0.9, **plain)
    plain_adamw = torch.optim.AdamW(student.parameters(), **plain)
    there = torch.tensor(MOMENTUM, dtype=torch.float64, device=next(student.parameters()).device)

    def both() -> None:
        sgd.step()
        ema_update_(teacher, student, MOMENTUM)

    # the teacher's update reads two and writes one; SGD reads weight, gradient and momentum and writes two; LARS reads
    # weight and gradient once more, for their norms; AdamW reads four and writes three
    return [
        Job("EMA", partial(ema_update_, teacher, student, MOMENTUM), 12, "EMA, a loop"),
        Job("EMA, momentum on the device", partial(ema_update_, teacher, student, there), 12, "EMA, a loop"),
        Job("EMA, a loop", partial(ema_loop, teacher, student), 12),
        Job("SGD", sgd.step, 20, "SGD, unfused"),
        Job("SGD, unfused", plain_sgd.step, 20),
        Job("LARS", lars.step, 28),
        Job("AdamW", adamw.step, 28, "AdamW, unfused"),
        Job("AdamW, unfused", plain_adamw.step, 28),
        Job("SGD and EMA", both, 32),
    ]


@torch.no_grad()
def ema_loop(teacher: nn.Module, student: nn.Module) -> None:
    """The teacher's update as ReSSL's and MoCo's authors write it: one parameter after another."""
    for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
        slow.data = slow.data * MOMENTUM + fast.data * (1.0 - MOMENTUM)


def time_jobs(work: list[Job], device: torch.device, *, steps: int, rounds: int, copied: int) -> Seconds:
    """Seconds of each job and of the copy of `copied` float32 values, one number a round of `steps` each."""
    source, there = torch.ones(copied, device=device), torch.empty(copied, device=device)

    def repeat(run: Callable[[], object], count: int) -> None:
        for _ in range(count):
            run()

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    parts = [Part(COPY, partial(repeat, partial(Tensor.copy_, there, source)))]
    parts += [Part(job.name, partial(repeat, job.run)) for job in work]
    return measure(parts, steps=steps, rounds=rounds, wait=wait)


def steps_for(parameters: int, device: torch.device) -> int:
    """So many that a round of a job takes long enough to be timed, and all of them less than a minute on two cores."""
    return 50 if device.type == "cuda" else max(2, min(20, 10_000_000 // parameters))


def report(work: list[Job], seconds: Seconds, *, parameters: int, copied: int) -> list[tuple[str, ...]]:
    """A row for each job, under COLUMNS. Ratios are taken within a round."""
    rates = [8 * copied / each for each in seconds[COPY]]  # bytes/s, read and written
    rows: list[tuple[str, ...]] = []
    for job in work:
        times = seconds[job.name]
        over = [each * rate / (job.floor * parameters) for each, rate in zip(times, rates, strict=True)]
        faster = [b / t for b, t in zip(seconds[job.baseline], times, strict=True)] if job.baseline else []
        rows.append(
            (
                job.name,
                f"{1000 * median(times):,.3f}",
                f"{1000 * min(times):,.3f} to {1000 * max(times):,.3f}",
                str(job.floor),
                _spread(over),
                _spread(faster) + f" ({job.baseline})" if faster else "",
            )
        )
    return rows


def _spread(ratios: list[float]) -> str:
    return f"{median(ratios):.2f} [{min(ratios):.2f} to {max(ratios):.2f}]"


def networks(cfg: Config) -> tuple[nn.Module, nn.Module, torch.device]:
    """The student and the teacher of a config's run, where it would compute."""
    runtime = Runtime(cfg.run)
    torch.manual_seed(cfg.run.seed)
    method = build_method(cfg.method, cfg.encoder, runtime.collectives).to(runtime.device)
    return method.student, method.teacher, runtime.device


def positive(text: str) -> int:
    """Of the command line."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1 on, not {text}")
    return number


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench_update", description=(__doc__ or "").splitlines()[0]
    )  # fmt: skip
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="SECTION.KEY=VALUE")
    parser.add_argument("--rounds", type=positive, default=5, help="counted rounds (5)")
    parser.add_argument(
        "--steps", type=positive, help="steps of each part in a round (2 to 20 by the size, on a GPU 50)"
    )
    parser.add_argument("--out", type=Path, help="directory for a markdown and a JSON file")
    arguments = parser.parse_args()
    try:
        cfg = load_config(arguments.config, arguments.overrides)
        if arguments.out:
            make_out(arguments.out)
        student, teacher, device = networks(cfg)
    except (ConfigError, DataError, MachineError) as error:
        print(f"ressl: error: {error}", file=sys.stderr)
        return 4 if isinstance(error, MachineError) else 2
    work, parameters = jobs(student, teacher), sum(p.numel() for p in student.parameters())
    steps = arguments.steps or steps_for(parameters, device)
    seconds = time_jobs(work, device, steps=steps, rounds=arguments.rounds, copied=COPIED)
    rows = report(work, seconds, parameters=parameters, copied=COPIED)
    rate = 8 * COPIED / median(seconds[COPY])
    title = (
        f"{arguments.config.stem}: {parameters:,} parameters, {len(list(student.parameters()))} tensors; "
        f"the device copies {rate / 1e9:,.1f} GB/s; {arguments.rounds} interleaved rounds"
    )
    table = Table(*COLUMNS, title=title, title_justify="left", caption=str(machine()), caption_justify="left")
    for row in rows:
        table.add_row(*(cell.replace("[", r"\[") for cell in row))
    Console().print(table)
    if arguments.out:
        name = f"update-{arguments.config.stem}-{'gpu' if device.type == 'cuda' else 'cpu'}-{date.today()}"
        record = {"config": cfg.model_dump(mode="json"), "parameters": parameters, "copied": COPIED, "seconds": seconds}
        keep({"machine": machine(), **record}, markdown(title, COLUMNS, rows), arguments.out / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
