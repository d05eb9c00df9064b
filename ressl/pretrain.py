"""A run from its directory's state to its last step: goes on from a checkpoint, saves, evaluates, ends when asked to.

The parts stand in files of their own; this one says when each has its turn.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from shlex import quote

import torch
from rich.console import Console

from ressl import checkpoint
from ressl.batch import Batch, Crops, Digest, Loaders, Probe, Probes, Split, ViewLoader, disagreement
from ressl.batchnorm import average_statistics_, normalised_together
from ressl.checkpoint import Checkpoint, CheckpointError, Manifest
from ressl.collapse import collapse_measures, collapse_warning
from ressl.compiled import not_compiled
from ressl.config import Config
from ressl.evals.protocol import check_probes, evaluate
from ressl.guard import NonFiniteRun
from ressl.method import AnyMethod
from ressl.recorder import BadImages, Recorder
from ressl.run_dir import accept_changes, checkpoints_path, keep_metrics_until, lines_of, make_run_dir, metrics_path
from ressl.runtime import Runtime
from ressl.saver import Saver
from ressl.snapshot import restore_, take_snapshot
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
) -> float:
    """Called on every rank; returns the images per second. `allowed`: see `check_run_dir`; `end` and `lost`: see
    Watchdog.

    Raises Stopped after a signal, when the run is saved; NonFiniteRun and NonFiniteWeights; RanksDiffer; SaveError
    where the last checkpoint could not be written; CheckpointError where none of those that are there can be used.
    """
    _check(cfg, runtime, loaders)
    take_step, out_dir = build_step(cfg, runtime), cfg.run.out_dir
    tell = partial(_warn, console) if runtime.is_main else _silent
    with Stop() as stop, make_run_dir(cfg, allowed) if runtime.is_main else nullcontext():
        runtime.wait_for_everyone()
        bad_images.open()
        start_step, damaged = _go_on(cfg, runtime, loaders, take_step, tell)
        if runtime.is_main:
            accept_changes(cfg, allowed)
            _set_log_aside(out_dir, start_step, tell)
            keep_metrics_until(out_dir, start_step)
            for line in [*remarks, *([f"going on after step {start_step:,}"] if start_step else [])]:
                console.print(line, soft_wrap=True)
        runtime.wait_for_everyone()
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
    if between.stopping:
        again = f"python launch.py resume {quote(str(out_dir))}"
        raise Stopped(f"stopped after step {step:,}, and saved; go on with: {again}")
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
        watch=partial(_look_for_collapse, method),
    )


def _cost(saver: Saver, seconds: float) -> str:
    count = "1 checkpoint" if saver.saved == 1 else f"{saver.saved} checkpoints"
    return f"saved {count}, for which the run waited {saver.held_s:.2f} s ({100 * saver.held_s / seconds:.2f} %)"


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
    _check_data(saved, path, loaders, cfg)
    if runtime.world_size > 1:
        take_step.settle(_blank(cfg, runtime), step)
    restore_(saved, path, method=take_step.method, optimizer=take_step.plain, guard=take_step.guarded, runtime=runtime)
    if saved.about.world_size != runtime.world_size:
        tell(
            f"the run had {saved.about.world_size} processes and has {runtime.world_size} now: the images, their order "
            "and their views stay the same, the weights do so except for rounding and for what batch norm sees together"
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
            f"{out_dir}: a log of {count:,} records but no checkpoint: the run begins anew, and the log is {aside.name}"
        )


def _check_data(saved: Checkpoint, path: Path, loaders: Loaders, cfg: Config) -> None:
    """Another data set has another order: the same run cannot go on with it."""
    images = loaders.probes.count("train")
    if images != saved.about.images:
        raise CheckpointError(
            f"{path}: the run saw {saved.about.images:,} images, data.source.train has {images:,} now"
        )
    if loaders.train.fingerprint != saved.about.data:
        raise CheckpointError(f"{path}: data.source.train has other images or labels than those that the run saw")


def _warn(console: Console, message: str) -> None:
    console.print(f"warning: {message}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def _silent(message: str) -> None:
    pass


def _look_for_collapse(method: AnyMethod) -> tuple[dict[str, float], str | None]:
    measures = collapse_measures(method.queue, teacher_temperature=method.cfg.teacher_temperature)
    values = {name: float(value) for name, value in measures.items()}
    return values, collapse_warning(values, method.cfg.embed_dim)


# --- between two steps -----------------------------------------------------------------------------------------------


class Between:
    """What follows each step, on every rank: batch norm's average and the evaluation after an epoch, a checkpoint where
    one is due, the end where one was asked for."""

    def __init__(
        self,
        cfg: Config,
        runtime: Runtime,
        loaders: Loaders,
        take_step: TrainStep,
        recorder: Recorder,
        saver: Saver,
        watchdog: Watchdog,
        stop: Stop,
        bad_images: BadImages,
        start_step: int,
    ) -> None:
        self.cfg, self.runtime, self.loaders, self.take_step = cfg, runtime, loaders, take_step
        self.recorder, self.saver, self.watchdog, self.stop, self.bad_images = (
            recorder,
            saver,
            watchdog,
            stop,
            bad_images,
        )
        self.start_step, self.steps_per_epoch = start_step, loaders.train.steps_per_epoch
        self.votes, self.stopping = runtime.votes(), False
        self.skipped = recorder.skipped = int(take_step.guarded.skipped)  # before this process began
        self.best = best_evaluation(cfg.run.out_dir)
        saver.best = self.best[0] if self.best else None
        self.saved_at = start_step  # the step of the last checkpoint
        self.began = self.last_save = time.perf_counter()

    def __call__(self, step: int) -> bool:
        """Whether the run is to end here."""
        self.watchdog.at("step", step)
        self.bad_images.after_step = step
        epochs, within = divmod(step, self.steps_per_epoch)
        if within == 0:
            average_statistics_(self.take_step.method, self.runtime.collectives)
        if self.recorder.skipped - self.skipped > self.cfg.run.skip_limit:
            raise NonFiniteRun(self._not_finite())
        seconds = 60 * self.cfg.run.checkpoint.minutes
        late = self.runtime.is_main and 0 < seconds < time.perf_counter() - self.last_save
        self.stopping, by_the_clock = self.votes.cast(self.stop.asked is not None, late)
        # what rank 0 wished before it had saved is heard after it has
        if self.stopping or self._due(step) or (by_the_clock and step - self.saved_at > self.votes.delay):
            self._save(step)
        if within == 0 and not self.stopping and self._evaluates(epochs):
            self._evaluate(step)
        return self.stopping

    def _due(self, step: int) -> bool:
        epochs, within = divmod(step, self.steps_per_epoch)
        rules, last = self.cfg.run.checkpoint, epochs == self.cfg.optim.epochs
        by_epochs = within == 0 and rules.epochs > 0 and epochs % rules.epochs == 0
        return last or by_epochs or (rules.steps > 0 and step % rules.steps == 0)

    def _save(self, step: int) -> None:
        self.watchdog.at("saving")
        runtime, train_set = self.runtime, self.loaders.train
        about = Manifest(
            step=step,
            images=self.loaders.probes.count("train"),
            data=train_set.fingerprint,
            world_size=runtime.world_size,
            local_ranks=runtime.local_ranks,
            device=runtime.device.type,
        )
        self.saver.save(
            lambda: take_snapshot(
                about, self.take_step.method, self.take_step.plain, self.take_step.guarded, runtime
            )
        )  # fmt: skip
        self.saved_at, self.last_save = step, time.perf_counter()
        self.watchdog.at("step")

    def _evaluates(self, epochs: int) -> bool:
        every = self.cfg.run.knn_every
        return every > 0 and (epochs == self.cfg.optim.epochs or epochs % every == 0)

    def make_up_evaluation(self) -> None:
        """A run that was ended between a checkpoint and the evaluation that follows it makes up for it."""
        epochs, within = divmod(self.start_step, self.steps_per_epoch)
        if within or not epochs or not self._evaluates(epochs):
            return
        there = any(
            r.get("step") == self.start_step and "knn" in r for r in lines_of(metrics_path(self.cfg.run.out_dir))
        )
        missing = torch.tensor([0 if there else 1], device=self.runtime.device)
        if int(self.runtime.gather_rows(missing)[0]):
            self._evaluate(self.start_step)

    def _evaluate(self, step: int) -> None:
        started = time.perf_counter()
        backbone = self.take_step.method.student.get_submodule("backbone")
        probes = WatchedProbes(self.loaders.probes, self.watchdog)
        with not_compiled():
            found = evaluate(
                backbone, probes, self.cfg.evaluate, linear=False, gather=self.runtime.gather_rows
            )  # fmt: skip
        if self.saved_at == step and (self.best is None or found["knn"] > self.best[1]):
            self.best = step, found["knn"]
            self.saver.best = step
        self.recorder.evaluated(step, found, time.perf_counter() - started)
        self.recorder.restart_clock()  # this is not training
        self.watchdog.at("step")

    def _not_finite(self) -> str:
        what = self.take_step.guarded.describe(self.start_step, self.runtime.collectives)
        last = next(iter(checkpoint.found(checkpoints_path(self.cfg.run.out_dir))), None)
        others = self.recorder.skipped - self.skipped - 1
        return (
            f"{what}. It and {others:,} other steps were left out, more than run.skip_limit={self.cfg.run.skip_limit} "
            f"allows; {f'the last checkpoint is {last}' if last else 'nothing was saved'}. Lower optim.lr, or use "
            "run.precision=fp32 or bf16"
        )


def best_evaluation(out_dir: Path) -> tuple[int, float] | None:
    """Step and kNN accuracy of the best evaluation whose checkpoint is there."""
    there = {path.name for path in checkpoint.found(checkpoints_path(out_dir))}
    records = [
        (record["step"], record["knn"])
        for record in lines_of(metrics_path(out_dir))
        if isinstance(record.get("knn"), float)
        and isinstance(record.get("step"), int)
        and checkpoint.name_of(record["step"]) in there
    ]
    return max(records, key=lambda record: record[1], default=None)


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


class WatchedProbes:
    """The streams of an evaluation, with word to the watchdog of each batch."""

    def __init__(self, probes: Probes, watchdog: Watchdog) -> None:
        self.probes, self.watchdog = probes, watchdog

    @property
    def num_classes(self) -> int:
        return self.probes.num_classes

    def count(self, split: Split) -> int:
        return self.probes.count(split)

    def probe(self, split: Split, crops: Crops = "centre", epoch: int = 0) -> Probe:
        return watched(self.probes.probe(split, crops, epoch), self.watchdog, "evaluation", "evaluation")
