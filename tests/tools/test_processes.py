"""A launcher starts the ranks of a run and ends them when one fails. Several start one run, its ranks in the order of
the nodes, and end together whatever ends one of them. How they are stopped: test_stopping.py."""

import json
import os
import signal
import socket
import time

import pytest

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
import os, sys
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
    os._exit(3)
try:
    runtime.wait_for_everyone()
except RuntimeError:
    sys.exit(1 if another_failed() else "a traceback")
"""


def start(launchers, node: int | str, program: str, *, count: int = 1, seconds: float = 60) -> int:
    """The launcher's process id. What is no number is for the ranks of a launcher that is alone."""
    place = node if isinstance(node, int) else None
    return launchers.start(program, str(node), str(seconds), count=count, node=place, silence_s=3)


def await_ranks(launchers, count: int) -> list[dict]:
    """What they have told of themselves."""
    paths = [launchers.directory / f"rank{rank}" for rank in range(count)]
    deadline = time.monotonic() + 20
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, [launchers.said(node) for node in (0, 1)]
        time.sleep(0.02)
    return [json.loads(path.read_text()) for path in paths]


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
    launchers, how: str, code: int, words: list[str]
) -> None:
    pid = start(launchers, how, FAILING, count=3)
    ranks = await_ranks(launchers, 3)
    os.kill(ranks[2]["pid"], signal.SIGSTOP)
    (launchers.directory / "go").touch()
    began = time.monotonic()
    assert launchers.end(pid) == code
    assert time.monotonic() - began < 20  # ranks 1 and 2, of which one does not end by itself and one cannot, get 5
    assert launchers.said(0) == words
    for rank in ranks:
        with pytest.raises(ProcessLookupError):
            os.kill(rank["pid"], 0)


# --- two nodes -------------------------------------------------------------------------------------------------------


def test_ranks_are_numbered_by_node_whichever_comes_first(launchers) -> None:
    one = start(launchers, 1, RANK, count=2, seconds=0.2)
    time.sleep(0.3)
    zero = start(launchers, 0, RANK, count=2, seconds=0.2)
    assert [launchers.end(zero), launchers.end(one)] == [0, 0]
    ranks = await_ranks(launchers, 4)
    assert [(rank["node"], rank["LOCAL_RANK"]) for rank in ranks] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert {(rank["WORLD_SIZE"], rank["LOCAL_WORLD_SIZE"]) for rank in ranks} == {(4, 2)}
    assert launchers.said(0) == launchers.said(1) == []


def test_ranks_of_two_nodes_meet_and_a_failure_is_told_once_on_each(launchers) -> None:
    zero, one = (start(launchers, node, TRAINING) for node in (0, 1))
    assert [launchers.end(zero), launchers.end(one)] == [3, 3]
    met = "met [[0, 0], [1, 1]] of 2"
    assert launchers.said(1) == [met, "ressl: error: the reason"]
    assert launchers.said(0) == [met, f"ressl: error: node 1 ({socket.gethostname()}) failed, exit code 3"]


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
    launchers, node: int, sent: signal.Signals, code: int, words: str
) -> None:
    pids = [start(launchers, number, RANK) for number in (0, 1)]
    ranks, began = await_ranks(launchers, 2), time.monotonic()
    os.kill(pids[node], sent)
    other = 1 - node
    assert launchers.end(pids[other]) == code
    assert time.monotonic() - began < 10  # of the 60 s that the ranks would stay
    error = "" if code == 75 else "error: "
    assert launchers.said(other) == [f"ressl: {error}node {node} ({socket.gethostname()}) {words}"]
    with pytest.raises(ProcessLookupError):
        os.kill(ranks[other]["pid"], 0)
    os.kill(pids[node], signal.SIGKILL)
    launchers.end(pids[node])


def test_a_rank_that_is_killed_ends_the_ranks_of_all_nodes(launchers) -> None:
    pids = [start(launchers, number, RANK, count=2) for number in (0, 1)]
    ranks = await_ranks(launchers, 4)
    os.kill(ranks[2]["pid"], signal.SIGKILL)
    assert [launchers.end(pid) for pid in pids] == [4, 4]
    lost = "rank 2 was killed by SIGKILL (out of memory?)"
    assert launchers.said(0) == [f"ressl: error: node 1 ({socket.gethostname()}): {lost}"]
    assert launchers.said(1) == [f"ressl: error: {lost}"]
    for rank in ranks:
        with pytest.raises(ProcessLookupError):
            os.kill(rank["pid"], 0)
