"""From files to `Batch`: decode once, cut every view on the device."""

import os
from collections.abc import Callable
from pathlib import Path

import torch

from pipelines.frames import Source
from pipelines.loader import Prober, ViewStream
from pipelines.sampler import Blocks, Order, Sampler, Shards
from ressl import config
from ressl.batch import DataError, Loaders, Split

Report = Callable[[str], None]
SPLITS: tuple[Split, ...] = ("train", "val")
CPU = torch.device("cpu")


def _silent(message: str) -> None:
    pass


def build_loaders(
    cfg: config.Config,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    rank: int = 0,
    world_size: int = 1,
    cores: int | None = None,
    report: Report = _silent,
) -> Loaders:
    """The streams of one rank. `dtype` is that of the training views; `cores` may decode, or all that the process may
    run on; `report` is told of images that were replaced."""
    train = build_source(cfg.data, "train", device, report, rank=rank, world_size=world_size, cores=cores)
    assert train is not None
    val = build_source(cfg.data, "val", device, report, rank=rank, world_size=world_size, cores=cores)
    if val and train.classes and val.classes and train.classes != val.classes:
        missing = sorted(set(train.classes) ^ set(val.classes))
        raise DataError(
            f"{cfg.data.source.val} has {len(val.classes)} classes, {_place(cfg.data, 'train')} {len(train.classes)}; "
            f"not in both: {', '.join(missing[:5]) or 'none, but their order differs'}"
        )
    stream = build_stream(cfg, train, device=device, dtype=dtype, rank=rank, world_size=world_size)
    probes = Prober(train, val, cfg.data, cfg.evaluate, cfg.views.impl, device, cfg.run.seed, rank, world_size)
    return Loaders(train=stream, probes=probes)


def build_stream(
    cfg: config.Config,
    source: Source,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    rank: int = 0,
    world_size: int = 1,
) -> ViewStream:
    """The training stream of one rank. Raises DataError where the config asks for what this device cannot do."""
    if cfg.views.impl == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise DataError("views.impl=triton needs a GPU: views.impl=auto takes the torch definition where there is none")
    sampler = Sampler(
        num_images=len(source.labels),
        batch_size=cfg.optim.batch_size,
        seed=cfg.run.seed,
        rank=rank,
        world_size=world_size,
        accumulate=cfg.optim.accumulate,
        order=order(cfg.data),
    )
    return ViewStream(source, sampler, cfg.views, cfg.data, device, dtype)


def order(cfg: config.DataConfig) -> Order:
    """Images that ranks hold in shards are shuffled inside those, whatever `shuffle` says."""
    if isinstance(cfg.source, config.ResidentSource) and cfg.source.shards > 1:
        return Shards(cfg.source.shards)
    return Blocks(cfg.block, cfg.window) if cfg.shuffle == "blocks" else None


def build_source(
    cfg: config.DataConfig,
    split: Split,
    device: torch.device,
    report: Report = _silent,
    *,
    rank: int = 0,
    world_size: int = 1,
    cores: int | None = None,
) -> Source | None:
    """Each format in its own file, whose heavy imports happen only where it is chosen. None: no such split is set."""
    path = _place(cfg, split)
    if path is None:
        return None
    match cfg.source:
        case config.SyntheticSource() as synthetic:
            from pipelines.synthetic_source import SyntheticSource

            return SyntheticSource(synthetic, device)
        case config.ResidentSource() as resident:
            from pipelines.resident_source import ResidentSource

            decoder = _decoder(resident, path)
            return ResidentSource(
                path,
                resident,
                device,
                rank=rank,
                world_size=world_size,
                decoder=None if decoder is None else lambda: _opened(cfg, decoder, device, report, cores),
            )
        case config.FolderSource(max_side=max_side):
            from pipelines.folder_source import FolderSource

            return FolderSource(
                path,
                workers=_workers(cfg.source, cores),
                max_side=max_side,
                on_corrupt=cfg.on_corrupt,
                report=report,
                pin=device.type == "cuda",
            )
        case config.DaliSource(max_side=max_side, hw_decoder_load=load):
            from pipelines.dali_source import DaliSource

            return DaliSource(
                path,
                device=device,
                workers=_workers(cfg.source, cores),
                max_side=max_side,
                hw_decoder_load=load,
                on_corrupt=cfg.on_corrupt,
                report=report,
            )
        case config.FfcvSource(cache=cache):
            from pipelines.ffcv_source import FfcvSource

            return FfcvSource(
                path,
                workers=_workers(cfg.source, cores),
                cache=cache,
                on_corrupt=cfg.on_corrupt,
                report=report,
                pin=device.type == "cuda",
            )


def count_images(cfg: config.DataConfig) -> int:
    """Images to train on. Opens both splits, so that what is wrong with either comes out, but decodes nothing."""
    if isinstance(cfg.source, config.SyntheticSource):
        return cfg.source.images
    counts = []
    for split in SPLITS:
        path = _place(cfg, split)
        decoder = _decoder(cfg.source, path) if path and isinstance(cfg.source, config.ResidentSource) else None
        source = build_source(cfg, split, CPU) if decoder is None else _opened(cfg, decoder, CPU, _silent, None)
        counts.append(len(source.labels) if source else 0)
    return counts[0]


def _opened(
    cfg: config.DataConfig, source: config.Source, device: torch.device, report: Report, cores: int | None
) -> Source:
    opened = build_source(cfg.model_copy(update={"source": source}), "train", device, report, cores=cores)
    assert opened is not None
    return opened


def _place(cfg: config.DataConfig, split: Split) -> Path | None:
    """Of the split's files. Noise has no place: it is named so."""
    if isinstance(cfg.source, config.SyntheticSource):
        return Path("noise") if split == "train" else None
    return cfg.source.train if split == "train" else cfg.source.val


def _decoder(cfg: config.ResidentSource, path: Path) -> config.Source | None:
    """What decodes the images that are to be resident; None for a file that holds decoded ones."""
    if path.suffix == ".beton":
        return config.FfcvSource(name="ffcv", train=path, workers=cfg.workers)
    if (path / "index.npz").exists():
        return config.DaliSource(name="dali", train=path, workers=cfg.workers, max_side=cfg.max_side)
    if path.is_dir():
        return config.FolderSource(name="folder", train=path, workers=cfg.workers, max_side=cfg.max_side)
    return None


def _workers(cfg: config.FolderSource | config.DaliSource | config.FfcvSource, cores: int | None) -> int:
    return cfg.workers or cores or len(os.sched_getaffinity(0))
