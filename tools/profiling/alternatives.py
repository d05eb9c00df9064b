"""What another setting would do to the step, tried at once beside the present one."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from itertools import repeat

import torch

from tools.profiling.clock import between, mark, wait
from tools.profiling.opened import OpenRun, step_in_pieces

BF16 = "run.precision=bf16"
FEWEST, MOST = 5, 9  # rounds
LONG_ENOUGH_S = 0.1  # of one value
STEPS = 10  # of one value, at most


def rounds_for(run: OpenRun, step_s: float, seconds: float) -> int:
    """As many as there is time for; 0 where there is too little of it, or nothing to try. With run.compile, trying
    takes minutes."""
    if run.cfg.run.precision not in ("fp32", "tf32") or run.cfg.run.compile:
        return 0
    count = int(seconds / (2 * _steps(step_s) * step_s)) - 1
    return min(MOST, count) if count >= FEWEST else 0


def measure_alternatives(run: OpenRun, rounds: int, step_s: float) -> dict[str, tuple[float, ...]]:
    """How many times as fast the step alone is, one value a round, by the line of the config that makes it so."""
    coarse = partial(torch.autocast, run.device.type, torch.bfloat16)
    ways: dict[str, Callable[[], AbstractContextManager] | None] = {"present": None, BF16: coarse}
    found: list[float] = []
    for number in range(rounds + 1):
        times: dict[str, float] = {}
        for name, autocast in ways.items():
            start = mark(run.device)
            for _ in range(_steps(step_s)):
                step_in_pieces(run, repeat(run.held), lambda _: None, autocast=autocast)
            end = mark(run.device)
            wait(run.device)
            times[name] = between(start, end)
        if number:
            found.append(times["present"] / times[BF16])
    return {BF16: tuple(found)}


def _steps(step_s: float) -> int:
    return max(1, min(STEPS, int(LONG_ENOUGH_S / step_s)))
