"""Decoded images on the device: what every source gives and the views are cut from.

One flat byte buffer, so that padded canvases, tight rows and a whole resident data set all fit without a copy.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Frames:
    """B images, each H x W x 3 bytes (RGB) somewhere in `pixels`. Bytes outside the images are undefined.

    `extent` is known to the host, so that shapes never have to be read from the device. From the first byte of any row
    of any image, at least 3 * extent[1] bytes can be read: sources leave that much slack behind the last image.
    """

    pixels: Tensor  # (bytes,) uint8, one dimension, on the device
    offset: Tensor  # (B,) int64, the first byte of each image
    size: Tensor  # (B, 2) int32, height and width of each image as stored
    stride: Tensor  # (B,) int32, bytes from one row to the next
    original: Tensor  # (B, 2) int32, height and width before any resizing: crops are drawn from it
    index: Tensor  # (B,) int64, the image's entry in its data set
    label: Tensor  # (B,) int64, -1 where unknown
    extent: tuple[int, int]  # no image is higher or wider

    def to(self, device: torch.device, *, non_blocking: bool = False) -> "Frames":
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {k: v.to(device, non_blocking=non_blocking) for k, v in moved.items() if isinstance(v, Tensor)}
        return replace(self, **tensors)


class Source(Protocol):
    """A data set of images in some format. A source knows nothing of views, epochs or ranks."""

    labels: np.ndarray  # (N,) int64, -1 where unknown
    classes: tuple[str, ...]  # class names; label i is classes[i]

    def stream(self, batches: Iterable[np.ndarray]) -> Iterator[Frames]:
        """One Frames for each (B,) int64 array of indices, in order. All arrays but the last have the same length.

        The result is valid until the next one is asked for. Leaving the iterator early (`close()`) frees its threads.
        """
        ...
