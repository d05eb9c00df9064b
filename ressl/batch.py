"""What the trainer eats: the one contract between pipelines/ and ressl/.

Shapes, throughout the project: B images per rank and micro-batch, G images of a step over all ranks and micro-batches,
H x W pixels of an image, h x w pixels of a view, D embedding width, K queue length, F backbone feature width,
N images in a data set.
"""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

Split = Literal["train", "val"]
REPLACED = "; replaced by "  # in a report of a bad image: between its name and reason, and the name of the other one
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


@dataclass(frozen=True, slots=True)
class Digest:
    """What ranks compare before an epoch, of its steps that are still to come. Each number is from 0 to 2**63 - 1."""

    common: int  # a hash of all that must be the same on every rank: data, seed, sizes of batches, order of the images
    own: int  # the sum, modulo 2**63, of a hash of each image that this rank will see
    whole: int  # that sum over the images of all ranks, as this rank works it out: what all `own` together must give


class ViewLoader(Protocol):
    """The training stream of one rank."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps; each takes `optim.accumulate` batches."""
        ...

    @property
    def fingerprint(self) -> int:
        """A hash of the data set, from 0 to 2**63 - 1: of its entries, labels and class names, not of the pixels."""
        ...

    def digest(self, epoch: int, start_step: int = 0) -> Digest:
        """What the ranks must agree on before `epoch` is read from its step `start_step` on. See `disagreement`."""
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


# --- do the ranks share out one epoch? -------------------------------------------------------------------------------


def disagreement(digests: Sequence[Digest]) -> str | None:
    """Which ranks differ and in what, from the digests of all of them in order of rank; None where they share out one
    epoch and no image comes twice."""
    most = _largest([(digest.common, digest.whole) for digest in digests])
    others = [rank for rank in range(len(digests)) if rank not in most]
    if others:
        reads, has = ("reads", "has") if len(others) == 1 else ("read", "have")
        return (
            f"{_named(others)} {reads} other data than {_named(most)}, or {has} another seed, batch size or step to "
            "start from: give every process the same files and the same config"
        )
    if sum(digest.own for digest in digests) % 2**63 == digests[0].whole:
        return None
    twins = _largest([digest.own for digest in digests])
    wrong = f"{_named(twins)} see the same images" if len(twins) > 1 else "the ranks do not share out the images"
    return f"{wrong}, and each image must come once: every process needs a rank of its own and the number of all ranks"


def _largest(values: Sequence[Hashable]) -> list[int]:
    """The places of the value that comes most often; of several such, of the one that comes first."""
    most = max(values, key=values.count)
    return [place for place, value in enumerate(values) if value == most]


def _named(ranks: Sequence[int], limit: int = 8) -> str:
    """rank 3; ranks 0, 1 and 5; no more than `limit` by number."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > limit:
        return f"ranks {', '.join(map(str, ranks[:limit]))} and {len(ranks) - limit} more"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"
