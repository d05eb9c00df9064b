"""A run from its directory's state to its last step: goes on from a checkpoint, saves, evaluates, ends when asked to.

The parts stand in files of their own; this one says when each has its turn.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from ressl import checkpoint
from ressl.batch import Batch, DataError, Digest, Loaders, ViewLoader, disagreement
from ressl.batchnorm import normalised_together
from ressl.between import Between
from ressl.checkpoint import Checkpoint
from ressl.collapse import collapse_measures, collapse_warning
from ressl.config import Config
from ressl.evals.protocol import check_probes
from ressl.method import AnyMethod
from ressl.recorder import BadImages, Recorder, counted, warn
from ressl.run_dir import (
    accept_changes,
    again_command,
    checkpoints_path,
    keep_metrics_until,
    lines_of,
    make_run_dir,
    metrics_path,
    side_by_side,
)  # fmt: skip
from ressl.runtime import Runtime, launched
from ressl.saver import Saver
from ressl.snapshot import restore_
from ressl.step import TrainStep, build_step
from ressl.stop import Stop, Stopped
from ressl.trainer import train
from ressl.watchdog import Watchdog, watched

WATCH = "watch"  # in the directory of the run: where each rank is, and stacks after a hang


class RanksDiffer(RuntimeError):
    """The ranks do not see one order of one data set. The message says which and how."""


def pretrain(
    cfg: Config,
    runtime: Runtime,
    loaders: Loaders,
    bad_images: BadImages,
    console: Console,
    *,
    remarks: Sequence[str] = (),
    allowed: Sequence[str] = (),
    end: Callable[[str], None],
    lost: Callable[[], bool] = lambda: False,
    done: Callable[[], object] = lambda: None,
) -> float:
    """Called on every rank; returns the images per second. `allowed`: see `check_run_dir`; `end` and `lost`: see
    Watchdog; `done` is called when all has been saved, while signals are still heard.

    Raises Stopped after a signal, when the run is saved; NonFiniteRun and NonFiniteWeights; RanksDiffer; SaveError
    where the last checkpoint could not be written; CheckpointError where none of those that are there can be used.
    """
    _check(cfg, runtime, loaders)
    take_step, out_dir = build_step(cfg, runtime), cfg.run.out_dir
    tell = partial(warn, console) if runtime.is_main else _silent
    with Stop(aloud=not launched()) as stop, make_run_dir(cfg, allowed) if runtime.is_main else nullcontext():
        runtime.wait_for_everyone()
        start_step, damaged = _go_on(cfg, runtime, loaders, take_step, tell)
        if runtime.is_main:
            total = cfg.optim.epochs * loaders.train.steps_per_epoch
            for line in [*remarks, *_begin(cfg, allowed, start_step, total, tell)]:
                console.print(line, soft_wrap=True)
        runtime.wait_for_everyone()
        bad_images.open()
        runtime.wait_for_everyone()  # from here on each sees what all add
        bad_images.check(loaders.probes.count("train"), cfg.data.max_bad)
        rank, world_size, patience = runtime.rank, runtime.world_size, cfg.run.hang_timeout
        watchdog = Watchdog(
            out_dir / WATCH, rank=rank, world_size=world_size, seconds=patience, end=end, lost=lost
        )  # fmt: skip
        watchdog.step = start_step
        recorder = _recorder(cfg, runtime, loaders, take_step.method, console, start_step)
        saver = Saver(
            checkpoints_path(out_dir), keep=cfg.run.checkpoint.keep, log=metrics_path(out_dir), tell=tell,
            damaged=damaged,
        )  # fmt: skip
        with closing(saver), watchdog, runtime.trackers(), recorder:
            between = Between(cfg, runtime, loaders, take_step, recorder, saver, watchdog, stop, bad_images, start_step)
            between.make_up_evaluation()
            loader = Supervised(loaders.train, runtime, watchdog)
            step = train(take_step, loader, recorder, cfg.optim, start_step=start_step, on_step=between)
            between.votes.hear(2)  # the last ones, which change nothing
            watchdog.at("saving")
            saver.finish()
            runtime.wait_for_everyone()  # saved is what all may say now
            if not between.stopping:
                done()
    if between.stopping:
        again = again_command(out_dir, several_nodes=world_size != runtime.local_ranks)
        raise Stopped(f"stopped after step {step:,}, and saved; to go on: {again}")
    if runtime.is_main and saver.saved:
        console.print(_cost(saver, time.perf_counter() - between.began), highlight=False)
    return recorder.images_per_s


def _check(cfg: Config, runtime: Runtime, loaders: Loaders) -> None:
    """Raises DataError for what would only fail later."""
    per_rank = cfg.optim.batch_size // runtime.world_size // cfg.optim.accumulate
    normalised_together(cfg.encoder.batchnorm, per_rank, runtime.world_size)
    if cfg.run.knn_every:
        check_probes(loaders.probes, runtime.world_size)


def _recorder(
    cfg: Config, runtime: Runtime, loaders: Loaders, method: AnyMethod, console: Console, start_step: int
) -> Recorder:
    return Recorder(
        cfg.run.out_dir,
        console,
        every=cfg.run.log_every,
        images=cfg.optim.batch_size,
        steps_per_epoch=loaders.train.steps_per_epoch,
        epochs=cfg.optim.epochs,
        start_step=start_step,
        rank=runtime.rank,
        mean=runtime.collectives.mean,
        track=runtime.track if cfg.run.tensorboard else None,
        watch=partial(_look, method, runtime),
    )


def _begin(cfg: Config, allowed: Sequence[str], start_step: int, total: int, tell: Callable[[str], None]) -> list[str]:
    """Makes config and log those of a run that is after `start_step` of `total` steps. Returns what to say of it."""
    changed = accept_changes(cfg, allowed)
    _set_log_aside(cfg.run.out_dir, start_step, tell)
    keep_metrics_until(cfg.run.out_dir, start_step)
    changes = [f"changed: {key} from {old} to {new}" for key, (old, new) in changed.items()]
    match start_step:
        case 0:
            return changes
        case _ if start_step >= total:
            return [*changes, f"the run is complete: {counted(start_step, 'step')}"]
    return [*changes, f"going on after step {start_step:,}"]


def _cost(saver: Saver, seconds: float) -> str:
    waited = f"{saver.held_s:.2f} s ({100 * saver.held_s / seconds:.2f} %)"
    return f"saved {counted(saver.saved, 'checkpoint')}, for which the run waited {waited}"


# --- before the first step -------------------------------------------------------------------------------------------


def _go_on(
    cfg: Config, runtime: Runtime, loaders: Loaders, take_step: TrainStep, tell: Callable[[str], None]
) -> tuple[int, list[Path]]:
    """The steps taken so far, and checkpoints that are damaged. Rank 0 looks for the newest that is whole; all read
    that one."""
    directory = checkpoints_path(cfg.run.out_dir)
    found = checkpoint.newest(directory, tell) if runtime.is_main else None
    own = torch.tensor([found[1].about.step if found else -1], device=runtime.device)
    step = int(runtime.gather_rows(own)[0])
    if step < 0:
        return 0, []
    path = directory / checkpoint.name_of(step)
    saved = found[1] if found else checkpoint.read(path)
    _check_data(saved, path, loaders)
    if runtime.world_size > 1:
        take_step.settle(_blank(cfg, runtime), step)
    restore_(saved, path, method=take_step.method, optimizer=take_step.plain, guard=take_step.guarded, runtime=runtime)
    if saved.about.world_size != runtime.world_size:
        tell(
            f"the run had {counted(saved.about.world_size, 'rank')} and has {runtime.world_size} now: the images, "
            "their order and their views stay the same, the weights do so except for rounding and for what batch norm "
            "sees together"
        )
    return step, found[2] if found else []


def _blank(cfg: Config, runtime: Runtime) -> Batch:
    """Black images in the shapes of a micro-batch."""
    images = cfg.optim.batch_size // runtime.world_size // cfg.optim.accumulate
    index = torch.zeros(images, dtype=torch.int64, device=runtime.device)
    weak, *strong = (
        torch.zeros(images, 3, view.size, view.size, device=runtime.device, dtype=runtime.dtype).to(
            memory_format=torch.channels_last
        )
        for view in (cfg.views.weak, *cfg.views.strong)
    )
    return Batch(weak=(weak,), strong=tuple(strong), index=index, label=index)


def _set_log_aside(out_dir: Path, start_step: int, tell: Callable[[str], None]) -> None:
    """A run that begins anew where there is a log does not write over it."""
    log = metrics_path(out_dir)
    if start_step == 0 and (count := len(lines_of(log))):
        names = (f"metrics.old{number or ''}.jsonl" for number in range(10**6))
        aside = next(path for path in map(log.with_name, names) if not path.exists())
        log.replace(aside)
        tell(
            f"{out_dir}: a log of {counted(count, 'record')} but no checkpoint: the run begins anew, and the log is "
            f"{aside.name}"
        )


def _check_data(saved: Checkpoint, path: Path, loaders: Loaders) -> None:
    """Another data set has another order: the same run cannot go on with it."""
    images, data = loaders.probes.count("train"), loaders.train.fingerprint
    if (images, data) != (saved.about.images, saved.about.data):
        rows = {"images": (f"{saved.about.images:,}", f"{images:,}")}
        rows["their names and labels (hash)"] = (f"{saved.about.data:016x}", f"{data:016x}")
        raise DataError(
            f"{path}: the run saw other images than data.source.train has now: give it those back, or choose another "
            f"run.out_dir\n{side_by_side(rows)}"
        )


def _silent(message: str) -> None:
    pass


def _look(method: AnyMethod, runtime: Runtime) -> tuple[dict[str, float], str | None]:
    """What else stands in each record, and what is wrong, if anything."""
    measures = collapse_measures(method.queue, teacher_temperature=method.cfg.teacher_temperature)
    values = {name: float(value) for name, value in measures.items()}
    warning = collapse_warning(values, method.cfg.embed_dim)
    if runtime.scales_gradients:
        values["loss_scale"] = runtime.scaler_state()["scale"]
        if values["loss_scale"] < 1:  # it falls with each step whose gradients overflow
            warning = "fp16 gradients overflow at any scale: the run learns nothing; use run.precision=bf16"
    return values, warning


# --- what the run is fed with, under supervision ---------------------------------------------------------------------


class Supervised:
    """The training stream, with word to the watchdog, and a comparison of the ranks before each epoch."""

    def __init__(self, loader: ViewLoader, runtime: Runtime, watchdog: Watchdog) -> None:
        self.loader, self.runtime, self.watchdog = loader, runtime, watchdog

    @property
    def steps_per_epoch(self) -> int:
        return self.loader.steps_per_epoch

    @property
    def fingerprint(self) -> int:
        return self.loader.fingerprint

    def digest(self, epoch: int, start_step: int = 0) -> Digest:
        return self.loader.digest(epoch, start_step)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        if self.runtime.world_size > 1:
            self._compare_ranks(self.loader.digest(epoch, start_step))
        return watched(self.loader.epoch(epoch, start_step), self.watchdog, "data", "step")

    def _compare_ranks(self, own: Digest) -> None:
        row = torch.tensor([[own.common, own.own, own.whole]], device=self.runtime.device)
        digests = [Digest(*values) for values in self.runtime.gather_rows(row).tolist()]
        if problem := disagreement(digests):
            raise RanksDiffer(problem)
