"""What a captured step is around its graph: the graph itself needs a GPU (tests/test_gpu.py)."""

from collections.abc import Iterator

import torch

from ressl.batch import Batch
from ressl.graphs import CapturedStep, Logs, tensors

CPU = torch.device("cpu")


def batches(sizes: list[int]) -> Iterator[Batch]:
    """As a loader may hand them out: each is overwritten when the next one is asked for."""
    for number, size in enumerate(sizes):
        view, index = torch.full((2, 3, size, size), float(number)), torch.full((2,), number)
        batch = Batch(weak=(view,), strong=(view + 0.5,), index=index, label=-index)
        yield batch
        for tensor in tensors(batch):
            tensor.fill_(-1)


def first_pixels(seen: Iterator[Batch]) -> Logs:
    return [{"weak": b.weak[0][0, 0, 0, 0], "strong": b.strong[0][0, 0, 0, 0], "index": b.index[0]} for b in seen]


def test_it_holds_the_micro_batches_that_a_loader_overwrites() -> None:
    take_step, stream = CapturedStep(first_pixels, CPU), batches([4] * 6)
    for step in range(2):
        logs = take_step(stream, count=3)
        for micro, log in enumerate(logs):
            number = 3 * step + micro
            assert log == {"weak": number, "strong": number + 0.5, "index": number}


def test_its_memory_stays_where_it_is_until_views_change_their_size() -> None:
    seen: list[list[int]] = []

    def places(held: Iterator[Batch]) -> Logs:
        seen.append([tensor.data_ptr() for batch in held for tensor in tensors(batch)])
        return []

    take_step, stream = CapturedStep(places, CPU), batches([4, 4, 8, 8])
    for _ in range(4):
        take_step(stream, count=1)
    assert seen[0] == seen[1] and seen[2] == seen[3]
    assert take_step.held is not None and take_step.held.steps == 2 and take_step.held.batches[0].weak[0].shape[2] == 8


def test_a_labelled_stream_is_held_too() -> None:
    inner = next(batches([4]))
    outer = Batch(weak=inner.weak, strong=inner.strong, index=inner.index, label=inner.label, labelled=inner)
    held: list[Batch] = []
    CapturedStep(lambda stream: held.extend(stream) or [], CPU)(iter([outer]), count=1)
    assert held[0].labelled is not None and held[0].labelled.weak[0] is not inner.weak[0]
    assert all(torch.equal(a, b) for a, b in zip(tensors(held[0]), tensors(outer), strict=True))
