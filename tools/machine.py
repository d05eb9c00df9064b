"""What a figure depends on: the machine, what is installed there, and what else it was doing."""

import os
import platform
import re
from importlib import metadata
from pathlib import Path

import torch
from PIL import features

PACKAGES = ("torchvision", "triton", "numpy", "pillow", "numba", "ffcv", "nvidia-dali-cuda130", "nvidia-dali-cuda120")


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


def machine_cpu_seconds() -> float:
    """User and system time of all processes since the machine started (man 5 proc, /proc/stat)."""
    user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
