"""CUDA graphs: the launches of a whole step, recorded once and replayed, for batches so small that launching binds."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ressl.batch import Batch

Logs = list[dict[str, Tensor]]
WARM_UP = 11
"""Steps that are taken as they are before a capture: DistributedDataParallel settles its buckets in the first ten."""


@dataclass(slots=True)
class _Held:
    """What a graph reads and writes: memory that stays where it is."""

    shapes: tuple[object, ...]
    batches: list[Batch]
    steps: int = 0  # taken with these shapes
    graph: torch.cuda.CUDAGraph | None = None
    logs: Logs | None = None


class CapturedStep:
    """Runs `step(batches)` on batches that are copied into memory of its own, and after a warm-up as a CUDA graph.

    `step` must read whatever changes from one step to the next (learning rate, momentum) from tensors on the device,
    and never wait for the device. Batches of other shapes start anew, with a warm-up and a capture of their own. On a
    CPU there is nothing to capture, and each call runs `step`.
    """

    def __init__(self, step: Callable[[Iterator[Batch]], Logs], device: torch.device) -> None:
        self.step, self.device = step, device
        # Capture refuses the default stream. A stream of high priority comes from a pool of its own: what compresses
        # gradients runs on streams of the common pool, and would draw whoever has the same one into the capture.
        self.side = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self.held: _Held | None = None

    def __call__(self, batches: Iterator[Batch], *, count: int) -> Logs:
        """Takes the next `count` batches. The logs are valid until the next call."""
        held = self._take(batches, count)
        held.steps += 1
        if self.side is None:
            return self.step(iter(held.batches))
        if held.steps <= WARM_UP:
            return self._on_the_side(self.side, held)
        if held.graph is None:
            held.graph = torch.cuda.CUDAGraph()
            # other threads go on working: they decode, and copy frames to the device
            with torch.cuda.graph(held.graph, stream=self.side, capture_error_mode="thread_local"):
                held.logs = self.step(iter(held.batches))
        held.graph.replay()
        assert held.logs is not None
        return held.logs

    def release(self) -> None:
        """Gives up the graph and all that it holds. A group of processes cannot end while a graph holds its
        collectives; a later call captures anew."""
        if self.held is not None and self.held.graph is not None:
            torch.cuda.synchronize(self.device)
            self.held.graph.reset()
        self.held = None

    def _take(self, batches: Iterator[Batch], count: int) -> _Held:
        """Copies one batch after another, as each is valid only until the next is asked for."""
        for place in range(count):
            batch = next(batches)
            if place == 0:
                shapes = tuple((t.shape, t.dtype) for t in tensors(batch))
                if self.held is None or self.held.shapes != shapes:
                    self.held = None  # an old graph gives its memory back before a new one takes some
                    self.held = _Held(shapes, [empty_like(batch) for _ in range(count)])
            assert self.held is not None
            for mine, theirs in zip(tensors(self.held.batches[place]), tensors(batch), strict=True):
                mine.copy_(theirs)
        assert self.held is not None
        return self.held

    def _on_the_side(self, side: torch.cuda.Stream, held: _Held) -> Logs:
        """A step as it is, on the stream that will be captured: what is allocated lazily is allocated there."""
        main = torch.cuda.current_stream(self.device)
        side.wait_stream(main)
        with torch.cuda.stream(side):
            logs = self.step(iter(held.batches))
        main.wait_stream(side)
        return logs


def tensors(batch: Batch) -> Sequence[Tensor]:
    """All tensors of a batch, in a fixed order."""
    labelled = tensors(batch.labelled) if batch.labelled else ()
    return (*batch.weak, *batch.strong, batch.index, batch.label, *labelled)


def empty_like(batch: Batch) -> Batch:
    """A batch of the same shapes, with memory of its own."""
    return Batch(
        weak=tuple(map(torch.empty_like, batch.weak)),
        strong=tuple(map(torch.empty_like, batch.strong)),
        index=torch.empty_like(batch.index),
        label=torch.empty_like(batch.label),
        labelled=empty_like(batch.labelled) if batch.labelled else None,
    )
