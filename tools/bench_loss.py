"""Times the relational loss, forward and backward, in all its ways on this machine, and writes a table.

    python -m tools.bench_loss [--size B,V,K,D]... [--queue float32] [--rounds 5] [--seconds 0.2] [--out DIRECTORY]

The ways have their turns in interleaved rounds (tools/bench.py); ratios are to the definition, within a round. Memory
is the peak of one forward and backward beside the inputs: of the allocator on a GPU, of the process on a CPU.
"""

import argparse
import ctypes
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from ressl.batch import DataError
from ressl.loss import WIDEST, LossImpl, LossPrecision, relational_loss
from tools.bench import Part, measure
from tools.loader_report import Sheet, print_sheets, spread
from tools.machine import machine
from tools.output import keep, make_out
from tools.profiling.clock import forget_peak, peak_memory, wait

Size = tuple[int, int, int, int]  # B, V, K, D
ON_CPU: tuple[Size, ...] = ((32, 1, 16384, 128), (256, 1, 4096, 128), (64, 5, 8192, 128))
ON_CUDA: tuple[Size, ...] = (
    *((rows // views, views, 131072, 512) for rows, views in ((32, 1), (160, 5), (256, 1), (1024, 1), (4096, 1))),
    (4096, 5, 131072, 512),
    (256, 1, 4096, 128),
)
STUDENT, TEACHER = 0.1, 0.04  # temperatures


@dataclass(frozen=True, slots=True)
class Way:
    impl: LossImpl
    precision: LossPrecision = "float32"

    @property
    def name(self) -> str:
        return f"triton, {self.precision}" if self.impl == "triton" else self.impl


TORCH, CHUNKED = Way("torch"), Way("chunked")
TRITON = (Way("triton", "float32"), Way("triton", "tf32"), Way("triton", "bf16"))


def step_of(size: Size, queue_dtype: str, device: torch.device) -> Callable[[Way], Tensor]:
    """A function that goes forward and backward and returns the student's gradient."""
    count, views, keys, dim = size
    generator = torch.Generator(device).manual_seed(0)
    student, teacher, queue = (
        F.normalize(torch.randn(n, dim, generator=generator, device=device), dim=1)
        for n in (count * views, count, keys)
    )
    queue = queue.to(getattr(torch, queue_dtype))
    student.requires_grad_()

    def step(way: Way) -> Tensor:
        loss = relational_loss(
            *(student, teacher, queue), student_temperature=STUDENT, teacher_temperature=TEACHER, impl=way.impl,
            precision=way.precision,
        )  # fmt: skip
        return torch.autograd.grad(loss, student)[0]

    return step


def seconds_of(
    step: Callable[[Way], Tensor], ways: list[Way], rounds: int, seconds: float, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of a call, one number a round. A turn is as many calls as the definition makes in `seconds`."""
    started = time.perf_counter()
    step(ways[0])
    wait(device)
    calls = max(1, int(seconds / (time.perf_counter() - started)))

    def part(way: Way) -> Part:
        def run(steps: int) -> None:
            for _ in range(steps):
                step(way)

        return Part(way.name, run)

    return measure([part(way) for way in ways], steps=calls, rounds=rounds, wait=lambda: wait(device))


def peak_bytes(step: Callable[[Way], Tensor], way: Way, device: torch.device) -> int:
    """Of one forward and backward, beside the inputs."""
    step(way)  # what is compiled and started once
    wait(device)
    if platform.libc_ver()[0] == "glibc":  # what was freed before, and kept, would be used again unseen
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    forget_peak(device)
    before = peak_memory(device)
    step(way)
    wait(device)
    return peak_memory(device) - before


def bench(sizes: list[Size], queue_dtype: str, rounds: int, seconds: float) -> dict[str, Any]:
    """The record: of every size and way, seconds of each round and the peak of memory; or why it could not run."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = []
    for size in sizes:
        ways = [TORCH, CHUNKED, *(TRITON if device.type == "cuda" and size[3] <= WIDEST else ())]
        step = step_of(size, queue_dtype, device)
        peaks, left_out = {}, {}
        for way in ways:
            try:
                peaks[way.name] = peak_bytes(step, way, device)
            except torch.OutOfMemoryError:
                left_out[way.name] = "out of memory"
        able = [way for way in ways if way.name in peaks]
        times = seconds_of(step, able, rounds, seconds, device)
        found.append({"size": size, "seconds": times, "peak_bytes": peaks, "left_out": left_out})
    options = {"queue": queue_dtype, "rounds": rounds, "seconds": seconds, "device": device.type}
    return {"date": str(date.today()), "machine": machine(), "options": options, "sizes": found}


def sheet(record: dict[str, Any]) -> Sheet:
    rows = []
    for entry in record["sizes"]:
        count, views, keys, dim = entry["size"]
        base, base_peak = entry["seconds"].get(TORCH.name), entry["peak_bytes"].get(TORCH.name)
        for name, times in entry["seconds"].items():
            peak = entry["peak_bytes"][name]
            ratio = spread([mine / theirs for mine, theirs in zip(times, base, strict=True)]) if base else "-"
            rows.append(
                (
                    f"{count} x {views}, {keys:,}, {dim}",
                    name,
                    spread([1000 * one for one in times]),
                    ratio,
                    f"{peak / 2**20:,.1f}",
                    f"{peak / base_peak:.3f}" if base_peak else "-",
                )
            )
    title = f"The relational loss, forward and backward, {record['options']['queue']} queue"
    columns = ("B x V, K, D", "way", "ms", "time over torch's", "peak MiB", "over torch's")
    return Sheet(title, columns, rows)


def markdown(record: dict[str, Any]) -> str:
    table, options = sheet(record), record["options"]
    where = "; ".join(f"{key} {value}" for key, value in record["machine"].items())
    lines = [f"# {table.title}, {options['device']}, {record['date']}", ""]
    lines += [
        f"{options['rounds']} interleaved rounds; median and range, ratios within a round. Memory is the peak beside "
        "the inputs.",
        "",
        f"Machine: {where}.",
        "",
    ]
    lines += ["| " + " | ".join(cells) + " |" for cells in (table.columns, ("---",) * len(table.columns), *table.rows)]
    lines += [f"\nLeft out at {size}: {text}." for size, text in left_out(record).items()]
    return "\n".join(lines) + "\n"


def left_out(record: dict[str, Any]) -> dict[str, str]:
    return {
        f"{', '.join(map(str, entry['size']))}, {name}": reason
        for entry in record["sizes"]
        for name, reason in entry["left_out"].items()
    }


def _size(text: str) -> Size:
    try:
        count, views, keys, dim = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: four whole numbers B,V,K,D, as in 256,1,4096,128") from None
    if min(count, views, keys, dim) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: numbers above 0")
    return count, views, keys, dim


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.bench_loss", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=_size, action="append", metavar="B,V,K,D", help="may be given several times")
    parser.add_argument("--queue", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds (5)")
    parser.add_argument("--seconds", type=float, default=0.2, help="of the definition's turn in a round (0.2)")
    parser.add_argument("--out", type=Path, help="directory for a markdown and a JSON file")
    arguments = parser.parse_args()
    sizes: list[Size] = arguments.size or list(ON_CUDA if torch.cuda.is_available() else ON_CPU)
    try:
        if arguments.out:
            make_out(arguments.out)
    except DataError as error:
        print(f"ressl: error: {error}", file=sys.stderr)
        return 2
    record = bench(sizes, arguments.queue, max(1, arguments.rounds), arguments.seconds)
    print_sheets([sheet(record)], left_out(record), Console())
    if arguments.out:
        keep(record, markdown(record), arguments.out / f"loss-{record['options']['device']}-{record['date']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
