"""A signal to the launcher reaches its ranks, which save and end; a second Ctrl-C ends them at once; none is left."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tools.processes import Requests, tell_stopped

ASKING = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP]
NOTHING = "before the first step: there is nothing new to save"

# Forks a launcher for each order that it reads and prints its process id; for {"pid": N}, how launcher N has ended. So
# torch is imported once. They would start anew whatever may be mended: nothing that is stopped is.
DRIVER = """
import json, os, signal, sys, threading, time
from tools.processes import ProcessesFailed, run_processes

def send_early(number):
    while signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:
        time.sleep(0.001)
    os.kill(os.getpid(), number)

for line in sys.stdin:
    order = json.loads(line)
    if "pid" in order:
        print(os.waitstatus_to_exitcode(os.waitpid(order["pid"], 0)[1]), flush=True)
    elif pid := os.fork():
        print(pid, flush=True)
    else:
        for stream in (1, 2):
            os.dup2(os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_IGN if order["nohup"] else signal.SIG_DFL)
        if order["early"]:
            threading.Thread(target=send_early, args=[order["early"]], daemon=True).start()
        code = 0
        try:
            run_processes(order["command"], wait_s=20, silence_s=5, max_restarts=3, **order["options"])
        except ProcessesFailed as failed:
            code = failed.exit_code
        os._exit(code)
"""

# A rank that needs no torch. It tells its process id, the signals that it got, and that it has saved, in files. What
# one has heard, all know: ranks of a training run agree on that. A slow one saves when the test lets it.
RANK = """
import os, signal, sys, time
from pathlib import Path

directory, rank = Path(sys.argv[1]), int(os.environ["RANK"])
kind, marks = sys.argv[2:][rank], Path(os.environ["RESSL_FAILURES"])
heard, asked = [], directory / "asked"

def tell(what, words):
    path = directory / f"{what}{rank}"
    path.with_suffix(".new").write_text(str(words))
    path.with_suffix(".new").rename(path)

def hear(number, frame):
    heard.append(signal.Signals(number).name)
    tell("heard", " ".join(heard))
    asked.touch()

if kind != "starting":
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"):
        if signal.getsignal(signal.Signals[name]) is not signal.SIG_IGN:
            signal.signal(signal.Signals[name], hear)
tell("pid", os.getpid())
until = time.monotonic() + 60
while not asked.exists() or kind == "stuck":
    time.sleep(0.01)
    if time.monotonic() > until:
        sys.exit(9)
if kind == "finished":
    sys.exit(0)
while kind == "slow" and not (directory / "go").exists() and time.monotonic() < until:
    time.sleep(0.01)
(marks / "stopped").touch()
tell("saved", "")
while kind == "lingering":
    time.sleep(0.01)
if kind == "struck":
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)
"""

# Ranks that begin as those of launch.py do.
ORPHANS = """
import os, sys, time
from pathlib import Path
from tools.early import begin

begin()
path = Path(sys.argv[1], f"pid{os.environ['RANK']}")
path.with_suffix(".new").write_text(str(os.getpid()))
path.with_suffix(".new").rename(path)
time.sleep(60)
"""


def awaited(done: Callable[[], object], what: object = "") -> None:
    deadline = time.monotonic() + 20
    while not done():
        assert time.monotonic() < deadline, what() if callable(what) else what
        time.sleep(0.01)


def is_gone(pid: int) -> bool:
    """Or waits for a parent that does not look."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


class Launchers:
    """Launchers on this machine. With `nodes`, each as if on one of its own, with one rank."""

    def __init__(self, directory: Path, driver: subprocess.Popen[str]) -> None:
        self.directory, self.driver, self.pids = directory, driver, list[int]()
        with socket.create_server(("localhost", 0)) as probe:
            self.port = probe.getsockname()[1]

    def ask(self, **order: object) -> int:
        assert self.driver.stdin and self.driver.stdout
        print(json.dumps(order), file=self.driver.stdin, flush=True)
        return int(self.driver.stdout.readline())

    def start(
        self, *kinds: str, node: int | None = None, early: int = 0, nohup: bool = False, program: str = RANK
    ) -> int:
        """The launcher's process id, once its ranks are there, if they will be."""
        script = self.directory / "rank.py"
        script.write_text(program)
        options: dict[str, object] = {"count": len(kinds)}
        if node is not None:
            options = {"count": 1, "nodes": 2, "node_rank": node, "rendezvous": f"localhost:{self.port}"}
        command = [str(script), str(self.directory), *kinds]
        log = str(self.directory / f"node{node or 0}.log")
        pid = self.ask(command=command, log=log, early=early, nohup=nohup, options=options)
        self.pids.append(pid)
        if not early and node is None:
            self.await_files(*(f"pid{rank}" for rank in range(len(kinds))))
        return pid

    def await_files(self, *names: str) -> None:
        awaited(lambda: all((self.directory / name).exists() for name in names), lambda: self.said(0))

    def end(self, pid: int, *, go: bool = False) -> int:
        """The exit code of a launcher, when it has ended. `go` lets slow ranks save."""
        if go:
            (self.directory / "go").touch()
        code = self.ask(pid=pid)
        self.pids.remove(pid)
        return code

    def ranks(self) -> list[int]:
        return [int(path.read_text()) for path in sorted(self.directory.glob("pid?"))]

    def saved(self) -> list[str]:
        return [path.name for path in sorted(self.directory.glob("saved?"))]

    def heard(self, rank: int) -> str:
        return (self.directory / f"heard{rank}").read_text()

    def said(self, node: int = 0) -> list[str]:
        lines = (self.directory / f"node{node}.log").read_text().splitlines()
        return [line for line in lines if " waits " not in line and "Ctrl-C again" not in line]


@pytest.fixture(scope="module")
def driver(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    left = tmp_path_factory.mktemp("left")  # here by launchers that are killed
    environment = os.environ | {"PYTHONPATH": str(repo), "OMP_NUM_THREADS": "1", "TMPDIR": str(left)}
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield process


@pytest.fixture
def launchers(driver: subprocess.Popen[str], tmp_path: Path) -> Iterator[Launchers]:
    launchers = Launchers(tmp_path, driver)
    yield launchers
    for pid in launchers.ranks():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for pid in launchers.pids:
        os.kill(pid, signal.SIGKILL)
        launchers.ask(pid=pid)


# --- asked once ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", ASKING)
def test_ranks_at_work_are_asked_save_and_the_code_is_75(launchers: Launchers, sent: signal.Signals) -> None:
    pid = launchers.start("working", "slow")
    os.kill(pid, sent)
    launchers.await_files("saved0", "heard1")
    assert launchers.end(pid, go=True) == 75
    assert launchers.saved() == ["saved0", "saved1"]
    assert launchers.heard(0) == launchers.heard(1) == ("SIGTERM" if sent == signal.SIGINT else sent.name)
    assert launchers.said() == []
    assert all(is_gone(rank) for rank in launchers.ranks())


@pytest.mark.parametrize("sent", ASKING)
def test_ranks_that_are_still_starting_die_of_the_signal_and_that_is_a_stop(
    launchers: Launchers, sent: signal.Signals
) -> None:
    pid = launchers.start("starting", "starting")
    os.kill(pid, sent)
    assert launchers.end(pid) == 75
    assert launchers.said() == [f"ressl: stopped by {sent.name} {NOTHING}"]
    assert all(is_gone(rank) for rank in launchers.ranks())


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGUSR1])
def test_a_signal_at_the_first_moment_reaches_ranks_that_start_after_it(
    launchers: Launchers, sent: signal.Signals
) -> None:
    pid = launchers.start("starting", "starting", early=sent)
    assert launchers.end(pid) == 75
    assert launchers.said() == [f"ressl: stopped by {sent.name} {NOTHING}"]
    assert all(is_gone(rank) for rank in launchers.ranks())


def test_a_rank_that_waits_for_one_that_died_starting_is_ended(launchers: Launchers) -> None:
    pid = launchers.start("starting", "stuck")
    os.kill(pid, signal.SIGUSR1)
    assert launchers.end(pid) == 75
    assert launchers.said() == [f"ressl: stopped by SIGUSR1 {NOTHING}"]
    assert all(is_gone(rank) for rank in launchers.ranks())


def test_a_rank_that_has_saved_may_die_of_a_signal_while_others_still_save(launchers: Launchers) -> None:
    pid = launchers.start("struck", "slow")
    os.kill(pid, signal.SIGUSR1)
    launchers.await_files("saved0")
    awaited(lambda: is_gone(launchers.ranks()[0]))
    time.sleep(0.2)  # for the launcher to see it
    assert launchers.end(pid, go=True) == 75
    assert launchers.saved() == ["saved0", "saved1"]
    assert launchers.said() == []


def test_a_signal_to_one_rank_alone_stops_the_run_as_well(launchers: Launchers) -> None:
    pid = launchers.start("working", "working")
    os.kill(launchers.ranks()[1], signal.SIGUSR1)
    assert launchers.end(pid) == 75
    assert launchers.saved() == ["saved0", "saved1"]
    assert launchers.said() == []


def test_a_run_that_comes_to_its_end_when_it_is_asked_has_not_stopped(launchers: Launchers) -> None:
    pid = launchers.start("finished", "finished")
    os.kill(pid, signal.SIGTERM)
    assert launchers.end(pid) == 0
    assert launchers.said() == []


def test_under_nohup_a_lost_terminal_is_nothing(launchers: Launchers) -> None:
    pid = launchers.start("working", "working", nohup=True)
    os.kill(pid, signal.SIGHUP)
    os.kill(pid, signal.SIGTERM)
    assert launchers.end(pid) == 75
    assert launchers.heard(0) == launchers.heard(1) == "SIGTERM"


# --- asked twice -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGUSR1])
def test_a_second_ctrl_c_ends_all_at_once(launchers: Launchers, first: signal.Signals) -> None:
    pid = launchers.start("stuck", "stuck")
    os.kill(pid, first)
    launchers.await_files("heard0", "heard1")
    time.sleep(0.6)
    began = time.monotonic()
    os.kill(pid, signal.SIGINT)
    assert launchers.end(pid) == 130
    assert time.monotonic() - began < 4  # they are not given the 5 s to end by themselves
    assert launchers.said() == ["ressl: ended at once: what came after the last checkpoint is lost"]
    assert all(is_gone(rank) for rank in launchers.ranks())


def test_a_second_ctrl_c_after_all_is_saved_loses_nothing(launchers: Launchers) -> None:
    pid = launchers.start("slow", "lingering")
    os.kill(pid, signal.SIGINT)
    launchers.await_files("heard0", "saved1")
    time.sleep(0.6)
    os.kill(pid, signal.SIGINT)
    assert launchers.end(pid) == 75
    assert launchers.said() == []
    assert all(is_gone(rank) for rank in launchers.ranks())


def test_a_ctrl_c_that_is_told_twice_is_one_and_signals_are_as_before_afterwards() -> None:
    before = [signal.getsignal(sent) for sent in ASKING]
    with Requests() as requests:
        for sent in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(sent)
        assert requests.first == signal.SIGINT and not requests.at_once
    assert [signal.getsignal(sent) for sent in ASKING] == before


def test_other_signals_after_the_first_change_nothing(launchers: Launchers) -> None:
    pid = launchers.start("slow", "slow")
    os.kill(pid, signal.SIGUSR1)
    launchers.await_files("heard0", "heard1")
    time.sleep(0.6)
    for sent in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        os.kill(pid, sent)
    time.sleep(0.2)
    assert launchers.end(pid, go=True) == 75
    assert launchers.saved() == ["saved0", "saved1"]
    assert launchers.heard(0).count("SIG") == launchers.heard(1).count("SIG") == 1


def test_a_killed_launcher_leaves_no_rank(launchers: Launchers) -> None:
    pid = launchers.start("", "", program=ORPHANS)
    os.kill(pid, signal.SIGKILL)
    assert launchers.end(pid) == -signal.SIGKILL
    ranks = launchers.ranks()
    awaited(lambda: all(is_gone(rank) for rank in ranks), [rank for rank in ranks if not is_gone(rank)])


# --- several nodes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("node", [0, 1])
def test_a_signal_to_one_node_stops_the_run_on_all(launchers: Launchers, node: int) -> None:
    pids = [launchers.start("slow", "working", node=number) for number in (0, 1)]
    launchers.await_files("pid0", "pid1")
    os.kill(pids[node], signal.SIGUSR1)
    launchers.await_files("saved1")
    assert [launchers.end(pid, go=True) for pid in pids] == [75, 75]
    assert launchers.saved() == ["saved0", "saved1"]
    assert launchers.said(0) == launchers.said(1) == []


def test_a_node_whose_rank_was_still_starting_is_told_of_on_the_other(launchers: Launchers) -> None:
    pids = [launchers.start("starting", "starting", node=number) for number in (0, 1)]
    launchers.await_files("pid0", "pid1")
    os.kill(pids[1], signal.SIGTERM)
    assert [launchers.end(pid) for pid in pids] == [75, 75]
    assert launchers.said(0) == [f"ressl: node 1 ({socket.gethostname()}) was stopped {NOTHING}"]
    assert launchers.said(1) == [f"ressl: stopped by SIGTERM {NOTHING}"]
    assert all(is_gone(rank) for rank in launchers.ranks())


@pytest.mark.parametrize("node", [0, 1])
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGUSR1])
def test_a_node_that_waits_for_the_other_is_stopped_at_once(
    launchers: Launchers, node: int, sent: signal.Signals
) -> None:
    pid = launchers.start("working", "working", node=node)
    log = launchers.directory / f"node{node}.log"
    awaited(lambda: log.exists() and " waits " in log.read_text())
    os.kill(pid, sent)
    assert launchers.end(pid) == 75
    assert launchers.said(node) == [f"ressl: stopped by {sent.name} {NOTHING}"]


def test_a_second_ctrl_c_on_one_node_ends_all_of_them(launchers: Launchers) -> None:
    pids = [launchers.start("stuck", "stuck", node=number) for number in (0, 1)]
    launchers.await_files("pid0", "pid1")
    os.kill(pids[0], signal.SIGINT)
    launchers.await_files("heard0")
    time.sleep(0.6)
    os.kill(pids[0], signal.SIGINT)
    assert [launchers.end(pid) for pid in pids] == [130, 130]
    assert launchers.said(1) == [f"ressl: node 0 ({socket.gethostname()}) was ended at once"]
    assert all(is_gone(rank) for rank in launchers.ranks())


# --- the rank's part -------------------------------------------------------------------------------------------------


def test_a_rank_tells_its_launcher_that_it_has_saved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RESSL_FAILURES", str(tmp_path))
    assert tell_stopped() and tell_stopped()
    assert [path.name for path in tmp_path.iterdir()] == ["stopped"]


def test_a_process_without_our_launcher_is_told_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RESSL_FAILURES", raising=False)
    assert not tell_stopped()
    monkeypatch.setenv("RESSL_FAILURES", str(tmp_path / "gone"))  # as when the launcher was killed
    assert tell_stopped()
