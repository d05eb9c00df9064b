"""What another setting would do to the step, tried at once beside the present one."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from itertools import repeat
from statistics import median

import torch

from tools.profiling.clock import between, mark, wait
from tools.profiling.opened import OpenRun, step_in_pieces

BF16 = "run.precision=bf16"
ROUNDS = 3


def worth_trying(run: OpenRun) -> bool:
    """Whether the step's networks could be in a coarser precision. With run.compile, trying takes minutes."""
    return run.cfg.run.precision in ("fp32", "tf32") and not run.cfg.run.compile


def measure_alternatives(run: OpenRun) -> dict[str, float]:
    """How many times faster the step alone is, by the line of the config that makes it so. Takes eight steps."""
    coarse = partial(torch.autocast, run.device.type, torch.bfloat16)
    ways: dict[str, Callable[[], AbstractContextManager] | None] = {"present": None, BF16: coarse}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(ROUNDS + 1):
        for name, autocast in ways.items():
            start = mark(run.device)
            step_in_pieces(run, repeat(run.held), lambda _: None, autocast=autocast)
            end = mark(run.device)
            wait(run.device)
            if number:
                times[name].append(between(start, end))
    return {BF16: median(times["present"]) / median(times[BF16])}
