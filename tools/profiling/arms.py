"""What a profile times, round by round: the parts of a step alone, and whole steps in several ways.

An arm takes so many steps and gives seconds a step, by name. It waits for the device once, at its end.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice, repeat
from time import perf_counter

from pipelines.frames import Frames
from ressl.batch import Batch
from tools.profiling.clock import Mark, between, mark, stored_reads, wait
from tools.profiling.opened import OpenRun, feed, gradient_buffer, places, step_in_pieces
from tools.profiling.stored import reads_files, stored_bytes

AHEAD = 3  # steps that a feed is longer than what is counted, besides those that are prepared ahead
LEAST_S = 1e-7  # of reading an image, where its call took all the time
WAITING = ("wait", "ranks")  # pieces of a step in which nothing is done


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
        *([Arm("launch", partial(_launch, run))] if run.device.type == "cuda" else []),
        Arm("loader", partial(_loader, run, fill)),
        Arm("real", partial(real_steps, run, fill)),
    ]


def _read(run: OpenRun, steps: int) -> dict[str, float]:
    """Less what as many calls take that read nothing: they are ours, and the sources' own readers do without."""
    assert reads_files(run.stream.source)
    with stored_bytes(run.stream.source) as (read, call):
        order = list(places(run, steps))
        stored, start = stored_reads(), perf_counter()
        count = sum(map(read, order))
        took, stored = perf_counter() - start, stored_reads() - stored
        start = perf_counter()
        sum(map(call, order))
        took = max(took - (perf_counter() - start), LEAST_S * sum(map(len, order)))
        return {"read": took / steps, "read bytes": count / steps, "stored bytes": stored / steps}


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
    gradients = gradient_buffer(run)
    marks: list[tuple[str, Mark]] = [("", mark(run.device))]
    for _ in range(steps):
        step_in_pieces(run, repeat(run.held), lambda name: marks.append((name, mark(run.device))), gradients=gradients)
    wait(run.device)
    found: dict[str, float] = {}
    for (_, start), (name, end) in zip(marks, marks[1:], strict=False):
        if name not in WAITING:
            found[name] = found.get(name, 0.0) + between(start, end) / steps
    return found


def synthetic_steps(run: OpenRun, steps: int) -> dict[str, float]:
    """Whole steps on frames that are there."""
    batches = (run.cut(frames) for frames in repeat(run.held))
    start = mark(run.device)
    for _ in range(steps):
        run.take(batches)
    end = mark(run.device)
    wait(run.device)
    return {"synthetic": between(start, end) / steps}


def _launch(run: OpenRun, steps: int) -> dict[str, float]:
    """The host's part of such a step. The device has nothing to do before it: a queue that is full would hold the host
    back, and the device's time would be counted for the host's."""
    took = 0.0
    batches = (run.cut(frames) for frames in repeat(run.held))
    for _ in range(min(steps, 3)):
        wait(run.device)
        start = perf_counter()
        run.take(batches)
        took += perf_counter() - start
    wait(run.device)
    return {"launch": took / min(steps, 3)}


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
