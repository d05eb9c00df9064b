"""How others feed two or more views of an image to a trainer: what `tools/bench_loaders.py` compares our sources with.
And how FFCV writes its files, for `tools/bench_convert.py`.

Each is written the way its library's documentation shows it; a loader gives a `Pass`. All loaders take the laws of the
views from the same `ViewConfig`s as ours. The libraries are imported where they are used: each takes seconds, and no
arm needs two.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipelines.images import scan_folder
from ressl.config import ViewConfig

Pass = Callable[[int], int]
"""Passes through one epoch, by its number, and returns how many images came out."""
Channels = tuple[float, float, float]


def folder_files(root: Path) -> list[str]:
    folder = scan_folder(root)
    return [str(folder.root / path) for path in folder.paths]


# --- torchvision -----------------------------------------------------------------------------------------------------


class PilViews(Dataset):
    """Item i: all views of file i, each (3, h, w) float32. The file is decoded once for all of them."""

    def __init__(self, files: Sequence[str], views: Sequence[ViewConfig], mean: Channels, std: Channels) -> None:
        self.files = files
        self.transforms = [pil_transform(view, mean, std) for view in views]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> list[Tensor]:
        with Image.open(self.files[i]) as image:
            pixels = image.convert("RGB")
        return [transform(pixels) for transform in self.transforms]


def pil_transform(view: ViewConfig, mean: Channels, std: Channels) -> Callable[[Image.Image], Tensor]:
    """One view by torchvision's transforms of PIL images, in the order of SimCLR (Chen et al. 2020)."""
    from torchvision import transforms

    steps: list[Any] = [transforms.RandomResizedCrop(view.size, scale=view.crop_scale, ratio=view.crop_ratio)]
    if view.jitter_prob > 0:
        steps.append(transforms.RandomApply([transforms.ColorJitter(*view.jitter)], p=view.jitter_prob))
    if view.grayscale_prob > 0:
        steps.append(transforms.RandomGrayscale(view.grayscale_prob))
    if view.blur_prob > 0:
        steps.append(transforms.RandomApply([partial(_pil_blur, sigma=view.blur_sigma)], p=view.blur_prob))
    steps += [transforms.RandomHorizontalFlip(view.flip_prob), transforms.ToTensor(), transforms.Normalize(mean, std)]
    return transforms.Compose(steps)


def _pil_blur(image: Image.Image, *, sigma: tuple[float, float]) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(float(torch.empty(1).uniform_(*sigma))))


def torchvision_pil(
    root: Path, views: Sequence[ViewConfig], *, mean: Channels, std: Channels, batch: int, workers: int
) -> Pass:
    """The way of SimCLR's, MoCo's and ReSSL's authors: PIL images, augmented by a DataLoader's processes."""
    loader = DataLoader(
        PilViews(folder_files(root), views, mean, std),
        batch_size=batch,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=True,
        pin_memory=torch.cuda.is_available(),
    )
    return lambda epoch: sum(len(batch[0]) for batch in loader)


# --- FFCV ------------------------------------------------------------------------------------------------------------


def ffcv_per_view(beton: Path, views: Sequence[ViewConfig], *, batch: int, workers: int, images: int) -> Pass:
    """The way of FFCV's self-supervised fork: one stock pipeline a view, each of which decodes the image again, crops,
    resizes and flips it. Colours and blur are left to the device and not part of this.

    Memory is allocated in each epoch: a small file's images are listed so often that an epoch has `images` of them.
    """
    import numba
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.pipeline.pipeline_spec import PipelineSpec
    from ffcv.reader import Reader
    from ffcv.transforms import RandomHorizontalFlip, ToTensor

    reader = Reader(str(beton))
    pipelines: dict[str, PipelineSpec | None] = dict.fromkeys(reader.field_names)
    for number, view in enumerate(views):
        side = (view.size, view.size)
        pipelines[f"view{number}"] = PipelineSpec(
            "image",
            decoder=RandomResizedCropRGBImageDecoder(side, scale=view.crop_scale, ratio=view.crop_ratio),
            transforms=[RandomHorizontalFlip(view.flip_prob), ToTensor()],
        )
    workers = min(workers, numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
    count = int(reader.num_samples)
    loader = Loader(
        str(beton),
        batch_size=batch,
        num_workers=workers,
        order=OrderOption.RANDOM,
        drop_last=True,
        indices=np.tile(np.arange(count, dtype=np.uint64), -(-images // count)),
        pipelines=pipelines,
    )
    return lambda epoch: sum(len(batch[0]) for batch in loader)


class PilFiles:
    """Item i: file i as a Pillow image of mode RGB, and its label."""

    def __init__(self, files: Sequence[str], labels: Sequence[int]) -> None:
        self.files, self.labels = files, labels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        with Image.open(self.files[i]) as image:
            return image.convert("RGB"), self.labels[i]


def load_ffcv_writer() -> None:
    import ffcv.writer  # noqa: F401 - so that it is there


def ffcv_write(root: Path, out: Path, *, max_side: int, quality: int, workers: int) -> None:
    """The way of FFCV's documentation: its own writer makes `out` of the images under `root`, all of them as JPEG.

    It waits for ever for a worker that met a bad image, so there should be none. Its chunks are of 100 images; here
    they are smaller where the images are few, so that no worker has to wait long for the last one.
    """
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    folder = scan_folder(root)
    files = PilFiles(folder_files(root), folder.labels.tolist())
    image = RGBImageField(write_mode="jpg", max_resolution=max_side, jpeg_quality=quality)
    writer = DatasetWriter(str(out), {"image": image, "label": IntField()}, num_workers=workers)
    writer.from_indexed_dataset(files, chunksize=min(100, max(1, len(files) // (16 * workers))))


# --- DALI ------------------------------------------------------------------------------------------------------------


def dali_cpu(
    root: Path, views: Sequence[ViewConfig], *, mean: Channels, std: Channels, batch: int, workers: int, images: int
) -> Pass:
    """The way of solo-learn's DALI pipelines, on the CPU: each image decoded once, then every view with all its
    augmentations; a random step is only computed for the images that it falls on.

    It prepares batches ahead of the next epoch: a small folder's images are listed so often that one has `images`.
    """
    from nvidia.dali import fn, pipeline_def
    from nvidia.dali.plugin.base_iterator import LastBatchPolicy
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    files = folder_files(root)
    files *= -(-images // len(files))
    no_gpu: Any = None

    @pipeline_def(batch_size=batch, num_threads=workers, device_id=no_gpu, enable_conditionals=True)
    def pipeline() -> tuple:
        encoded, _ = fn.readers.file(files=files, random_shuffle=True, name="files")
        decoded = fn.decoders.image(encoded, device="cpu")
        return tuple(_dali_view(decoded, view, mean, std) for view in views)

    names = [f"view{number}" for number in range(len(views))]
    built = pipeline()
    built.build()
    loader = DALIGenericIterator(
        [built], names, reader_name="files", last_batch_policy=LastBatchPolicy.DROP, auto_reset=True
    )
    return lambda epoch: sum(len(out["view0"]) for (out,) in loader)


def _dali_view(images: Any, view: ViewConfig, mean: Channels, std: Channels) -> Any:
    """(B, 3, size, size) float32 from decoded images, as a node of a DALI graph."""
    from nvidia.dali import fn
    from nvidia.dali.types import DALIDataType

    side = (view.size, view.size)
    out = fn.random_resized_crop(
        images, size=side, random_area=view.crop_scale, random_aspect_ratio=view.crop_ratio, antialias=True
    )
    if view.jitter_prob > 0:
        out = _dali_sometimes(out, view.jitter_prob, partial(_dali_jitter, strength=view.jitter))
    if view.grayscale_prob > 0:
        out = _dali_sometimes(out, view.grayscale_prob, lambda x: fn.hsv(x, saturation=0.0))
    if view.blur_prob > 0:
        out = _dali_sometimes(
            out, view.blur_prob, lambda x: fn.gaussian_blur(x, sigma=fn.random.uniform(range=view.blur_sigma))
        )
    return fn.crop_mirror_normalize(
        out,
        dtype=DALIDataType.FLOAT,
        output_layout="CHW",
        mirror=fn.random.coin_flip(probability=view.flip_prob),
        mean=[255 * x for x in mean],
        std=[255 * x for x in std],
    )


def _dali_sometimes(images: Any, probability: float, change: Callable[[Any], Any]) -> Any:
    """DALI reads this function's source: the `if` becomes a split and a merge of its graph."""
    from nvidia.dali import fn
    from nvidia.dali.types import DALIDataType

    out = images
    if fn.random.coin_flip(probability=probability, dtype=DALIDataType.BOOL):
        out = change(images)
    return out


def _dali_jitter(images: Any, *, strength: tuple[float, float, float, float]) -> Any:
    from nvidia.dali import fn

    brightness, contrast, saturation, hue = strength
    return fn.color_twist(
        images,
        brightness=fn.random.uniform(range=(1 - brightness, 1 + brightness)),
        contrast=fn.random.uniform(range=(1 - contrast, 1 + contrast)),
        saturation=fn.random.uniform(range=(1 - saturation, 1 + saturation)),
        hue=fn.random.uniform(range=(-360 * hue, 360 * hue)),
    )
