"""A whole data set, decoded once, in memory. Nothing is read or decoded while training.

Images lie in one buffer without gaps, in RGB or as planes of YUV 4:2:0 (`yuv.py`). Where a table has their sizes it is
made at its exact length. Where sizes show only on decoding it grows, by remapping: no byte is copied, and at most an
eighth more than the images take is reserved meanwhile, of which no page is in memory before it fills. For
`memory: device` it is then copied to the device: the machine holds the images too until then, but neither holds them
twice. For `memory: host` it stays as it is, and each batch goes through a page-locked buffer of its own; torch would
round a page-locked buffer up to a power of two, and only what a GPU copies from gains by being one.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from mmap import MADV_HUGEPAGE, MAP_ANONYMOUS, MAP_PRIVATE, mmap
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipelines.beton import open_beton
from pipelines.frames import Frames, Source, host_buffer
from pipelines.free_memory import free_memory
from pipelines.images import fitted_sizes
from pipelines.prefetch import prefetch
from pipelines.sampler import shard
from pipelines.shards import INDEX, read_index
from pipelines.tensor_file import TensorFile, read_tensor_file
from pipelines.yuv import planar_bytes, to_rgb, to_yuv420
from ressl.batch import DataError
from ressl.config import ResidentSource as Config

CPU = torch.device("cpu")
DECODE_BATCH = 64
SURE, SURE_SHARE = 256, 0.05  # images, and share of them, that must be decoded before the rest is judged by them


class ResidentSource:
    """The images of a tensor file, or of what `decoder` reads at `path`, held as `cfg` says.

    With `cfg.shards` above 1 a rank holds only its own part of the positions (`sampler.shard`), else all. `labels` are
    those of the whole set. `progress` is told how many images of how many are decoded. Raises DataError for what does
    not fit (`Demand`).
    """

    def __init__(
        self,
        path: Path,
        cfg: Config,
        device: torch.device,
        *,
        rank: int = 0,
        world_size: int = 1,
        decoder: Callable[[], Source] | None = None,
        progress: Callable[[int, int], None] = lambda done, count: None,
    ) -> None:
        if cfg.shards > 1 and cfg.shards % world_size:
            raise DataError(f"data.source.shards={cfg.shards} must be a multiple of the {world_size} processes")
        source = _FileImages(open_tensor_file(path)) if decoder is None else decoder()
        ranks = world_size if cfg.shards > 1 else 1
        part = shard(len(source.labels), rank if ranks > 1 else 0, ranks)
        limit = min(_limits(cfg, device), key=_length)
        demand = Demand(path, cfg, len(source.labels), len(part), ranks, world_size, limit)
        length = 1
        if (sizes := _known_sizes(path, source, cfg.max_side)) is not None:
            length = int(_image_bytes(sizes[part], cfg.pixels).sum())
            demand.check(sizes[part], length)
            length += _slack(sizes[part])
        self.cfg, self.device = cfg, device
        self.labels, self.classes, self.index = source.labels, source.classes, source.index
        self.first, self.count = len(source.labels) * rank // ranks if ranks > 1 else 0, len(part)
        try:
            held, self.start = _decode(source, part, demand, length, device, progress)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "DefaultCPUAllocator" not in str(error):  # torch's MemoryError
                raise
            raise DataError(demand.no_memory()) from None
        self.size = held.size.numpy()
        if isinstance(source, _FileImages):
            source.check_unchanged()
        del source
        if (path / INDEX).exists():  # the decoder was DALI, whose memory would stay on the device
            from pipelines.dali_source import release_memory

            release_memory()
        try:
            self.held = held.to(device if cfg.memory == "device" else CPU)
        except torch.OutOfMemoryError:
            raise DataError(replace(demand, limit=_device_limit(device)).refusal(self.size)) from None

    def stream(self, batches: Iterable[np.ndarray], *, salt: int) -> Iterator[Frames]:
        """Raises IndexError for a position that this rank does not hold."""
        for positions in batches:
            rows = positions - self.first
            if (outside := (rows < 0) | (rows >= self.count)).any():
                raise IndexError(
                    f"position {positions[outside][0]} is not among the {self.count:,} from {self.first:,} on "
                    "that this rank holds"
                )
            frames = self._take(rows)
            if self.cfg.pixels == "yuv420":
                if frames.pixels.device.type != self.device.type:
                    frames = frames.pin_memory().to(self.device, non_blocking=True)
                frames = to_rgb(frames)
            yield frames

    def _take(self, rows: np.ndarray) -> Frames:
        """The images in these `rows` of the tables, still planes if they are held so."""
        held, at = self.held, torch.from_numpy(rows)
        if held.pixels.is_cuda:
            at = at.pin_memory().to(held.pixels.device, non_blocking=True)
        height, width = self.size[rows].max(axis=0).tolist()
        frames = Frames(
            pixels=held.pixels,
            offset=held.offset[at],
            size=held.size[at],
            stride=held.stride[at],
            original=held.original[at],
            index=held.index[at],
            label=held.label[at],
            extent=(height, width),
        )
        if self.cfg.memory == "device":
            return frames
        pixels, offset = self._gather(rows, slack=3 * (width + 1))
        return replace(frames, pixels=pixels, offset=offset)

    def _gather(self, rows: np.ndarray, slack: int) -> tuple[Tensor, Tensor]:
        """The images of a batch one after another in a new buffer, page-locked for a GPU; and their offsets."""
        first, end = self.start[rows], self.start[rows + 1]
        until = np.cumsum(end - first)
        offset = until - (end - first)
        pixels = host_buffer(int(until[-1]) + slack, pin=self.device.type == "cuda")
        into, source = pixels.numpy(), self.held.pixels.numpy()
        for at, to, begin, stop in zip(offset.tolist(), until.tolist(), first.tolist(), end.tolist(), strict=True):
            into[at:to] = source[begin:stop]
        return pixels, torch.from_numpy(offset)


# --- decoding --------------------------------------------------------------------------------------------------------


def open_tensor_file(path: Path) -> TensorFile:
    """`read_tensor_file`, but a file of another kind is not called damaged. Raises DataError."""
    if path.is_file() and path.suffix.lower() != ".safetensors":
        raise DataError(
            f"{path}: not a file that data.source.name=resident takes; give a .safetensors file "
            "(`convert --to tensor`), a .beton file, a folder of images or a directory of shards with its index"
        )
    return read_tensor_file(path, sealed=True)


class _FileImages:
    """A tensor file as a source."""

    def __init__(self, file: TensorFile) -> None:
        self.file, self.labels, self.classes = file, file.label.numpy().copy(), file.classes
        self.index, self.written = file.index.numpy().copy(), file.path.stat().st_mtime_ns

    def check_unchanged(self) -> None:
        """The file is mapped: what was written to it meanwhile may be among what was read."""
        if not self.file.path.exists() or self.file.path.stat().st_mtime_ns != self.written:
            raise DataError(f"{self.file.path}: changed while it was read; start again")

    def stream(self, batches: Iterable[np.ndarray], *, salt: int) -> Iterator[Frames]:
        file = self.file
        for positions in batches:
            rows = torch.from_numpy(positions)
            size = file.size[rows]
            yield Frames(
                pixels=file.pixels,
                offset=file.offset[rows],
                size=size,
                stride=3 * size[:, 1],
                original=file.original[rows],
                index=file.index[rows],
                label=file.label[rows],
                extent=(int(size[:, 0].max()), int(size[:, 1].max())),
            )


def _decode(
    source: Source,
    part: np.ndarray,
    demand: "Demand",
    length: int,
    device: torch.device,
    progress: Callable[[int, int], None],
) -> tuple[Frames, np.ndarray]:
    """The images at the positions `part`, one after another, on the host; and (n + 1,) int64, where each starts, then
    the end. Planes are made on `device`. `length` bytes are reserved at first. Raises MemoryError."""
    count = len(part)
    size, original = np.empty((count, 2), np.int32), np.empty((count, 2), np.int32)
    index, label, start = np.empty(count, np.int64), np.empty(count, np.int64), np.zeros(count + 1, np.int64)
    memory, slack = _reserve(length), _slack(size[:0])
    batches = [part[at : at + DECODE_BATCH] for at in range(0, count, DECODE_BATCH)]
    done = 0
    # in a thread of its own, so that a batch is decoded while the one before it is converted
    with closing(prefetch(source.stream(batches, salt=0), CPU, depth=1)) as stream:
        for frames in stream:
            here = slice(done, done + len(frames.offset))
            size[here], original[here] = frames.size.cpu().numpy(), frames.original.cpu().numpy()
            index[here], label[here] = frames.index.cpu().numpy(), frames.label.cpu().numpy()
            start[done + 1 : here.stop + 1] = start[done] + np.cumsum(_image_bytes(size[here], demand.cfg.pixels))
            demand.check(size[: here.stop], int(start[here.stop]))
            slack = max(slack, _slack(size[here]))
            needed = int(start[here.stop]) + slack
            if needed > len(memory):  # also where a larger image stands in for one whose size was known
                _resize(memory, max(needed, min(needed + needed // 8, demand.limit.bytes)))
            images = _images(frames)
            flat = _as_planes(images, device) if demand.cfg.pixels == "yuv420" else [i.flatten() for i in images]
            _write(memory, flat, start[done : here.stop + 1].tolist())
            done = here.stop
            progress(done, count)
    _resize(memory, int(start[-1]) + slack)
    width = torch.from_numpy(size[:, 1].copy())
    held = Frames(
        pixels=torch.frombuffer(memory, dtype=torch.uint8),
        offset=torch.from_numpy(start[:-1].copy()),
        size=torch.from_numpy(size),
        stride=width if demand.cfg.pixels == "yuv420" else 3 * width,
        original=torch.from_numpy(original),
        index=torch.from_numpy(index),
        label=torch.from_numpy(label),
        extent=(int(size[:, 0].max(initial=0)), int(size[:, 1].max(initial=0))),
    )
    return held, start


def _reserve(length: int) -> mmap:
    """Memory that can be resized without a copy. Raises MemoryError."""
    try:
        memory = mmap(-1, length, flags=MAP_PRIVATE | MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(error.strerror) from None
    with suppress(OSError):  # a kernel may be built without huge pages
        memory.madvise(MADV_HUGEPAGE)
    return memory


def _resize(memory: mmap, length: int) -> None:
    """It may move: no tensor may be on it. Raises MemoryError."""
    try:
        memory.resize(length)
    except OSError as error:
        raise MemoryError(error.strerror) from None


def _write(memory: mmap, images: list[Tensor], start: list[int]) -> None:
    """Images (bytes,) each, the first from start[0] to start[1], and so on. The tensor on `memory` ends here."""
    pixels = torch.frombuffer(memory, dtype=torch.uint8)
    for image, first, end in zip(images, start[:-1], start[1:], strict=True):
        pixels[first:end] = image


def _slack(size: np.ndarray) -> int:
    """Bytes behind the last of images of these sizes (n, 2), for `Frames` and for `to_rgb`."""
    return 3 * (int(size[:, 1].max(initial=0)) + 1)


def _images(frames: Frames) -> list[Tensor]:
    """Each image as (H, W, 3), in place."""
    numbers = zip(frames.offset.tolist(), frames.stride.tolist(), frames.size.tolist(), strict=True)
    return [
        frames.pixels[first : first + stride * (height - 1) + 3 * width].as_strided((height, width, 3), (stride, 3, 1))
        for first, stride, (height, width) in numbers
    ]


def _as_planes(images: list[Tensor], device: torch.device) -> list[Tensor]:
    """(H, W, 3) each -> (bytes,) each, on the host. Images of one size go together."""
    rows: dict[torch.Size, list[int]] = {}
    for row, image in enumerate(images):
        rows.setdefault(image.shape, []).append(row)
    flat = list(images)
    for group in rows.values():
        planes = to_yuv420(torch.stack([images[row] for row in group]).to(device)).cpu()
        for row, image in zip(group, planes, strict=True):
            flat[row] = image
    return flat


# --- what fits -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Limit:
    """What a rank's images may take, what sets it, and what would raise it."""

    bytes: int
    name: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Demand:
    """What a rank is to hold, and in how much memory."""

    path: Path
    cfg: Config
    images: int  # of the whole set
    held: int  # of them by this rank
    ranks: int  # that share the set
    world_size: int  # all ranks
    limit: Limit

    def check(self, size: np.ndarray, spent: int) -> None:
        """Raises DataError when images of these sizes (n, 2), which take `spent` bytes, are too much already, or when
        all those to be held will be, beyond doubt: images come class by class, so the first may be unlike the rest."""
        done = len(size)
        sure = done == self.held or done >= max(SURE, SURE_SHARE * self.held)
        doubt = 0.5 * (1 - done / max(1, self.held))
        if spent > self.limit.bytes or (sure and spent * self.held > self.limit.bytes * (1 + doubt) * done):
            raise DataError(self.refusal(size))

    def refusal(self, size: np.ndarray) -> str:
        """The arithmetic of what does not fit, and what would help. `size` (n, 2): of the first n images, or of all."""
        done, form = len(size), "RGB" if self.cfg.pixels == "rgb" else "yuv420"
        spent = float(_image_bytes(size, self.cfg.pixels).sum())
        known = "" if done == self.held else f", the mean of the first {done:,}"
        shared = f" / {self.ranks} ranks = {self.held:,}" if self.ranks > 1 else ""
        message = (
            f"{self.path}: {self.images:,} images{shared} x {_amount(spent / done)} ({form}{known}) = "
            f"{_amount(spent * self.held / done)}{' a rank' if shared else ''}, over {self.limit.name}; "
        )
        if form == "RGB":
            planes = float(_image_bytes(size, "yuv420").sum())
            message += f"data.source.pixels=yuv420 would make it {_amount(planes * self.held / done)}; "
        return f"{message}{self.limit.remedy}, {self._otherwise()}"

    def no_memory(self) -> str:
        """Of memory that the system did not give, although it is within the limit."""
        return (
            f"{self.path}: the system gives this process too little memory to decode and hold {self.held:,} images, "
            "though they may fit into data.source.budget_gb; raise what it gives (see `ulimit -v` and "
            f"vm.overcommit_memory), {self._otherwise()}"
        )

    def _otherwise(self) -> str:
        """What helps whatever the limit."""
        folder = self.path.is_dir()
        smaller = "lower data.source.max_side" if folder else "convert again with a smaller --max-side"
        if self.ranks > 1:
            return f"{smaller}, or share the images out over more processes (data.source.shards)"
        if self.world_size > 1:
            return f"{smaller}, or share the images out over the processes (data.source.shards={self.world_size})"
        other = "ffcv" if self.path.suffix == ".beton" else "dali" if (self.path / INDEX).exists() else "folder"
        files = "" if folder or other == "ffcv" else " and the images that the file was made from"
        return f"{smaller}, or decode images as they are needed (data.source.name={other}{files})"


def _limits(cfg: Config, device: torch.device) -> list[Limit]:
    """The budget and the memory that is free now: on the machine, for each of its ranks, and on the device."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free, where = free_memory()
    free //= ranks
    each = f" for each of its {ranks} processes" if ranks > 1 else ""
    limits = [
        Limit(int(cfg.budget_gb * 10**9), f"data.source.budget_gb={cfg.budget_gb:g}", "raise the budget"),
        Limit(free, f"the {_amount(free)} of memory that are free {where}{each}", "free some memory"),
    ]
    if device.type == "cuda" and cfg.memory == "device":
        limits.append(_device_limit(device))
    return limits


def _device_limit(device: torch.device) -> Limit:
    free = torch.cuda.mem_get_info(device)[0]
    return Limit(free, f"the {_amount(free)} of memory that are free on {device}", "set data.source.memory=host")


def _length(limit: Limit) -> int:
    return limit.bytes


def _known_sizes(path: Path, source: Source, max_side: int | None) -> np.ndarray | None:
    """(N, 2) height and width of all images as they will be held, where a table in their file has them."""
    if isinstance(source, _FileImages):
        return source.file.size.numpy()
    if path.suffix == ".beton":
        return open_beton(path).size
    if not (path / INDEX).exists():
        return None
    size = read_index(path).size
    return size if max_side is None else fitted_sizes(size, max_side)


def _image_bytes(size: np.ndarray, pixels: str) -> np.ndarray:
    """(n,) int64 from (n, 2) height and width."""
    return planar_bytes(size) if pixels == "yuv420" else 3 * size.prod(axis=1, dtype=np.int64)


def _amount(count: float) -> str:
    for unit, length in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= length:
            return f"{count / length:,.1f} {unit}"
    return f"{count:,.0f} bytes"
