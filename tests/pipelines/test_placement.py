"""Which cores a rank's threads run on, on machines that are drawn up as the kernel describes them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipelines.placement import settle, share

SIBLINGS = 8  # core n and core n + 8 are two threads of one


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """Sixteen hardware threads on two nodes: cores 0-3 and 4-7, and their second threads 8-11 and 12-15."""
    for node, cpus in enumerate(("0-3,8-11", "4-7,12-15")):
        place = tmp_path / f"devices/system/node/node{node}"
        place.mkdir(parents=True)
        (place / "cpulist").write_text(f"{cpus}\n")
    for cpu in range(16):
        place = tmp_path / f"devices/system/cpu/cpu{cpu}/topology"
        place.mkdir(parents=True)
        (place / "thread_siblings_list").write_text(f"{cpu % SIBLINGS},{cpu % SIBLINGS + SIBLINGS}\n")
    return tmp_path


def test_ranks_share_out_the_cores_beside_their_gpus(machine):
    shares = [share(range(16), [0, 0, 1, 1], rank, machine) for rank in range(4)]
    assert shares == [[0, 1, 8, 9], [2, 3, 10, 11], [4, 5, 12, 13], [6, 7, 14, 15]]


def test_ranks_of_unknown_nodes_share_out_all_cores_evenly(machine):
    shares = [share(range(16), [None] * 3, rank, machine) for rank in range(3)]
    assert sorted(sum(shares, [])) == list(range(16))
    assert sorted(map(len, shares)) == [5, 5, 6]


def test_one_unknown_node_makes_all_ranks_forget_theirs(machine):
    shares = [share(range(16), [0, None], rank, machine) for rank in range(2)]
    assert sorted(sum(shares, [])) == list(range(16))
    assert list(map(len, shares)) == [8, 8]


def test_two_threads_of_a_core_go_to_one_rank(machine):
    for rank in range(4):
        cores = share(range(16), [None] * 4, rank, machine)
        assert {cpu % SIBLINGS for cpu in cores} == {cpu - SIBLINGS for cpu in cores if cpu >= SIBLINGS}


def test_only_cores_that_are_allowed_are_given_out(machine):
    allowed = [0, 1, 2, 9, 13]
    assert share(allowed, [0, 1], 0, machine) == [0, 1, 2, 9]
    assert share(allowed, [0, 1], 1, machine) == [13]
    assert share([0, 1], [0, 1], 1, machine) == [1]  # node 1 has none: as if no node were known


def test_with_fewer_cores_than_ranks_all_run_on_all(machine):
    assert share([0, 1], [0] * 4, 3, machine) == [0, 1]


def test_ranks_whose_node_has_too_few_cores_for_them_share_out_all(machine):
    allowed = [0, 1, 4, 5, 6, 7, 12, 13]
    shares = [share(allowed, [0, 0, 0, 0], rank, machine) for rank in range(4)]
    assert sorted(sum(shares, [])) == allowed and list(map(len, shares)) == [2] * 4


def test_a_machine_that_tells_nothing_is_shared_out_too(tmp_path):
    assert [share(range(4), [None, None], rank, tmp_path) for rank in range(2)] == [[0, 1], [2, 3]]


# Ranks that are forked off a process that has imported torch: each is as it would be by itself.
SETTLE = """
import os, sys, threading, torch
from pipelines.placement import settle
for word in sys.argv[1:]:
    placement, os.environ["LOCAL_RANK"] = word.split()
    if os.fork():
        os.wait()
        continue
    cores = settle(placement, torch.device("cpu"))
    seen = []
    thread = threading.Thread(target=lambda: seen.append(os.sched_getaffinity(0)))
    thread.start(); thread.join()
    print(cores, len(seen[0]), sorted(seen[0])[0], flush=True)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def settled(repo: Path) -> dict[str, list[int]]:
    """By placement and rank of two: the cores it is told, how many a thread of it may use, and the first of them."""
    asked = ["auto 0", "auto 1", "none 0"]
    environment = os.environ | {"LOCAL_WORLD_SIZE": "2", "PYTHONPATH": str(repo)}
    run = subprocess.run(
        [sys.executable, "-c", SETTLE, *asked], env=environment, cwd=repo, capture_output=True, text=True, check=True
    )
    return {
        word: [int(number) for number in line.split()]
        for word, line in zip(asked, run.stdout.splitlines(), strict=True)
    }


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_a_rank_and_the_threads_it_starts_keep_to_its_share(settled):
    total = len(os.sched_getaffinity(0))
    first, second = settled["auto 0"], settled["auto 1"]
    assert first[0] == first[1] and second[0] == second[1]
    assert first[0] + second[0] == total
    assert first[2] != second[2]


def test_without_placement_threads_run_anywhere_but_are_as_few(settled):
    total = len(os.sched_getaffinity(0))
    assert settled["none 0"][:2] == [max(1, total // 2), total]


def test_one_rank_keeps_all_cores():
    before = os.sched_getaffinity(0)
    assert settle("auto", torch.device("cpu")) == len(before)
    assert os.sched_getaffinity(0) == before
