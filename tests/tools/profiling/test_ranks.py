import signal
import subprocess
import sys
from pathlib import Path
from time import sleep

import pytest

from ressl.config_file import load_config
from tools.profiling.ranks import RANK, at, cores_of, fewer_processes


@pytest.mark.parametrize(("count", "fewer"), [(2, [1]), (3, [1]), (6, [1, 2]), (8, [1, 2, 4]), (12, [1, 2, 4])])
def test_fewer_processes_are_powers_of_two_that_share_out_the_ranks(count: int, fewer: list[int]) -> None:
    assert fewer_processes(count) == fewer


def test_a_process_has_the_same_work_whatever_their_number(tiny_config: Path) -> None:
    cfg = load_config(tiny_config, ["optim.batch_size=48"])
    assert [at(cfg, count, 8).optim.batch_size // count for count in (1, 2, 4, 8)] == [6] * 4


def test_fewer_processes_have_the_cores_that_theirs_would_be_among_all() -> None:
    assert [len(cores_of(range(8), count, 4)) for count in (1, 2, 4)] == [2, 4, 8]
    assert cores_of(range(8), 1, 4) < cores_of(range(8), 2, 4)
    assert cores_of([0, 1], 1, 4) == {0, 1}  # fewer cores than processes: all run on all of them


def test_a_rank_that_still_imports_ends_without_a_word_on_ctrl_c() -> None:
    rank = subprocess.Popen([sys.executable, "-c", RANK, "steps", "nothing", "out", "0"], stderr=subprocess.PIPE)
    sleep(0.8)
    rank.send_signal(signal.SIGINT)
    assert rank.communicate(timeout=60) == (None, b"") and rank.returncode == -signal.SIGINT
