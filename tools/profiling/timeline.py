"""One step of the real run as it passes, and the trace of a few of them."""

import os
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from pipelines.frames import Frames, Source
from tools.profiling.arms import AHEAD, real_steps, synthetic_steps
from tools.profiling.clock import Mark, between, covered, mark, wait
from tools.profiling.opened import OpenRun, feed, gradient_buffer, step_in_pieces
from tools.profiling.record import Span

TRACED = 3  # steps
SHORTEST = 1e-3  # share of the step below which a span is not shown


class Watched:
    """A source, and the moments (of the host's clock) between which each of its batches was prepared."""

    def __init__(self, source: Source) -> None:
        self.source, self.prepared = source, list[tuple[float, float]]()
        self.labels, self.index, self.classes = source.labels, source.index, source.classes

    def stream(self, batches: Iterable[np.ndarray], *, salt: int) -> Iterator[Frames]:
        asked = perf_counter()
        for frames in self.source.stream(batches, salt=salt):
            self.prepared.append((asked, perf_counter()))
            yield frames
            asked = perf_counter()


def typical_step(run: OpenRun, *, steps: int, fill: int) -> tuple[Span, ...]:
    """The one of `steps` real steps whose length is the median, in pieces, and what its loader did meanwhile. Gradients
    travel after the backward pass here, where the run sends them beside it."""
    device, watched, gradients = run.device, Watched(run.stream.source), gradient_buffer(run)
    run = replace(run, stream=replace(run.stream, source=watched))
    taken: list[list[tuple[str, Mark]]] = []
    with closing(feed(run, fill + steps + AHEAD + run.cfg.data.prefetch)) as frames:
        wait(device)
        zero, clock = mark(device), perf_counter()
        for _ in range(fill + steps):
            marks = [("", mark(device))]
            end_of = partial(_mark, marks, device)
            step_in_pieces(run, frames, end_of, gradients=gradients)
            taken.append(marks)
        wait(device)
        prepared = [(start - clock, end - clock) for start, end in watched.prepared]
    times = [[(name, between(zero, at)) for name, at in marks] for marks in taken[fill:]]
    chosen = sorted(times, key=lambda marks: marks[-1][1] - marks[0][1])[len(times) // 2]
    return _spans(chosen, prepared)


def _mark(marks: list[tuple[str, Mark]], device: torch.device, name: str) -> None:
    marks.append((name, mark(device)))


def _spans(marks: list[tuple[str, float]], prepared: list[tuple[float, float]]) -> tuple[Span, ...]:
    """Of a step whose pieces ended at `marks`; the first is the step's begin. All in seconds of one clock."""
    begin, end = marks[0][1], marks[-1][1]
    shortest = SHORTEST * (end - begin)
    device = [
        Span(lane="device", name=name, start=start - begin, end=until - begin)
        for (_, start), (name, until) in zip(marks, marks[1:], strict=False)
    ]
    loader = [
        Span(lane="loader", name="frames", start=max(start, begin) - begin, end=min(until, end) - begin)
        for start, until in prepared
        if until > begin and start < end
    ]
    return tuple(span for span in (*loader, *device) if span.end - span.start > shortest)


def _quietly(activities: list[ProfilerActivity]) -> profile:
    """torch's profiler, which would print a log of its own."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    return profile(activities=activities)


def busy_seconds(run: OpenRun, *, steps: int = 2) -> float:
    """Of a synthetic step on a GPU, the time in which any of its kernels and copies ran, as torch's profiler saw it:
    what several streams do at once is counted once."""
    with _quietly([ProfilerActivity.CUDA]) as profiler:
        synthetic_steps(run, steps)
    found = [event for event in profiler.events() or () if event.device_type == DeviceType.CUDA]
    work = [event.time_range for event in found if not event.is_user_annotation]
    return covered((one.start, one.end) for one in work) / 1e6 / steps


def write_trace(run: OpenRun, path: Path) -> None:
    """A trace of a few real steps at `path`, for chrome://tracing or Perfetto."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if run.device.type == "cuda" else [])]
    with _quietly(activities) as profiler:
        real_steps(run, 0, TRACED)
    part = path.with_name(f"part-{path.name}")  # the profiler looks at how a name ends
    profiler.export_chrome_trace(str(part))
    part.replace(path)
