"""Starts the processes of a run, on this machine or as one of several; passes on to them what asks a run to stop; and
tells of a failure once, not once a process."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from torch.distributed import DistError, TCPStore

from ressl.runtime import MachineError
from ressl.stop import ASKING, AT_ONCE_S, HEARD
from tools.early import AT_ONCE, HANG, LAUNCHER, STOPPED
from tools.node_watch import FIRST, Mark, Watch, leave_mark, read_mark
from tools.nodes import SILENCE_S, Peer, Place, check_nodes, gather, place_of, reach, say
from tools.resuming import how_to_go_on, last_checkpoint

FAILURES = "RESSL_FAILURES"  # a directory in which the first process to fail leaves a mark
SAVED = "stopped"  # there: the mark of a process that was asked to stop, and has saved
DONE = "done"  # there: the mark of one that has come to the end of the run
LOST_TOUCH = "RESSL_LOST_TOUCH"  # for how many seconds a process that fails waits for word of another's failure
LOST_TOUCH_S = {"here": 1.0, "elsewhere": 5.0}
ENDING_S = 5.0  # for processes to end by themselves when another has failed
KILLED_S = 30.0  # for killed processes to be gone: the kernel may hold them
LOOK_S = 0.05  # between two looks at the processes
START_S = 60.0  # for the launchers, who have met, to reach the port where the processes meet
MENDED = {1: "failed", HANG: "hung"}  # exit codes after which it may go better
HINTS: dict[int, str] = {
    signal.SIGKILL: " (out of memory?)",
    signal.SIGBUS: " (was a data file cut while it was read, or is /dev/shm full?)",
}


class ProcessesFailed(RuntimeError):
    """The run did not come to its end, and why has been said. `exit_code` is that of the process that failed; 75 where
    all were asked to stop, and 130 where they were ended at once."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"the processes ended with exit code {exit_code}")
        self.exit_code = exit_code


@dataclass(frozen=True, slots=True)
class End:
    """How the processes of this node ended: the exit code, what is still to be said of it, and whether they did `well`,
    that is came to the end of the run, or saved when asked to stop; or one was `lost`, or a whole node."""

    code: int
    text: str = ""
    well: bool = False
    lost: bool = False

    @property
    def may_be_mended(self) -> bool:
        """By starting again. What the machine refuses, as a full disk, it would refuse again."""
        return self.lost or self.code in MENDED


ENDED_AT_ONCE = End(AT_ONCE, "ended at once: what came after the last checkpoint is lost")


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
    max_restarts: int = 0,
    run_dir: Path | None = None,
) -> None:
    """Runs `python COMMAND` as `count` ranks of one run here and waits for them. Raises ProcessesFailed.

    A signal in ASKING is passed on to the ranks, which are to save and end; a second Ctrl-C ends them at once. When one
    fails, the others are ended. If a signal that did not come through here killed it, or its exit code is in MENDED,
    all start again, up to `max_restarts` times, from the last checkpoint in `run_dir`. To be called in the main thread.

    With several `nodes`, called on each with its own `node_rank` and the same `rendezvous`, HOST:PORT on node 0: ranks
    node_rank * count and up are here. Nodes wait for each other for `wait_s` seconds and must agree on `count`, on
    `max_restarts` and on `settings`, any text; whichever fails, or is not heard of for `silence_s` seconds, ends the
    run on all of them with one message on each, or starts it again there. Raises ConfigError and MachineError where
    they do not come together (tools/nodes.py).
    """
    place = None
    if nodes > 1:
        check_nodes(nodes, node_rank, rendezvous, count)
        place = place_of(nodes, node_rank, str(rendezvous))
    with Requests() as requests:
        for restart in range(1, max_restarts + 2):
            with tempfile.TemporaryDirectory(prefix="ressl-") as directory:
                ranks = Ranks(command, count, Path(directory), requests)
                if place is None:
                    store = _serve(0)
                    end = ranks.run("127.0.0.1", store.port)
                else:
                    meet = partial(gather, place, count, settings, wait_s, max_restarts)
                    try:
                        end = _run_among(place, ranks, meet, silence_s)
                    except MachineError as error:
                        if restart == 1:
                            raise
                        end, restart = End(4, str(error), lost=True), max_restarts + 1  # one did not come back
            if restart > max_restarts or requests.first or not end.may_be_mended:
                break
            why = end.text or f"a process {MENDED[end.code]}"
            last = run_dir and last_checkpoint(run_dir)
            say(f"{why}; starting again from {last or 'the beginning'}, restart {restart} of {max_restarts}")
    _tell(end, how_to_go_on(run_dir, nodes) if run_dir else "")
    if end.code:
        raise ProcessesFailed(end.code)


def _tell(end: End, how: str) -> None:
    """What is still to be said, and `how` to go on where that makes sense."""
    if end.code in (STOPPED, AT_ONCE):
        words = [end.text]
    else:
        words = [f"error: {end.text}" if end.text else "", how if end.may_be_mended else ""]
    if any(words):
        say("; ".join(filter(None, words)))


def _serve(port: int) -> TCPStore:
    """Where the processes find each other. Kept by a launcher, it outlives each of them."""
    return TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)


def _run_among(place: Place, ranks: "Ranks", meet: Callable[[], tuple[list[Peer], int]], silence_s: float) -> End:
    """All nodes come to the same end. Raises what `meet` raises, which brings the launchers together."""
    requests, end, store = ranks.requests, End(4), None
    try:
        with requests.heard_at_once():
            peers, port = meet()
    except Asked:
        return requests.nothing_saved()
    watch = Watch(place, peers, ranks.failures, silence_s)
    try:
        with watch:
            with requests.heard_at_once():
                if place.node:
                    reach(place, port, START_S)
                else:
                    store = _serve(port)
            end = ranks.run(place.host, port, place, watch)
            if end.well:
                watch.wait_for_others(lambda: requests.at_once)
    except Asked:
        end = requests.nothing_saved()
    except (DistError, MachineError) as error:
        end = End(4, str(error).splitlines()[0])
    finally:
        if watch.over and not requests.at_once:
            end = End(watch.over.code, watch.over.text, lost=watch.over.lost)
        elif requests.at_once and not end.well:
            end = ENDED_AT_ONCE
        watch.leave(end.code, well=end.well)
        del store
    return end


# --- what asks it to stop --------------------------------------------------------------------------------------------


class Asked(Exception):
    """A signal asks the run to stop while there is nothing to save yet."""


class Requests:
    """The signals that ask the run to stop, taken while it is open: the `first` of them, and whether a Ctrl-C after it
    wants all to end `at_once`. SIGHUP stays ignored where it was, as under nohup."""

    def __init__(self) -> None:
        self.first: signal.Signals | None = None
        self.at_once = False
        self._when, self._raises = 0.0, False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in ASKING:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def heard_at_once(self) -> Iterator[None]:
        """Raises Asked on a signal, or if there has been one."""
        try:
            self._raises = True
            if self.first:
                raise Asked
            yield
        finally:
            self._raises = False

    def nothing_saved(self) -> End:
        name = self.first.name if self.first else "a signal"
        return End(STOPPED, f"stopped by {name} before the first step: there is nothing new to save")

    def _take(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first, self._when = signal.Signals(number), now
        elif number == signal.SIGINT and now - self._when > AT_ONCE_S:
            self.at_once = True
        if self._raises:
            raise Asked


# --- the processes ---------------------------------------------------------------------------------------------------


class Ranks:
    """The processes of this node, once: each try has its own, with a directory of its own for their `failures`."""

    def __init__(self, command: Sequence[str], count: int, failures: Path, requests: Requests) -> None:
        self.command, self.count, self.failures, self.requests = command, count, failures, requests
        self._started: list[subprocess.Popen[bytes]] = []
        self._first = 0  # the number of the first rank here
        self._at_once = False  # as another node wants it

    def run(self, host: str, port: int, place: Place | None = None, watch: Watch | None = None) -> End:
        """Starts them, to meet at `host` and `port`, and waits until all have ended, or must. None is left then."""
        nodes, node = (place.nodes, place.node) if place else (1, 0)
        self._first = node * self.count
        shared = {
            "WORLD_SIZE": str(nodes * self.count),
            "LOCAL_WORLD_SIZE": str(self.count),
            "MASTER_ADDR": host,
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # tells torch that no rank has to serve that port
            FAILURES: str(self.failures),
            LAUNCHER: str(os.getpid()),
            LOST_TOUCH: str(LOST_TOUCH_S["elsewhere" if place else "here"]),
        }
        threads = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // self.count))}
        try:
            for local in range(self.count):
                own = {"RANK": str(self._first + local), "LOCAL_RANK": str(local)}
                environment = threads | os.environ | shared | own
                command = [sys.executable, "-u", *self.command]
                self._started.append(subprocess.Popen(command, env=environment, start_new_session=True))
            return self._wait(watch)
        finally:
            self._end()

    def _wait(self, watch: Watch | None) -> End:
        first, saved, done = (self.failures / name for name in (FIRST, SAVED, DONE))
        passed_on, since = False, 0.0
        while True:
            codes = [rank.poll() for rank in self._started]
            # one that has saved may be struck by a signal once more while it ends
            struck = ASKING if saved.exists() or done.exists() else ()
            failed = {rank: code for rank, code in enumerate(codes, self._first) if code and -code not in struck}
            if self.requests.at_once:
                return ENDED_AT_ONCE if not struck else End(STOPPED if saved.exists() else 0, well=True)
            if watch and watch.over:
                self._at_once = watch.over.code == AT_ONCE
                return End(watch.over.code, watch.over.text, lost=watch.over.lost)
            if failed or (since and time.monotonic() - since > ENDING_S):
                return self._why(failed)
            if None not in codes:
                return End(STOPPED if saved.exists() else 0, well=True)
            if self.requests.first and not passed_on:
                self._pass_on(self.requests.first)
                passed_on = True
                if self.requests.first == signal.SIGINT:
                    say(HEARD)
            if not since and first.exists():  # it has failed, and is about to end
                since = time.monotonic()
            time.sleep(LOOK_S)

    def _pass_on(self, asked: signal.Signals) -> None:
        """Ctrl-C as SIGTERM, which no one takes for a KeyboardInterrupt while it starts."""
        for rank in self._started:
            rank.send_signal(signal.SIGTERM if asked == signal.SIGINT else asked)

    def _why(self, failed: dict[int, int]) -> End:
        """How the first process failed, of the ranks that `failed` and their codes. One that could not leave the mark
        itself has it left here, for the others and other nodes."""
        killed = sorted(((-code, rank) for rank, code in failed.items() if code < 0), key=lambda one: one[0] in ASKING)
        if killed and self.requests.first and killed[0][0] in ASKING:
            end = self.requests.nothing_saved()
        elif killed:
            number, rank = killed[0]
            end = End(4, f"rank {rank} was killed by {_name(number)}{HINTS.get(number, '')}", lost=True)
        else:
            end = End(next(iter(failed.values()), 4))
        if leave_mark(self.failures, Mark(end.code, end.lost, end.text if end.lost else "")):
            return end
        self._end()
        mark = read_mark(self.failures)  # of another, which has said why
        return End(mark.code, lost=mark.lost) if mark else end

    def _end(self) -> None:
        """Asks those that are left to end, with what each has started, and kills them after ENDING_S seconds."""
        left = [rank for rank in self._started if rank.poll() is None]
        for rank in [rank for rank in self._started if rank.returncode != 0]:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(rank.pid, signal.SIGTERM)
        deadline = time.monotonic() + ENDING_S
        while any(rank.poll() is None for rank in left) and time.monotonic() < deadline:
            if self._at_once or self.requests.at_once:
                break
            time.sleep(LOOK_S)
        for rank in left:
            rank.kill()
        for rank in left:
            with suppress(subprocess.TimeoutExpired):
                rank.wait(KILLED_S)


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


# --- in each process -------------------------------------------------------------------------------------------------


def tell_stopped() -> bool:
    """Called by each rank that was asked to stop, has saved, and now ends. Whether there is a launcher of ours to tell:
    it ends with 75 then, and this process must end with 0."""
    if FAILURES not in os.environ:
        return False
    with suppress(OSError):  # the launcher is gone
        (Path(os.environ[FAILURES]) / SAVED).touch()
    return True


def tell_done() -> None:
    """Called by each rank at the end of the run, when nothing can be lost any more."""
    if FAILURES in os.environ:
        with suppress(OSError):
            (Path(os.environ[FAILURES]) / DONE).touch()


def first_to_fail(code: int) -> bool:
    """Whether this process is the first of its run to fail, with `code`; the others need not say anything."""
    if FAILURES not in os.environ:
        return True
    try:
        return leave_mark(Path(os.environ[FAILURES]), Mark(code))
    except OSError:  # the launcher is gone
        return True


def another_failed(*, wait: bool = True) -> bool:
    """Whether another process of the run has failed, so that this one's troubles come from that. Word of it takes a
    moment longer than the loss of its connections: unless told not to, this waits for it."""
    if FAILURES not in os.environ:
        return False
    deadline = time.monotonic() + (float(os.environ.get(LOST_TOUCH, "0")) if wait else 0.0)
    while not (failed := (Path(os.environ[FAILURES]) / FIRST).exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return failed
