"""Decoded images on the device: what every source gives and the views are cut from.

One flat byte buffer, so that padded canvases, tight rows and a whole resident data set all fit without a copy.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from pipelines.images import BadImage
from pipelines.sampler import mix64
from ressl.batch import REPLACED, DataError


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

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.pixels, self.offset, self.size, self.stride, self.original, self.index, self.label)

    def to(self, device: torch.device, *, non_blocking: bool = False) -> "Frames":
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Frames":
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Frames":
        return Frames(
            pixels=change(self.pixels),
            offset=change(self.offset),
            size=change(self.size),
            stride=change(self.stride),
            original=change(self.original),
            index=change(self.index),
            label=change(self.label),
            extent=self.extent,
        )


def host_buffer(length: int, *, pin: bool) -> Tensor:
    """(length,) uint8 on the host, undefined. Pinned (page-locked) memory is copied to a GPU without another copy on
    the way; torch keeps it for the next buffer as soon as that copy has been made. Other memory is NumPy's, which asks
    for huge pages: a fifth of the time to touch it first."""
    if pin:
        return torch.empty(length, dtype=torch.uint8, pin_memory=True)
    return torch.from_numpy(np.empty(length, np.uint8))


def pack(
    images: Sequence[np.ndarray], original: np.ndarray, index: np.ndarray, label: np.ndarray, *, pin: bool = False
) -> Frames:
    """Copies images, each (H, W, 3) uint8, one after another into a buffer of their own, on the host.

    `original` (B, 2) is the size of each before any resizing; `index` and `label` are (B,).
    """
    size = np.array([image.shape[:2] for image in images], np.int32)
    lengths = size.prod(axis=1, dtype=np.int64) * 3
    offset = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    extent = (int(size[:, 0].max()), int(size[:, 1].max()))
    pixels = host_buffer(int(lengths.sum()) + 3 * extent[1], pin=pin)
    rows = pixels.numpy()
    for image, first, length in zip(images, offset, lengths, strict=True):
        rows[first : first + length] = image.reshape(-1)
    return Frames(
        pixels=pixels,
        offset=torch.from_numpy(offset),
        size=torch.from_numpy(size),
        stride=torch.from_numpy(3 * size[:, 1]),
        original=torch.from_numpy(original.astype(np.int32)),
        index=torch.from_numpy(index.astype(np.int64)),
        label=torch.from_numpy(label.astype(np.int64)),
        extent=extent,
    )


class Source(Protocol):
    """A data set of images in some format. A source knows nothing of views, epochs or ranks."""

    labels: np.ndarray  # (N,) int64, -1 where unknown
    index: np.ndarray  # (N,) int64, the image's entry in its data set
    classes: tuple[str, ...]  # class names; label i is classes[i]

    def stream(self, batches: Iterable[np.ndarray], *, salt: int) -> Iterator[Frames]:
        """One Frames for each (B,) int64 array of positions in 0 .. N - 1, in order, in memory of its own.

        All arrays but the last have the same length. `salt` and the position decide which image stands in for one that
        cannot be read. Closing the iterator early frees what it holds.
        """
        ...


def stand_in(position: int, attempt: int, salt: int, count: int) -> int:
    """Another position, to take the place of one that cannot be read; `attempt` counts from 0."""
    if count == 1:
        return position
    key = np.array([position + attempt * count], np.uint64) ^ mix64(np.array([salt], np.uint64))
    return (position + 1 + int(mix64(key)[0] % np.uint64(count - 1))) % count


def read_or_stand_in(
    position: int,
    read: Callable[[int], np.ndarray],
    where: Callable[[int], str],
    *,
    salt: int,
    count: int,
    on_corrupt: Literal["replace", "fail"],
    report: Callable[[str], None],
) -> tuple[int, np.ndarray]:
    """The image at `position`, or at the first of nine others that can be read; and its position.

    `read` gives an image (H, W, 3) or raises BadImage, `where` its name. Raises DataError where `on_corrupt` says so,
    and where none can be read.
    """
    problems: list[str] = []
    for attempt in range(10):
        chosen = position if attempt == 0 else stand_in(position, attempt - 1, salt, count)
        try:
            image = read(chosen)
        except BadImage as bad:
            if on_corrupt == "fail":
                raise DataError(f"{where(chosen)}: {bad} (data.on_corrupt=replace goes on without it)") from None
            problems.append(f"{where(chosen)}: {bad}")
            continue
        for problem in problems:
            report(f"{problem}{REPLACED}{where(chosen)}")
        return chosen, image
    raise DataError(f"{problems[0]}; and none of {len(problems) - 1} others tried in its place can be read")
