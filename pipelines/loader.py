"""Sampler, source, prefetch and views, joined into the streams that `ressl.batch` promises."""

from collections.abc import Generator, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pipelines.draws import centre_view, draw_view
from pipelines.frames import Frames, Source
from pipelines.prefetch import prefetch
from pipelines.sampler import Sampler, shard
from pipelines.views import cut_view
from ressl.batch import Batch, Crops, DataError, Split
from ressl.config import DataConfig, EvaluateConfig, ViewConfig, ViewsConfig

PROBE = 1 << 20  # numbers the views of linear probes, far from those of any training view


@dataclass(frozen=True, slots=True)
class ViewStream:
    """The training stream of one rank (`ressl.batch.ViewLoader`)."""

    source: Source
    sampler: Sampler
    views: ViewsConfig
    data: DataConfig
    device: torch.device
    dtype: torch.dtype

    @property
    def steps_per_epoch(self) -> int:
        return self.sampler.steps_per_epoch

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        for frames in self.frames(epoch, start_step):
            yield self.cut(frames, epoch)

    def frames(self, epoch: int, start_step: int = 0) -> Generator[Frames]:
        """What the views of an epoch are cut from, on the device."""
        stream = self.source.stream(self.sampler.epoch(epoch, start_step), salt=self.sampler.seed + (epoch << 32))
        return prefetch(stream, self.device, depth=self.data.prefetch)

    def cut(self, frames: Frames, epoch: int) -> Batch:
        weak, *strong = (
            self._view(frames, cfg, epoch, number) for number, cfg in enumerate((self.views.weak, *self.views.strong))
        )
        return Batch(weak=(weak,), strong=tuple(strong), index=frames.index, label=frames.label)

    def _view(self, frames: Frames, cfg: ViewConfig, epoch: int, number: int) -> Tensor:
        seed = self.sampler.seed
        params = draw_view(cfg, frames.original, frames.index, seed=seed, epoch=epoch, view=number)
        return cut_view(frames, params, cfg, mean=self.data.mean, std=self.data.std, dtype=self.dtype)


@dataclass(frozen=True, slots=True)
class Prober:
    """Labelled streams for the evaluations (`ressl.batch.Probes`)."""

    train: Source
    val: Source | None
    data: DataConfig
    cfg: EvaluateConfig
    device: torch.device
    seed: int
    rank: int
    world_size: int

    @property
    def num_classes(self) -> int:
        return max(len(self.train.classes), int(self.train.labels.max()) + 1)

    def count(self, split: Split) -> int:
        return len(self._source(split).labels)

    def probe(self, split: Split, crops: Crops = "centre", epoch: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        source, size = self._source(split), self.cfg.size
        part = shard(len(source.labels), self.rank, self.world_size)
        batches = [part[i : i + self.cfg.batch_size] for i in range(0, len(part), self.cfg.batch_size)]
        view = ViewConfig(size=size, crop_scale=self.cfg.linear.crop_scale)
        stream = source.stream(batches, salt=self.seed)
        for frames in prefetch(stream, self.device, depth=self.data.prefetch):
            match crops:
                case "centre":
                    params = centre_view(frames.original, size=size, resize=self.cfg.resize or size)
                case "random":
                    params = draw_view(view, frames.original, frames.index, seed=self.seed, epoch=epoch, view=PROBE)
            images = cut_view(frames, params, view, mean=self.data.mean, std=self.data.std)
            yield images, frames.label, frames.index

    def _source(self, split: Split) -> Source:
        source = self.train if split == "train" else self.val
        if source is None:
            raise DataError("data.source.val is not set: an evaluation needs labelled images to test on")
        return source
