"""`launch.py profile`: how fast a run is on this machine, what binds it, and what would change that."""

import subprocess
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from time import monotonic

from rich.console import Console

from pipelines import check_data
from ressl.batch import DataError
from ressl.config import Config
from ressl.config_file import ConfigError
from ressl.runtime import launched, preferred_device
from tools.machine import machine
from tools.output import make_out
from tools.profiling.measure import measure
from tools.profiling.ranks import ROOT, fewer_processes, measure_fewer, measure_ranks
from tools.profiling.record import Measured, Point, Profile
from tools.profiling.verdict import judge

TRACE = "trace.json"
FEWER = 0.4  # share of the time for runs on fewer processes


def profile(
    cfg: Config,
    console: Console,
    *,
    title: str,
    command: str,
    processes: int,
    gpus: int,
    out: Path,
    seconds: float,
    trace: bool,
) -> Profile:
    """Measures the run of `cfg` on `gpus` or `processes` ranks, or in this process where both are 0.

    It takes about `seconds`, or as long as a few steps do. It makes the directory `out` and writes nothing to it, but
    for a trace of some steps to trace.json on request. Raises ConfigError under a launcher, DataError where `out`
    cannot be written to, DataError and MachineError as `pretrain` does, and ProcessesFailed, after which a rank has
    said why.
    """
    began, count = monotonic(), gpus or processes or 1
    if launched():
        raise ConfigError("profile starts its processes itself: without torchrun, with --gpus N or --processes N")
    check_data(cfg, preferred_device(cfg.run), count)
    _check_out(out)
    traced = (out / TRACE).resolve() if trace else None
    others: tuple[Point, ...] = ()
    notes: tuple[str, ...] = ()
    if count > 1:
        share = (1 - FEWER) * seconds
        measured = measure_ranks(cfg, count, seconds=share, until=began + share, trace=traced)
        others, notes = _on_fewer(cfg, console, of=count, until=began + seconds)
    else:
        measured = measure(cfg, console, seconds=seconds, until=began + seconds, trace=traced)
    return _join(cfg, measured, others, title=title, command=command, notes=(*measured.notes, *notes))


def _check_out(out: Path) -> None:
    """Before anything long is begun. Raises DataError where no file can be made in `out`."""
    make_out(out)
    try:
        with tempfile.TemporaryFile(dir=out):
            return
    except OSError as error:
        raise DataError(f"--out {out}: cannot be written to: {error.strerror}; choose another") from None


def _on_fewer(cfg: Config, console: Console, *, of: int, until: float) -> tuple[tuple[Point, ...], tuple[str, ...]]:
    """The curve's points below its last one, and why there are not more."""
    points: list[Point] = []
    notes: list[str] = []
    counts = fewer_processes(of)
    for number, count in enumerate(counts):
        left = max(0.0, until - monotonic())
        console.print(f"the same on {count} of {of} processes, about {left:.0f} s left", soft_wrap=True)
        share = left / (len(counts) - number)
        match measure_fewer(cfg, count, of=of, until=monotonic() + share):
            case Point() as point:
                points.append(point)
            case str(reason):
                notes.append(reason)
    return tuple(points), tuple(notes)


def _join(
    cfg: Config, measured: Measured, fewer: tuple[Point, ...], *, title: str, command: str, notes: tuple[str, ...]
) -> Profile:
    images = measured.images * measured.world_size
    itself = Point(count=measured.world_size, images_per_s=tuple(images / step for step in measured.runs.real))
    return Profile(
        title=title,
        command=command,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=_commit(),
        machine=machine() | {"threads": measured.threads},
        config=cfg.model_dump(mode="json"),
        device=measured.device,
        precision=cfg.run.precision,
        world_size=measured.world_size,
        images=measured.images,
        warm_up=measured.warm_up,
        stages=measured.stages,
        runs=measured.runs,
        ceilings=measured.ceilings,
        memory_peak=measured.memory_peak,
        loader_scaling=measured.loader_scaling,
        scaling=(*fewer, itself),
        timeline=measured.timeline,
        total_steps=measured.total_steps,
        predicted_hours=measured.total_steps * median(measured.runs.real) / 3600,
        verdict=judge(cfg, measured),
        notes=notes,
        others=measured.others,
    )


def _commit() -> str | None:
    """Of the checkout that this file is in; None where there is none."""
    try:
        found = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
