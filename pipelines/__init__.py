"""From files to `Batch`: decode once, cut every view on the device."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from pipelines.frames import Source
from pipelines.loader import Prober, ViewStream
from pipelines.sampler import Blocks, Order, Sampler, Shards
from ressl import config
from ressl.batch import DataError, Loaders, Split

Report = Callable[[str], None]
Progress = Callable[[Split, int, int], None]
Files = config.FolderSource | config.FfcvSource | config.DaliSource
SPLITS: tuple[Split, ...] = ("train", "val")
CPU = torch.device("cpu")


def _silent(message: str) -> None:
    pass


def _no_progress(split: Split, done: int, count: int) -> None:
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
    report_val: Report | None = None,
    progress: Progress = _no_progress,
) -> Loaders:
    """The streams of one rank. `dtype` is that of the training views; `cores` may decode, or all that the process may
    run on; `report` is told of images that were replaced, `report_val` of those of that split if it is given,
    `progress` of those that are decoded before the first step.
    """
    if isinstance(cfg.data.source, config.ResidentSource):  # decoding may take minutes: what is wrong is told before
        check_data(cfg, device, world_size)
    open_split = partial(build_source, rank=rank, world_size=world_size, cores=cores, progress=progress)
    reports = {"train": report, "val": report_val or report}
    train, val = (open_split(cfg.data, split, device, reports[split]) for split in SPLITS)
    assert train is not None
    if val:
        _compare_classes(cfg.data, train.classes, val.classes)
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
    """The training stream of one rank, from a source that was built before."""
    _check(cfg, device)
    sampler = _sampler(cfg, len(source.labels), rank, world_size)
    return ViewStream(source, sampler, cfg.views, cfg.data, device, dtype)


def _check(cfg: config.Config, device: torch.device) -> None:
    """Raises DataError where the config asks for what this device cannot do."""
    if cfg.views.impl == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise DataError("views.impl=triton needs a GPU: views.impl=auto takes the torch definition where there is none")


def _sampler(cfg: config.Config, images: int, rank: int, world_size: int) -> Sampler:
    return Sampler(
        num_images=images,
        batch_size=cfg.optim.batch_size,
        seed=cfg.run.seed,
        rank=rank,
        world_size=world_size,
        accumulate=cfg.optim.accumulate,
        order=_order(cfg.data),
    )


def _order(cfg: config.DataConfig) -> Order:
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
    progress: Progress = _no_progress,
) -> Source | None:
    """The images of a split, for one rank; None where no such split is set."""
    path = _place(cfg, split)
    if path is None:
        return None
    match cfg.source:
        case config.SyntheticSource() as synthetic:
            from pipelines.synthetic_source import SyntheticSource

            return SyntheticSource(synthetic, device)
        case config.ResidentSource() as resident:
            from pipelines.resident_source import ResidentSource

            files = _decoder(resident, path)
            return ResidentSource(
                path,
                resident,
                device,
                rank=rank,
                world_size=world_size,
                decoder=None if files is None else partial(_open, files, path, cfg.on_corrupt, device, report, cores),
                progress=partial(progress, split),
            )
        case files:
            return _open(files, path, cfg.on_corrupt, device, report, cores)


def _open(
    files: Files,
    path: Path,
    on_corrupt: Literal["replace", "fail"],
    device: torch.device,
    report: Report,
    cores: int | None,
) -> Source:
    """Each format in its own file, whose heavy imports happen only where it is chosen."""
    workers, pin = files.workers or cores or len(os.sched_getaffinity(0)), device.type == "cuda"
    match files:
        case config.FolderSource(max_side=max_side):
            from pipelines.folder_source import FolderSource

            return FolderSource(path, workers=workers, max_side=max_side, on_corrupt=on_corrupt, report=report, pin=pin)
        case config.FfcvSource(cache=cache):
            from pipelines.ffcv_source import FfcvSource

            return FfcvSource(path, workers=workers, cache=cache, on_corrupt=on_corrupt, report=report, pin=pin)
        case config.DaliSource(max_side=max_side, hw_decoder_load=load):
            from pipelines.dali_source import DaliSource

            return DaliSource(
                path,
                device=device,
                workers=workers,
                max_side=max_side,
                hw_decoder_load=load,
                on_corrupt=on_corrupt,
                report=report,
            )


def _decoder(cfg: config.ResidentSource, path: Path) -> Files | None:
    """What decodes the images that are to be resident; None for a file that holds decoded ones."""
    if path.suffix == ".beton":
        return config.FfcvSource(name="ffcv", train=path, workers=cfg.workers)
    if (path / "index.npz").exists():
        return config.DaliSource(name="dali", train=path, workers=cfg.workers, max_side=cfg.max_side)
    if path.is_dir():
        return config.FolderSource(name="folder", train=path, workers=cfg.workers, max_side=cfg.max_side)
    return None


def _place(cfg: config.DataConfig, split: Split) -> Path | None:
    """Of the split's files. Noise has no place: it is named so."""
    if isinstance(cfg.source, config.SyntheticSource):
        return Path("noise") if split == "train" else None
    return cfg.source.train if split == "train" else cfg.source.val


def check_data(cfg: config.Config, device: torch.device, world_size: int) -> int:
    """Images to train on. Raises what `build_loaders` would, but decodes nothing: a resident set that is too large may
    still be refused later."""
    _check(cfg, device)
    found = [_tables(cfg.data, path) for split in SPLITS if (path := _place(cfg.data, split))]
    if len(found) == 2:
        _compare_classes(cfg.data, found[0][1], found[1][1])
    _sampler(cfg, found[0][0], 0, world_size)
    return found[0][0]


def _tables(cfg: config.DataConfig, path: Path) -> tuple[int, tuple[str, ...]]:
    """Number of images, and class names."""
    match cfg.source:
        case config.SyntheticSource(images=count):
            return count, ()
        case config.ResidentSource() as resident:
            files = _decoder(resident, path)
            if files is None:
                from pipelines.resident_source import open_tensor_file

                data = open_tensor_file(path)
                return len(data.label), data.classes
        case files:
            pass
    source = _open(files, path, cfg.on_corrupt, CPU, _silent, None)
    return len(source.labels), source.classes


def _compare_classes(cfg: config.DataConfig, train: tuple[str, ...], val: tuple[str, ...]) -> None:
    """Raises DataError if both splits have classes, and not the same ones."""
    if train and val and train != val:
        missing = sorted(set(train) ^ set(val))
        raise DataError(
            f"{_place(cfg, 'val')} has {len(val)} classes, {_place(cfg, 'train')} {len(train)}; "
            f"not in both: {', '.join(missing[:5]) or 'none, but their order differs'}"
        )
