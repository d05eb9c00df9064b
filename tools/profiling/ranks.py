"""A profile's part that needs several processes: some functions start them, and each of them runs `main`."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal

import torch.distributed as dist

from pipelines import check_data
from pipelines.placement import share
from ressl.batch import DataError
from ressl.config import Config
from ressl.config_file import load_config, save_config
from ressl.run_dir import config_path
from ressl.runtime import preferred_device
from tools.early import AT_ONCE, STOPPED, end_with_launcher
from tools.ending import exit_code
from tools.processes import ProcessesFailed, run_processes
from tools.profiling.measure import measure, steps_alone
from tools.profiling.record import Measured, Point
from tools.terminal import plain_console

ROOT = Path(__file__).resolve().parents[2]
RANK = f"""import signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
sys.path.insert(0, {str(ROOT)!r})
from tools.profiling.ranks import main
sys.exit(main(*sys.argv[1:]))"""
"""What a rank runs: a module by its name would be looked for where the user is. Ctrl-C, which the terminal sends to the
launcher too, ends it without a word, also while it imports."""
THREADS = "OMP_NUM_THREADS"
Kind = Literal["all", "steps"]


def fewer_processes(count: int) -> list[int]:
    """1, 2, 4, ... below `count`, as far as they share out its ranks."""
    return [1 << power for power in range(count.bit_length()) if 1 << power < count and count % (1 << power) == 0]


def at(cfg: Config, count: int, of: int) -> Config:
    """The same work for each process with `count` of them as with `of`: the batch shrinks with their number."""
    batch = cfg.optim.batch_size // of * count
    optim = cfg.optim.model_copy(update={"batch_size": batch})
    return cfg.model_copy(update={"optim": optim})


def measure_ranks(cfg: Config, count: int, *, seconds: float, until: float, trace: Path | None) -> Measured:
    """What rank 0 of `count` processes measured, in the time that `measure` is given. Raises ProcessesFailed, after
    which a rank has said why."""
    with tempfile.TemporaryDirectory(prefix="ressl-profile-") as directory:
        out = Path(directory) / "measured.json"
        words = (str(seconds), str(until), *([str(trace)] if trace else []))
        _start(cfg, Path(directory), count, "all", out, *words)
        return Measured.model_validate_json(out.read_bytes())


def measure_fewer(cfg: Config, count: int, *, of: int, until: float) -> Point | str:
    """Images/s over `count` processes, each with the work, the cores and the threads of one of a run on `of`; or why
    they cannot run it. There is time `until` (of time.monotonic), their start included."""
    smaller = at(cfg, count, of)
    try:
        check_data(smaller, preferred_device(cfg.run), count)
    except DataError as error:
        return f"not measured on {count} processes: {error}"
    with tempfile.TemporaryDirectory(prefix="ressl-profile-") as directory:
        out = Path(directory) / "point.json"
        try:
            with _cores_of(count, of):
                _start(smaller, Path(directory), count, "steps", out, str(until))
        except ProcessesFailed as failed:
            if failed.exit_code in (STOPPED, AT_ONCE):  # Ctrl-C is meant for all
                raise
            return f"not measured on {count} processes: they failed there"
        return Point.model_validate_json(out.read_bytes())


def _start(cfg: Config, directory: Path, count: int, kind: Kind, out: Path, *words: str) -> None:
    path = config_path(directory)
    save_config(cfg, path)
    with _threads_for(count):
        run_processes(["-c", RANK, kind, str(path), str(out), *words], count)


@contextmanager
def _threads_for(count: int) -> Iterator[None]:
    """Each of `count` processes computes on its share of the cores, unless the user has said on how many."""
    if THREADS in os.environ:
        yield
        return
    os.environ[THREADS] = str(max(1, len(os.sched_getaffinity(0)) // count))
    try:
        yield
    finally:
        del os.environ[THREADS]


@contextmanager
def _cores_of(count: int, of: int) -> Iterator[None]:
    """What is started runs on the cores that fall to `count` of `of` processes (pipelines/placement.py)."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores_of(sorted(allowed), count, of))
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def cores_of(allowed: Sequence[int], count: int, of: int) -> set[int]:
    """Of the `allowed` cores, those of the first `count` of `of` processes."""
    return {core for rank in range(count) for core in share(allowed, [None] * of, rank)}


# --- in each process -------------------------------------------------------------------------------------------------


def main(kind: Kind, config: str, out: str, *words: str) -> int:
    """Rank 0 writes what it measured to `out`, as JSON. The words are those of `kind`: seconds, until when, and where
    to leave a trace, or until when. Returns the exit code."""
    end_with_launcher()
    return exit_code(partial(_measure, kind, config, out, *words))


def _measure(kind: Kind, config: str, out: str, *words: str) -> None:
    cfg, console = load_config(Path(config)), plain_console()
    found: Measured | Point
    match kind:
        case "all":
            seconds, until, *trace = words
            path = Path(trace[0]) if trace else None
            found = measure(cfg, console, seconds=float(seconds), until=float(until), trace=path)
        case "steps":
            rates = steps_alone(cfg, console, until=float(*words))
            found = Point(count=dist.get_world_size(), images_per_s=rates)
    if dist.get_rank() == 0:
        Path(out).write_text(found.model_dump_json())
    dist.destroy_process_group()
