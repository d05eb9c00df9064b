"""Signals: what asks a run to save and end, and what ends it at once."""

import os
import signal
import time
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Self

ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)  # Ctrl-C, kill, SLURM's warning, lost terminal
AT_ONCE_S = 0.5  # two signals nearer than that are one, told twice: by the terminal, and by who passes it on
HEARD = "the run finishes its step, saves and ends; Ctrl-C again ends it at once"


class Stopped(RuntimeError):
    """The run was asked to stop, has saved, and can go on later. The message says after which step and how."""


class Stop:
    """While it is open, a signal in ASKING is remembered, for the run to finish its step, save and end. A second Ctrl-C
    is a KeyboardInterrupt. A signal that was ignored before, as under nohup, stays ignored.

    To be opened in the main thread; elsewhere nothing is caught. `aloud`: a first Ctrl-C is answered on stderr.
    """

    def __init__(self, *, aloud: bool = False) -> None:
        self.aloud = aloud
        self.asked: str | None = None  # the name of the signal
        self._when = 0.0
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        for number in ASKING:
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
            if self.aloud and number == signal.SIGINT:
                with suppress(OSError):
                    os.write(2, f"ressl: {HEARD}\n".encode())  # print may be amid something itself
