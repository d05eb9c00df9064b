"""From files to `Batch`: decode once, cut every view on the device."""

import os
from collections.abc import Callable
from pathlib import Path

import torch

from pipelines.frames import Source
from pipelines.loader import Prober, ViewStream
from pipelines.sampler import Sampler
from ressl import config
from ressl.batch import DataError, Loaders


def build_loaders(
    cfg: config.Config,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    rank: int = 0,
    world_size: int = 1,
    report: Callable[[str], None] = lambda message: None,
) -> Loaders:
    """The streams of one rank. `dtype` is that of the training views; `report` is told of images that were replaced."""
    train = build_source(cfg.data, cfg.data.source.train, device, report)
    val = cfg.data.source.val and build_source(cfg.data, cfg.data.source.val, device, report)
    if val and train.classes and val.classes and train.classes != val.classes:
        missing = sorted(set(train.classes) ^ set(val.classes))
        raise DataError(
            f"{cfg.data.source.val} has {len(val.classes)} classes, {cfg.data.source.train} {len(train.classes)}; "
            f"not in both: {', '.join(missing[:5]) or 'none, but their order differs'}"
        )
    sampler = Sampler(
        num_images=len(train.labels),
        batch_size=cfg.optim.batch_size,
        seed=cfg.run.seed,
        rank=rank,
        world_size=world_size,
        accumulate=cfg.optim.accumulate,
    )
    prober = Prober(train, val or None, cfg.data, cfg.evaluate, device, cfg.run.seed, rank, world_size)
    return Loaders(train=ViewStream(train, sampler, cfg.views, cfg.data, device, dtype), probes=prober)


def build_source(
    cfg: config.DataConfig, path: Path, device: torch.device, report: Callable[[str], None] = lambda message: None
) -> Source:
    """Each format in its own file, whose heavy imports happen only where it is chosen."""
    match cfg.source:
        case config.ResidentSource():
            from pipelines.resident_source import ResidentSource

            return ResidentSource(path, device)
        case config.FolderSource(workers=workers, max_side=max_side):
            from pipelines.folder_source import FolderSource

            return FolderSource(
                path, workers=workers or cores(), max_side=max_side, on_corrupt=cfg.on_corrupt, report=report
            )
        case config.FfcvSource(workers=workers):
            from pipelines.ffcv_source import FfcvSource

            return FfcvSource(path, workers=workers or cores(), on_corrupt=cfg.on_corrupt, report=report)


def cores() -> int:
    """The cores that fall to this rank: those this process may use, shared out over the ranks of the machine."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
