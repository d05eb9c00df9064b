"""A made-up profile, for those who show and compare profiles."""

from collections.abc import Callable
from typing import Any

import pytest

from tools.profiling.record import Advice, Ceilings, Point, Profile, Runs, Span, Stage, Verdict

STAGES = (  # name, lane, seconds, flops, bytes
    ("decode", "loader", 0.010, None, None),
    ("copy", "loader", 0.002, None, 20e6),
    ("views", "device", 0.005, None, 50e6),
    ("teacher", "device", 0.020, 1e9, 100e6),
    ("student", "device", 0.025, 1e9, 120e6),
    ("loss", "device", 0.001, 1e7, 5e6),
    ("backward", "device", 0.050, 2e9, 300e6),
    ("optimizer", "device", 0.0004, None, 3e6),
    ("ema", "device", 0.0001, None, 1e6),
    ("queue", "device", 0.00002, None, 5e4),
)


def rounds(seconds: float) -> tuple[float, ...]:
    return tuple(seconds * factor for factor in (1.0, 1.02, 0.98, 1.01, 0.99))


@pytest.fixture
def made_profile() -> Callable[..., Profile]:
    """`made_profile(field=value, ...)`: a plausible profile of one process on a CPU, but for these fields."""

    def make(**fields: Any) -> Profile:
        device = [stage for stage in STAGES if stage[1] == "device"]
        ends = [sum(stage[2] for stage in device[: number + 1]) for number in range(len(device))]
        values = {
            "title": "tiny",
            "command": "launch.py profile tiny.yaml",
            "date": "2026-01-02T03:04:05Z",
            "commit": "0123456789abcdef",
            "machine": {"device": "cpu", "cpu": "Some CPU", "cores": 2, "memory": "8 GB", "torch": "2.15.0"},
            "config": {"data": {"source": {"name": "folder", "workers": 1}}, "run": {"out_dir": "runs/tiny"}},
            "device": "cpu",
            "precision": "fp32",
            "world_size": 1,
            "images": 100,
            "warm_up": 3,
            "stages": tuple(
                Stage(name=name, lane=lane, seconds=rounds(seconds), flops=flops, bytes=moved)
                for name, lane, seconds, flops, moved in STAGES
            ),
            "runs": Runs(real=rounds(0.125), synthetic=rounds(0.1), loader=rounds(0.012), wait=rounds(0.025)),
            "ceilings": Ceilings(matmul_flops=1e11, copy_bytes=1e10),
            "memory_peak": 10**9,
            "loader_scaling": tuple(Point(count=n, images_per_s=rounds(500.0 * n)) for n in (1, 2, 4)),
            "scaling": (Point(count=1, images_per_s=rounds(800.0)),),
            "timeline": (
                Span(lane="loader", name="frames", start=0, end=0.012),
                *(
                    Span(lane="device", name=s[0], start=end - s[2], end=end)
                    for s, end in zip(device, ends, strict=True)
                ),
            ),
            "total_steps": 1000,
            "predicted_hours": 1000 * 0.125 / 3600,
            "verdict": Verdict(
                binding="decode",
                sentence="Decoding binds: a step waits for 20 % of its time.",
                advice=(
                    Advice(line="data.source.workers=2", why="one core idles", images_per_s=1000.0),
                    Advice(line="run.precision=bf16", why="the step is next", images_per_s=None),
                ),
            ),
        }
        return Profile(**(values | fields))

    return make
