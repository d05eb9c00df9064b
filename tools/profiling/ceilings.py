"""What the machine reaches at all: the rates against which the stages of a step are held.

No rate of another program's is known here, so each ceiling is the best that was seen of works which do little else.
All of them are tried once, and the best one again in every round: a machine that others use is not always as fast.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import perf_counter

import torch
from torch.nn import functional as F

from tools.profiling.clock import between, mark, wait
from tools.profiling.record import Ceilings

SIDES = {"cpu": (512, 1024, 2048, 4096), "cuda": (2048, 4096, 8192, 16384)}  # of square matrices
SHAPES = {  # of images (B, C, side) that a 3x3 convolution makes as many channels of
    "cpu": ((16, 64, 32), (64, 64, 32), (64, 128, 16), (64, 256, 8), (32, 256, 16)),
    "cuda": ((256, 64, 56), (256, 128, 28), (256, 256, 14), (256, 512, 14)),
}
COPIED = {"cpu": 1 << 27, "cuda": 1 << 30}  # bytes, far beyond any cache
CALLS = 20  # of one work, at most, each time it is looked at


@dataclass(frozen=True, slots=True)
class Work:
    amount: float  # flops or bytes of a call
    make: Callable[[], Callable[[], object]]  # takes the memory for it, and gives what is called


@dataclass(frozen=True, slots=True)
class Best:
    """The fastest of several works, and the best rate that was seen of it: amounts a second."""

    work: Work
    rate: float


@dataclass(frozen=True, slots=True)
class Reached:
    products: Best
    copies: Best
    uploads: Best | None  # None where there is no GPU

    def ceilings(self) -> Ceilings:
        return Ceilings(
            matmul_flops=self.products.rate,
            copy_bytes=self.copies.rate,
            host_to_device_bytes=self.uploads.rate if self.uploads else None,
        )


def look(device: torch.device, precision: str, *, seconds: float) -> Reached:
    """Tries all works, each in turn, for about so many `seconds`; what would take too long is left out."""
    with _coarse_products(device.type == "cuda" and precision == "tf32"):
        return Reached(
            products=best_of(products(device, precision), device, 0.7 * seconds),
            copies=best_of(copies(device), device, 0.3 * seconds),
            uploads=best_of([_upload(device)], device, 0.3 * seconds) if device.type == "cuda" else None,
        )


def look_again(reached: Reached, device: torch.device, precision: str, *, seconds: float) -> Reached:
    """The best works once more: rates can only rise. What the run has left no memory for stays as it was."""

    def again(best: Best) -> Best:
        try:
            return replace(best, rate=max(best.rate, _rate(best.work, device, perf_counter() + seconds / 3)))
        except torch.OutOfMemoryError:
            return best

    with _coarse_products(device.type == "cuda" and precision == "tf32"):
        uploads = again(reached.uploads) if reached.uploads else None
        return Reached(again(reached.products), again(reached.copies), uploads)


def products(device: torch.device, precision: str) -> list[Work]:
    """What networks multiply with, in the step's precision: matrices, and 3x3 convolutions of images whose channels lie
    together. Their flops are counted as those of the stages are (floors.py). The smallest of each, then by size."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)

    def matrices(side: int) -> Callable[[], object]:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        return lambda: a @ b

    def convolution(images: int, channels: int, side: int) -> Callable[[], object]:
        shapes = (images, channels, side, side), (channels, channels, 3, 3)
        x, weight = (
            torch.randn(*s, device=device).to(dtype).contiguous(memory_format=torch.channels_last) for s in shapes
        )
        return lambda: F.conv2d(x, weight, padding=1)

    squares = [Work(2.0 * n**3, lambda n=n: matrices(n)) for n in SIDES[device.type]]  # type: ignore[misc]
    images = [
        Work(18.0 * b * (c * n) ** 2, lambda b=b, c=c, n=n: convolution(b, c, n))  # type: ignore[misc]
        for b, c, n in SHAPES[device.type]
    ]
    return [squares[0], images[0], *sorted(squares[1:] + images[1:], key=lambda work: work.amount)]


def copies(device: torch.device) -> list[Work]:
    """Copying and adding in place, with the bytes read and those written: processors read what a copy overwrites, too,
    and no one counts it."""
    values = COPIED[device.type] // 4

    def two() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ones(values, device=device), torch.zeros(values, device=device)

    def copy() -> Callable[[], object]:
        target, source = two()
        return lambda: target.copy_(source)

    def add() -> Callable[[], object]:
        target, source = two()
        return lambda: target.add_(source)

    return [Work(8.0 * values, copy), Work(12.0 * values, add)]


def _upload(device: torch.device) -> Work:
    def make() -> Callable[[], object]:
        host = torch.zeros(COPIED["cpu"], dtype=torch.uint8, pin_memory=True)
        target = torch.empty_like(host, device=device)
        return lambda: target.copy_(host, non_blocking=True)

    return Work(float(COPIED["cpu"]), make)


def best_of(works: Sequence[Work], device: torch.device, seconds: float) -> Best:
    """Of the first two works, and of those after them that the time is expected to allow."""
    until, found = perf_counter() + seconds, list[Best]()
    for number, work in enumerate(works):
        left = until - perf_counter()
        if number > 1 and 3 * work.amount / max(best.rate for best in found) > left:
            continue
        found.append(Best(work, _rate(work, device, perf_counter() + left / (len(works) - number))))
    return max(found, key=lambda best: best.rate)


@contextmanager
def _coarse_products(wanted: bool) -> Iterator[None]:
    """A run of precision tf32 has it in its convolutions alone."""
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    if wanted:
        settings.fp32_precision = "tf32"
    try:
        yield
    finally:
        settings.fp32_precision = before


def _rate(work: Work, device: torch.device, until: float) -> float:
    """Of the fastest call, of two at least, after one that is not counted."""
    call, times = work.make(), list[float]()
    with torch.no_grad():
        call()
        while len(times) < 2 or (perf_counter() < until and len(times) < CALLS):
            start = mark(device)
            call()
            end = mark(device)
            wait(device)
            times.append(between(start, end))
    return work.amount / min(times)
