"""A signal to the launcher reaches its ranks, which save and end; a second Ctrl-C ends them at once; none is left."""

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tools.processes import Requests, tell_stopped

ASKING = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP]
NOTHING = "before the first step: there is nothing new to save"

# A rank that needs no torch. It tells its process id, the signals that it got, and that it has saved, in files. What
# one has heard, all know: ranks of a training run agree on that. A slow one saves when the test lets it.
RANK = """
import json, os, signal, sys, time
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
tell("rank", json.dumps({"pid": os.getpid()}))
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
path = Path(sys.argv[1], f"rank{os.environ['RANK']}")
path.with_suffix(".new").write_text(f'{{"pid": {os.getpid()}}}')
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


class Run:
    """Launchers and what their ranks tell. They would start anew whatever may be mended: nothing that is stopped is."""

    def __init__(self, launchers) -> None:
        self.launchers, self.directory = launchers, launchers.directory

    def start(
        self, *kinds: str, node: int | None = None, early: int = 0, nohup: bool = False, program: str = RANK
    ) -> int:
        """The launcher's process id, once its ranks are there, if they will be. With `node` it has one of both."""
        pid = self.launchers.start(
            program, *kinds, count=len(kinds) if node is None else 1, node=node, early=early, nohup=nohup, silence_s=5,
            max_restarts=3,
        )  # fmt: skip
        if not early and node is None:
            self.await_files(*(f"rank{rank}" for rank in range(len(kinds))))
        return pid

    def await_files(self, *names: str) -> None:
        awaited(lambda: all((self.directory / name).exists() for name in names), lambda: self.said(0))

    def end(self, pid: int, *, go: bool = False) -> int:
        """The exit code of a launcher, when it has ended. `go` lets slow ranks save."""
        if go:
            (self.directory / "go").touch()
        return self.launchers.end(pid)

    def ranks(self) -> list[int]:
        return [json.loads(path.read_text())["pid"] for path in sorted(self.directory.glob("rank[0-9]"))]

    def saved(self) -> list[str]:
        return [path.name for path in sorted(self.directory.glob("saved?"))]

    def heard(self, rank: int) -> str:
        return (self.directory / f"heard{rank}").read_text()

    def said(self, node: int = 0) -> list[str]:
        return [line for line in self.launchers.said(node) if "Ctrl-C again" not in line]


@pytest.fixture
def run(launchers) -> Run:
    return Run(launchers)


# --- asked once ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", ASKING)
def test_ranks_at_work_are_asked_save_and_the_code_is_75(run: Run, sent: signal.Signals) -> None:
    pid = run.start("working", "slow")
    os.kill(pid, sent)
    run.await_files("saved0", "heard1")
    assert run.end(pid, go=True) == 75
    assert run.saved() == ["saved0", "saved1"]
    assert run.heard(0) == run.heard(1) == ("SIGTERM" if sent == signal.SIGINT else sent.name)
    assert run.said() == []
    assert all(is_gone(rank) for rank in run.ranks())


@pytest.mark.parametrize("sent", ASKING)
def test_ranks_that_are_still_starting_die_of_the_signal_and_that_is_a_stop(run: Run, sent: signal.Signals) -> None:
    pid = run.start("starting", "starting")
    os.kill(pid, sent)
    assert run.end(pid) == 75
    assert run.said() == [f"ressl: stopped by {sent.name} {NOTHING}"]
    assert all(is_gone(rank) for rank in run.ranks())


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGUSR1])
def test_a_signal_at_the_first_moment_reaches_ranks_that_start_after_it(run: Run, sent: signal.Signals) -> None:
    pid = run.start("starting", "starting", early=sent)
    assert run.end(pid) == 75
    assert run.said() == [f"ressl: stopped by {sent.name} {NOTHING}"]
    assert all(is_gone(rank) for rank in run.ranks())


def test_a_rank_that_waits_for_one_that_died_starting_is_ended(run: Run) -> None:
    pid = run.start("starting", "stuck")
    os.kill(pid, signal.SIGUSR1)
    assert run.end(pid) == 75
    assert run.said() == [f"ressl: stopped by SIGUSR1 {NOTHING}"]
    assert all(is_gone(rank) for rank in run.ranks())


def test_a_rank_that_has_saved_may_die_of_a_signal_while_others_still_save(run: Run) -> None:
    pid = run.start("struck", "slow")
    os.kill(pid, signal.SIGUSR1)
    run.await_files("saved0")
    awaited(lambda: is_gone(run.ranks()[0]))
    time.sleep(0.2)  # for the launcher to see it
    assert run.end(pid, go=True) == 75
    assert run.saved() == ["saved0", "saved1"]
    assert run.said() == []


def test_a_signal_to_one_rank_alone_stops_the_run_as_well(run: Run) -> None:
    pid = run.start("working", "working")
    os.kill(run.ranks()[1], signal.SIGUSR1)
    assert run.end(pid) == 75
    assert run.saved() == ["saved0", "saved1"]
    assert run.said() == []


def test_a_run_that_comes_to_its_end_when_it_is_asked_has_not_stopped(run: Run) -> None:
    pid = run.start("finished", "finished")
    os.kill(pid, signal.SIGTERM)
    assert run.end(pid) == 0
    assert run.said() == []


def test_under_nohup_a_lost_terminal_is_nothing(run: Run) -> None:
    pid = run.start("working", "working", nohup=True)
    os.kill(pid, signal.SIGHUP)
    os.kill(pid, signal.SIGTERM)
    assert run.end(pid) == 75
    assert run.heard(0) == run.heard(1) == "SIGTERM"


# --- asked twice -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGUSR1])
def test_a_second_ctrl_c_ends_all_at_once(run: Run, first: signal.Signals) -> None:
    pid = run.start("stuck", "stuck")
    os.kill(pid, first)
    run.await_files("heard0", "heard1")
    time.sleep(0.6)
    began = time.monotonic()
    os.kill(pid, signal.SIGINT)
    assert run.end(pid) == 130
    assert time.monotonic() - began < 4  # they are not given the 5 s to end by themselves
    assert run.said() == ["ressl: ended at once: what came after the last checkpoint is lost"]
    assert all(is_gone(rank) for rank in run.ranks())


def test_a_second_ctrl_c_after_all_is_saved_loses_nothing(run: Run) -> None:
    pid = run.start("slow", "lingering")
    os.kill(pid, signal.SIGINT)
    run.await_files("heard0", "saved1")
    time.sleep(0.6)
    os.kill(pid, signal.SIGINT)
    assert run.end(pid) == 75
    assert run.said() == []
    assert all(is_gone(rank) for rank in run.ranks())


def test_a_ctrl_c_that_is_told_twice_is_one_and_signals_are_as_before_afterwards() -> None:
    before = [signal.getsignal(sent) for sent in ASKING]
    with Requests() as requests:
        for sent in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(sent)
        assert requests.first == signal.SIGINT and not requests.at_once
    assert [signal.getsignal(sent) for sent in ASKING] == before


def test_other_signals_after_the_first_change_nothing(run: Run) -> None:
    pid = run.start("slow", "slow")
    os.kill(pid, signal.SIGUSR1)
    run.await_files("heard0", "heard1")
    time.sleep(0.6)
    for sent in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        os.kill(pid, sent)
    time.sleep(0.2)
    assert run.end(pid, go=True) == 75
    assert run.saved() == ["saved0", "saved1"]
    assert run.heard(0).count("SIG") == run.heard(1).count("SIG") == 1


def test_a_killed_launcher_leaves_no_rank(run: Run) -> None:
    pid = run.start("", "", program=ORPHANS)
    os.kill(pid, signal.SIGKILL)
    assert run.end(pid) == -signal.SIGKILL
    ranks = run.ranks()
    awaited(lambda: all(is_gone(rank) for rank in ranks), [rank for rank in ranks if not is_gone(rank)])


# --- several nodes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("node", [0, 1])
def test_a_signal_to_one_node_stops_the_run_on_all(run: Run, node: int) -> None:
    pids = [run.start("slow", "working", node=number) for number in (0, 1)]
    run.await_files("rank0", "rank1")
    os.kill(pids[node], signal.SIGUSR1)
    run.await_files("saved1")
    assert [run.end(pid, go=True) for pid in pids] == [75, 75]
    assert run.saved() == ["saved0", "saved1"]
    assert run.said(0) == run.said(1) == []


def test_a_node_whose_rank_was_still_starting_is_told_of_on_the_other(run: Run) -> None:
    pids = [run.start("starting", "starting", node=number) for number in (0, 1)]
    run.await_files("rank0", "rank1")
    os.kill(pids[1], signal.SIGTERM)
    assert [run.end(pid) for pid in pids] == [75, 75]
    assert run.said(0) == [f"ressl: node 1 ({socket.gethostname()}) was stopped {NOTHING}"]
    assert run.said(1) == [f"ressl: stopped by SIGTERM {NOTHING}"]
    assert all(is_gone(rank) for rank in run.ranks())


@pytest.mark.parametrize("node", [0, 1])
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGUSR1])
def test_a_node_that_waits_for_the_other_is_stopped_at_once(run: Run, node: int, sent: signal.Signals) -> None:
    pid = run.start("working", "working", node=node)
    awaited(lambda: run.launchers.waits(node))
    os.kill(pid, sent)
    assert run.end(pid) == 75
    assert run.said(node) == [f"ressl: stopped by {sent.name} {NOTHING}"]


def test_a_second_ctrl_c_on_one_node_ends_all_of_them(run: Run) -> None:
    pids = [run.start("stuck", "stuck", node=number) for number in (0, 1)]
    run.await_files("rank0", "rank1")
    os.kill(pids[0], signal.SIGINT)
    run.await_files("heard0")
    time.sleep(0.6)
    os.kill(pids[0], signal.SIGINT)
    assert [run.end(pid) for pid in pids] == [130, 130]
    assert run.said(1) == [f"ressl: node 0 ({socket.gethostname()}) was ended at once"]
    assert all(is_gone(rank) for rank in run.ranks())


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
