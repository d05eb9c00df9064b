"""Contract: what `convert` reads from."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

TORCHVISION = "torchvision:"  # how a source begins that torchvision knows by name: `torchvision:NAME[:ROOT]`
TORCHVISION_ROOT = "data/torchvision"


@dataclass(frozen=True, slots=True)
class ImageSet:
    """N images that several processes, forked after this was made, can read in any order at once.

    So no function here may move the offset of a file that was open before the fork.
    """

    labels: np.ndarray  # (N,) int64, -1 where unknown
    classes: tuple[str, ...]  # label i is classes[i]
    name: Callable[[int], str]  # of an image, for messages and to find it again
    read: Callable[[int], bytes | np.ndarray]  # its file as it is, or (H, W, 3) uint8 pixels; raises BadImage
    stamp: Callable[[int], tuple[int, int]]  # bytes and mtime (ns) of what holds it; (-1, -1) where that is gone
    identity: str = ""  # differs when an archive or an array that holds images does; files are known by their stamps
    notes: tuple[str, ...] = ()  # what the user should know: files left out, empty classes
    chunk: int = 64  # images worth one task
    in_order: bool = False  # whether reading them in another order is many times slower


@dataclass(frozen=True, slots=True)
class Origin:
    """What was found at a place, before any of it is loaded."""

    description: str  # one line: the layout as it was understood
    sets: dict[str, Callable[[], ImageSet]]  # split -> what loads it
