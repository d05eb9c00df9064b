"""Sampler, source, prefetch and views, joined into the streams that `ressl.batch` promises."""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from hashlib import blake2b
from subprocess import CalledProcessError
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pipelines.draws import ViewParams, centre_view, draw_view
from pipelines.frames import Frames, Source
from pipelines.prefetch import prefetch
from pipelines.sampler import Sampler, mix64, shard
from pipelines.views import cut_view
from ressl.batch import Batch, Crops, DataError, Digest, Split
from ressl.config import DataConfig, EvaluateConfig, ViewConfig, ViewsConfig

Impl = Literal["auto", "torch", "triton"]
PROBE = 1 << 20  # numbers the views of linear probes, far from those of any training view
LAST = 2**63 - 1  # the largest number that int64 holds


@dataclass(frozen=True)  # no slots: `fingerprint` is kept
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

    @cached_property
    def fingerprint(self) -> int:
        return hashed(self.source.index, self.source.labels, *self.source.classes)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        for frames in self.frames(epoch, start_step):
            yield self.cut(frames, epoch)

    def digest(self, epoch: int, start_step: int = 0) -> Digest:
        """Of the order for any number of ranks, so `common` and `whole` do not depend on it."""
        sampler = self.sampler
        steps = replace(sampler, rank=0, world_size=1).epoch(epoch, start_step)
        order = np.concatenate([np.empty(0, np.int64), *steps])  # of all ranks: that of a single one
        settings = (sampler.seed, epoch, start_step, sampler.num_images, sampler.batch_size, sampler.accumulate)
        images = mix64(self.source.index[order].astype(np.uint64))
        shares = images.reshape(-1, sampler.world_size, sampler.batch_size // sampler.world_size)
        return Digest(
            common=hashed(self.fingerprint, *settings, sampler.steps_per_epoch, order),
            own=int(shares[:, sampler.rank].sum()) & LAST,  # uint64 sums are modulo 2**64
            whole=int(images.sum()) & LAST,
        )

    def warm_up(self) -> None:
        """Cuts the views of the first epoch once, from two black images: what is compiled for them is compiled then.

        Raises DataError where Triton cannot compile.
        """
        if not fused(self.views.impl, self.device):
            return
        long, int32 = (partial(torch.zeros, device=self.device, dtype=kind) for kind in (torch.int64, torch.int32))
        size = int32(2, 2) + 8
        black = torch.zeros(3 * 8 * 9, dtype=torch.uint8, device=self.device)
        frames = Frames(black, long(2), size, 3 * size[:, 1], size, long(2), long(2), (8, 8))
        try:
            self.cut(frames, 0)
        except (RuntimeError, OSError, CalledProcessError) as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise DataError(
                f"views.impl: Triton cannot compile here ({reason[0]}); it needs a C compiler and Python's headers, "
                "as in apt-get install gcc python3-dev; or set views.impl=torch"
            ) from None

    def frames(self, epoch: int, start_step: int = 0) -> Generator[Frames]:
        """What the views of an epoch are cut from, on the device."""
        stream = self.source.stream(self.sampler.epoch(epoch, start_step), salt=self.sampler.seed + (epoch << 32))
        return prefetch(stream, self.device, depth=self.data.prefetch)

    def cut(self, frames: Frames, epoch: int) -> Batch:
        cfgs = self.configs(epoch)
        weak, *strong = cut(frames, self.params(frames, epoch), cfgs, self.views.impl, self.data, self.dtype)
        return Batch(weak=(weak,), strong=tuple(strong), index=frames.index, label=frames.label)

    def configs(self, epoch: int) -> list[ViewConfig]:
        """Of the weak view and of each strong one, at the sizes of this epoch."""
        cfgs = [self.views.weak, *self.views.strong]
        sizes = self.views.progressive
        if sizes is None:
            return cfgs
        return [cfg.model_copy(update={"size": sizes.size(cfg.size, epoch)}) for cfg in cfgs]

    def params(self, frames: Frames, epoch: int) -> list[ViewParams]:
        """The numbers of each view, in the order of `configs`: the same in every source, except for rounding."""
        return draw(self.configs(epoch), frames, self.views.impl, seed=self.sampler.seed, epoch=epoch)


@dataclass(frozen=True, slots=True)
class Prober:
    """Labelled streams for the evaluations (`ressl.batch.Probes`)."""

    train: Source
    val: Source | None
    data: DataConfig
    cfg: EvaluateConfig
    impl: Impl
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
                    (params,) = draw([view], frames, self.impl, seed=self.seed, epoch=epoch, first=PROBE)
            (images,) = cut(frames, [params], [view], self.impl, self.data, torch.float32)
            yield images, frames.label, frames.index

    def _source(self, split: Split) -> Source:
        source = self.train if split == "train" else self.val
        if source is None:
            raise DataError("data.source.val is not set: an evaluation needs labelled images to test on")
        return source


def draw(
    cfgs: Sequence[ViewConfig], frames: Frames, impl: Impl, *, seed: int, epoch: int, first: int = 0
) -> list[ViewParams]:
    """The numbers of the views `first`, `first` + 1, ... of each image."""
    if fused(impl, frames.pixels.device):
        from pipelines.kernels.draws import draw_views

        return draw_views(cfgs, frames.original, frames.index, seed=seed, epoch=epoch, first_view=first)
    return [
        draw_view(cfg, frames.original, frames.index, seed=seed, epoch=epoch, view=view)
        for view, cfg in enumerate(cfgs, first)
    ]


def cut(
    frames: Frames,
    params: Sequence[ViewParams],
    cfgs: Sequence[ViewConfig],
    impl: Impl,
    data: DataConfig,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """One (B, 3, h, w) for each of `cfgs`."""
    if fused(impl, frames.pixels.device):
        from pipelines.kernels.views import cut_views

        return cut_views(frames, params, cfgs, mean=data.mean, std=data.std, dtype=dtype)
    return tuple(
        cut_view(frames, numbers, cfg, mean=data.mean, std=data.std, dtype=dtype)
        for numbers, cfg in zip(params, cfgs, strict=True)
    )


def fused(impl: Impl, device: torch.device) -> bool:
    return impl == "triton" or (impl == "auto" and device.type == "cuda")


def hashed(*parts: np.ndarray | str | int) -> int:
    """A number from 0 to 2**63 - 1 that tells integer arrays, words and numbers apart, the same on every machine."""
    digest = blake2b(digest_size=8)
    for part in parts:
        data = np.ascontiguousarray(part, "<i8").data if isinstance(part, np.ndarray) else repr(part).encode()
        digest.update(f"{len(data)} ".encode())
        digest.update(data)
    return int.from_bytes(digest.digest(), "little") & LAST
