from pathlib import Path

import pytest

from ressl.config_file import load_config
from tools.profiling.ranks import at, fewer_processes


@pytest.mark.parametrize(("count", "fewer"), [(2, [1]), (3, [1]), (6, [1, 2]), (8, [1, 2, 4]), (12, [1, 2, 4])])
def test_fewer_processes_are_powers_of_two_that_share_out_the_ranks(count: int, fewer: list[int]) -> None:
    assert fewer_processes(count) == fewer


def test_a_process_has_the_same_work_whatever_their_number(tiny_config: Path) -> None:
    cfg = load_config(tiny_config, ["optim.batch_size=48"])
    assert [at(cfg, count, 8).optim.batch_size // count for count in (1, 2, 4, 8)] == [6] * 4
