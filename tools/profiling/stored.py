"""The stored bytes of images, read and not decoded: what a source's decoding begins with."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeGuard

import numpy as np

from pipelines.beton import Beton, open_again
from pipelines.dali_source import DaliSource
from pipelines.ffcv_source import FfcvSource
from pipelines.folder_source import FolderSource
from pipelines.frames import Source
from pipelines.images import BadImage, FolderIndex

Files = FolderSource | FfcvSource | DaliSource
Read = Callable[[np.ndarray], int]  # positions (B,) -> bytes read
NOTHING = Path(os.devnull)


def reads_files(source: Source) -> TypeGuard[Files]:
    """Whether the source reads images from storage, and decodes them, while training."""
    return isinstance(source, Files)


@contextmanager
def stored_bytes(source: Files) -> Iterator[tuple[Read, Read]]:
    """Reads the bytes of images, in as many threads as the source has; what cannot be read counts as nothing. The
    second reads nothing, by the same calls: what the first takes beyond it is the reading.

    Of .beton files these are the images' own bytes, also where the source maps the file or reads whole pages.
    """
    with ThreadPoolExecutor(max(1, source.workers), thread_name_prefix="read") as pool, NOTHING.open("rb") as empty:
        in_threads = partial(_in_threads, pool, max(1, source.workers))
        open_nothing, read_nothing = in_threads(lambda _: _file(NOTHING)), in_threads(partial(_nothing, empty))
        match source:
            case FolderSource(root=root, paths=paths):
                yield in_threads(lambda position: _file(root / paths[position])), open_nothing
            case FfcvSource(beton=beton):
                with open_again(beton) as file:
                    yield in_threads(partial(_in_beton, beton, file)), read_nothing
            case DaliSource(store=FolderIndex(root=root, paths=paths)):
                yield in_threads(lambda position: _file(Path(root) / paths[position])), open_nothing
            case DaliSource():
                yield in_threads(partial(_in_shard, source)), read_nothing


def _in_threads(pool: ThreadPoolExecutor, workers: int, length: Callable[[int], int]) -> Read:
    def part(positions: list[int]) -> int:
        return sum(map(length, positions))

    def read(positions: np.ndarray) -> int:
        return sum(pool.map(part, [share.tolist() for share in np.array_split(positions, 4 * workers)]))

    return read


def _nothing(file: BinaryIO, position: int) -> int:
    return len(os.pread(file.fileno(), 1, position))


def _file(path: Path) -> int:
    try:
        return len(path.read_bytes())
    except OSError:
        return 0


def _in_beton(beton: Beton, file: BinaryIO, position: int) -> int:
    return len(os.pread(file.fileno(), int(beton.data_size[position]), int(beton.data_ptr[position])))


def _in_shard(source: DaliSource, position: int) -> int:
    assert not isinstance(source.store, FolderIndex)
    try:
        return len(source.store.read(position))
    except BadImage:
        return 0
