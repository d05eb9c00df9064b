"""Writes the checkpoints of a run in a thread, while the run goes on."""

import os
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

from ressl import checkpoint
from ressl.checkpoint import SaveError
from ressl.snapshot import Snapshot


class Saver:
    """One checkpoint at a time: the next waits until the one before is written.

    A disk that refuses does not end the run: `tell` is told, the last good checkpoint stays, and the next save tries
    again. Weights that are not finite end it: NonFiniteWeights comes out of the next call, as does what no one foresaw.
    After a step that was left out nothing is saved, unless it must be, and no other checkpoint goes for it.
    `damaged` are checkpoints that could not be read; they go when the first new one is there. `log` is flushed before
    each checkpoint, so that it never knows less.
    """

    def __init__(
        self, directory: Path, *, keep: int, log: Path, tell: Callable[[str], None], damaged: Collection[Path] = ()
    ) -> None:
        self.directory, self.keep, self.log, self.tell, self.damaged = directory, keep, log, tell, tuple(damaged)
        self.best: int | None = None  # the step of the best evaluation, whose checkpoint stays
        self.saved = 0  # checkpoints written
        self.held_s = 0.0  # seconds that the run waited for checkpoints: for copies of its state, and for older ones
        self.failed: SaveError | None = None  # of the last one
        self._broken: BaseException | None = None
        self._thread: threading.Thread | None = None

    def save(self, take: Callable[[], Snapshot | None], *, last: bool = False) -> None:
        """`take` makes the snapshot, on all ranks; where it gives none, nothing is written. `last`: the run ends here,
        so it must be saved, and `finish` tells how that went."""
        self.wait()
        started = time.perf_counter()
        if (snapshot := take()) is not None:
            self._thread = threading.Thread(target=self._write, args=(snapshot, last), name="checkpoint")
            self._thread.start()
        self.held_s += time.perf_counter() - started

    def wrote(self, step: int) -> bool:
        """Whether there is a checkpoint of `step`; waits for one that is being written."""
        self.wait()
        path = self.directory / checkpoint.name_of(step)
        return path.exists() and path not in self.damaged

    def finish(self) -> None:
        """Waits for the last one. Raises SaveError where it could not be written."""
        self.wait()
        if self.failed:
            raise self.failed

    def close(self) -> None:
        """Waits for what is being written, whatever becomes of it."""
        if self._thread is not None:
            self._thread.join()

    def wait(self) -> None:
        """For one that is being written. Raises what ends the run."""
        if self._thread is not None:
            started = time.perf_counter()
            self._thread.join()
            self._thread = None
            self.held_s += time.perf_counter() - started
        if self._broken:
            raise self._broken

    def _write(self, snapshot: Snapshot, last: bool) -> None:
        try:
            saved = snapshot.wait()
            if saved.about.left_out and not last:
                return
            _flush(self.log)
            written = checkpoint.write(self.directory, saved)
            self.saved, self.failed = self.saved + 1, None
            gone = [path for path in self.damaged if path != written]  # it may have taken the place of one
            checkpoint.prune(self.directory, keep=self.keep, best=self.best, damaged=gone)
            self.damaged = ()
        except SaveError as error:
            self._refused(error, last)
        except MemoryError:
            self._refused(SaveError(f"{self.directory}: no memory for the copy of a checkpoint"), last)
        except OSError as error:  # of those that are to go
            self.tell(f"{self.directory}: an old checkpoint cannot be removed: {error.strerror}")
        except BaseException as error:  # not swallowed: the run raises it
            self._broken = error

    def _refused(self, error: SaveError, last: bool) -> None:
        self.failed = error
        if not last:
            there = bool(checkpoint.found(self.directory))
            kept = "those before it stay" if there else "there is none yet, so all is lost if the run is killed now"
            self.tell(f"{error}; {kept}; the next one is tried")


def _flush(path: Path) -> None:
    with suppress(OSError):  # the log tells of its own troubles
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)
