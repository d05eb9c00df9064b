"""Before training takes the signals over, while much is imported and images are decoded, a run can be stopped too."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ASKING = [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP]

# Tells when it listens, then does what takes long. With a child, which a library may have forked, it waits for that.
STARTING = """
import os, sys, time
from tools.early import begin

begin(*sys.argv[1:2])
if "child" in sys.argv:
    if not (child := os.fork()):
        print(os.getpid(), flush=True)
        time.sleep(60)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != -15)
print(os.getpid(), flush=True)
time.sleep(60)
"""


def started(repo: Path, *words: str, **environment: str) -> tuple[subprocess.Popen[str], int]:
    """The process, and the one that is to be sent a signal."""
    process = subprocess.Popen(
        [sys.executable, "-c", STARTING, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=repo,
        env=os.environ | environment,
    )  # fmt: skip
    assert process.stdout
    return process, int(process.stdout.readline())


@pytest.mark.parametrize("verb", ["pretrain", "resume"])
@pytest.mark.parametrize("sent", ASKING)
def test_a_run_that_is_starting_ends_with_75_in_one_line(repo: Path, verb: str, sent: signal.Signals) -> None:
    process, pid = started(repo, verb)
    os.kill(pid, sent)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 75 and out == ""
    assert err == f"ressl: stopped by {sent.name}: there is nothing new to save\n"


@pytest.mark.parametrize("words", [["convert"], []])
def test_other_verbs_end_as_any_program_does(repo: Path, words: list[str]) -> None:
    process, pid = started(repo, *words)
    os.kill(pid, signal.SIGTERM)
    assert process.communicate(timeout=20) == ("", "") and process.returncode == -signal.SIGTERM


def test_ctrl_c_is_no_traceback(repo: Path) -> None:
    process, pid = started(repo, "pretrain")
    os.kill(pid, signal.SIGINT)
    assert process.communicate(timeout=20) == ("", "") and process.returncode == -signal.SIGINT


def test_a_child_that_is_ended_says_nothing(repo: Path) -> None:
    process, pid = started(repo, "pretrain", "child")
    os.kill(pid, signal.SIGTERM)
    assert process.communicate(timeout=20) == ("", "") and process.returncode == 0


def test_a_rank_ends_with_its_launcher_from_its_first_line_on(repo: Path) -> None:
    """Before the imports, which take seconds."""
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHING, STARTING], stdout=subprocess.PIPE, text=True, cwd=repo
    )
    assert launcher.stdout
    rank = int(launcher.stdout.readline())
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 20
    while (state := state_of(rank)) not in ("", "Z"):
        assert time.monotonic() < deadline, state
        time.sleep(0.01)


LAUNCHING = """
import os, subprocess, sys
os.environ["RESSL_LAUNCHER"] = str(os.getpid())
subprocess.run([sys.executable, "-c", sys.argv[1], "pretrain"])
"""


def state_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def test_what_stands_before_the_imports_imports_little(repo: Path) -> None:
    """Else a signal would find nobody listening."""
    program = "import sys; import tools.early; print(len(sys.modules), 'torch' in sys.modules, 'numpy' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=repo).stdout
    count, torch, numpy = said.split()
    assert int(count) < 150 and (torch, numpy) == ("False", "False")
