"""What a profile times, round by round: the parts of a step alone, and whole steps in several ways.

An arm takes so many steps and gives seconds a step, by name. It waits for the device once, at its end.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice, repeat
from time import perf_counter

import torch

from pipelines.frames import Frames
from ressl.batch import Batch
from tools.profiling.clock import Mark, between, mark, wait
from tools.profiling.opened import OpenRun, feed, places, step_in_pieces
from tools.profiling.stored import reads_files, stored_bytes

AHEAD = 3  # steps that a feed is longer than what is counted, besides those that are prepared ahead


@dataclass(frozen=True, slots=True)
class Arm:
    name: str
    run: Callable[[int], dict[str, float]]


def make_arms(run: OpenRun, *, fill: int) -> list[Arm]:
    """`fill` steps of each feed go by before the counting begins, so that what is prepared ahead is."""
    reading = [Arm("read", partial(_read, run))] if reads_files(run.stream.source) else []
    copying = []
    if run.device.type == "cuda":
        host = next(iter(run.stream.source.stream(places(run, 1), salt=0)))
        if not host.pixels.is_cuda:
            copying = [Arm("copy", partial(_copy, run, host.pin_memory()))]
    return [
        *reading,
        Arm("decode", partial(_decode, run)),
        *copying,
        Arm("pieces", partial(pieces, run)),
        Arm("synthetic", partial(synthetic_steps, run)),
        Arm("loader", partial(_loader, run, fill)),
        Arm("real", partial(real_steps, run, fill)),
    ]


def _read(run: OpenRun, steps: int) -> dict[str, float]:
    assert reads_files(run.stream.source)
    with stored_bytes(run.stream.source) as read:
        order = list(places(run, steps))
        start = perf_counter()
        count = sum(map(read, order))
        return {"read": (perf_counter() - start) / steps, "read bytes": count / steps}


def _decode(run: OpenRun, steps: int) -> dict[str, float]:
    """The source's own stream: reading, decoding, gathering; no copy of ours, and no thread but the source's."""
    micro = run.cfg.optim.accumulate
    stream = run.stream.source.stream(places(run, 1 + steps + AHEAD), salt=0)
    for _ in islice(stream, micro):
        pass
    wait(run.device)
    start = perf_counter()
    for _ in islice(stream, steps * micro):
        pass
    wait(run.device)
    return {"decode": (perf_counter() - start) / steps}


def _copy(run: OpenRun, host: Frames, steps: int) -> dict[str, float]:
    start = mark(run.device)
    for _ in range(steps * run.cfg.optim.accumulate):
        host.to(run.device, non_blocking=True)
    end = mark(run.device)
    wait(run.device)
    return {"copy": between(start, end) / steps}


def _loader(run: OpenRun, fill: int, steps: int) -> dict[str, float]:
    """All that comes before the step: the source, the thread that prepares ahead, the copies."""
    micro, ahead = run.cfg.optim.accumulate, AHEAD + run.cfg.data.prefetch
    with closing(feed(run, fill + steps + ahead)) as frames:
        for _ in islice(frames, fill * micro):
            pass
        start = perf_counter()
        for _ in islice(frames, steps * micro):
            pass
        wait(run.device)
        return {"loader": (perf_counter() - start) / steps}


def pieces(run: OpenRun, steps: int) -> dict[str, float]:
    """Each piece of the step, on frames that are there."""
    gradients = None
    if run.runtime.world_size > 1:
        dtype = torch.bfloat16 if run.cfg.run.gradient_compression == "bf16" else torch.float32
        gradients = torch.zeros(sum(p.numel() for p in run.method.student.parameters()), dtype=dtype, device=run.device)
    marks: list[tuple[str, Mark]] = [("", mark(run.device))]
    for _ in range(steps):
        step_in_pieces(run, repeat(run.held), lambda name: marks.append((name, mark(run.device))), gradients=gradients)
    wait(run.device)
    found: dict[str, float] = {}
    for (_, start), (name, end) in zip(marks, marks[1:], strict=False):
        if name != "wait":
            found[name] = found.get(name, 0.0) + between(start, end) / steps
    return found


def synthetic_steps(run: OpenRun, steps: int) -> dict[str, float]:
    """Whole steps on frames that are there."""
    batches = (run.cut(frames) for frames in repeat(run.held))
    start, started = mark(run.device), perf_counter()
    for _ in range(steps):
        run.take(batches)
    launched, end = perf_counter() - started, mark(run.device)
    wait(run.device)
    found = {"synthetic": between(start, end) / steps}
    return found | {"launch": launched / steps} if run.device.type == "cuda" else found


def real_steps(run: OpenRun, fill: int, steps: int) -> dict[str, float]:
    """Whole steps as `pretrain` takes them. On a GPU the wait is what passes, for the device, between its last work of
    one step and the arrival of the next frames."""
    waits: list[tuple[Mark, Mark]] = []

    def batches(frames: Iterator[Frames]) -> Iterator[Batch]:
        while True:
            before = mark(run.device)
            held = next(frames)  # a feed is longer than what is taken of it
            waits.append((before, mark(run.device)))
            yield run.cut(held)

    with closing(feed(run, fill + steps + AHEAD + run.cfg.data.prefetch)) as frames:
        source = batches(frames)
        for _ in range(fill):
            run.take(source)
        waits.clear()
        start = mark(run.device)
        for _ in range(steps):
            run.take(source)
        end = mark(run.device)
        wait(run.device)
    return {"real": between(start, end) / steps, "wait": sum(between(*pair) for pair in waits) / steps}
