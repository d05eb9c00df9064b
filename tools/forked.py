"""Forked worker processes: they know all that their parent knows, use every core, and end with it."""

import ctypes
import gc
import os
import signal
import traceback
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch

from ressl.batch import DataError

T = TypeVar("T")
AHEAD = 2  # tasks that a worker has before it


class WorkerDied(RuntimeError):
    """A worker process was killed, as by a system that has no memory left."""


@dataclass(frozen=True, slots=True)
class Workers:
    processes: list[BaseProcess]
    connections: list[Connection]  # our end to each of them

    def end(self) -> None:
        """At once, whatever they are at."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        for connection in self.connections:
            connection.close()

    def death(self, worker: int) -> str:
        """How it ended."""
        process = self.processes[worker]
        process.join(timeout=5)
        code = process.exitcode
        how = f"was killed by {signal.Signals(-code).name}" if code is not None and code < 0 else "ended"
        return how + " (out of memory?)" * (code == -signal.SIGKILL)


def fork_workers(serve: Callable[..., None], arguments: Sequence[tuple[Any, ...]], name: str) -> Workers:
    """A process for each of the arguments, in which `serve(connection, *arguments)` runs. Nothing is pickled."""
    context = get_context("fork")
    workers = Workers([], [])
    try:
        with _interrupts_held_back(), _garbage_kept():
            for number, mine in enumerate(arguments):
                ours, theirs = context.Pipe()
                workers.connections.append(ours)
                given = (serve, theirs, list(workers.connections), os.getpid(), mine)
                process = context.Process(target=_enter, args=given, daemon=True, name=f"{name}-{number}")
                process.start()
                theirs.close()
                workers.processes.append(process)
    except OSError as error:  # fork or pipe: a limit of the machine
        workers.end()
        reason = (error.strerror or str(error)).lower()
        raise WorkerDied(
            f"{name}: worker {len(workers.processes)} cannot be started: {reason}; use fewer --workers"
        ) from None
    except BaseException:
        workers.end()
        raise
    return workers


def _enter(
    serve: Callable[..., None],
    connection: Connection,
    others: list[Connection],
    parent: int,
    arguments: tuple[Any, ...],
) -> None:
    gc.freeze()
    gc.enable()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG of <linux/prctl.h>
    if os.getppid() != parent:  # it was gone before
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent ends its workers
    for other in others:
        other.close()
    torch.set_num_threads(1)  # the parent's threads are not here, and OpenMP would wait for them
    serve(connection, *arguments)


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Ctrl-C waits. Python forgets one that comes amid what it does itself around a fork; and workers, which keep it
    blocked, would die of it before they can ignore it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _garbage_kept() -> Iterator[None]:
    """A worker must never collect what its parent has left lying about: DALI's pipelines, for one, want the threads
    that they had. So it is born with collection off, and freezes all it was given."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings():  # Python 3.12 warns of forks beside threads; workers use none of their parent's
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        if enabled:
            gc.enable()


def run_forked(tasks: Sequence[Callable[[], T]], count: int, name: str) -> Generator[T, None, None]:
    """What each task returns, in their order, from `count` processes; where one is enough, that is this process. Raises
    the DataError of a task and, of others, WorkerDied and RuntimeError with the traceback of a task that failed."""
    if min(count, len(tasks)) <= 1:  # forking takes longer than a small data set
        yield from (task() for task in tasks)
        return
    workers = fork_workers(_serve, [(tasks,)] * min(count, len(tasks)), name)
    try:
        results: dict[int, T] = {}
        given = taken = 0
        busy = [0] * len(workers.processes)
        while taken < len(tasks):
            for worker in range(len(busy)):
                while busy[worker] < AHEAD and given < min(len(tasks), taken + 4 * AHEAD * len(busy)):
                    _send(workers, worker, given)
                    busy[worker] += 1
                    given += 1
            for ready in wait(workers.connections):
                worker = workers.connections.index(ready)  # type: ignore[arg-type]
                try:
                    number, result = workers.connections[worker].recv()
                except (EOFError, OSError):
                    raise WorkerDied(f"a worker of {name} {workers.death(worker)}") from None
                if number is None:
                    if isinstance(result, DataError):
                        raise result
                    raise RuntimeError(f"a worker of {name} failed:\n{result}")
                results[number] = result
                busy[worker] -= 1
            while taken in results:
                yield results.pop(taken)
                taken += 1
    finally:
        workers.end()


def _send(workers: Workers, worker: int, number: int) -> None:
    with suppress(OSError):  # it is dead, as its end of the pipe will tell
        workers.connections[worker].send(number)


def _serve(connection: Connection, tasks: Sequence[Callable[[], Any]]) -> None:
    try:
        while True:
            number = connection.recv()
            connection.send((number, tasks[number]()))
    except (EOFError, BrokenPipeError, ConnectionResetError):  # the parent is gone
        pass
    except DataError as error:
        connection.send((None, error))
    except Exception:
        connection.send((None, traceback.format_exc()))
