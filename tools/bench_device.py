"""What the device itself needs: to decode, to copy, to cut views, beside one step of a ResNet-50."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, Literal

import numpy as np
import torch

from pipelines import build_source
from pipelines.prefetch import prefetch
from ressl.config import DaliSource, DataConfig, SyntheticSource
from tools.loader_arms import open_stream, recipe, view_dtype, wait

BATCH = 256
FRAME = (400, 500)  # height, width
LOADS = (0.0, 0.65, 1.0)
COPIED = 1 << 28  # bytes
WARM_UP = 3


def measure_device(files: Path, device: torch.device, *, workers: int, repeats: int = 20) -> dict[str, Any]:
    """Everything that this file measures, on a GPU; `files` is a folder of JPEG files."""
    step = time_step(device, batch=BATCH, size=224, repeats=repeats)
    views = time_views(device, ("torch", "triton"), batch=BATCH, frame=FRAME, repeats=repeats)
    return {
        "batch": BATCH,
        "frame": list(FRAME),
        "step_ms": step,
        "views": views,
        "decode": decode_rates(files, device, batch=BATCH, workers=workers, batches=5 * repeats),
        "copy_gb_s": copy_rate(device, repeats=repeats),
    }


def time_step(device: torch.device, *, batch: int, size: int, repeats: int) -> float:
    """Milliseconds of torchvision's ResNet-50 forward and backward, in bfloat16 by autocast, channels_last."""
    from torchvision.models import resnet50  # takes seconds, and arms that import this file do without

    network = resnet50().to(device, memory_format=torch.channels_last)
    images = torch.randn(batch, 3, size, size, device=device).to(memory_format=torch.channels_last)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = network(images).float().square().mean()
        loss.backward()
        network.zero_grad(set_to_none=True)

    return median(milliseconds(step, device, repeats=repeats))


def time_views(
    device: torch.device,
    impls: Sequence[Literal["torch", "triton"]],
    *,
    batch: int,
    frame: tuple[int, int],
    repeats: int,
    counts: Sequence[int] = (2, 6),
) -> list[dict[str, Any]]:
    """Milliseconds to cut all views of a batch by each implementation, from frames (height, width) on the device."""
    source = SyntheticSource(name="synthetic", images=2 * batch, height=frame[0], width=frame[1], classes=10)
    found = []
    for views in counts:
        for impl in impls:
            stream = open_stream(recipe(source, views=views, batch=batch, impl=impl), device)
            held = next(stream.frames(0))
            times = milliseconds(partial(stream.cut, held, 0), device, repeats=repeats)
            found.append({"impl": impl, "views": views, "dtype": str(view_dtype(device)), "ms": median(times)})
    return found


def decode_rates(
    folder: Path, device: torch.device, *, batch: int, workers: int, batches: int, loads: Sequence[float] = LOADS
) -> list[dict[str, float]]:
    """Images/s that our DALI source gives, whole images, for each share of them that goes to the GPU's JPEG engines."""
    found = []
    for load in loads:
        chosen = DaliSource(name="dali", train=folder, workers=workers, max_side=None, hw_decoder_load=load)
        source = build_source(DataConfig(source=chosen), "train", device)
        assert source is not None
        places = [np.arange(first, first + batch) % len(source.labels) for first in range(0, batches * batch, batch)]
        for _ in prefetch(source.stream(places[:WARM_UP], salt=0), device, depth=2):
            pass
        wait(device)
        started = perf_counter()
        for _ in prefetch(source.stream(places, salt=0), device, depth=2):
            pass
        wait(device)
        found.append({"hw_decoder_load": load, "images_s": batches * batch / (perf_counter() - started)})
    return found


def copy_rate(device: torch.device, *, repeats: int) -> float:
    """10**9 bytes/s from page-locked memory of the host to the GPU."""
    host = torch.empty(COPIED, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(COPIED, dtype=torch.uint8, device=device)
    times = milliseconds(lambda: there.copy_(host, non_blocking=True), device, repeats=repeats)
    return COPIED / 1e6 / median(times)


def milliseconds(work: Callable[[], object], device: torch.device, *, repeats: int) -> list[float]:
    """Of each of `repeats` calls, after a few that are not counted: by events of the GPU, or by the clock on a CPU."""
    for _ in range(WARM_UP):
        work()
    if device.type != "cuda":
        stamps = [perf_counter()]
        for _ in range(repeats):
            work()
            stamps.append(perf_counter())
        return [1000 * (end - start) for start, end in zip(stamps, stamps[1:], strict=False)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    torch.cuda.synchronize(device)
    events[0].record(torch.cuda.current_stream(device))
    for event in events[1:]:
        work()
        event.record(torch.cuda.current_stream(device))
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) for start, end in zip(events, events[1:], strict=False)]
