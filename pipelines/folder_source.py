"""Image files in a directory tree, decoded by a pool of threads: Pillow releases the interpreter lock meanwhile.

The simplest source: nothing has to be converted, and every epoch decodes every file again.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np

from pipelines.frames import Frames, pack, read_or_stand_in
from pipelines.images import fit_max_side, read_image, scan_folder


class FolderSource:
    def __init__(
        self,
        root: Path,
        *,
        workers: int,
        max_side: int | None,
        on_corrupt: Literal["replace", "fail"],
        report: Callable[[str], None],
        pin: bool = False,
    ) -> None:
        folder = scan_folder(root)
        self.root, self.paths = folder.root, folder.paths
        self.labels, self.classes, self.index = folder.labels, folder.classes, np.arange(len(folder.labels))
        self.workers, self.max_side, self.pin = workers, max_side, pin
        self.on_corrupt, self.report = on_corrupt, report

    def stream(self, batches: Iterable[np.ndarray], *, salt: int) -> Iterator[Frames]:
        with ThreadPoolExecutor(self.workers, thread_name_prefix="decode") as pool:
            waiting = iter(batches)
            # two batches are in the pool at a time, so that no thread idles while the last image of one is decoded
            pending = deque(self._submit(pool, batch, salt) for batch in islice(waiting, 2))
            try:
                while pending:
                    decoded = [future.result() for future in pending.popleft()]
                    pending.extend(self._submit(pool, batch, salt) for batch in islice(waiting, 1))
                    positions = np.array([position for position, _, _ in decoded])
                    originals = np.array([original for _, _, original in decoded])
                    images = [image for _, image, _ in decoded]
                    yield pack(images, originals, positions, self.labels[positions], pin=self.pin)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _submit(self, pool: ThreadPoolExecutor, positions: np.ndarray, salt: int) -> list:
        return [pool.submit(partial(self._read, int(position), salt)) for position in positions]

    def _read(self, position: int, salt: int) -> tuple[int, np.ndarray, tuple[int, int]]:
        """Position, image and original size: of the position asked for, or of the one that stands in for it."""
        chosen, image = read_or_stand_in(
            position,
            lambda chosen: read_image(self.root / self.paths[chosen]),
            lambda chosen: f"{self.root / self.paths[chosen]}",
            salt=salt,
            count=len(self.paths),
            on_corrupt=self.on_corrupt,
            report=self.report,
        )
        return chosen, fit_max_side(image, self.max_side), (image.shape[0], image.shape[1])
