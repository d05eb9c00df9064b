"""`.beton` files, each image decoded once, by FFCV's compiled decoder, straight into the buffer that is handed over.

Of FFCV's loader only what pays is used: its JPEG decoder and the plan of its page cache. Its own loop hangs for ever
on any exception, leaks when an epoch is left early, gives every image the room of the largest and overwrites what it
gave; so the loop here is ours, in the caller's thread. Its decoder's verdict, which FFCV drops, is kept for every
image, and so is the size that a JPEG's header tells: where it is not the table's, the decoder would fill part of the
image only. The file is validated before it is read, and never mapped: of a mapped file, a part that is cut off or that
the disk cannot read ends the process.
"""

import ctypes
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from torch import Tensor

from pipelines.beton import JPG, RAW, Beton, open_again, open_beton
from pipelines.frames import Frames, host_buffer, read_or_stand_in
from pipelines.images import BadImage, decode_image
from pipelines.manifest import classes_of
from ressl.batch import DataError

READERS = 12  # threads that read pages, as many as FFCV has
WHOLE, UNREAD, DAMAGED = 0, 1, 2  # what became of an image
NO_FILE, NO_MEMORY = -1, np.zeros(0, np.uint8)  # where the data do not come from


class FfcvSource:
    def __init__(
        self,
        path: Path,
        *,
        workers: int,
        cache: Literal["os", "process"] = "os",
        on_corrupt: Literal["replace", "fail"],
        report: Callable[[str], None],
        pin: bool = False,
    ) -> None:
        try:
            with _threads_kept():
                import ffcv.libffcv  # noqa: F401
        except ImportError:
            raise DataError("data.source.name=ffcv needs FFCV; `launch.py doctor` says how to install it") from None
        self.beton: Beton = open_beton(path, sealed=True)
        self.labels, self.classes, self.index = self.beton.label, classes_of(path), self.beton.index
        self.workers, self.cache, self.pin = workers, cache, pin
        self.on_corrupt, self.report = on_corrupt, report
        nothing = np.zeros(0, np.int64)
        self._decode(nothing, NO_FILE, NO_MEMORY, nothing, np.zeros(0, np.uint8), nothing)  # compiles

    def stream(self, batches: Iterable[np.ndarray], *, salt: int) -> Iterator[Frames]:
        with open_again(self.beton) as file:
            match self.cache:
                case "os":
                    data = _in_file(self.beton, batches)
                case "process":
                    data = _paged(self.beton, file, list(batches))
            with closing(data):
                for positions, memory, start in data:
                    yield self._frames(file, positions, memory, start, salt)

    def _frames(
        self, file: BinaryIO, positions: np.ndarray, memory: np.ndarray, start: np.ndarray, salt: int
    ) -> Frames:
        """`memory` (bytes,) uint8 holds the file's data of each position (B,) from `start` (B,) on; where it is empty,
        the file itself does. Raises DataError for a file that was written to since it was checked."""
        lengths = 3 * self.beton.size[positions].prod(axis=1, dtype=np.int64)
        offset = np.cumsum(lengths) - lengths
        slack = 3 * int(self.beton.size[positions, 1].max())
        pixels = host_buffer(int(lengths.sum()) + slack, pin=self.pin)
        source = NO_FILE if len(memory) else file.fileno()
        fault = self._decode(positions, source, memory, start, pixels.numpy(), offset)
        _check_unchanged(self.beton, file)  # after the decoding: what it has read until now was the file's
        if fault.any():
            positions, pixels, offset = self._without_bad(fault, positions, pixels, offset, salt)
        size = self.beton.size[positions]
        return Frames(
            pixels=pixels,
            offset=torch.from_numpy(offset),
            size=torch.from_numpy(size),
            stride=torch.from_numpy(3 * size[:, 1]),
            original=torch.from_numpy(self.beton.original[positions]),
            index=torch.from_numpy(self.beton.index[positions]),
            label=torch.from_numpy(self.beton.label[positions]),
            extent=(int(size[:, 0].max()), int(size[:, 1].max())),
        )

    def _decode(
        self,
        positions: np.ndarray,
        file: int,
        memory: np.ndarray,
        start: np.ndarray,
        pixels: np.ndarray,
        offset: np.ndarray,
    ) -> np.ndarray:
        """Fills `pixels`; (B,) uint8 says what became of each image."""
        import numba

        # the number of threads belongs to the calling thread
        numba.set_num_threads(max(1, min(self.workers, numba.config.NUMBA_NUM_THREADS)))  # type: ignore[attr-defined]
        fault, beton = np.zeros(len(positions), np.uint8), self.beton
        length, mode, size = beton.data_size[positions], beton.mode[positions], beton.size[positions]
        with numba.parallel_chunksize(4):  # images a thread takes at a time: some take twice as long as others
            _compiled()(file, memory, start, length, mode, size, pixels, offset, fault)
        return fault

    def _without_bad(
        self, fault: np.ndarray, positions: np.ndarray, pixels: Tensor, offset: np.ndarray, salt: int
    ) -> tuple[np.ndarray, Tensor, np.ndarray]:
        """Others in place of the images with a fault: behind the rest, as they may be larger."""
        positions, offset, images = positions.copy(), offset.copy(), []
        room = 3 * int(self.beton.size[:, 1].max())  # slack for whatever width comes in
        end = pixels.numel()
        for row in np.flatnonzero(fault).tolist():
            damaged = int(positions[row]) if fault[row] == DAMAGED else None
            positions[row], image = read_or_stand_in(
                int(positions[row]), partial(read_sample, self.beton, damaged=damaged), self._where, salt=salt,
                count=len(self.labels), on_corrupt=self.on_corrupt, report=self.report,
            )  # fmt: skip
            offset[row], end = end, end + image.size
            images.append(image.reshape(-1))
        joined = host_buffer(end + room, pin=self.pin)
        joined.numpy()[:end] = np.concatenate([pixels.numpy(), *images])
        return positions, joined, offset

    def _where(self, position: int) -> str:
        return f"{self.beton.path}: image {self.beton.index[position]}"


def read_sample(beton: Beton, position: int, *, damaged: int | None = None) -> np.ndarray:
    """One image, (H, W, 3) uint8, without FFCV. Raises BadImage, also for position `damaged`, which FFCV has refused,
    and DataError for another file than the one that was checked."""
    if position == damaged:
        raise BadImage("its JPEG data is damaged")
    with open_again(beton) as file:
        try:
            data = os.pread(file.fileno(), int(beton.data_size[position]), int(beton.data_ptr[position]))
        except OSError as error:
            raise BadImage(f"cannot be read: {(error.strerror or str(error)).lower()}") from None
    if len(data) != beton.data_size[position]:
        raise BadImage(f"the file ends after {len(data):,} of its {beton.data_size[position]:,} bytes")
    height, width = beton.size[position].tolist()
    if beton.mode[position] == RAW:
        return np.frombuffer(data, np.uint8).reshape(height, width, 3)
    image = decode_image(data)
    if image.shape != (height, width, 3):
        raise BadImage(f"has {image.shape[0]} x {image.shape[1]} pixels, but the file's table says {height} x {width}")
    return image


# --- where the file's bytes are: positions, memory, and the first byte of each position's data in it ------------------

Data = tuple[np.ndarray, np.ndarray, np.ndarray]


def _in_file(beton: Beton, batches: Iterable[np.ndarray]) -> Generator[Data]:
    """Each image is read where it is decoded; the system keeps what fits into memory."""
    for positions in batches:
        yield positions, NO_MEMORY, beton.data_ptr[positions]


def _paged(beton: Beton, file: BinaryIO, batches: list[np.ndarray]) -> Generator[Data]:
    """By the plan of FFCV's process cache: each page of the file is read shortly before its first use in the epoch, and
    its memory is used again after the last. The reading is ours: FFCV's goes on with whatever it could not read."""
    if not batches:
        return
    with _threads_kept():
        from ffcv.memory_managers.process_cache.schedule import compute_schedule

    page = beton.data_ptr // beton.page_size
    plan = compute_schedule([set(page[positions].tolist()) for positions in batches])
    slot = np.zeros(int(page.max()) + 1, np.int64)
    slot[list(plan.page_to_slot)] = list(plan.page_to_slot.values())
    memory = np.empty((plan.num_slots, beton.page_size), np.uint8)
    reading: dict[int, Future[None]] = {}
    pool = ThreadPoolExecutor(READERS, thread_name_prefix="page")
    try:
        for number, positions in enumerate(batches):
            for wanted in plan.can_prefetch_at[number]:
                reading[wanted] = pool.submit(_read_page, beton, file.fileno(), wanted, memory[slot[wanted]])
            for needed in plan.entering_at[number]:
                reading.pop(needed).result()
            first = slot[page[positions]] * beton.page_size
            yield positions, memory.reshape(-1), first + beton.data_ptr[positions] % beton.page_size
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _read_page(beton: Beton, file: int, page: int, memory: np.ndarray) -> None:
    """Fills `memory` (page_size,); the file's last page is shorter. Raises DataError where the file is."""
    begin = page * beton.page_size
    length, done = min(beton.page_size, beton.length - begin), 0
    while done < length:
        try:
            count = os.preadv(file, [memory[done:length].data], begin + done)
        except OSError as error:
            raise DataError(f"{beton.path}: cannot be read at byte {begin + done:,}: {error.strerror}") from None
        if count == 0:
            raise DataError(f"{beton.path}: ends at byte {begin + done:,}: it was cut since the run began")
        done += count


def _check_unchanged(beton: Beton, file: BinaryIO) -> None:
    """What is read of a file that others write to may be anything: the tables are those of before."""
    status = os.fstat(file.fileno())
    if (status.st_size, status.st_mtime_ns) != beton.identity[2:]:
        raise DataError(f"{beton.path}: changed since the run began; start it again")


# --- FFCV ------------------------------------------------------------------------------------------------------------


@cache
def _compiled() -> Callable[..., None]:
    """decode(file, memory, start, length, mode, size, pixels, offset, fault), compiled for all threads, without
    Python's lock.

    Compiling takes seconds, so a process does it once. Functions that numba compiled do not leave quietly: it stays.
    """
    import numba

    with _threads_kept():
        from ffcv.libffcv import imdecode, memcpy

    alone = numba.njit(nogil=True)
    jpeg, copy, read, has_size = alone(imdecode), alone(memcpy), alone(_read), alone(_has_size)

    @alone
    def decode_one(
        file: Any, memory: Any, start: Any, length: Any, mode: Any, height: Any, width: Any, out: Any
    ) -> Any:
        if file == NO_FILE:
            data = memory[start : start + length]
        elif mode == RAW:
            data = out
        else:
            data = np.empty(length, np.uint8)
        if file != NO_FILE and not read(file, data, start):
            return UNREAD
        if mode == JPG:
            if not has_size(data, height, width):
                return DAMAGED
            return WHOLE if jpeg(data, out, height, width, height, width, 0, 0, 1, 1, False, False) == 0 else DAMAGED
        if file == NO_FILE:
            copy(data, out)
        return WHOLE

    def decode(
        file: Any, memory: Any, start: Any, length: Any, mode: Any, size: Any, pixels: Any, offset: Any, fault: Any
    ) -> None:
        for i in numba.prange(len(start)):
            height, width = np.uint32(size[i, 0]), np.uint32(size[i, 1])
            out = pixels[offset[i] : offset[i] + 3 * np.int64(height) * np.int64(width)]
            fault[i] = decode_one(file, memory, start[i], length[i], mode[i], height, width, out)

    return numba.njit(nogil=True, parallel=True, error_model="numpy")(decode)


_pread = ctypes.CDLL(None).pread
_pread.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64]
_pread.restype = ctypes.c_ssize_t


def _read(file: int, data: np.ndarray, start: int) -> bool:
    """To be compiled. Whether all of `data` could be filled with what `file` holds from `start` on."""
    address, left = np.int64(data.ctypes.data), np.int64(len(data))
    while left > 0:
        count = _pread(file, address, left, start)
        if count <= 0:
            return False
        address, left, start = address + count, left - count, start + count
    return True


def _has_size(jpeg: np.ndarray, height: int, width: int) -> bool:
    """To be compiled. Whether the frame header (ITU-T T.81, B.2.2) of a JPEG file tells this size."""
    at = 2
    while at + 9 <= len(jpeg) and jpeg[at] == 0xFF:
        if 0xC0 <= jpeg[at + 1] <= 0xC3:
            return jpeg[at + 5] * 256 + jpeg[at + 6] == height and jpeg[at + 7] * 256 + jpeg[at + 8] == width
        at += 2 + jpeg[at + 2] * 256 + jpeg[at + 3]
    return False


@contextmanager
def _threads_kept() -> Generator[None]:
    """`import ffcv` sets the number of threads of torch and of numba to one: both are put back."""
    import numba

    before = torch.get_num_threads(), numba.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        numba.set_num_threads(before[1])
