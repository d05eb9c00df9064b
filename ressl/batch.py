"""What the trainer eats: the one contract between pipelines/ and ressl/.

Shapes, throughout the project: B images per rank and micro-batch, G images of a step over all ranks and micro-batches,
H x W pixels of an image, h x w pixels of a view, D embedding width, K queue length, F backbone feature width,
N images in a data set.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

Split = Literal["train", "val"]
Crops = Literal["centre", "random"]


class DataError(ValueError):
    """Data that cannot be used. The message names the file, what is wrong with it and what to do."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch of one rank, on the training device. Row i of every field comes from the same image.

    The loader may reuse the memory: a batch is valid until the next one is asked for.
    """

    weak: tuple[Tensor, ...]  # each (B, 3, h, w), normalised, channels_last: the teacher's views (ReSSL: one)
    strong: tuple[Tensor, ...]  # each (B, 3, h, w), likewise: the student's views (ReSSL: one, or five of falling size)
    index: Tensor  # (B,) int64, the image's entry in its data set, never its place in a file
    label: Tensor  # (B,) int64, -1 where unknown; no self-supervised loss reads it
    labelled: "Batch | None" = None  # a second stream of its own size, for semi-supervised methods; None in ReSSL


class ViewLoader(Protocol):
    """The training stream of one rank."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps; each takes `optim.accumulate` batches."""
        ...

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of `epoch` from its step `start_step` on. The same arguments give the same batches, always."""
        ...


Probe = Iterable[tuple[Tensor, Tensor, Tensor]]  # (B, 3, h, w) float32 normalised, (B,) int64 label, (B,) int64 index


class Probes(Protocol):
    """Labelled streams for the evaluations."""

    @property
    def num_classes(self) -> int: ...

    def count(self, split: Split) -> int:
        """Images of the split over all ranks."""
        ...

    def probe(self, split: Split, crops: Crops = "centre", epoch: int = 0) -> Probe:
        """Every image of the split exactly once over all ranks, in the order of the data set; the last, partial batch
        is kept. `centre` crops are for features, `random` crops and flips (new for each epoch) to train a linear probe.
        """
        ...


@dataclass(frozen=True, slots=True)
class Loaders:
    train: ViewLoader
    probes: Probes
