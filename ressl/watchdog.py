"""The watchdog: a run that hangs ends, with the stacks of all ranks and the name of the one that is late.

Each rank tells in a small file where it is. A thread in each looks whether its own rank goes on. Where one does not
for too long, that thread leaves the stacks of its rank, reads where the others are, and ends the process. Should it not
even be given Python's lock, faulthandler's own thread, which needs none, does the same less eloquently.
"""

import faulthandler
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, TypeVar

T = TypeVar("T")
START = 4.0  # so many times as long may pass before the first step: kernels are compiled, buffers filled
GRACE_S = 2.0  # for the other ranks to leave their stacks too
STOPPED_S = 2.0  # if the watchdog looks so much later than it should, its process was stopped, or had no processor
STDERR = 2
LOCKED_S = 6.0  # after which faulthandler takes over
FROZEN_S = 4.0  # watchdogs look once a second, or more often

Stage = Literal["start", "data", "step", "saving", "evaluation"]
WORDS: dict[Stage, str] = {
    "start": "before the first step", "data": "waiting for data", "step": "in the step", "saving": "while saving",
    "evaluation": "in an evaluation",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Beat:
    """Where a rank is."""

    rank: int
    step: int  # steps taken
    stage: Stage
    since: float  # time.time() from which on it has been at that
    seen: float  # time.time() at which its watchdog last looked


class Watchdog:
    """Watches while it is open. `at` is told where the run is, as often as one likes: it costs next to nothing.

    `directory` is the same for all ranks. `seconds`: how long a rank may be at one thing; 0: for ever. `end(message)`
    says why, once for all ranks, and ends this process; `lost()` says that another rank has failed, which this one may
    never hear of while it waits for it.
    """

    def __init__(
        self,
        directory: Path,
        *,
        rank: int,
        world_size: int,
        seconds: float,
        end: Callable[[str], None],
        lost: Callable[[], bool] = lambda: False,
    ) -> None:
        self.directory, self.rank, self.world_size, self.seconds = directory, rank, world_size, seconds
        self.end, self.lost = end, lost
        self.poll_s = min(1.0, seconds / 8) if seconds else 1.0
        self.step, self.since = 0, time.monotonic()
        self.stage: Stage = "start"
        self._count, self._stepped = 0, False  # calls of `at`; whether a step has been taken
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        with suppress(OSError):
            self.directory.mkdir(exist_ok=True)
            self._stacks_path.unlink(missing_ok=True)  # of a hang before
        self.since = time.monotonic()
        self._tell_where()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        with suppress(OSError):
            self._beat_path(self.rank).unlink()
            self.directory.rmdir()  # by the last one, if nobody hung

    def at(self, stage: Stage, step: int | None = None) -> None:
        if step is not None:
            self.step, self._stepped = step, True
        self.stage = stage
        self._count += 1

    def _watch(self) -> None:
        count, alone, looked = -1, 0.0, time.monotonic()
        try:
            while not self._over.wait(self.poll_s):
                now = time.monotonic()
                if self._count != count or now - looked > self.poll_s + STOPPED_S:  # it was stopped, and goes on
                    count, self.since = self._count, now
                looked = now
                limit = self.seconds * (1 if self._stepped else START)
                if self.seconds:
                    faulthandler.dump_traceback_later(2 * limit + LOCKED_S, exit=True, file=STDERR)
                    self._tell_where()
                    if now - self.since > limit:
                        self._give_up(count)
                alone = alone + self.poll_s if self.lost() else 0.0
                if alone > GRACE_S:  # this rank waits for one that is gone, which has said why
                    os._exit(1)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _give_up(self, count: int) -> None:
        with suppress(OSError), self._stacks_path.open("w") as file:
            print(f"rank {self.rank}, at {self.stage} since step {self.step:,}", file=file)
            faulthandler.dump_traceback(file, all_threads=True)
        self._over.wait(GRACE_S)
        if not self._over.is_set() and self._count == count:
            self.end(self._who_is_late())

    def _who_is_late(self) -> str:
        others = [beat for rank in range(self.world_size) if rank != self.rank and (beat := self._read(rank))]
        beats = sorted([self._beat(), *others], key=lambda beat: beat.rank)
        return f"{late(beats)}; the stacks of all ranks are in {self.directory}"

    def _beat(self) -> Beat:
        now = time.time()
        return Beat(self.rank, self.step, self.stage, now - (time.monotonic() - self.since), now)

    def _tell_where(self) -> None:
        part = self.directory / f".rank{self.rank}.part"
        with suppress(OSError):  # a full disk is told of elsewhere
            part.write_text(json.dumps(asdict(self._beat())))
            part.replace(self._beat_path(self.rank))

    def _read(self, rank: int) -> Beat | None:
        with suppress(OSError, ValueError, TypeError):
            return Beat(**json.loads(self._beat_path(rank).read_text()))
        return None

    @property
    def _stacks_path(self) -> Path:
        return self.directory / f"stacks-rank{self.rank}.txt"

    def _beat_path(self, rank: int) -> Path:
        return self.directory / f"rank{rank}.json"


def late(beats: list[Beat]) -> str:
    """Which rank the others wait for. One whose watchdog no longer looks is stopped or lost. Else it is one that has
    taken fewer steps; else one that is not in the step itself, where ranks wait for each other."""
    now = max(beat.seen for beat in beats)
    frozen = [beat for beat in beats if now - beat.seen > FROZEN_S]
    if frozen:
        return "; ".join(
            f"rank {beat.rank} has given no sign of life for {now - beat.seen:.0f} s, and was at step {beat.step:,} "
            "then: it is stopped, or its machine is lost"
            for beat in frozen
        )
    behind = [beat for beat in beats if beat.step == min(other.step for other in beats)]
    apart = [beat for beat in behind if beat.stage != "step"]
    ranks = apart if 0 < len(apart) < len(beats) else behind
    which = ", ".join(str(beat.rank) for beat in ranks)
    stages = " and ".join(sorted({WORDS[beat.stage] for beat in ranks}))
    longest = max(now - beat.since for beat in ranks)
    return (
        f"rank{'s' if len(ranks) > 1 else ''} {which} hung for {longest:.0f} s after step {ranks[0].step:,}, {stages}"
    )


def watched(items: Iterable[T], watchdog: Watchdog, waiting: Stage, working: Stage) -> Iterator[T]:
    """The items, with word to the watchdog of who has the turn: who makes them, or who uses them."""
    iterator = iter(items)
    try:
        while True:
            watchdog.at(waiting)
            try:
                item = next(iterator)
            except StopIteration:
                return
            watchdog.at(working)
            yield item
    finally:
        close = getattr(iterator, "close", None)
        if close is not None:
            close()
