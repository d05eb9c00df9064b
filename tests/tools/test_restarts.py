"""After a failure that a restart may mend all ranks start again, as often as allowed; after any other they do not."""

import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest

ANEW = "starting again from the beginning, restart"

# A rank that needs no torch. It tells who it is in each try, in a file. The last one does, in each try, what the next
# word says: is killed by a signal, exits with a code (having `said` so, or asked to stop), or stays. The others stay
# until they are ended, or the last one ends well.
RANK = """
import json, os, signal, sys, time
from pathlib import Path

directory, marks = Path(sys.argv[1]), Path(os.environ["RESSL_FAILURES"])
rank, last = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]) - 1
tries = len(list(directory.glob(f"rank{rank}.try*")))
word = sys.argv[2:][tries]
me = {"pid": os.getpid(), "marks": str(marks), "empty": not list(marks.iterdir()), "port": os.environ["MASTER_PORT"]}
path = directory / f"rank{rank}.try{tries}"
path.with_suffix(".new").write_text(json.dumps(me))
path.with_suffix(".new").rename(path)
while not all((directory / f"rank{other}.try{tries}").exists() for other in range(last + 1)):
    time.sleep(0.01)
if rank == last and word.startswith("SIG"):
    os.kill(os.getpid(), signal.Signals[word])
if rank == last and word.startswith("said"):
    (marks / "first").write_text(word.removeprefix("said"))
if rank == last and word == "stopped":
    (marks / "stopped").touch()
if rank == last and word.isdigit():
    sys.exit(int(word))
if rank == last and word.startswith("said"):
    sys.exit(1)
if rank == last and word in ("ends", "stopped"):
    (directory / "over").touch()
until = time.monotonic() + 60
while not (directory / "over").exists() and time.monotonic() < until:
    time.sleep(0.01)
"""

# Ranks of a training run, which meet by torch in each try. In the first, rank 1 is killed while rank 0 waits for it.
TRAINING = """
import os, signal, sys
from pathlib import Path
import torch
from ressl.config import RunConfig
from ressl.runtime import Runtime
from tools.processes import another_failed

directory, _, word = Path(sys.argv[1]), *sys.argv[2:4]
again = (directory / "again").exists()
runtime = Runtime(RunConfig(out_dir=directory, device="cpu"))
total = int(runtime.gather_rows(torch.tensor([runtime.rank + 1])).sum())
if runtime.rank == 1:
    print("met" if total == 3 else "alone", flush=True)
if runtime.rank == 1 and not again:
    (directory / "again").touch()
    os.kill(os.getpid(), signal.SIGKILL)
try:
    runtime.wait_for_everyone()
except RuntimeError:
    sys.exit(1 if another_failed() else "a traceback")
"""


def start(
    launchers, words: str, *, restarts: int, node: int | None = None, program: str = RANK, run_dir: Path | None = None
) -> int:
    """The process id of a launcher of two ranks; with `node` of one, and another launcher has the other."""
    count, run = 2 if node is None else 1, run_dir or launchers.directory / "nothing"
    return launchers.start(
        program, *words.split(), count=count, node=node, run_dir=run, max_restarts=restarts, silence_s=5
    )  # fmt: skip


def tries(launchers, rank: int) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(launchers.directory.glob(f"rank{rank}.try?"))]


# --- one node --------------------------------------------------------------------------------------------------------


def test_what_may_be_mended_starts_again_each_time_told_in_one_line(launchers) -> None:
    assert launchers.end(start(launchers, "SIGKILL 1 said6 ends", restarts=3)) == 0
    assert launchers.said() == [
        f"ressl: rank 1 was killed by SIGKILL (out of memory?); {ANEW} 1 of 3",
        f"ressl: a process failed; {ANEW} 2 of 3",
        f"ressl: a process hung; {ANEW} 3 of 3",
    ]


def test_where_there_is_a_checkpoint_it_is_named_and_at_the_end_how_to_go_on_from_it(launchers) -> None:
    run = launchers.directory / "a run"
    (run / "checkpoints" / "step-00000012").mkdir(parents=True)
    assert launchers.end(start(launchers, "1 SIGKILL", restarts=1, run_dir=run)) == 4
    assert launchers.end(start(launchers, "1 1 said6", restarts=0, run_dir=run)) == 6
    here = f"the last checkpoint is step-00000012; to go on: python launch.py resume '{run}'"
    assert launchers.said() == [
        "ressl: a process failed; starting again from step-00000012, restart 1 of 1",
        f"ressl: error: rank 1 was killed by SIGKILL (out of memory?); {here}",
        f"ressl: {here}",
    ]


@pytest.mark.parametrize(
    ("words", "code", "last"),
    [
        ("SIGSEGV 1 SIGKILL", 4, ["ressl: error: rank 1 was killed by SIGKILL (out of memory?); nothing was saved"]),
        ("SIGKILL 1 6", 6, ["ressl: nothing was saved"]),
    ],
)
def test_when_the_restarts_are_used_up_the_last_failure_counts(
    launchers, words: str, code: int, last: list[str]
) -> None:
    assert launchers.end(start(launchers, words, restarts=2)) == code
    assert launchers.said()[2:] == last
    assert len(tries(launchers, 0)) == len(tries(launchers, 1)) == 3


@pytest.mark.parametrize(
    ("word", "code"),
    [("2", 2), ("said3", 3), ("said4", 4), ("said5", 5), ("75", 75), ("130", 130), ("stopped", 75)],
)
def test_what_cannot_be_mended_does_not_start_again(launchers, word: str, code: int) -> None:
    assert launchers.end(start(launchers, f"{word} ends", restarts=3)) == code
    assert launchers.said() == []
    assert len(tries(launchers, 0)) == len(tries(launchers, 1)) == 1


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("SIGKILL", " (out of memory?)"),
        ("SIGBUS", " (was a data file cut while it was read, or is /dev/shm full?)"),
        ("SIGTERM", ""),
        ("SIGRTMIN", ""),
    ],
)
def test_nothing_starts_again_unless_asked_to_and_a_killer_is_named(launchers, word: str, hint: str) -> None:
    assert launchers.end(start(launchers, f"{word} ends", restarts=0)) == 4
    assert launchers.said() == [f"ressl: error: rank 1 was killed by {word}{hint}; nothing was saved"]


def test_each_try_has_marks_of_its_own_and_leaves_none_of_its_ranks(launchers) -> None:
    assert launchers.end(start(launchers, "said6 said1 said3", restarts=5)) == 3  # not the 6 that was said first
    for rank in (0, 1):
        found = tries(launchers, rank)
        assert len({tried["marks"] for tried in found}) == 3
        assert all(tried["empty"] and not Path(tried["marks"]).exists() for tried in found)
        for tried in found:
            with pytest.raises(ProcessLookupError):
                os.kill(tried["pid"], 0)


def test_a_signal_between_two_tries_stops_the_run(launchers) -> None:
    pid = start(launchers, "1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1", restarts=19)
    while len(tries(launchers, 0)) < 2:
        time.sleep(0.01)
    os.kill(pid, signal.SIGUSR1)
    assert launchers.end(pid) in (1, 75)  # as it comes while the ranks are there, or start
    assert len(tries(launchers, 0)) < 20


def test_ranks_of_torch_meet_anew_and_the_one_that_lost_touch_says_nothing(launchers) -> None:
    assert launchers.end(start(launchers, "- -", restarts=1, program=TRAINING)) == 0
    line = f"ressl: rank 1 was killed by SIGKILL (out of memory?); {ANEW} 1 of 1"
    assert launchers.said() == ["met", line, "met"]


# --- two nodes -------------------------------------------------------------------------------------------------------


def test_nodes_start_again_together(launchers) -> None:
    pids = [start(launchers, "SIGKILL said1 ends", restarts=2, node=node) for node in (0, 1)]
    assert [launchers.end(pid) for pid in pids] == [0, 0]
    assert [len(tries(launchers, rank)) for rank in (0, 1)] == [3, 3]
    assert launchers.said(1) == [
        f"ressl: rank 1 was killed by SIGKILL (out of memory?); {ANEW} 1 of 2",
        f"ressl: a process failed; {ANEW} 2 of 2",
    ]
    there = f"ressl: node 1 ({socket.gethostname()})"
    assert launchers.said(0) == [
        f"{there}: rank 1 was killed by SIGKILL (out of memory?); {ANEW} 1 of 2",
        f"{there} failed, exit code 1; {ANEW} 2 of 2",
    ]


def test_nodes_end_together_when_it_cannot_be_mended(launchers) -> None:
    pids = [start(launchers, "SIGKILL said3 ends", restarts=2, node=node) for node in (0, 1)]
    assert [launchers.end(pid) for pid in pids] == [3, 3]
    assert [len(tries(launchers, rank)) for rank in (0, 1)] == [2, 2]
    assert launchers.said(0)[1:] == [f"ressl: error: node 1 ({socket.gethostname()}) failed, exit code 3"]


@pytest.mark.parametrize("lost", [0, 1])
def test_a_launcher_that_was_killed_may_be_started_again_and_joins_the_others(launchers, lost: int) -> None:
    pids = [start(launchers, "stays ends", restarts=1, node=node) for node in (0, 1)]
    while not all(tries(launchers, rank) for rank in (0, 1)):
        time.sleep(0.01)
    os.kill(pids[lost], signal.SIGKILL)
    launchers.end(pids[lost])
    pids[lost] = start(launchers, "stays ends", restarts=1, node=lost)
    assert [launchers.end(pid) for pid in pids] == [0, 0]
    assert [len(tries(launchers, rank)) for rank in (0, 1)] == [2, 2]
    assert launchers.said(lost) == []
    there = f"ressl: node {lost} ({socket.gethostname()}) was lost: its launcher was killed, or the network failed"
    assert launchers.said(1 - lost) == [f"{there}; {ANEW} 1 of 1"]
