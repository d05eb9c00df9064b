"""Run by test_interrupted.py and test_faults.py: forks the ranks of runs, with a fault in one of them if asked for.

torch is imported once for all of them, so that a run of two ranks starts in a fraction of a second. Reads lines of
JSON: {"start": {"config", "overrides", "ranks", "log", "fault"}} answers the process ids; {"wait": [pid, ...],
"seconds": s} answers their exit codes, None for one that has not ended within that time and was killed.
"""

import json
import math
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # threads do not survive a fork

import torch
import torchvision.models.resnet  # noqa: F401  # takes seconds too
from rich.console import Console

from pipelines import build_loaders
from pipelines.loader import ViewStream
from ressl.batch import Batch, Digest, Loaders
from ressl.config import Config
from ressl.config_file import load_config
from ressl.method import build_method
from ressl.pretrain import pretrain
from ressl.recorder import BadImages
from ressl.runtime import Runtime
from ressl.step import TrainStep, build_step, step_of
from tools.ending import end_hanging, exit_code
from tools.processes import FAILURES, another_failed

Fault = dict[str, Any]  # what, on which rank, at which steps


class Faulty:
    """A ViewLoader that does what the fault says when the batch of one of its steps is asked for."""

    def __init__(self, loader: ViewStream, fault: Fault) -> None:
        self.loader, self.fault = loader, fault

    @property
    def steps_per_epoch(self) -> int:
        return self.loader.steps_per_epoch

    @property
    def fingerprint(self) -> int:
        return self.loader.fingerprint

    def digest(self, epoch: int, start_step: int = 0) -> Digest:
        return self.loader.digest(epoch, start_step)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        first = epoch * self.steps_per_epoch + start_step
        for step, batch in enumerate(self.loader.epoch(epoch, start_step), first):
            if step in self.fault["steps"]:
                self._strike(batch)
            yield batch

    def _strike(self, batch: Batch) -> None:
        match self.fault["what"]:
            case "nan":
                batch.strong[0][1].fill_(float("nan"))
            case "sleep":
                time.sleep(3600)
            case "freeze":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "exit":
                os._exit(9)
            case "raise":
                raise ZeroDivisionError("the fault")
            case "slow":
                time.sleep(0.1)


def run(cfg: Config, fault: Fault | None) -> None:
    runtime = Runtime(cfg.run)
    mine = fault if fault and fault["rank"] == runtime.rank else None
    torch.manual_seed(cfg.run.seed)
    bad_images = BadImages(cfg.run.out_dir, Console(), runtime.rank)
    seen, rank = cfg, runtime.rank
    if mine and mine["what"] == "other seed":
        seen = cfg.model_copy(update={"run": cfg.run.model_copy(update={"seed": 5})})
    if mine and mine["what"] == "other part":
        rank = 1 - rank
    loaders = build_loaders(
        seen, device=runtime.device, rank=rank, world_size=runtime.world_size, report=bad_images.report
    )
    assert isinstance(loaders.train, ViewStream)
    if mine:
        loaders = Loaders(train=Faulty(loaders.train, mine), probes=loaders.probes)
    lost = partial(another_failed, wait=False)
    pretrain(cfg, runtime, loaders, bad_images, Console(width=300), end=end_hanging, lost=lost)


def run_in_float64(cfg: Config, steps: int) -> None:
    """Leaves the student of a run in float64, after some steps, in its directory."""
    runtime = Runtime(cfg.run)
    torch.manual_seed(cfg.run.seed)
    stream = build_loaders(cfg, device=runtime.device, rank=runtime.rank, world_size=runtime.world_size).train
    step = step_of(build_method(cfg.method, cfg.encoder, runtime.collectives).double(), cfg, runtime)

    def doubled() -> Iterator[Batch]:
        for b in chain.from_iterable(map(stream.epoch, range(100))):
            yield Batch((b.weak[0].double(),), tuple(view.double() for view in b.strong), b.index, b.label)

    batches = doubled()
    for _ in range(steps):
        step(batches, lr=0.05, momentum=0.9)
    if runtime.is_main:
        cfg.run.out_dir.mkdir()
        torch.save(step.method.state_dict(), cfg.run.out_dir / "method.pt")
    runtime.wait_for_everyone()


def spoil(place: str, step: TrainStep, batch: Batch) -> None:
    match place:
        case "strong view":
            batch.strong[0][1].fill_(math.nan)
        case "weak view":
            batch.weak[0][1].fill_(math.inf)
        case "teacher":
            next(step.method.teacher.parameters()).data.fill_(math.nan)
        case "queue":
            step.method.queue.keys[3].fill_(math.nan)
        case "gradient":
            weight = next(step.method.student.parameters())
            hook = weight.register_hook(lambda gradient: (hook.remove(), gradient * math.inf)[1])


def run_spoiled(cfg: Config, places: list[str]) -> None:
    """Steps of which one, on the last rank alone, is spoiled at a place: after each, what it has changed on this rank
    and how many were left out stands in a file."""
    runtime = Runtime(cfg.run)
    torch.manual_seed(cfg.run.seed)
    loaders = build_loaders(cfg, device=runtime.device, rank=runtime.rank, world_size=runtime.world_size)
    step, batches = build_step(cfg, runtime), chain.from_iterable(map(loaders.train.epoch, range(100)))
    found: dict[str, tuple[list[str], int]] = {}
    for place in places:
        step(batches, lr=0.05, momentum=0.9)
        whole, batch = state_of(step), next(batches)
        if runtime.rank == runtime.world_size - 1:
            spoil(place, step, batch)
        before = state_of(step)
        step(iter([batch]), lr=0.05, momentum=0.9)
        after = state_of(step)
        changed = [name for name in before if not torch.equal(before[name].nan_to_num(), after[name].nan_to_num())]
        found[place] = changed, int(step.guarded.skipped)
        step.method.load_state_dict(whole, strict=False)  # mended
    cfg.run.out_dir.mkdir(exist_ok=True)
    (cfg.run.out_dir / f"rank{runtime.rank}.json").write_text(json.dumps(found))
    runtime.wait_for_everyone()


def state_of(step: TrainStep) -> dict[str, torch.Tensor]:
    momenta = {f"momentum{n}": entry["momentum_buffer"] for n, entry in step.plain.state_dict()["state"].items()}
    method = {name: value for name, value in step.method.state_dict().items() if "tracked" not in name}
    return {name: value.clone() for name, value in (method | momenta).items()}


def start(given: dict[str, Any]) -> list[int]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    failures, ranks = tempfile.mkdtemp(dir=Path(given["log"]).parent), []
    for rank in range(given["ranks"]):
        if pid := os.fork():
            ranks.append(pid)
            continue
        code = 1
        try:
            for stream in (1, 2):
                os.dup2(os.open(given["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
            count = str(given["ranks"])
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), FAILURES: failures,
            }  # fmt: skip
            cfg = load_config(Path(given["config"]), given["overrides"])
            work: Callable[[], object] = partial(run, cfg, given.get("fault"))
            if given.get("float64"):
                work = partial(run_in_float64, cfg, given["float64"])
            if given.get("spoiled"):
                work = partial(run_spoiled, cfg, given["spoiled"])
            code = exit_code(work)
            sys.stdout.flush()
        except BaseException as error:
            print(repr(error), file=sys.stderr)
        finally:
            sys.stderr.flush()
            os._exit(code)
    return ranks


def wait(pids: list[int], seconds: float) -> list[int | None]:
    codes: dict[int, int | None] = {}
    deadline = time.monotonic() + seconds
    while len(codes) < len(pids):
        for pid in set(pids) - codes.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                codes[pid] = None
        time.sleep(0.002)
    return [codes[pid] for pid in pids]


def main() -> None:
    for line in sys.stdin:
        match json.loads(line):
            case {"start": given}:
                answer: object = start(given)
            case {"wait": pids, "seconds": seconds}:
                answer = wait(pids, seconds)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
