"""What a process of a run does before its imports, which take seconds: it ends with its launcher, and a wish to stop is
heard. It imports nothing that takes long itself."""

import ctypes
import os
import signal
from types import FrameType

LAUNCHER = "RESSL_LAUNCHER"  # the launcher's process id
STOPPED = 75  # exit code of a run that was asked to stop: the same command goes on (EX_TEMPFAIL of <sysexits.h>)
AT_ONCE = 130  # of one that was ended at once, by Ctrl-C
HANG = 6  # of one that hung
RUNS = ("pretrain", "resume")  # the verbs
OWN = os.getpid()


def begin(verb: str = "") -> None:
    """To be called first, in the main thread. Until training takes the signals over, SIGTERM, SIGUSR1 and SIGHUP end
    what there is of it with STOPPED: nothing is lost. Ctrl-C ends it without a traceback."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if LAUNCHER in os.environ:
        end_with_launcher()
    elif verb in RUNS:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, _stop)


def end_with_launcher() -> None:
    """Has the kernel end this rank when its launcher is killed: it would train on, unseen, holding its GPU."""
    if LAUNCHER in os.environ:
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
        if os.getppid() != int(os.environ[LAUNCHER]):  # it was killed while this rank started
            os.kill(os.getpid(), signal.SIGKILL)


def _stop(number: int, frame: FrameType | None) -> None:
    if os.getpid() != OWN:  # a child that was forked, whom it means something else
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"ressl: stopped by {signal.Signals(number).name}: there is nothing new to save\n".encode())
    os._exit(STOPPED)
