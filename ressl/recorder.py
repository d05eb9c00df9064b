"""Metrics out: a live bar on the terminal, one line of JSON for each record in metrics.jsonl, and the trackers.

Reading a value waits for the device, and this is the only place of the training step that does so.
"""

import json
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from ressl.batch import REPLACED, DataError
from ressl.run_dir import append_line, bad_images_path, lines_of, metrics_path

FEW_BAD = 10  # images that may be bad in a data set of any size
LINE_EVERY_S = 60  # where there is no live bar, as in a log file, no silence is longer than this and one record


def warn(console: Console, message: str) -> None:
    console.print(f"warning: {message}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def counted(count: int, noun: str) -> str:
    """`1 step`, `2,808 steps`."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


class BadImages:
    """Images that could not be read and were replaced: never silent. Every rank adds to the same file; what it says
    already, because the run was interrupted after it, is not said twice.

    `report` may be called from any thread. What it gets before `open` waits for that.
    """

    def __init__(self, out_dir: Path, console: Console, rank: int) -> None:
        self.path, self.console, self.rank = bad_images_path(out_dir), console, rank
        self.after_step = 0
        self._lock = threading.Lock()
        self._known: set[str] | None = None  # messages in the file; None: there is no directory for it yet
        self._early: list[tuple[str, bool]] = []
        self._bad: set[str] = set()  # bad training images of all ranks since the run was started
        self._read = 0  # bytes of the file
        self._fresh = False  # reports since the last check: the rank that reports last sees what all have added

    def open(self) -> None:
        """From here on there is a directory, and what is added to its file counts."""
        with self._lock:
            self._known = {str(record.get("message")) for record in lines_of(self.path)}
            self._read = self.path.stat().st_size if self.path.exists() else 0

    def report(self, message: str, *, training: bool = True) -> None:
        """`training`: it is of the training set. A disk that is full does not end the run."""
        with self._lock:
            if self._known is None:
                self._early.append((message, training))
                return
            if message not in self._known:
                record = {"after_step": self.after_step, "rank": self.rank, "training": training, "message": message}
                with suppress(OSError):
                    append_line(self.path, record)
            self._known.add(message)
            self._fresh = True
            if training:
                self._bad.add(message.split(REPLACED)[0])
        warn(self.console, message)

    def check(self, images: int, share: float) -> None:
        """Raises DataError where more than `share` of the `images` of the training set, and more than FEW_BAD, were bad
        since the run was started. Costs nothing where this rank has reported nothing since the last time."""
        early, self._early = self._early, []
        for message, training in early:
            self.report(message, training=training)
        if self._fresh:
            self._fresh = False
            self._learn()
        if len(self._bad) > max(FEW_BAD, share * images):
            raise DataError(
                f"{len(self._bad):,} of {images:,} images could not be read, more than data.max_bad={share:g} allows; "
                f"they are listed in {self.path}"
            )

    def _learn(self) -> None:
        """What other ranks have added, by whole lines."""
        with self._lock, suppress(OSError):
            if not self.path.exists() or self.path.stat().st_size == self._read:
                return
            with self.path.open("rb") as file:
                file.seek(self._read)
                new = file.read()
            whole = new[: new.rfind(b"\n") + 1]
            self._read += len(whole)
            for line in whole.splitlines():
                with suppress(ValueError, AttributeError):
                    record = json.loads(line)
                    if record.get("training"):
                        self._bad.add(str(record.get("message")).split(REPLACED)[0])


class Recorder:
    """Holds device tensors between records and reads them every `every` steps and at the end of each epoch.

    `images` is the number of images of a step over all ranks, `mean` averages values over the ranks, and `track` also
    gets every record, if given. `watch` measures what else is worth a look at each record, and says what is wrong, if
    anything. On other ranks than 0 it is silent.
    """

    def __init__(
        self,
        out_dir: Path,
        console: Console,
        *,
        every: int,
        images: int,
        steps_per_epoch: int,
        epochs: int,
        start_step: int = 0,
        rank: int = 0,
        mean: Callable[[Tensor], Tensor] = lambda values: values,
        track: Callable[[int, dict[str, float]], None] | None = None,
        watch: Callable[[], tuple[Mapping[str, float], str | None]] = lambda: ({}, None),
    ) -> None:
        active = rank == 0
        self.mean, self.watch = mean, watch
        self.every, self.images, self.active, self.track = every, images, active, track
        self.skipped = 0  # steps left out so far, as of the last record
        self._warned, self._unwritten = "", False  # the last warning; whether the last record could not be written
        self.steps_per_epoch, self.epochs = steps_per_epoch, epochs
        self.console = console
        self.file = metrics_path(out_dir)
        self.progress = Progress(
            TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:,.0f} images/s  loss {task.fields[loss]:.3f}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            transient=True,
            disable=not (active and console.is_terminal),
        )
        self.task = self.progress.add_task(
            "", total=epochs * steps_per_epoch, completed=start_step, epoch=0, epochs=epochs, rate=0.0, loss=math.nan
        )
        self.last_step, self.since = start_step, time.perf_counter()
        self.trained_s, self.trained_images, self.last_line = 0.0, 0, self.since

    def __enter__(self) -> Self:
        self.progress.start()
        self.since = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def step(self, step: int, logs: Sequence[Mapping[str, Tensor]], *, lr: float) -> None:
        """Takes the logs of the micro-batches of optimizer step `step`, counted from 1. Most calls only return; the
        others record the mean over micro-batches and ranks."""
        end_of_epoch = step % self.steps_per_epoch == 0
        if step % self.every and not end_of_epoch:
            return
        names = list(logs[0])
        means = self.mean(torch.stack([torch.stack([micro[n].float() for n in names]) for micro in logs]).mean(0))
        values: dict[str, float | str] = dict(zip(names, means.tolist(), strict=True))  # waits for the device
        now = time.perf_counter()
        seconds, self.since = now - self.since, now
        skipped, self.skipped = self.skipped, int(values.pop("skipped", 0))
        if self.skipped > skipped and self.active:
            warn(self.console, f"left out by step {step:,}, as not finite: {counted(self.skipped, 'step')}")
        self.logged = names
        images = (step - self.last_step) * self.images
        self.trained_s, self.trained_images = self.trained_s + seconds, self.trained_images + images
        values |= {"lr": lr, "images_per_s": images / seconds}
        if self.skipped:
            values["skipped"] = self.skipped
        if self.active:
            found, warning = self.watch()
            values |= found
            if warning:
                values["warning"] = warning
                self._warn(warning)
        epoch = (step - 1) // self.steps_per_epoch + 1
        self.progress.update(self.task, completed=step, epoch=epoch, rate=values["images_per_s"], loss=values["loss"])
        self.write(step, values)
        silent = time.perf_counter() - self.last_line > LINE_EVERY_S and not self.console.is_terminal
        if end_of_epoch or silent:
            self._line(epoch, step, values)
        self.last_step = step

    def write(self, step: int, values: Mapping[str, float | str]) -> None:
        """One record; what is not finite stands there as null. Where the disk refuses it is left out, and said once."""
        if not self.active:
            return
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        try:
            append_line(self.file, {"step": step, "epoch": round(step / self.steps_per_epoch, 4), **finite})
            self._unwritten = False
        except OSError as error:
            if not self._unwritten:
                warn(self.console, f"{self.file}: cannot be written: {error.strerror}; the run goes on without")
            self._unwritten = True
        if self.track:
            self.track(step, {k: v for k, v in finite.items() if isinstance(v, float)})

    def _warn(self, warning: str) -> None:
        """Once; the log says it at each record."""
        kind = warning.partition(":")[0]  # the rest has numbers
        if kind != self._warned:
            warn(self.console, warning)
        self._warned = kind

    def evaluated(self, step: int, values: Mapping[str, float], seconds: float) -> None:
        """The result of an evaluation between epochs."""
        self.write(step, {**values, "evaluation_s": seconds})
        if self.active:
            found = "  ".join(f"{name} {100 * value:.2f} %" for name, value in values.items())
            self.console.print(f"  after epoch {step // self.steps_per_epoch}: {found}  ({seconds:.0f} s)")

    def restart_clock(self) -> None:
        """Leaves the time since the last record out of the rates."""
        self.since = time.perf_counter()

    @property
    def images_per_s(self) -> float:
        """Of all recorded steps."""
        return self.trained_images / self.trained_s if self.trained_s else math.nan

    def _line(self, epoch: int, step: int, values: Mapping[str, float | str]) -> None:
        self.last_line = time.perf_counter()
        if not self.active:
            return
        total = self.epochs * self.steps_per_epoch
        left = (total - step) * self.images / self.images_per_s
        others = "".join(f"{name} {values[name]:.3f}  " for name in self.logged if name not in ("loss", "skipped"))
        self.console.print(
            f"epoch {epoch}/{self.epochs}  step {step:,}/{total:,}  loss {values['loss']:.4f}  "
            f"{others}{self.images_per_s:,.0f} images/s  {_duration(left)} left",
            highlight=False,
            soft_wrap=True,
        )


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"
