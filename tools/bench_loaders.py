"""Compares what our loaders cost with what others do: CPU-milliseconds an image, and images/s.

    python -m tools.bench_loaders IMAGES [--rounds 5] [--arms ours-ffcv400,torchvision-2] [--out DIRECTORY]

IMAGES is a folder of images or a .tar of one. Files converted from it are kept in --work and used again.
"""

import argparse
import importlib.util
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import date
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipelines.free_memory import free_memory
from ressl.batch import DataError
from tools.bench_data import Prepared, converted, prepare
from tools.bench_device import measure_device
from tools.convert import DiskFull
from tools.early import AT_ONCE
from tools.loader_arms import Arm, ArmFailed, Job, Running, Turn, all_arms, start, stop, turn
from tools.loader_report import Record, markdown, print_report
from tools.machine import machine, machine_cpu_seconds
from tools.output import keep, make_out

EPOCHS = 1 << 16  # of one turn, at most: every turn has epochs of its own
ARM_GB = 0.6  # of memory, about, that a warmed-up arm and its workers hold


def choose(words: str | None) -> list[Arm]:
    """The arms that `--arms` names, by their own name or that of their way. Raises DataError."""
    arms = all_arms()
    if words is None:
        return arms
    wanted = [word.strip() for word in words.split(",") if word.strip()]
    for word in wanted:
        if not any(word in (arm.name, arm.way.name) for arm in arms):
            raise DataError(f"--arms {word}: no such arm; there are {', '.join(arm.name for arm in arms)}")
    chosen = [arm for arm in arms if arm.name in wanted or arm.way.name in wanted]
    if not chosen:
        raise DataError("--arms: names none; leave it away for all")
    return chosen


def without_missing(arms: list[Arm]) -> tuple[list[Arm], dict[str, str]]:
    """The arms whose package is there, and why the others are left out."""
    missing = {need for arm in arms if (need := arm.way.needs) and not _installed(need)}
    left_out = {arm.name: f"{arm.way.needs} is not installed" for arm in arms if arm.way.needs in missing}
    return [arm for arm in arms if arm.name not in left_out], left_out


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def check_memory(arms: int, free_gb: float) -> None:
    """All arms are in memory at once. Raises DataError where they do not fit, before the machine begins to swap."""
    if arms * ARM_GB > free_gb:
        need = f"{arms} arms need about {arms * ARM_GB:.0f} GB of memory"
        raise DataError(f"{need}, and {free_gb:.1f} GB are free: name fewer with --arms")


def shuffled(names: list[str], round_number: int) -> list[str]:
    """The order of a round: the same for the same arms, another in each round."""
    return random.Random(f"{round_number} {names}").sample(names, len(names))


@contextmanager
def running_arms(
    arms: list[Arm], paths: dict[str, Path], job: Job, logs: Path, left_out: dict[str, str], console: Console
) -> Iterator[dict[str, Running]]:
    """The arms' processes, warmed up; those that fail are noted in `left_out`. All are ended when the block is left."""
    running: dict[str, Running] = {}
    logs.mkdir(exist_ok=True)
    console.print(f"starting {len(arms)} arms, one after another; those of FFCV compile first")
    try:
        with _progress(console) as progress:
            task = progress.add_task("starting", total=len(arms), now="")
            for arm in arms:
                progress.update(task, now=arm.name)
                try:
                    running[arm.name] = start(arm, paths[arm.way.data], job, logs / f"{arm.name}.log")
                except ArmFailed as error:
                    left_out[arm.name] = str(error)
                    progress.console.print(f"left out: {arm.name}: {error}", markup=False, soft_wrap=True)
                progress.advance(task)
        yield running
    finally:
        stop(running.values())


def take_rounds(
    running: dict[str, Running], rounds: int, left_out: dict[str, str], console: Console
) -> tuple[dict[str, list[Turn]], list[list[str]]]:
    """The turns of each arm, one a round, and the order of each round. An arm that fails loses its turns."""
    turns: dict[str, list[Turn]] = {name: [] for name in running}
    orders = []
    with _progress(console) as progress:
        task = progress.add_task("measuring", total=rounds * len(running), now="")
        for number in range(rounds):
            began = time.perf_counter()
            orders.append(shuffled(list(turns), number))
            for name in orders[-1]:
                progress.update(task, now=name)
                try:
                    turns[name].append(turn(running[name], 1 + number * EPOCHS))
                except ArmFailed as error:
                    left_out[name] = f"failed in round {number + 1}: {error}"
                    del turns[name]
                    progress.update(task, total=number * len(running) + (rounds - number) * len(turns))
                progress.advance(task)
            took = time.perf_counter() - began
            left = took * (rounds - number - 1)
            progress.console.print(f"round {number + 1} of {rounds}: {took:,.0f} s; about {left:,.0f} s to go")
    return turns, orders


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[now]}"),
        console=console,
        transient=True,
        refresh_per_second=1,  # drawing takes CPU time from the arms
        disable=not console.is_terminal,
    )


def bench(arguments: argparse.Namespace, console: Console) -> Record:
    """Everything that was measured and how, ready for JSON. Raises DataError and DiskFull."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arms, left_out = without_missing(choose(arguments.arms))
    if not arms:
        raise DataError(f"--arms: none of them can run: {'; '.join(f'{k}: {v}' for k, v in left_out.items())}")
    check_memory(len(arms), free_memory()[0] / 1e9)
    prepared = prepare(arguments.images, arguments.work, arguments.images_per_round)
    if prepared.images < arguments.batch:
        raise DataError(
            f"{arguments.images}: {prepared.images:,} images are fewer than --batch {arguments.batch}: lower it"
        )
    needed = dict.fromkeys(arm.way.data for arm in arms)
    paths: dict[str, Path] = {data: converted(prepared, data, arguments.workers, console) for data in needed}
    job = Job(arguments.batch, arguments.images_per_round, arguments.workers, device, arguments.seconds)
    with running_arms(arms, paths, job, prepared.root / "logs", left_out, console) as running:
        machine_before, started = machine_cpu_seconds(), time.perf_counter()
        turns, orders = take_rounds(running, arguments.rounds, left_out, console)
        others = machine_cpu_seconds() - machine_before - sum(one.cpu_s for all in turns.values() for one in all)
        others_share = max(0.0, others) / (time.perf_counter() - started) / (os.cpu_count() or 1)
    if not turns:
        raise DataError(f"no arm could run: {'; '.join(f'{k}: {v}' for k, v in left_out.items())}")
    on_device = None
    if device == "cuda":
        console.print("measuring the GPU itself")
        on_device = measure_device(prepared.root / "files", torch.device(device), workers=arguments.workers)
    return make_record(arguments, prepared, device, arms, turns, orders, left_out, others_share, on_device)


def make_record(
    arguments: argparse.Namespace,
    prepared: Prepared,
    device: str,
    arms: list[Arm],
    turns: dict[str, list[Turn]],
    orders: list[list[str]],
    left_out: dict[str, str],
    others_share: float,
    on_device: Record | None,
) -> Record:
    options = {name: getattr(arguments, name) for name in ("rounds", "batch", "workers", "seconds", "images_per_round")}
    measured = {
        arm.name: {
            "way": arm.way.name,
            "label": arm.way.label,
            "kind": arm.way.kind,
            "views": arm.views,
            "rounds": [asdict(one) for one in turns[arm.name]],
        }
        for arm in arms
        if arm.name in turns
    }
    return {
        "date": str(date.today()),
        "machine": machine(),
        "options": {**options, "device": device},
        "data": {"images": prepared.images, "of": prepared.of, "bytes": prepared.bytes},
        "others_share": others_share,
        "arms": measured,
        "order": orders,
        "left_out": left_out,
        "device": on_device,
    }


def write(record: Record, out: Path) -> list[Path]:
    """loaders-<cpu|gpu>-<date>.md and .json in `out`."""
    kind = "gpu" if record["options"]["device"] == "cuda" else "cpu"
    return keep(record, markdown(record), out / f"loaders-{kind}-{record['date']}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.bench_loaders", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("images", type=Path, metavar="IMAGES", help="a folder of images, or a .tar of one")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="for the tables (docs/results)")
    parser.add_argument("--work", type=Path, default=Path("runs/bench-loaders"), help="for copies (runs/bench-loaders)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each arm (5)")
    parser.add_argument("--images-per-round", type=int, default=1000, help="images to use (1000)")
    parser.add_argument("--seconds", type=float, default=1.0, help="an arm's turn lasts at least so long (1)")
    parser.add_argument("--arms", help="names of arms or ways, with commas between; all if not given")
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="threads or processes of each arm (all cores)"
    )
    parser.add_argument("--batch", type=int, default=64, help="images of a batch (64)")
    return parser.parse_args(argv)


def check(arguments: argparse.Namespace) -> None:
    """Raises DataError before anything long is begun."""
    for name in ("rounds", "images_per_round", "workers", "batch"):
        if getattr(arguments, name) < 1:
            raise DataError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: expected at least 1")
    if not 0 <= arguments.seconds <= 600:
        raise DataError(f"--seconds {arguments.seconds}: expected from 0 to 600")
    make_out(arguments.out)


def answer(measure: Callable[[], tuple[Record, list[Path]]], show: Callable[[Record, Console], None]) -> int:
    """Runs a benchmark, which gives its record and the files it was written to, and shows it. Returns the exit code."""
    try:
        record, paths = measure()
    except (DataError, DiskFull) as error:
        print(f"ressl: error: {error}", file=sys.stderr)
        return 4 if isinstance(error, DiskFull) else 2
    except KeyboardInterrupt:
        print("ressl: stopped; nothing was written", file=sys.stderr)
        return AT_ONCE
    console = Console()
    show(record, console)
    console.print(f"wrote {' and '.join(map(str, paths))}", markup=False, soft_wrap=True)
    return 0


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)

    def measure() -> tuple[Record, list[Path]]:
        check(arguments)
        record = bench(arguments, Console(stderr=True))
        return record, write(record, arguments.out)

    return answer(measure, print_report)


if __name__ == "__main__":
    sys.exit(main())
