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


def reads_files(source: Source) -> TypeGuard[Files]:
    """Whether the source reads images from storage, and decodes them, while training."""
    return isinstance(source, Files)


@contextmanager
def stored_bytes(source: Files) -> Iterator[Read]:
    """Reads the bytes of images, in as many threads as the source has; what cannot be read counts as nothing.

    Of .beton files these are the images' own bytes, also where the source maps the file or reads whole pages.
    """
    match source:
        case FolderSource(root=root, paths=paths):
            with _in_threads(source.workers, lambda position: _file(root / paths[position])) as read:
                yield read
        case FfcvSource(beton=beton):
            with (
                open_again(beton) as file,
                _in_threads(source.workers, partial(_in_beton, beton, file)) as read,
            ):
                yield read
        case DaliSource(store=FolderIndex(root=root, paths=paths)):
            with _in_threads(source.workers, lambda position: _file(Path(root) / paths[position])) as read:
                yield read
        case DaliSource():
            with _in_threads(source.workers, partial(_in_shard, source)) as read:
                yield read


@contextmanager
def _in_threads(workers: int, length: Callable[[int], int]) -> Iterator[Read]:
    with ThreadPoolExecutor(max(1, workers), thread_name_prefix="read") as pool:

        def part(positions: list[int]) -> int:
            return sum(map(length, positions))

        def read(positions: np.ndarray) -> int:
            return sum(pool.map(part, [share.tolist() for share in np.array_split(positions, 4 * max(1, workers))]))

        yield read


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
