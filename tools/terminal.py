"""What is printed, and what Ctrl-C does."""

import io
import os
import signal
import sys
from typing import Any, NoReturn

from rich.console import Console


class _Steady(Console):
    """What cannot be printed, as its reader or its disk is gone, is not worth the end of a run."""

    def print(self, *objects: Any, **options: Any) -> None:
        try:
            super().print(*objects, **options)
        except OSError:
            self.quiet = True

    def on_broken_pipe(self) -> None:
        self.quiet = True


def plain_console() -> Console:
    """Prints text as it is: a path may hold [brackets], which rich would take for its own."""
    return _Steady(markup=False, highlight=False)


def settle_streams(code: int) -> int:
    """To be called last, with the exit code, which Python would change where it could not print what is left."""
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    return code


def leave(code: int) -> NoReturn:
    """Ends this process, to be called with settled streams. A rank that has failed ends at once: threads of torch that
    wait for other ranks have been seen to end it otherwise, with words of their own."""
    if code and "RANK" in os.environ:
        os._exit(code)
    sys.exit(code)


def prepare_terminal() -> None:
    """From here on Ctrl-C is a KeyboardInterrupt, unless it is ignored, and a letter that the terminal lacks is `?`."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
