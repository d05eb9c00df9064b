"""Which images make up a step: a pure function of (seed, epoch, step, rank), so any step can be resumed at.

Epoch e is one order of the images, the same on every rank. Step k takes G consecutive entries of it and each rank a
contiguous slice of those, so the order of a global batch does not depend on the number of ranks. N mod G images are
left out, others each epoch; no image comes twice.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ressl.batch import DataError


@dataclass(frozen=True, slots=True)
class Blocks:
    """An order for data whose neighbours are read together: blocks of `block` neighbours are permuted, then the images
    inside each run of `window` blocks."""

    block: int
    window: int


@dataclass(frozen=True, slots=True)
class Shards:
    """An order for data that ranks hold in parts: it is cut into `count` contiguous shards, each permuted inside, and
    every step takes G / count images of each. Ranks share out the shards, so `count` is a multiple of their number; the
    order depends on `count` alone."""

    count: int


Order = Blocks | Shards | None  # None: one permutation of all images


@dataclass(frozen=True, slots=True)
class Sampler:
    num_images: int  # N
    batch_size: int  # G
    seed: int
    rank: int = 0
    world_size: int = 1
    accumulate: int = 1
    order: Order = None

    def __post_init__(self) -> None:
        check_split(self.batch_size, self.world_size, self.accumulate)
        if self.num_images < self.batch_size:
            raise DataError(
                f"{self.num_images:,} images are fewer than one batch of optim.batch_size={self.batch_size:,} "
                f"({self.world_size} processes x {self.batch_size // self.world_size}): lower optim.batch_size"
            )
        if isinstance(self.order, Shards):
            count = self.order.count
            if count % self.world_size or self.batch_size % count:
                raise DataError(
                    f"data.source.shards={count} must be a multiple of the {self.world_size} processes and divide "
                    f"optim.batch_size={self.batch_size}"
                )

    @property
    def steps_per_epoch(self) -> int:
        return self.num_images // self.batch_size

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[np.ndarray]:
        """(B,) int64 index arrays of this rank: `accumulate` of them for each step from `start_step` on."""
        order = self._images(epoch)
        share = self.batch_size // self.world_size
        for step in range(start_step, self.steps_per_epoch):
            first = step * self.batch_size + self.rank * share
            yield from np.split(order[first : first + share], self.accumulate)

    def _images(self, epoch: int) -> np.ndarray:
        match self.order:
            case None:
                return permutation(self.num_images, self.seed, epoch)
            case Blocks(block=block, window=window):
                return blocked_permutation(self.num_images, self.seed, epoch, block=block, window=window)
            case Shards(count=count):
                taken = self.steps_per_epoch * self.batch_size // count  # of each shard
                shards = [shard(self.num_images, s, count) for s in range(count)]
                # a seed for each shard, or neighbours in shards of one length would meet in every epoch
                seeds = [self.seed + ((s + 1) << 32) for s in range(count)]
                orders = [permutation(len(s), seed, epoch) for s, seed in zip(shards, seeds, strict=True)]
                mixed = [s[order[:taken]] for s, order in zip(shards, orders, strict=True)]
                steps = [part.reshape(self.steps_per_epoch, self.batch_size // count) for part in mixed]
                return np.concatenate(steps, axis=1).reshape(-1)


def check_split(batch_size: int, world_size: int, accumulate: int) -> None:
    """Raises DataError where a batch cannot be shared out over ranks and micro-batches."""
    parts = world_size * accumulate
    if batch_size % parts:
        raise DataError(
            f"optim.batch_size={batch_size} does not split over {world_size} processes x "
            f"optim.accumulate={accumulate}: choose a multiple of {parts}"
        )


def permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """(count,) int64, all of 0 .. count - 1. Sorted by a hash of our own, so that no library's update can change it."""
    key = mix64(mix64(np.array([seed], np.uint64)) + np.uint64(epoch))
    # all keys differ, as the hash is one to one: no sort could order them otherwise
    return np.argsort(mix64(mix64(np.arange(count, dtype=np.uint64)) ^ key))


def blocked_permutation(count: int, seed: int, epoch: int, *, block: int, window: int) -> np.ndarray:
    """(count,) int64, all of 0 .. count - 1. Any `block` x `window` entries in a row come from at most 2 `window` + 2
    blocks of `block` neighbours."""
    blocks = permutation(-(-count // block), seed, epoch)
    starts = np.concatenate([np.arange(b * block, min((b + 1) * block, count)) for b in blocks])
    within = permutation(count, seed + 1, epoch)  # another key than that of the blocks
    place = np.empty(count, np.int64)
    place[within] = np.arange(count)  # a random number for each place, all different
    run = np.arange(count) // (block * window)
    return starts[np.lexsort((place, run))]


def mix64(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014) after its increment: uint64 -> uint64, one to one."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def shard(count: int, rank: int, world_size: int) -> np.ndarray:
    """The contiguous part of 0 .. count - 1 that falls to `rank`: (n,) int64, every entry on exactly one rank."""
    return np.arange(count * rank // world_size, count * (rank + 1) // world_size)
