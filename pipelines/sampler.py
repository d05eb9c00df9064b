"""Which images make up a step: a pure function of (seed, epoch, step, rank), so any step can be resumed at.

Epoch e is one permutation of the N images, the same on every rank. Step k takes G consecutive entries of it and each
rank a contiguous slice of those, so the order of a global batch does not depend on the number of ranks. The last
N mod G entries of the permutation are left out, other images each epoch; no image comes twice.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ressl.batch import DataError


@dataclass(frozen=True, slots=True)
class Sampler:
    num_images: int  # N
    batch_size: int  # G
    seed: int
    rank: int = 0
    world_size: int = 1
    accumulate: int = 1

    def __post_init__(self) -> None:
        parts = self.world_size * self.accumulate
        if self.batch_size % parts:
            raise DataError(
                f"optim.batch_size={self.batch_size} does not split over {self.world_size} processes x "
                f"optim.accumulate={self.accumulate}: choose a multiple of {parts}"
            )
        if self.num_images < self.batch_size:
            raise DataError(
                f"{self.num_images:,} images are fewer than one batch of optim.batch_size={self.batch_size:,} "
                f"({self.world_size} processes x {self.batch_size // self.world_size}): lower optim.batch_size"
            )

    @property
    def steps_per_epoch(self) -> int:
        return self.num_images // self.batch_size

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[np.ndarray]:
        """(B,) int64 index arrays of this rank: `accumulate` of them for each step from `start_step` on."""
        order = permutation(self.num_images, self.seed, epoch)
        share = self.batch_size // self.world_size
        for step in range(start_step, self.steps_per_epoch):
            first = step * self.batch_size + self.rank * share
            yield from np.split(order[first : first + share], self.accumulate)


def permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """(count,) int64, all of 0 .. count - 1. Sorted by a hash of our own, so that no library's update can change it."""
    key = mix64(mix64(np.array([seed], np.uint64)) + np.uint64(epoch))
    return np.argsort(mix64(mix64(np.arange(count, dtype=np.uint64)) ^ key), kind="stable")


def mix64(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014) after its increment: uint64 -> uint64, one to one."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def shard(count: int, rank: int, world_size: int) -> np.ndarray:
    """The contiguous part of 0 .. count - 1 that falls to `rank`: (n,) int64, every entry on exactly one rank."""
    return np.arange(count * rank // world_size, count * (rank + 1) // world_size)
