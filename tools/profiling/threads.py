"""How a source's rate grows with its decoding threads."""

from collections.abc import Iterator
from itertools import islice
from time import perf_counter

import numpy as np

from pipelines import build_source
from pipelines.frames import Source
from tools.profiling.clock import wait
from tools.profiling.opened import OpenRun, places
from tools.profiling.record import Point
from tools.profiling.stored import reads_files

BATCH = 128  # images at most, so that one thread alone is not timed for minutes
POINT_S = 0.5  # of one value
ROUNDS = 3


def measure_threads(run: OpenRun, decode_s: float, *, seconds: float) -> tuple[Point, ...]:
    """Images/s of this rank with 1, 2, 4, ... threads, up to its cores, and with as many as it has; nothing for a
    source without threads.

    `decode_s` is what a step's images take with the config's own. Where `seconds` do not allow it, with fewer counts.
    """
    source, cfg = run.stream.source, run.cfg.data
    if not reads_files(source):
        return ()
    alone = decode_s / run.images * max(1, source.workers)  # of an image, on one thread
    opened: dict[int, Source] = {}
    until, began = perf_counter() + seconds / 2, perf_counter()
    for count in counts(run.cores, source.workers):
        if opened and perf_counter() + (perf_counter() - began) / len(opened) > until:
            break
        chosen = cfg.source.model_copy(update={"workers": count})
        built = build_source(cfg.model_copy(update={"source": chosen}), "train", run.device)
        assert built is not None
        opened[count] = built
    rounds: dict[int, list[float]] = {count: [] for count in opened}
    until = perf_counter() + seconds / 2
    for number in range(ROUNDS):
        for count, one in opened.items():
            if number == 0 or perf_counter() < until:
                rounds[count].append(_rate(run, one, alone / count))
    return tuple(Point(count=count, images_per_s=tuple(rounds[count])) for count in sorted(rounds))


def counts(cores: int, present: int) -> list[int]:
    """In the order of what they tell: all cores, the run's own number, one thread, then those between."""
    between = [1 << power for power in range(cores.bit_length()) if 1 << power < cores]
    return list(dict.fromkeys([cores, max(1, present), *between]))


def _rate(run: OpenRun, source: Source, image_s: float) -> float:
    """Images/s of a stream that is under way; `image_s` is about what an image takes."""
    batches = max(2, min(200, int(POINT_S / max(image_s, 1e-9) / BATCH)))
    stream = source.stream(_small_batches(run, batches + 3), salt=0)
    for _ in islice(stream, 1):
        pass
    wait(run.device)
    start, images = perf_counter(), 0
    for frames in islice(stream, batches):
        images += len(frames.index)
    wait(run.device)
    return images / (perf_counter() - start)


def _small_batches(run: OpenRun, count: int) -> Iterator[np.ndarray]:
    """`count` arrays of positions, all of one length."""
    size = min(BATCH, run.images)
    steps = -(-count * size // run.images)
    positions = np.concatenate(list(places(run, steps)))
    return iter(positions[: count * size].reshape(count, size))
