"""Starts the processes of a run with torch elastic, on this machine or as one of several, and tells of a failure once,
not once a process."""

import ctypes
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from ressl.runtime import MachineError
from tools.node_watch import FIRST, Watch
from tools.nodes import SILENCE_S, Place, check_nodes, gather, place_of

FAILURES = "RESSL_FAILURES"  # a directory in which the first process to fail leaves a mark
LOST_TOUCH = "RESSL_LOST_TOUCH"  # for how many seconds a process that fails waits for word of another's failure
LOST_TOUCH_S = 5.0
# the loggers whose report of a failure is a page long; those below the first have levels of their own
TALKATIVE = ("torch.distributed", "torch.distributed.elastic.agent.server.api", "torch.distributed.launcher.api")
START_S = 60  # for the launchers, who have met, to meet once more in elastic


class ProcessesFailed(RuntimeError):
    """A process of the run ended with an error, which it has printed itself unless a signal killed it."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"a process failed with exit code {exit_code}")
        self.exit_code = exit_code


def run_processes(
    command: Sequence[str],
    count: int,
    *,
    nodes: int = 1,
    node_rank: int = 0,
    rendezvous: str | None = None,
    settings: str = "",
    wait_s: float = 300.0,
    silence_s: float = SILENCE_S,
) -> None:
    """Runs `python COMMAND` as `count` ranks of one run here and waits for them. Raises ProcessesFailed.

    With several `nodes`, called on each with its own `node_rank` and the same `rendezvous`, HOST:PORT on node 0: ranks
    node_rank * count and up are here. Nodes wait for each other for `wait_s` seconds and must agree on `count` and on
    `settings`, any text; whichever fails, or is not heard of for `silence_s` seconds, ends the run on all of them with
    one message on each. Raises ConfigError and MachineError where they do not come together (tools/nodes.py).
    """
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
    with tempfile.TemporaryDirectory(prefix="ressl-") as directory:
        failures = Path(directory)
        os.environ[FAILURES] = directory
        if nodes == 1:
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
            _launch(config, command, failures)
            return
        check_nodes(nodes, node_rank, rendezvous, count)
        place = place_of(nodes, node_rank, str(rendezvous))
        peers, port = gather(place, count, settings, wait_s)
        os.environ[LOST_TOUCH] = str(LOST_TOUCH_S)
        _launch_among(place, Watch(place, peers, failures, silence_s), port, count, command, failures)


def _launch(config: LaunchConfig, command: Sequence[str], failures: Path) -> None:
    try:
        elastic_launch(config, sys.executable)("-u", *command)
    except ChildFailedError as error:
        raise ProcessesFailed(_exit_code(error, failures)) from None
    except SignalException as error:
        raise ProcessesFailed(128 + error.sigval) from None


def _launch_among(place: Place, watch: Watch, port: int, count: int, command: Sequence[str], failures: Path) -> None:
    """Elastic's static rendezvous numbers the ranks by node; its other one goes by the nodes' addresses."""
    config = LaunchConfig(
        min_nodes=place.nodes,
        max_nodes=place.nodes,
        nproc_per_node=count,
        run_id="ressl",
        rdzv_backend="static",
        rdzv_endpoint=f"{place.host}:{port}",
        rdzv_configs={"rank": place.node, "timeout": START_S},
        max_restarts=0,
    )
    code = 4
    try:
        with watch:
            _launch(config, command, failures)
        code = watch.over.code if watch.over else 0
    except ProcessesFailed as failed:
        code = watch.over.code if watch.over else failed.exit_code
    except DistError as error:
        if watch.over is None:
            raise MachineError(
                f"node {place.node}: the nodes met, but not at node 0's port {port}, where the processes meet: "
                f"{str(error).splitlines()[0]}; a firewall must let the nodes reach all ports of each other"
            ) from None
        code = watch.over.code
    finally:
        watch.leave(code)
    if code:
        raise ProcessesFailed(code)


def _exit_code(error: ChildFailedError, failures: Path) -> int:
    """Of the process that failed by itself; the others were stopped because of it, or lost touch with it."""
    first = failures / FIRST
    if first.exists():
        return int(first.read_text())
    codes = [failure.exitcode for failure in error.failures.values()]
    own = [code for code in codes if code > 0]
    if own:
        return own[0]
    killed_by = signal.Signals(-codes[0]).name
    why = " (out of memory?)" if killed_by == "SIGKILL" else ""
    print(f"ressl: error: a process was killed by {killed_by}{why}", file=sys.stderr)
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
        with (Path(os.environ[FAILURES]) / FIRST).open("x") as file:
            file.write(str(code))
        return True
    except FileExistsError:
        return False
    except OSError:  # the launcher is gone
        return True


def another_failed() -> bool:
    """Whether another process of the run has failed, so that this one's troubles come from that. Word from another
    node takes a moment longer than the loss of its processes: with several, this waits for it."""
    if FAILURES not in os.environ:
        return False
    deadline = time.monotonic() + float(os.environ.get(LOST_TOUCH, "0"))
    while not (failed := (Path(os.environ[FAILURES]) / FIRST).exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return failed
