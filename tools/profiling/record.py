"""What a profile holds: the contract between those who measure, judge, draw and compare.

Every duration is in seconds, every rate a second, every list of durations has one entry for each counted round. A
*step* is an optimizer step of one rank: `images` of them, over all micro-batches.
"""

from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field, ValidationError

from ressl.batch import DataError
from ressl.config_parts import Section

FORMAT: Final = 1
Seconds = tuple[float, ...]
Number = Annotated[int, Field(ge=1)]  # of what there is at least one of
Lane = Literal["loader", "device"]
"""loader: what prepares the next frames beside the step. device: what the step itself is made of, in order."""
StageName = Literal[
    "read",
    "decode",
    "copy",
    "views",
    "teacher",
    "student",
    "loss",
    "backward",
    "all-reduce",
    "optimizer",
    "ema",
    "queue",
]
Binding = Literal["read", "decode", "copy", "views", "step", "all-reduce", "host"]
"""host: launching kernels from Python, where the device waits for it."""


class Stage(Section):
    """One part of a step, measured alone."""

    name: StageName
    lane: Lane
    seconds: Seconds  # of a whole step's work
    flops: float | None = None  # multiplications and additions that the step's work needs
    bytes: float | None = None  # least bytes that its work reads and writes
    note: str = ""  # what was measured, where the name does not tell all


class Runs(Section):
    """Whole steps: on the user's data, on frames that lie ready on the device (upper bound), and loading alone."""

    real: Seconds
    synthetic: Seconds
    loader: Seconds
    wait: Seconds  # of each real step, the part in which the loop waited for its data
    launch: Seconds = ()  # of a synthetic step on a GPU that has nothing to do, the host's time to launch it
    busy: float | None = None  # of a synthetic step on a GPU, the seconds in which it computed or sent


class Ceilings(Section):
    """What this machine reaches at all, measured in the same run."""

    matmul_flops: float  # a second, of products or 3x3 convolutions, in the step's precision
    copy_bytes: float  # a second, read and written, in the memory of the device
    host_to_device_bytes: float | None = None  # a second, from page-locked memory; None where there is no GPU


class Point(Section):
    """Of a curve: with `count` workers or processes, `images_per_s` over all, one value a round."""

    count: Number
    images_per_s: tuple[float, ...]


class Span(Section):
    """What happened when, in one typical step of the real run; starts at 0."""

    lane: Lane
    name: str
    start: float
    end: float


class Advice(Section):
    """A line of the config to change, and what it should bring."""

    line: str  # as typed behind the config: section.key=value; or a command
    why: str
    images_per_s: float | None  # over all ranks, at most: nothing was run with the line; None where it cannot be told


class Verdict(Section):
    binding: Binding
    sentence: str
    advice: tuple[Advice, ...]


class Measured(Section):
    """What was measured, before anybody judges it; by rank 0 where there are several. Names as in `Profile`."""

    device: Literal["cpu", "cuda"]
    world_size: Number
    images: Number
    cores: Number  # that this rank's threads may run on
    threads: Number = 1  # of torch, in this rank
    others: float | None = None
    warm_up: int
    stages: tuple[Stage, ...]
    runs: Runs
    ceilings: Ceilings
    memory_peak: int
    loader_scaling: tuple[Point, ...]
    timeline: tuple[Span, ...]
    total_steps: Number
    side: int  # pixels; the longer side of the images as they are stored, on average
    set_bytes: float  # of all images of the training set, decoded
    free_bytes: float  # where a resident set would lie: memory that this rank may take
    speedups: dict[str, tuple[float, ...]]  # by line of the config: times as fast as without it, of the step alone
    notes: tuple[str, ...]


class Profile(Section):
    format: Literal[1] = FORMAT
    title: str  # name of the config
    command: str
    date: str  # ISO 8601, UTC
    commit: str | None
    machine: dict[str, str | int]  # `threads` are torch's, of one rank
    config: dict[str, Any]
    device: Literal["cpu", "cuda"]
    precision: str
    world_size: Number
    images: Number  # of a step, this rank
    warm_up: int  # steps before the first counted one
    stages: tuple[Stage, ...]  # in the order of StageName; what does not take place is left out
    runs: Runs
    ceilings: Ceilings
    memory_peak: int  # bytes; of the GPU's allocator, or of the process
    loader_scaling: tuple[Point, ...]  # by decoding threads
    scaling: tuple[Point, ...]  # by processes; the last one is the run itself
    timeline: tuple[Span, ...]
    total_steps: Number
    predicted_hours: float  # of training: no evaluations, no checkpoints
    verdict: Verdict
    notes: tuple[str, ...] = ()  # what to know when reading the figures
    others: float | None = None  # share of this machine's processor time that other processes used during the rounds


def read_profile(path: Path) -> Profile:
    """Raises DataError where the file is none of ours."""
    try:
        return Profile.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "file"
        raise DataError(f"{path}: not a profile of `launch.py profile`: {where}: {first['msg']}") from None
