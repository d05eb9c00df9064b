"""Launchers of processes for the tests of how they start, stop, fail and start again."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

# Forks a launcher for each order that it reads and prints its process id; for {"pid": N}, how launcher N has ended. So
# torch is imported once for all of them. A launcher may get a signal the moment it listens to any, and may be started
# under nohup.
PROGRAM = """
import json, os, resource, signal, sys, threading, time
from pathlib import Path
from tools.processes import ProcessesFailed, run_processes

resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

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
        code, run_dir = 0, order["run_dir"] and Path(order["run_dir"])
        try:
            run_processes(order["command"], wait_s=20, run_dir=run_dir, **order["options"])
        except ProcessesFailed as failed:
            code = failed.exit_code
        os._exit(code)
"""


class Launchers:
    """Launchers on this machine, each with ranks that run a script of the test in its directory; with a `node`, each of
    two as if on a machine of its own."""

    def __init__(self, directory: Path, driver: subprocess.Popen[str]) -> None:
        self.directory, self.driver, self.pids = directory, driver, list[int]()
        with socket.create_server(("localhost", 0)) as probe:
            self.port = probe.getsockname()[1]

    def start(
        self,
        program: str,
        *words: str,
        count: int,
        node: int | None = None,
        run_dir: Path | None = None,
        early: int = 0,
        nohup: bool = False,
        **options: object,
    ) -> int:
        """The process id of a launcher of `count` ranks that run `program DIRECTORY WORDS`. `early` is a signal that it
        gets as soon as it listens."""
        script = self.directory / "rank.py"
        script.write_text(program)
        if node is not None:
            options |= {"nodes": 2, "node_rank": node, "rendezvous": f"localhost:{self.port}"}
        pid = self._ask(
            command=[str(script), str(self.directory), *words], log=str(self._log(node or 0)),
            options={"count": count, **options}, run_dir=str(run_dir or ""), early=early, nohup=nohup,
        )  # fmt: skip
        self.pids.append(pid)
        return pid

    def end(self, pid: int) -> int:
        """The exit code of a launcher, when it has ended."""
        code = self._ask(pid=pid)
        self.pids.remove(pid)
        return code

    def said(self, node: int = 0) -> list[str]:
        """But for whom it waits."""
        lines = self._log(node).read_text().splitlines() if self._log(node).exists() else []
        return [line for line in lines if " waits " not in line]

    def waits(self, node: int) -> bool:
        return self._log(node).exists() and " waits " in self._log(node).read_text()

    def kill(self, ranks: list[int]) -> None:
        """All that is left."""
        for pid in ranks:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in list(self.pids):
            os.kill(pid, signal.SIGKILL)
            self.end(pid)

    def _log(self, node: int) -> Path:
        return self.directory / f"node{node}.log"

    def _ask(self, **order: object) -> int:
        assert self.driver.stdin and self.driver.stdout
        print(json.dumps(order), file=self.driver.stdin, flush=True)
        return int(self.driver.stdout.readline())


@pytest.fixture(scope="session")
def launcher_driver(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    left = tmp_path_factory.mktemp("left")  # here by launchers that are killed
    environment = os.environ | {"PYTHONPATH": str(repo), "OMP_NUM_THREADS": "1", "TMPDIR": str(left)}
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield process


@pytest.fixture
def launchers(launcher_driver: subprocess.Popen[str], tmp_path: Path) -> Iterator[Launchers]:
    launchers = Launchers(tmp_path, launcher_driver)
    yield launchers
    launchers.kill([json.loads(path.read_text())["pid"] for path in tmp_path.glob("rank[0-9]*")])
