"""Starts the processes of a run on this machine with torch elastic, and tells of a failure once, not once a process."""

import ctypes
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

FAILURES = "RESSL_FAILURES"  # a directory in which the first process to fail leaves a mark


class ProcessesFailed(RuntimeError):
    """A process of the run ended with an error, which it has printed itself unless a signal killed it."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"a process failed with exit code {exit_code}")
        self.exit_code = exit_code


def run_processes(command: Sequence[str], count: int) -> None:
    """Runs `python COMMAND` as `count` ranks of one run and waits for them. Raises ProcessesFailed."""
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # its report of a failure is a page long
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
    with tempfile.TemporaryDirectory(prefix="ressl-") as failures:
        os.environ[FAILURES] = failures
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id=str(os.getpid()),
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="127.0.0.1",
            max_restarts=0,
        )
        try:
            elastic_launch(config, sys.executable)("-u", *command)
        except ChildFailedError as error:
            raise ProcessesFailed(_exit_code(error, Path(failures))) from None
        except SignalException as error:
            raise ProcessesFailed(128 + error.sigval) from None


def _exit_code(error: ChildFailedError, failures: Path) -> int:
    """Of the process that failed by itself; the others were stopped because of it, or lost touch with it."""
    first = failures / "first"
    if first.exists():
        return int(first.read_text())
    codes = [failure.exitcode for failure in error.failures.values()]
    own = [code for code in codes if code > 0]
    if own:
        return own[0]
    killed_by = signal.Signals(-codes[0]).name
    print(f"ressl: error: a process was killed by {killed_by} (out of memory?)", file=sys.stderr)
    return 4


def end_with_launcher() -> None:
    """Asks the kernel to end this rank when its launcher is killed: it would train on, unseen, holding its GPU."""
    if FAILURES in os.environ:
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def first_to_fail(code: int) -> bool:
    """Whether this process is the first of its run to fail, with `code`; the others need not say anything."""
    if FAILURES not in os.environ:
        return True
    try:
        with (Path(os.environ[FAILURES]) / "first").open("x") as file:
            file.write(str(code))
        return True
    except FileExistsError:
        return False
    except OSError:  # the launcher is gone
        return True


def another_failed() -> bool:
    """Whether another process of the run has failed, so that this one's troubles come from that."""
    return FAILURES in os.environ and (Path(os.environ[FAILURES]) / "first").exists()
