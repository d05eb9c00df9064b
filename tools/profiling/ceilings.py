"""What the machine reaches at all: the rates against which the stages of a step are held."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter

import torch

from tools.profiling.clock import between, mark, wait
from tools.profiling.record import Ceilings

LONG_ENOUGH_S = 0.02  # of one call, so that starting it does not count
LARGEST_SIDE = {"cpu": 4096, "cuda": 16384}  # of the matrices
COPIED = {"cpu": 1 << 27, "cuda": 1 << 30}  # bytes, far beyond any cache


def measure_ceilings(device: torch.device, precision: str, *, seconds: float) -> Ceilings:
    """Each rate is the best of those seen within a third of `seconds`, as a ceiling is."""
    share = seconds / (3 if device.type == "cuda" else 2)
    return Ceilings(
        matmul_flops=_matmul_rate(device, precision, share),
        copy_bytes=_copy_rate(device, share),
        host_to_device_bytes=_upload_rate(device, share) if device.type == "cuda" else None,
    )


def _matmul_rate(device: torch.device, precision: str, seconds: float) -> float:
    """Multiplications and additions a second, of square matrices of growing size."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    best, side, until = 0.0, 512, perf_counter() + seconds
    with _coarse_products(device.type == "cuda" and precision == "tf32"):
        while side <= LARGEST_SIDE[device.type]:
            a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
            took = _fastest(lambda a=a, b=b: a @ b, device, until)  # type: ignore[misc]
            best = max(best, 2 * side**3 / took)
            if took > LONG_ENOUGH_S or perf_counter() > until:
                break
            side *= 2
    return best


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


def _copy_rate(device: torch.device, seconds: float) -> float:
    """Bytes a second, those read and those written, of copying or of adding in place, whichever is faster: processors
    read what a copy overwrites, too, and no one counts it."""
    source = torch.zeros(COPIED[device.type] // 4, device=device)
    target, until = torch.ones_like(source), perf_counter() + seconds
    copied = 2 * source.nbytes / _fastest(lambda: target.copy_(source), device, until - seconds / 2)
    return max(copied, 3 * source.nbytes / _fastest(lambda: target.add_(source), device, until))


def _upload_rate(device: torch.device, seconds: float) -> float:
    host = torch.zeros(COPIED["cpu"], dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(host, device=device)
    return len(host) / _fastest(lambda: target.copy_(host, non_blocking=True), device, perf_counter() + seconds)


def _fastest(work: Callable[[], object], device: torch.device, until: float) -> float:
    """Seconds of the fastest call, of three at least, after one that is not counted."""
    work()
    times: list[float] = []
    while len(times) < 3 or (perf_counter() < until and len(times) < 20):
        start = mark(device)
        work()
        end = mark(device)
        wait(device)
        times.append(between(start, end))
    return min(times)
