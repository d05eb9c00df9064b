"""`.beton` files, each image decoded once, by FFCV's compiled decoder, straight into the buffer that is handed over.

Of FFCV's loader only what pays is used: its JPEG decoder and the plan of its page cache. Its own loop hangs for ever
on any exception, leaks when an epoch is left early, gives every image the room of the largest and overwrites what it
gave; so the loop here is ours, in the caller's thread. Its decoder's verdict, which FFCV drops, is kept for every
image. The file is validated before anything maps it.
"""

import os
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from torch import Tensor

from pipelines.beton import JPG, RAW, Beton, open_again, open_beton
from pipelines.frames import Frames, host_buffer, stand_in
from pipelines.images import BadImage, decode_image
from pipelines.manifest import classes_of
from ressl.batch import DataError

READERS = 12  # threads that read pages, as many as FFCV has


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
        self.beton: Beton = open_beton(path)
        self.labels, self.classes, self.index = self.beton.label, classes_of(path), self.beton.index
        self.workers, self.cache, self.pin = workers, cache, pin
        self.on_corrupt, self.report = on_corrupt, report
        nothing = np.zeros(0, np.int64)
        self._decode(nothing, _read_only(np.zeros(0, np.uint8)), nothing, np.zeros(0, np.uint8), nothing)  # compiles

    def stream(self, batches: Iterable[np.ndarray], *, salt: int) -> Iterator[Frames]:
        with open_again(self.beton) as file:
            match self.cache:
                case "os":
                    data = _mapped(self.beton, file, batches)
                case "process":
                    data = _paged(self.beton, file, list(batches))
            with closing(data):
                for positions, memory, start in data:
                    yield self._frames(positions, memory, start, salt)

    def _frames(self, positions: np.ndarray, memory: np.ndarray, start: np.ndarray, salt: int) -> Frames:
        """`memory` (bytes,) uint8 holds the file's data of each position (B,) from `start` (B,) on."""
        lengths = 3 * self.beton.size[positions].prod(axis=1, dtype=np.int64)
        offset = np.cumsum(lengths) - lengths
        slack = 3 * int(self.beton.size[positions, 1].max())
        pixels = host_buffer(int(lengths.sum()) + slack, pin=self.pin)
        good = self._decode(positions, memory, start, pixels.numpy(), offset)
        if not good.all():
            positions, pixels, offset = self._without_bad(np.flatnonzero(~good), positions, pixels, offset, salt)
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
        self, positions: np.ndarray, memory: np.ndarray, start: np.ndarray, pixels: np.ndarray, offset: np.ndarray
    ) -> np.ndarray:
        """Fills `pixels`; (B,) bool says which images the decoder took."""
        import numba

        # the number of threads belongs to the calling thread
        numba.set_num_threads(max(1, min(self.workers, numba.config.NUMBA_NUM_THREADS)))  # type: ignore[attr-defined]
        good, beton = np.zeros(len(positions), np.bool_), self.beton
        length, mode, size = beton.data_size[positions], beton.mode[positions], beton.size[positions]
        with numba.parallel_chunksize(4):  # images a thread takes at a time: some take twice as long as others
            _compiled()(memory, start, length, mode, size, pixels, offset, good)
        return good

    def _without_bad(
        self, bad: np.ndarray, positions: np.ndarray, pixels: Tensor, offset: np.ndarray, salt: int
    ) -> tuple[np.ndarray, Tensor, np.ndarray]:
        """Others in place of the images in the rows `bad`: behind the rest, as they may be larger."""
        positions, offset, images = positions.copy(), offset.copy(), []
        room = 3 * int(self.beton.size[:, 1].max())  # slack for whatever width comes in
        end = pixels.numel()
        for row in bad.tolist():
            where = f"{self.beton.path}: image {self.beton.index[positions[row]]}"
            if self.on_corrupt == "fail":
                raise DataError(f"{where}: its JPEG data is damaged (data.on_corrupt=replace goes on without it)")
            positions[row], image = self._stand_in(int(positions[row]), salt, where)
            self.report(f"{where}: its JPEG data is damaged; replaced by image {self.beton.index[positions[row]]}")
            offset[row], end = end, end + image.size
            images.append(image.reshape(-1))
        joined = host_buffer(end + room, pin=self.pin)
        joined.numpy()[:end] = np.concatenate([pixels.numpy(), *images])
        return positions, joined, offset

    def _stand_in(self, position: int, salt: int, where: str) -> tuple[int, np.ndarray]:
        for attempt in range(9):
            chosen = stand_in(position, attempt, salt, len(self.labels))
            try:
                return chosen, read_sample(self.beton, chosen)
            except BadImage:
                continue
        raise DataError(f"{where}: its JPEG data is damaged, and so is that of 9 others tried in its place")


def read_sample(beton: Beton, position: int) -> np.ndarray:
    """One image, (H, W, 3) uint8, without FFCV. Raises BadImage."""
    with open_again(beton) as file:
        file.seek(int(beton.data_ptr[position]))
        data = file.read(int(beton.data_size[position]))
    if beton.mode[position] == RAW:
        return np.frombuffer(data, np.uint8).reshape(*beton.size[position], 3)
    return decode_image(data)


# --- where the file's bytes are: positions, memory, and the first byte of each position's data in it ------------------

Data = tuple[np.ndarray, np.ndarray, np.ndarray]


def _mapped(beton: Beton, file: BinaryIO, batches: Iterable[np.ndarray]) -> Generator[Data]:
    memory = _read_only(np.memmap(file, np.uint8, mode="r"))
    for positions in batches:
        yield positions, memory, beton.data_ptr[positions]


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
            yield positions, _read_only(memory.reshape(-1)), first + beton.data_ptr[positions] % beton.page_size
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


def _read_only(memory: np.ndarray) -> np.ndarray:
    """To the compiler, arrays that can be written to and those that cannot are of two types; this makes them one."""
    memory = memory.view(np.ndarray)
    memory.flags.writeable = False
    return memory


# --- FFCV ------------------------------------------------------------------------------------------------------------


@cache
def _compiled() -> Callable[..., None]:
    """decode(memory, start, length, mode, size, pixels, offset, good), compiled for all threads, without Python's lock.

    Compiling takes seconds, so a process does it once. Functions that numba compiled do not leave quietly: it stays.
    """
    import numba

    with _threads_kept():
        from ffcv.libffcv import imdecode

    jpeg = numba.njit(nogil=True)(imdecode)

    def decode(memory: Any, start: Any, length: Any, mode: Any, size: Any, pixels: Any, offset: Any, good: Any) -> None:
        for i in numba.prange(len(start)):
            data = memory[start[i] : start[i] + length[i]]
            if mode[i] == JPG:
                height, width = np.uint32(size[i, 0]), np.uint32(size[i, 1])
                out = pixels[offset[i] : offset[i] + 3 * np.int64(height) * np.int64(width)]
                good[i] = jpeg(data, out, height, width, height, width, 0, 0, 1, 1, False, False) == 0
            else:
                pixels[offset[i] : offset[i] + length[i]] = data
                good[i] = True

    return numba.njit(nogil=True, parallel=True, error_model="numpy")(decode)


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
