"""A launcher starts the ranks of a run and ends them when one fails. Several start one run, its ranks in the order of
the nodes, and end together whatever ends one of them. How they are stopped: test_stopping.py."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

# Forks a launcher for each [node, port, count, command, log] that it reads, of two nodes, or alone where the port is 0,
# and prints its process id; for a [pid] it prints how that launcher has ended. So torch is imported once for all.
DRIVER = """
import json, os, sys
from tools.processes import ProcessesFailed, run_processes

for line in sys.stdin:
    words = json.loads(line)
    if len(words) == 1:
        print(os.waitstatus_to_exitcode(os.waitpid(words[0], 0)[1]), flush=True)
    elif pid := os.fork():
        print(pid, flush=True)
    else:
        node, port, count, command, log = words
        for stream in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        code = 0
        nodes = {"nodes": 2, "node_rank": node, "rendezvous": f"localhost:{port}"} if port else {}
        try:
            run_processes(command, count, wait_s=20, silence_s=3, **nodes)
        except ProcessesFailed as failed:
            code = failed.exit_code
        os._exit(code)
"""

# A rank that needs no torch. It tells who it is, in a file, and stays for some seconds.
RANK = """
import json, os, sys, time
from pathlib import Path

directory, node, seconds = sys.argv[1:]
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
me = {"node": int(node), "pid": os.getpid()} | {name: int(os.environ[name]) for name in names}
path = Path(directory, f"rank{me['RANK']}")
path.with_suffix(".new").write_text(json.dumps(me))
path.with_suffix(".new").rename(path)
time.sleep(float(seconds))
"""

# When all are there, rank 0 fails, or rank 1, or both. They and rank 2 would wait on for ever.
FAILING = """
import json, os, signal, sys, time
from pathlib import Path

directory, how, _ = sys.argv[1:]
rank, marks = os.environ["RANK"], Path(os.environ["RESSL_FAILURES"])
if rank != "0":
    signal.signal(signal.SIGTERM, lambda number, frame: None)  # as a rank of a training run, which finishes its step
path = Path(directory, f"rank{rank}")
path.with_suffix(".new").write_text(json.dumps({"pid": os.getpid()}))
path.with_suffix(".new").rename(path)
while not all(Path(directory, name).exists() for name in ("rank0", "rank1", "rank2", "go")):
    time.sleep(0.01)
if rank == "0" and how == "SIGKILL":
    os.kill(os.getpid(), signal.SIGKILL)
if rank == "1" and how in ("second", "waits"):
    (marks / "first").write_text("5")  # it has failed, and said so, but does not end
while rank == "0" and how == "second" and not (marks / "first").exists():
    time.sleep(0.01)
if rank == "0" and how != "waits":
    sys.exit(3)
while True:
    time.sleep(1)
"""

# A rank of a training run: all meet, then rank 1 fails while the other waits for it.
TRAINING = """
import sys
from pathlib import Path
import torch
from ressl.config import RunConfig
from ressl.runtime import Runtime
from tools.processes import another_failed, first_to_fail

directory, node, _ = sys.argv[1:]
runtime = Runtime(RunConfig(out_dir=Path(directory), device="cpu"))
met = runtime.gather_rows(torch.tensor([[runtime.rank, int(node)]])).tolist()
print("met", met, "of", runtime.world_size, flush=True)
if runtime.rank == 1:
    if first_to_fail(3):
        print("ressl: error: the reason", flush=True)
    sys.exit(3)
try:
    runtime.wait_for_everyone()
except RuntimeError:
    sys.exit(1 if another_failed() else "a traceback")
"""


class Launchers:
    """Launchers on this machine, as if each were on one of its own. `ranks` were told of by those of RANK."""

    def __init__(self, directory: Path, driver: subprocess.Popen[str]) -> None:
        self.directory, self.driver, self.ranks = directory, driver, list[dict]()
        with socket.create_server(("localhost", 0)) as probe:
            self.port = probe.getsockname()[1]

    def ask(self, *words: object) -> int:
        assert self.driver.stdin and self.driver.stdout
        print(json.dumps(words), file=self.driver.stdin, flush=True)
        return int(self.driver.stdout.readline())

    def start(self, node: int | str, program: str, *, count: int = 1, seconds: float = 60) -> int:
        """The launcher's process id. What is no number is for the ranks of a launcher that is alone, as node 0."""
        script = self.directory / "rank.py"
        script.write_text(program)
        command = [str(script), str(self.directory), str(node), str(seconds)]
        port, number = (self.port, node) if isinstance(node, int) else (0, 0)
        return self.ask(number, port, count, command, str(self.directory / f"node{number}.log"))

    def await_ranks(self, count: int) -> list[dict]:
        paths = [self.directory / f"rank{rank}" for rank in range(count)]
        deadline = time.monotonic() + 20
        while not all(path.exists() for path in paths):
            assert time.monotonic() < deadline, [self.errors(node) for node in (0, 1)]
            time.sleep(0.02)
        self.ranks = [json.loads(path.read_text()) for path in paths]
        return self.ranks

    def errors(self, node: int) -> list[str]:
        path = self.directory / f"node{node}.log"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if " waits " not in line]


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
    for rank in launchers.ranks:
        with suppress(ProcessLookupError):
            os.kill(rank["pid"], signal.SIGKILL)


# --- one node --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "code", "words"),
    [
        ("exits", 3, []),
        ("second", 5, []),
        ("waits", 5, []),
        ("SIGKILL", 4, ["ressl: error: rank 0 was killed by SIGKILL (out of memory?)"]),
    ],
)
def test_when_a_rank_fails_the_others_are_gone_soon_even_one_that_is_stopped(
    launchers: Launchers, how: str, code: int, words: list[str]
) -> None:
    pid = launchers.start(how, FAILING, count=3)
    ranks = launchers.await_ranks(3)
    os.kill(ranks[2]["pid"], signal.SIGSTOP)
    (launchers.directory / "go").touch()
    began = time.monotonic()
    assert launchers.ask(pid) == code
    assert time.monotonic() - began < 20  # ranks 1 and 2, of which one does not end by itself and one cannot, get 5
    assert launchers.errors(0) == words
    for rank in ranks:
        with pytest.raises(ProcessLookupError):
            os.kill(rank["pid"], 0)


# --- two nodes -------------------------------------------------------------------------------------------------------


def test_ranks_are_numbered_by_node_whichever_comes_first(launchers: Launchers) -> None:
    one = launchers.start(1, RANK, count=2, seconds=0.2)
    time.sleep(0.3)
    zero = launchers.start(0, RANK, count=2, seconds=0.2)
    assert [launchers.ask(zero), launchers.ask(one)] == [0, 0]
    ranks = [(rank["node"], rank["LOCAL_RANK"]) for rank in launchers.await_ranks(4)]
    assert ranks == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert {(rank["WORLD_SIZE"], rank["LOCAL_WORLD_SIZE"]) for rank in launchers.ranks} == {(4, 2)}
    assert launchers.errors(0) == launchers.errors(1) == []


def test_ranks_of_two_nodes_meet_and_a_failure_is_told_once_on_each(launchers: Launchers) -> None:
    zero, one = (launchers.start(node, TRAINING) for node in (0, 1))
    assert [launchers.ask(zero), launchers.ask(one)] == [3, 3]
    met = "met [[0, 0], [1, 1]] of 2"
    assert launchers.errors(1) == [met, "ressl: error: the reason"]
    assert launchers.errors(0) == [met, f"ressl: error: node 1 ({socket.gethostname()}) failed, exit code 3"]


@pytest.mark.parametrize("node", [0, 1])
@pytest.mark.parametrize(
    ("sent", "code", "words"),
    [
        (signal.SIGINT, 75, "was stopped before the first step: there is nothing new to save"),
        (signal.SIGKILL, 4, "was lost: its launcher was killed, or the network failed"),
        (signal.SIGSTOP, 4, "was lost: not heard of for 3 s"),
    ],
)
def test_a_launcher_that_ends_ends_the_other_with_one_message(
    launchers: Launchers, node: int, sent: signal.Signals, code: int, words: str
) -> None:
    pids = [launchers.start(number, RANK) for number in (0, 1)]
    ranks, began = launchers.await_ranks(2), time.monotonic()
    os.kill(pids[node], sent)
    other = 1 - node
    assert launchers.ask(pids[other]) == code
    assert time.monotonic() - began < 10  # of the 60 s that the ranks would stay
    error = "" if code == 75 else "error: "
    assert launchers.errors(other) == [f"ressl: {error}node {node} ({socket.gethostname()}) {words}"]
    with pytest.raises(ProcessLookupError):
        os.kill(ranks[other]["pid"], 0)
    os.kill(pids[node], signal.SIGKILL)
    launchers.ask(pids[node])


def test_a_rank_that_is_killed_ends_the_ranks_of_all_nodes(launchers: Launchers) -> None:
    pids = [launchers.start(number, RANK, count=2) for number in (0, 1)]
    ranks = launchers.await_ranks(4)
    os.kill(ranks[2]["pid"], signal.SIGKILL)
    assert [launchers.ask(pid) for pid in pids] == [4, 4]
    lost = "rank 2 was killed by SIGKILL (out of memory?)"
    assert launchers.errors(0) == [f"ressl: error: node 1 ({socket.gethostname()}): {lost}"]
    assert launchers.errors(1) == [f"ressl: error: {lost}"]
    for rank in ranks:
        with pytest.raises(ProcessLookupError):
            os.kill(rank["pid"], 0)
