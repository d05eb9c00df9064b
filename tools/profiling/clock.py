"""Time and memory of the device that a profile is measured on, and what else its machine does."""

import re
from collections.abc import Iterable
from pathlib import Path
from time import perf_counter

import torch

Mark = float | torch.cuda.Event


def mark(device: torch.device) -> Mark:
    """Now; on a GPU, the moment at which all that this stream was given before is done."""
    if device.type != "cuda":
        return perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def between(start: Mark, end: Mark) -> float:
    """Seconds. On a GPU both must have passed: `wait` first."""
    if isinstance(start, float) or isinstance(end, float):
        assert isinstance(start, float) and isinstance(end, float)
        return end - start
    return start.elapsed_time(end) / 1000


def wait(device: torch.device) -> None:
    """Until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def forget_peak(device: torch.device) -> None:
    """What `peak_memory` tells is of the time after this, where the system allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the largest resident size so far becomes the present one
    except OSError:  # then the peak is that of the whole process
        return


def peak_memory(device: torch.device) -> int:
    """Bytes: most that tensors took on a GPU, most that the process had in memory elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found.group(1)) if found else 0


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of what (start, end) spans cover together: what several cover is counted once."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def stored_reads() -> int:
    """Bytes that this process has had fetched from storage so far; what came from the system's page cache is none of
    them (man 5 proc, /proc/PID/io). 0 where the system does not tell."""
    try:
        found = re.search(r"^read_bytes: (\d+)", Path("/proc/self/io").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found.group(1)) if found else 0
