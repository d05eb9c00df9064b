"""What follows each step: a checkpoint where one is due, an evaluation, the end where one was asked for."""

import time
from pathlib import Path
from shlex import quote

import torch

from ressl import checkpoint
from ressl.batch import Crops, Loaders, Probe, Probes, Split
from ressl.checkpoint import Manifest
from ressl.compiled import not_compiled
from ressl.config import Config
from ressl.evals.protocol import evaluate
from ressl.guard import NonFiniteRun
from ressl.recorder import BadImages, Recorder, counted
from ressl.run_dir import again_command, checkpoints_path, lines_of, metrics_path
from ressl.runtime import Runtime
from ressl.saver import Saver
from ressl.snapshot import take_snapshot
from ressl.step import TrainStep
from ressl.stop import Stop
from ressl.watchdog import Watchdog, watched


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
        self.recorder, self.saver, self.watchdog, self.stop = recorder, saver, watchdog, stop
        self.bad_images = bad_images
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
        self.bad_images.check(self.loaders.probes.count("train"), self.cfg.data.max_bad)
        epochs, within = divmod(step, self.steps_per_epoch)
        if within == 0:
            self.take_step.guarded.average_statistics_(self.runtime.collectives)
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
            left_out=False,  # see Snapshot
        )
        self.saver.save(
            lambda: take_snapshot(about, self.take_step.method, self.take_step.plain, self.take_step.guarded, runtime),
            last=self.stopping or step == self.cfg.optim.epochs * self.steps_per_epoch,
        )
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
        better = self.best is None or found["knn"] > self.best[1]
        if better and self.runtime.is_main and self.saver.wrote(step):
            self.best = step, found["knn"]
            self.saver.best = step
        self.recorder.evaluated(step, found, time.perf_counter() - started)
        self.recorder.restart_clock()  # this is not training
        self.watchdog.at("step")

    def _not_finite(self) -> str:
        self.saver.wait()  # before the others are met, who look for the last checkpoint too
        what = self.take_step.guarded.describe(self.start_step, self.runtime.collectives)
        found = checkpoint.found(checkpoints_path(self.cfg.run.out_dir))
        last = next(iter(checkpoint.good(found)), None)
        later = [quote(str(path)) for path in found if last and path > last]  # of weights that lead to no number
        others = self.recorder.skipped - self.skipped - 1
        total = f"it and {counted(others, 'other')}" if others else "it"
        several = self.runtime.world_size != self.runtime.local_ranks
        lower = f"optim.lr={self.cfg.optim.lr / 2:g} --allow-change optim.lr"
        again = again_command(self.cfg.run.out_dir, several_nodes=several, change=lower)
        remove = f"rm -r {' '.join(later)}; " if later else ""
        limit, there = self.cfg.run.skip_limit, f"The last good checkpoint is {last}; to go on: {remove}{again}"
        advice = there if last else f"Nothing was saved: begin again with {lower}"
        return f"{what}. Left out: {total}, more than run.skip_limit={limit} allows. {advice}"


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
