from pathlib import Path

import pytest
from rich.console import Console

from ressl.config_file import load_config
from tools.profiling.alternatives import BF16, FEWEST, MOST, measure_alternatives, rounds_for
from tools.profiling.opened import OpenRun, open_run


@pytest.fixture
def run(tiny_config: Path) -> OpenRun:
    return open_run(load_config(tiny_config), Console(quiet=True))


def test_it_is_tried_in_several_rounds_or_not_at_all(run: OpenRun, tiny_config: Path) -> None:
    assert rounds_for(run, step_s=1.0, seconds=100.0) == MOST
    assert rounds_for(run, step_s=1.0, seconds=12.5) == FEWEST
    assert rounds_for(run, step_s=1.0, seconds=11.0) == 0
    coarse = open_run(load_config(tiny_config, ["run.precision=bf16"]), Console(quiet=True))
    assert rounds_for(coarse, step_s=1.0, seconds=100.0) == 0


def test_each_round_gives_a_ratio(run: OpenRun) -> None:
    found = measure_alternatives(run, 5, step_s=0.1)
    assert list(found) == [BF16] and len(found[BF16]) == 5 and min(found[BF16]) > 0
