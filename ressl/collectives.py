"""What the ranks of a run do together. `runtime.py` makes one for the processes it started; methods are handed it."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Collectives:
    """Every rank calls the same one with the same shape, at the same place in the step."""

    world_size: int
    gather: Callable[[Tensor], Tensor]  # (B, ...) of each rank -> (B * world_size, ...) in rank order; no gradient
    mean: Callable[[Tensor], Tensor]  # the mean over the ranks; gradients flow
    exchange: Callable[[Tensor], Tensor]
    """(B, ...) -> (B, ...): part j of rank i's rows becomes part i of rank j's. Twice gives the rows back; no gradient.
    B must be a multiple of the world size."""


def alone() -> Collectives:
    """For one process, which is the whole world."""
    return Collectives(world_size=1, gather=lambda rows: rows, mean=lambda x: x, exchange=lambda rows: rows)
