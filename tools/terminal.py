"""What is printed, and what Ctrl-C does."""

import io
import signal
import sys

from rich.console import Console


def plain_console() -> Console:
    """Prints text as it is: a path may hold [brackets], which rich would take for its own."""
    return Console(markup=False, highlight=False)


def prepare_terminal() -> None:
    """From here on Ctrl-C is a KeyboardInterrupt, unless it is ignored, and a letter that the terminal lacks is `?`."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
