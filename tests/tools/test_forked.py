"""Tasks run in forked processes: results come in order, and whatever goes wrong there is told by the parent."""

import gc
import multiprocessing
import os
import signal
import time
from contextlib import closing

import pytest

from ressl.batch import DataError
from tools.forked import WorkerDied, run_forked


def test_results_come_in_the_order_of_the_tasks_from_other_processes():
    def task(number: int) -> tuple[int, int]:
        time.sleep(0.02 * (number % 3 == 0))  # the others are done before
        return number, os.getpid()

    results = list(run_forked([lambda n=n: task(n) for n in range(40)], 3, "test"))
    assert [number for number, _ in results] == list(range(40))
    assert os.getpid() not in {process for _, process in results}


def test_one_process_is_this_one():
    assert list(run_forked([os.getpid] * 3, 1, "test")) == [os.getpid()] * 3
    assert list(run_forked([os.getpid], 2, "test")) == [os.getpid()]
    assert list(run_forked([], 2, "test")) == []


def fail(error: Exception) -> None:
    raise error


def test_a_mistake_of_a_person_comes_through_as_it_was():
    with pytest.raises(DataError, match=r"^a\.tar: changed since; start again$"):
        list(run_forked([lambda: fail(DataError("a.tar: changed since; start again"))] * 2, 2, "test"))


def test_any_other_failure_comes_with_its_traceback():
    with pytest.raises(RuntimeError, match=r"a worker of test failed:(.|\n)*in fail(.|\n)*KeyError: 'lost'"):
        list(run_forked([lambda: fail(KeyError("lost"))] * 2, 2, "test"))


def test_a_killed_worker_is_told():
    with pytest.raises(WorkerDied, match=r"a worker of test was killed by SIGKILL \(out of memory\?\)"):
        list(run_forked([lambda: os.kill(os.getpid(), signal.SIGKILL)] * 2, 2, "test"))


def test_the_processes_end_with_the_generator():
    before = set(multiprocessing.active_children())
    with closing(run_forked([lambda: None, *[lambda: time.sleep(60)] * 3], 2, "test")) as results:
        next(results)
        assert len(set(multiprocessing.active_children()) - before) == 2
    assert set(multiprocessing.active_children()) == before


def test_what_the_parent_left_lying_about_is_never_collected_in_a_worker(tmp_path):
    """Such as a pipeline of DALI, which would wait for threads that are not there, or crash."""
    mark, parent = tmp_path / "mark", os.getpid()

    class Left:
        def __init__(self):
            self.itself = self

        def __del__(self):
            if os.getpid() != parent:
                mark.touch()

    gc.disable()
    try:
        Left()
        assert list(run_forked([gc.isenabled, lambda: gc.collect() >= 0], 2, "test")) == [True, True]
    finally:
        gc.enable()
    assert not mark.exists()
