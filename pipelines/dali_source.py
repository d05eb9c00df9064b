"""Image files or WebDataset shards, decoded by DALI: on the GPU, with its JPEG engines, where there is one.

DALI cannot skip an image, often does not name it, and an error ends its pipeline for good. So threads look at each file
first: what is plainly a whole JPEG or PNG file goes to DALI, all else to `decode_image`, which reads it or knows what
is wrong. Where DALI fails all the same, it is given the images one by one, and the batch without the culprits in a new
pipeline.
"""

import ctypes
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pipelines.frames import Frames, host_buffer, read_or_stand_in
from pipelines.headers import plain_size, read_regular
from pipelines.images import BadImage, FolderIndex, decode_image, fit_max_side, fitted_sizes, read_image, scan_folder
from pipelines.shards import INDEX, ShardFiles, point_to_shards, read_index
from ressl.batch import DataError

READ_AHEAD = 2  # batches whose files are being read
IN_FLIGHT = 2  # batches inside DALI, so that its threads do not idle while the last image of one is decoded
CHUNK = 16  # images worth one task of a reading thread
MAX_IDLE = 2  # pipelines kept for the next streams: one for training, one for the evaluations


@dataclass(frozen=True, slots=True)
class Encoded:
    """An image that DALI shall decode."""

    position: int
    data: np.ndarray  # (bytes,) uint8, a JPEG or PNG file
    size: tuple[int, int]  # height, width, as its header says
    original: tuple[int, int]  # height, width before any resizing


@dataclass(frozen=True, slots=True)
class Decoded:
    """An image that was decoded on the host."""

    position: int
    image: np.ndarray  # (H, W, 3) uint8
    original: tuple[int, int]  # height, width before any resizing


Item = Encoded | Decoded


class DaliSource:
    """`path` is a folder of images or a directory of shards. Frames are on `device`; what is larger than `max_side` was
    shrunk there with a cubic filter. Damage that the JPEG decoder of a GPU passes over is passed over."""

    def __init__(
        self,
        path: Path,
        *,
        device: torch.device,
        workers: int,
        max_side: int | None,
        hw_decoder_load: float,
        on_corrupt: Literal["replace", "fail"],
        report: Callable[[str], None],
    ) -> None:
        try:
            import nvidia.dali  # noqa: F401
        except ImportError:
            raise DataError("data.source.name=dali needs DALI; `launch.py doctor` says how to install it") from None
        path = Path(path)
        if (path / INDEX).exists():
            index = read_index(path)
            self.store: FolderIndex | ShardFiles = ShardFiles(index)
            self.labels, self.classes, self.index = index.label, index.classes, index.index
        else:
            try:
                self.store = folder = scan_folder(path)
            except DataError:
                point_to_shards(path)
                raise
            self.labels, self.classes, self.index = folder.labels, folder.classes, np.arange(len(folder.labels))
        if str(device) == "cuda":
            device = torch.device("cuda", torch.cuda.current_device())  # this thread's: streams run in others
        self.device, self.workers, self.max_side = device, max(1, workers), max_side
        self.hw_decoder_load, self.on_corrupt, self.report = hw_decoder_load, on_corrupt, report
        self.refused: set[int] = set()  # positions that DALI has failed on: they are decoded on the host
        self.idle: list[Decoder] = []
        self.lock = threading.Lock()

    def stream(self, batches: Iterable[np.ndarray], *, salt: int) -> Iterator[Frames]:
        waiting = iter(batches)
        first = next(waiting, None)
        if first is None:
            return
        decoder = self._borrow(len(first))
        running: deque[list[Item]] = deque()
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="read")
        try:
            reads = (self._submit(pool, batch, salt) for batch in chain([first], waiting))
            reading = deque(islice(reads, READ_AHEAD))
            while reading or running:
                while reading and len(running) < IN_FLIGHT:
                    running.append([item for part in reading.popleft() for item in part.result()])
                    reading.extend(islice(reads, 1))
                    decoder.start(running[-1])
                try:
                    images = decoder.finish()
                except RuntimeError as error:
                    decoder.drain()
                    running[0] = self._without_culprits(running[0], salt, error)
                    decoder = self._build(decoder.batch_size)
                    for items in running:
                        decoder.start(items)
                    continue
                yield self._frames(decoder, images, running.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            self._give_back(decoder)

    # --- reading, in threads -----------------------------------------------------------------------------------------

    def _submit(self, pool: ThreadPoolExecutor, positions: np.ndarray, salt: int) -> list[Future[list[Item]]]:
        parts = (positions[i : i + CHUNK].tolist() for i in range(0, len(positions), CHUNK))
        return [pool.submit(self._read, part, salt) for part in parts]

    def _read(self, positions: list[int], salt: int) -> list[Item]:
        return [self._encoded(position) or self._decode(position, salt) for position in positions]

    def _encoded(self, position: int) -> "Encoded | None":
        """The image as DALI may have it; None: it is one for the host to decode, or to refuse."""
        data = None if position in self.refused else self._bytes(position)
        size = plain_size(data) if data else None
        if data is None or size is None:
            return None
        try:
            return Encoded(position, np.frombuffer(data, np.uint8), size, self._original(position, size))
        except BadImage:
            return None

    def _bytes(self, position: int) -> bytes | None:
        match self.store:
            case FolderIndex():
                return read_regular(Path(self._where(position)))
            case ShardFiles() as shards:
                try:
                    return shards.read(position)
                except BadImage:
                    return None

    def _where(self, position: int) -> str:
        match self.store:
            case FolderIndex(root=root, paths=paths):
                return f"{root}/{paths[position]}"
            case ShardFiles() as shards:
                return shards.where(position)

    def _original(self, position: int, size: tuple[int, int]) -> tuple[int, int]:
        match self.store:
            case FolderIndex():
                return size
            case ShardFiles() as shards:
                return shards.original(position, size)

    def _decode(self, position: int, salt: int) -> Decoded:
        """The image asked for, or the one that stands in for it, decoded on the host."""
        chosen, image = read_or_stand_in(
            position, self._image, self._where, salt=salt, count=len(self.labels), on_corrupt=self.on_corrupt,
            report=self.report,
        )  # fmt: skip
        original = self._original(chosen, (image.shape[0], image.shape[1]))
        return Decoded(chosen, fit_max_side(image, self.max_side), original)

    def _image(self, position: int) -> np.ndarray:
        match self.store:
            case FolderIndex():
                return read_image(self._where(position))
            case ShardFiles() as shards:
                image = decode_image(shards.read(position))
                shards.original(position, (image.shape[0], image.shape[1]))
                return image

    def _without_culprits(self, items: list[Item], salt: int, error: RuntimeError) -> list[Item]:
        """A batch that DALI failed on: what it fails on alone too is decoded on the host, or replaced."""
        culprits, alone = set(), self._build(1)
        for item in items:
            if isinstance(item, Encoded):
                alone.start([item])
                try:
                    alone.finish()
                except RuntimeError:
                    culprits.add(item.position)
                    alone = self._build(1)
        if not culprits:
            raise RuntimeError(f"DALI failed on a batch, and on no image of it alone: {_reason(error)}") from error
        self.refused |= culprits
        return [self._decode(item.position, salt) if item.position in culprits else item for item in items]

    # --- pipelines ---------------------------------------------------------------------------------------------------

    def _borrow(self, batch_size: int) -> "Decoder":
        with self.lock:
            fitting = [decoder for decoder in self.idle if decoder.batch_size == batch_size]
            if fitting:
                self.idle.remove(fitting[0])
                return fitting[0]
        return self._build(batch_size)

    def _build(self, batch_size: int) -> "Decoder":
        return Decoder(batch_size, self.device, self.workers, self.max_side, self.hw_decoder_load)

    def _give_back(self, decoder: "Decoder") -> None:
        if decoder.drain():
            with self.lock:
                self.idle = [*self.idle, decoder][-MAX_IDLE:]

    def _frames(self, decoder: "Decoder", images: Any, items: list[Item]) -> Frames:
        """One flat buffer on the device: first what DALI has decoded, then what the host has."""
        by_dali = [row for row, item in enumerate(items) if isinstance(item, Encoded)]
        on_host = [(row, item.image) for row, item in enumerate(items) if isinstance(item, Decoded)]
        size = np.empty((len(items), 2), np.int32)
        if by_dali:
            size[by_dali] = [shape[:2] for shape in images.shape()]
        for row, image in on_host:
            size[row] = image.shape[:2]
        order = [*by_dali, *(row for row, _ in on_host)]
        ends = np.cumsum(3 * size.prod(axis=1, dtype=np.int64)[order])
        offset = np.empty(len(items), np.int64)
        offset[order] = np.concatenate([[0], ends[:-1]])
        extent = (int(size[:, 0].max()), int(size[:, 1].max()))
        pixels = torch.empty(int(ends[-1]) + 3 * extent[1], dtype=torch.uint8, device=self.device)
        if by_dali:
            decoder.copy(images, pixels)
        if on_host:
            first = int(offset[on_host[0][0]])
            rest = host_buffer(int(ends[-1]) - first, pin=self.device.type == "cuda")
            np.concatenate([image.reshape(-1) for _, image in on_host], out=rest.numpy())
            pixels[first : first + len(rest)].copy_(rest, non_blocking=True)
        positions = np.array([item.position for item in items])
        return Frames(
            pixels=pixels,
            offset=self._put(offset),
            size=self._put(size),
            stride=self._put(3 * size[:, 1]),
            original=self._put(np.array([item.original for item in items], np.int32)),
            index=self._put(self.index[positions]),
            label=self._put(self.labels[positions]),
            extent=extent,
        )

    def _put(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor


class Decoder:
    """One DALI pipeline: batches go in and come out in order, several under way at a time. Not for two threads."""

    def __init__(
        self, batch_size: int, device: torch.device, workers: int, max_side: int | None, hw_decoder_load: float
    ) -> None:
        self.batch_size, self.device, self.max_side = batch_size, device, max_side
        self.pipeline = _build_pipeline(batch_size, device, workers, max_side is not None, hw_decoder_load)
        self.begun: deque[list[Encoded]] = deque()  # of each batch under way: what DALI has of it
        self.failed: RuntimeError | None = None
        self.held: tuple[Any, torch.cuda.Event] | None = None

    def start(self, items: list[Item]) -> None:
        """Takes the encoded images of a batch, at most `batch_size`; what goes wrong is raised by `finish`."""
        encoded = [item for item in items if isinstance(item, Encoded)]
        self.begun.append(encoded)
        if not encoded or self.failed is not None:
            return
        self.failed = RuntimeError("interrupted")  # until all of it has gone well
        try:
            self.pipeline.feed_input("encoded", [item.data for item in encoded])
            if self.max_side is not None:
                size = np.array([item.size for item in encoded])
                target = fitted_sizes(size, self.max_side)
                self.pipeline.feed_input("target", target.astype(np.float32))
                self.pipeline.feed_input("larger", (target != size).any(axis=1))
            self.pipeline.schedule_run()
        except RuntimeError as error:
            self.failed = error
        else:
            self.failed = None

    def finish(self) -> Any:
        """DALI's list of the images of the oldest batch under way, None where it has none. Raises RuntimeError, after
        which this decoder is of no more use."""
        if self.failed is not None:
            raise self.failed
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        self.failed, images = RuntimeError("interrupted"), None
        try:
            if encoded := self.begun.popleft():
                (images,) = self.pipeline.share_outputs(cuda_stream=stream)
                self.pipeline.release_outputs()
                if stream is None:
                    _refuse_early_ends(images, encoded)
        except RuntimeError as error:
            self.failed = error
            raise
        self.failed = None
        return images

    def copy(self, images: Any, pixels: Tensor) -> None:
        """Copies images one after another to the start of `pixels`; on a GPU in the order of torch's current stream."""
        if self.device.type != "cuda":
            images.copy_to_external(ctypes.c_void_p(pixels.data_ptr()))
            return
        self._let_go()
        stream = torch.cuda.current_stream(self.device)
        handle = ctypes.c_void_p(stream.cuda_stream)
        images.copy_to_external(ctypes.c_void_p(pixels.data_ptr()), handle, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(stream)
        # DALI reuses memory in the order of its own streams, not of this one: so it is held until it has been read
        self.held = (images, copied)

    def drain(self) -> bool:
        """Waits for what is under way. False: something failed, and the decoder is of no more use."""
        self._let_go()
        try:
            while self.begun:
                self.finish()
        except RuntimeError:
            return False
        return self.failed is None

    def _let_go(self) -> None:
        if self.held is not None:
            self.held[1].synchronize()  # of the batch before: it has long been copied
            self.held = None


def _refuse_early_ends(images: Any, encoded: list[Encoded]) -> None:
    """Raises RuntimeError for an image whose data end before its pixels do: the CPU's decoder makes the rest grey."""
    for number, item in enumerate(encoded):
        last = np.asarray(images[number])[-1, -1]
        if abs(last @ (0.299, 0.587, 0.114) - 128) < 1.5:
            try:
                decode_image(item.data.tobytes())
            except BadImage as bad:
                raise RuntimeError(str(bad)) from None


def release_memory() -> None:
    """Gives back what DALI keeps on the GPU, and page-locked on the host, for pipelines that are gone."""
    from nvidia import dali as installed

    dali: Any = installed
    dali.backend.ReleaseUnusedMemory()


def _build_pipeline(batch_size: int, device: torch.device, workers: int, resize: bool, hw_decoder_load: float) -> Any:
    from nvidia import dali as installed

    dali: Any = installed  # its own annotations are incomplete
    fn, types = dali.fn, dali.types

    def decode() -> Any:
        return fn.decoders.image(
            fn.external_source(name="encoded", dtype=types.UINT8, ndim=1),
            device="mixed" if device.type == "cuda" else "cpu",
            output_type=types.RGB,
            adjust_orientation=False,
            jpeg_fancy_upsampling=True,  # as the CPU's libraries enlarge colour; otherwise the GPU repeats pixels
            hw_decoder_load=hw_decoder_load,
            affine=False,  # the threads of all ranks would be tied to the same cores
        )

    def decode_and_shrink() -> Any:
        images = decode()
        larger = fn.external_source(name="larger", dtype=types.BOOL, ndim=0)
        target = fn.external_source(name="target", dtype=types.FLOAT, ndim=1)
        if larger:  # DALI's resize costs about as much where it changes nothing
            images = fn.resize(images, size=target, interp_type=types.INTERP_CUBIC, antialias=True)
        return images

    pipeline = dali.pipeline_def(decode_and_shrink if resize else decode, enable_conditionals=resize)(
        batch_size=batch_size,
        num_threads=workers,
        device_id=device.index if device.type == "cuda" else None,
        prefetch_queue_depth=1,  # how many batches are under way is decided outside
    )
    pipeline.build()
    return pipeline


def _reason(error: RuntimeError) -> str:
    """What DALI says between the place in our code and its farewell."""
    text = " ".join(str(error).split()).rpartition("encountered: ")[2]
    return text.partition(" Current pipeline")[0].strip(" :")[:200] or type(error).__name__
