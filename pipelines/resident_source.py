"""The whole data set, decoded, in the memory of the device. Nothing is read, decoded or copied while training."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from pipelines.frames import Frames
from pipelines.tensor_file import read_tensor_file


class ResidentSource:
    """A file that `launch.py convert --to tensor` wrote. Its frames all share one buffer; only numbers are indexed."""

    def __init__(self, path: Path, device: torch.device) -> None:
        data = read_tensor_file(path)
        size = data.size.numpy()
        self.labels = data.label.numpy()
        self.classes = data.classes
        self.all = Frames(
            pixels=data.pixels,
            offset=data.offset,
            size=data.size,
            stride=3 * data.size[:, 1],
            original=data.original,
            index=data.index,
            label=data.label,
            extent=(int(size[:, 0].max()), int(size[:, 1].max())),
        ).to(device)

    def stream(self, batches: Iterable[np.ndarray], *, salt: int) -> Iterator[Frames]:
        device = self.all.pixels.device
        for positions in batches:
            rows = torch.from_numpy(positions)
            if device.type == "cuda":
                rows = rows.pin_memory().to(device, non_blocking=True)
            yield replace(
                self.all,
                offset=self.all.offset[rows],
                size=self.all.size[rows],
                stride=self.all.stride[rows],
                original=self.all.original[rows],
                index=self.all.index[rows],
                label=self.all.label[rows],
            )
