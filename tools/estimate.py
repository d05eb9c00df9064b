"""What a conversion will take, told from some of its images before it begins: size, time, loss of quality."""

import io
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from pipelines.beton import JPG
from pipelines.images import BadImage
from tools.encode import Options, Skipped, encode, lossy, prepare
from tools.image_sets.image_set import ImageSet
from tools.quality import psnr, ssim

SAMPLES = 200  # images that are tried of each split
PLACED = 2000  # images that are placed to see what a format adds
TABLES = 100  # bytes an image takes in the index and other tables behind the data, about
MARGIN = 1.02  # of the expected size that must be free


class Layout(Protocol):
    """Where images go, one after another: of any of the formats."""

    def place(self, index: int, length: int, /) -> tuple[int, int]: ...
    def ends(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True)
class Sample:
    stored: int  # bytes it takes in the output; 0 where the image cannot be read
    seconds: float  # to read and encode it
    loss: tuple[float, float] | None  # PSNR (dB) and SSIM against the image before it was encoded; None: no loss


@dataclass(frozen=True, slots=True)
class Estimate:
    """Of one split with `images` images still to be done."""

    images: int
    stored: float  # bytes they will take
    error: float  # share of that, one standard deviation
    seconds: float  # with all processes
    tried: int
    unreadable: int  # of those that were tried
    mean: float  # bytes of an image
    psnr: float | None  # dB, mean of those that were encoded with loss; None where none was
    ssim: float | None


def sample_image(images: ImageSet, options: Options, i: int) -> Sample:
    """Encodes the set's entry `i` and compares what came of it with what went in."""
    begin = time.perf_counter()
    one = encode(images, options, i)
    seconds = time.perf_counter() - begin
    if isinstance(one, Skipped):
        return Sample(0, seconds, None)
    loss = None
    if lossy(options) and int(one.row["mode"]) == JPG and one.data[:2] == b"\xff\xd8":
        found = images.read(i)
        if not isinstance(found, bytes) or found != one.data:
            loss = _loss(found, options, one.data)
    return Sample(len(one.data), seconds, loss)


def _loss(found: bytes | np.ndarray, options: Options, data: bytes) -> tuple[float, float] | None:
    try:
        before = np.asarray(prepare(found, options)[0])
    except BadImage:  # it was readable a moment ago
        return None
    with Image.open(io.BytesIO(data)) as image:
        after = np.asarray(image.convert("RGB"))
    return psnr(before, after), ssim(before, after)


def spread(order: np.ndarray, count: int = SAMPLES, run: int = 1) -> list[int]:
    """Up to `count` of the entries, evenly spread: `run` neighbours at a time."""
    starts = np.linspace(0, max(0, len(order) - run), min(count, len(order)) // run or 1).astype(int)
    places = np.unique((starts[:, None] + np.arange(run)).clip(max=len(order) - 1))
    return [int(order[place]) for place in places]


def estimate(samples: Sequence[Sample], images: int, begun: int, layout: Layout, processes: int) -> Estimate:
    """For `images` images like the samples, `begun` of which are done; `layout` is a new one, for all of them."""
    sizes = np.array([sample.stored for sample in samples], float)
    losses = np.array([sample.loss for sample in samples if sample.loss is not None]).reshape(-1, 2)
    seconds = float(np.mean([sample.seconds for sample in samples]))
    finite = losses[np.isfinite(losses[:, 0]), 0]
    whole = _stored_bytes(sizes.astype(int).tolist(), images, layout)
    left = (images - begun) / images
    return Estimate(
        images=images - begun,
        stored=whole * left,
        error=float(sizes.std(ddof=1) / len(sizes) ** 0.5 / max(sizes.mean(), 1)) if len(sizes) > 1 else 0.0,
        seconds=seconds * (images - begun) / processes,
        tried=len(samples),
        unreadable=int((sizes == 0).sum()),
        mean=float(sizes.mean()),
        psnr=float(finite.mean()) if len(finite) else None,
        ssim=float(losses[:, 1].mean()) if len(losses) else None,
    )


def _stored_bytes(lengths: Sequence[int], images: int, layout: Layout) -> float:
    """What the format makes of that: by placing the samples, over and over, as if they were the images."""
    fixed, placed = sum(layout.ends()), 0
    stored = [length for length in lengths if length]
    while stored and placed < min(images, PLACED):
        for length in stored:
            layout.place(placed, length)
            placed += 1
    each = (sum(layout.ends()) - fixed) / placed + TABLES if placed else 0.0
    return fixed + each * images * len(stored) / len(lengths)


def free_bytes(directory: Path) -> int:
    """Free where `directory` is or will be."""
    place = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    return shutil.disk_usage(place).free


def fits(estimates: Sequence[Estimate], free: int) -> bool:
    return sum(one.stored for one in estimates) * MARGIN <= free


def show_estimates(estimates: dict[str, Estimate], free: int, processes: int, console: Console) -> None:
    """One table: what each split will take, and what there is."""
    tried = sum(one.tried for one in estimates.values())
    table = Table(title=f"expected, from {tried:,} images", title_justify="left", show_footer=len(estimates) > 1)
    total = sum(one.stored for one in estimates.values())
    seconds = sum(one.seconds for one in estimates.values())
    table.add_column("split", footer="together")
    table.add_column("images", justify="right", footer=f"{sum(one.images for one in estimates.values()):,}")
    table.add_column("size", justify="right", footer=size_text(total))
    table.add_column(f"time, {processes} core{'s' * (processes != 1)}", justify="right", footer=time_text(seconds))
    table.add_column("loss by encoding")
    for split, one in estimates.items():
        size = f"{size_text(one.stored)} +- {100 * one.error:.0f} %"
        loss = "none"
        if one.psnr is not None:
            loss = f"PSNR {one.psnr:.1f} dB, SSIM {one.ssim:.3f}"
        table.add_row(split, f"{one.images:,}", size, time_text(one.seconds), loss)
    console.print(table)
    for split, one in estimates.items():
        if one.unreadable:
            console.print(f"{split}: {one.unreadable:,} of the {one.tried:,} images that were tried cannot be read")
    console.print(f"free there: {size_text(free)}")


def size_text(number: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= scale:
            return f"{number / scale:,.1f} {unit}"
    return f"{number:.0f} bytes"


def time_text(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 1 else "under 1 s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes / 60:.1f} h"
