"""Noise that lies on the device, for timing: a run on it never waits for its images."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch

from pipelines.frames import Frames
from pipelines.sampler import mix64
from ressl.config import SyntheticSource as Config

POOL, POOL_BYTES = 64, 1 << 27  # distinct images at most, and their bytes together


class SyntheticSource:
    """`cfg.images` images of one size, of which only a few differ: position i shows image i modulo the pool's length.

    They are the same bytes on every device and in every run. Labels are a hash of the position.
    """

    def __init__(self, cfg: Config, device: torch.device) -> None:
        self.bytes = 3 * cfg.height * cfg.width
        self.pool = max(1, min(POOL, POOL_BYTES // self.bytes, cfg.images))
        self.size = (cfg.height, cfg.width)
        self.labels = (mix64(np.arange(cfg.images, dtype=np.uint64)) % np.uint64(cfg.classes)).astype(np.int64)
        self.index = np.arange(cfg.images)
        self.classes = tuple(f"noise {label}" for label in range(cfg.classes))
        noise = torch.Generator().manual_seed(0)
        # rows are as long as the extent, so no slack is needed behind the last
        pixels = torch.randint(0, 256, (self.pool * self.bytes,), dtype=torch.uint8, generator=noise)
        self.pixels = pixels.to(device)

    def stream(self, batches: Iterable[np.ndarray], *, salt: int) -> Iterator[Frames]:
        device = self.pixels.device
        for positions in batches:
            numbers = torch.from_numpy(np.stack([positions, self.labels[positions]]))
            if device.type == "cuda":
                numbers = numbers.pin_memory().to(device, non_blocking=True)
            index, label = numbers
            count = len(positions)
            height, width = (torch.full((count,), side, dtype=torch.int32, device=device) for side in self.size)
            size = torch.stack([height, width], dim=1)
            yield Frames(
                pixels=self.pixels,
                offset=index % self.pool * self.bytes,
                size=size,
                stride=3 * width,
                original=size,
                index=index,
                label=label,
                extent=self.size,
            )
