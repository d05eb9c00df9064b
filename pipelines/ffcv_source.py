"""`.beton` files, each image decoded once by FFCV's compiled pipeline into a padded row.

FFCV's own crops, augmentations, order and loading thread are not used. Its thread hangs for ever on any exception and
leaks when an epoch is left early, so its pipeline is run here, step by step, in the caller's thread. Its decoder
ignores JPEG errors; ours notes them beside the pixels. The file is validated before FFCV maps it.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from pipelines.beton import RAW, Beton, open_beton
from pipelines.frames import Frames, stand_in
from pipelines.images import BadImage, decode_image
from pipelines.manifest import classes_of
from ressl.batch import DataError


class FfcvSource:
    def __init__(
        self, path: Path, *, workers: int, on_corrupt: Literal["replace", "fail"], report: Callable[[str], None]
    ) -> None:
        self.beton: Beton = open_beton(path)
        self.labels, self.classes = self.beton.label, classes_of(path)
        self.on_corrupt, self.report = on_corrupt, report
        status = path.stat()
        self.loader = _build_loader(path, status.st_mtime_ns, status.st_size, workers)

    def stream(self, batches: Iterable[np.ndarray], *, salt: int) -> Iterator[Frames]:
        batches = list(batches)
        if not batches:
            return
        for positions, rows in zip(batches, _decoded(self.loader, batches), strict=True):
            positions, replaced = self._without_bad(rows, positions, salt)
            size = self.beton.size[positions]
            extent = (int(size[:, 0].max()), int(size[:, 1].max()))
            width = int(size.prod(axis=1, dtype=np.int64).max()) * 3  # rows are as wide as the file's largest image
            pixels = np.empty(len(rows) * width + 3 * extent[1], np.uint8)
            copy = pixels[: len(rows) * width].reshape(len(rows), width)  # FFCV will overwrite its rows
            copy[:] = rows[:, :width]
            for row, image in replaced.items():
                copy[row, : image.size] = image.reshape(-1)
            yield Frames(
                pixels=torch.from_numpy(pixels),
                offset=torch.arange(len(positions)) * width,
                size=torch.from_numpy(size),
                stride=torch.from_numpy(3 * size[:, 1]),
                original=torch.from_numpy(self.beton.original[positions]),
                index=torch.from_numpy(self.beton.index[positions]),
                label=torch.from_numpy(self.beton.label[positions]),
                extent=extent,
            )

    def _without_bad(
        self, rows: np.ndarray, positions: np.ndarray, salt: int
    ) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        """The positions, with others in place of those whose row (B, bytes + 1) does not end in 1, and their images."""
        bad = np.flatnonzero(rows[:, -1] == 0)
        if len(bad) == 0:
            return positions, {}
        positions, replaced = positions.copy(), {}
        for row in bad.tolist():
            where = f"{self.beton.path}: image {self.beton.index[positions[row]]}"
            if self.on_corrupt == "fail":
                raise DataError(f"{where}: its JPEG data is damaged (data.on_corrupt=replace goes on without it)")
            positions[row], replaced[row] = self._stand_in(int(positions[row]), salt, where)
            self.report(f"{where}: its JPEG data is damaged; replaced by image {self.beton.index[positions[row]]}")
        return positions, replaced

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
    with beton.path.open("rb") as file:
        file.seek(int(beton.data_ptr[position]))
        data = file.read(int(beton.data_size[position]))
    if beton.mode[position] == RAW:
        return np.frombuffer(data, np.uint8).reshape(*beton.size[position], 3)
    return decode_image(data)


def _decoded(loader: Any, batches: list[np.ndarray]) -> Iterator[np.ndarray]:
    """(B, bytes + 1) uint8 for each batch, overwritten by the next: an image's bytes from the left, padding, and last
    a 1 where they could be decoded."""
    from ffcv.loader.epoch_iterator import EpochIterator

    class Epoch(EpochIterator):
        def start(self) -> None:
            """Not as a thread."""

    with loader.lock:  # the epoch takes its batch size from the loader, which others may share
        loader.batch_size = len(batches[0])
        epoch = Epoch(loader, np.concatenate(batches).astype(np.uint64))
    try:
        for number, order in enumerate(epoch.iter_ixes):
            loader.set_threads()  # the number belongs to the calling thread
            (rows,) = epoch.run_pipeline(number, order, number % 2, None)
            yield rows
    finally:
        epoch.close()


@cache
def _build_loader(path: Path, changed: int, length: int, workers: int) -> Any:
    """An FFCV Loader that decodes the field `image` alone. FFCV sets torch's number of threads: that is put back.

    Compiling takes seconds, so a process does it once for each file, and keeps it: functions that numba compiled do not
    leave quietly. `changed` and `length` tell a new file of the same name from the old one.
    """
    threads = torch.get_num_threads()
    import numba
    from ffcv.fields.rgb_image import IMAGE_MODES, SimpleRGBImageDecoder
    from ffcv.libffcv import imdecode
    from ffcv.loader import Loader, OrderOption
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.compiler import Compiler
    from ffcv.reader import Reader

    class DecodeOnce(SimpleRGBImageDecoder):
        """Whole images, of any size, with a byte behind that says whether the decoder succeeded."""

        def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, Any]:
            pixels = self.metadata["height"].astype(np.int64) * self.metadata["width"].astype(np.int64)
            shape, dtype = (int(3 * pixels.max()) + 1,), np.dtype("<u1")
            return replace(previous_state, jit_mode=True, shape=shape, dtype=dtype), AllocationQuery(shape, dtype)

        def generate_code(self) -> Callable:
            read, decode_jpeg, jpg = self.memory_read, Compiler.compile(imdecode), IMAGE_MODES["jpg"]
            each = Compiler.get_iterator()

            def decode(positions: Any, out: Any, metadata: Any, state: Any) -> Any:
                for row in each(len(positions)):
                    field = metadata[positions[row]]
                    data = read(field["data_ptr"], state)
                    if field["mode"] == jpg:
                        height, width = np.uint32(field["height"]), np.uint32(field["width"])
                        failed = decode_jpeg(data, out[row], height, width, height, width, 0, 0, 1, 1, False, False)
                        out[row, -1] = np.uint8(failed == 0)
                    else:
                        out[row, : data.shape[0]] = data
                        out[row, -1] = np.uint8(1)
                return out[: len(positions)]

            decode.is_parallel = True  # type: ignore[attr-defined]
            return decode

    # `import ffcv` has set the thread's own count to one: the limit is the machine's
    workers = max(1, min(workers, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
    fields: dict[str, list | None] = dict.fromkeys(Reader(str(path)).field_names)
    fields["image"] = [DecodeOnce()]
    loader = Loader(
        str(path), batch_size=1, num_workers=workers, order=OrderOption.SEQUENTIAL, pipelines=fields, batches_ahead=0
    )
    loader.set_threads = lambda: numba.set_num_threads(workers)
    loader.lock = threading.Lock()
    torch.set_num_threads(threads)
    return loader
