"""Signals: what asks a run to save and end, and what ends it at once."""

import signal
import time
from types import FrameType, TracebackType
from typing import Self

ASKING = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")  # Ctrl-C, kill, SLURM's warning, a closed terminal
AT_ONCE_S = 0.5  # two signals nearer than that are one, told twice


class Stopped(RuntimeError):
    """The run was asked to stop, has saved, and can go on later. The message says after which step and how."""


class Stop:
    """While it is open, a signal in ASKING is remembered, for the run to finish its step, save and end. A second Ctrl-C
    is a KeyboardInterrupt. A signal that was ignored before, as under nohup, stays ignored.

    To be opened in the main thread; elsewhere nothing is caught.
    """

    def __init__(self) -> None:
        self.asked: str | None = None  # the name of the signal
        self._when = 0.0
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        for name in ASKING:
            number = signal.Signals[name]
            if signal.getsignal(number) != signal.SIG_IGN:
                try:
                    self._before[number] = signal.signal(number, self._hear)
                except ValueError:  # not the main thread
                    return self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before.clear()

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.asked and number == signal.SIGINT and now - self._when > AT_ONCE_S:
            raise KeyboardInterrupt
        if self.asked is None:
            self.asked, self._when = signal.Signals(number).name, now
