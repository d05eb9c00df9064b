"""Kills a small run of two processes again and again, and compares what it becomes with an undisturbed one.

    make soak OPTIONS="--kills 1000 --minutes 60 --source resident"

Kills come at random moments: while steps are taken, while a checkpoint is written, while the run starts; to both ranks
or to one, which the other has to notice. After some of them the newest checkpoint is torn. At the end weights, teacher,
queue, optimizer and the log must be the same to the bit. It counts what the kills met, so that it cannot be vacuous.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

# read when torch and numba are imported: ranks are forked, which threads do not survive, but for those of this layer
os.environ |= {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "NUMBA_THREADING_LAYER": "workqueue"}

import numpy as np
import torchvision.models.resnet  # noqa: F401  # takes seconds, so it is imported once for all ranks
from PIL import Image
from rich.console import Console

import launch
from pipelines.ffcv_source import FfcvSource
from ressl import checkpoint
from ressl.run_dir import checkpoints_path, lines_of, metrics_path
from tools.convert import convert

Source = Literal["resident", "ffcv", "dali"]
RANKS, IMAGES, BATCH = 2, 200, 16
STEPS_PER_EPOCH = IMAGES // BATCH
STEPS_PER_KILL = 6  # steps that the run has for each kill that it is to meet
TIMES = ("images_per_s", "evaluation_s")  # of a record: other in every run
STILL_S = 120.0  # a run that does not go on for so long is broken

CONFIG = """
data:
  source: {source}
  mean: [0.5, 0.5, 0.5]
  std: [0.25, 0.25, 0.25]
views:
  weak: {{size: 16}}
  strong: [{{size: 16, jitter_prob: 0.8, blur_prob: 0.5, blur_sigma: [0.1, 1.0]}}]
encoder: {{name: resnet_small, width: 4}}
method: {{name: ressl, hidden_dim: 32, embed_dim: 16, queue_size: 40, teacher_momentum: 0.9}}
optim: {{name: sgd, epochs: {epochs}, batch_size: {batch}, lr: 0.06, warmup_epochs: 0}}
evaluate: {{size: 16, batch_size: 50, knn: {{k: 5}}}}
run: {{out_dir: {out}, device: cpu, log_every: 1, knn_every: {knn_every}, checkpoint: {{epochs: 1, steps: 5}}}}
"""


@dataclass(slots=True)
class Report:
    """What the kills met."""

    source: str
    kills: int = 0
    while_saving: int = 0  # a checkpoint was half written or half removed
    while_starting: int = 0  # before the first step of that start
    one_rank: int = 0  # the other had to notice
    torn: int = 0  # newest checkpoints damaged by us
    gone_back: int = 0  # starts that found the newest damaged, and took the one before
    starts: int = 0
    runs: int = 0  # to their last step
    steps: int = 0  # of those runs
    seconds: float = 0.0
    differing: list[str] = field(default_factory=list)  # in which the runs ended otherwise than undisturbed


# --- the run ---------------------------------------------------------------------------------------------------------


def make_data(root: Path, source: Source) -> str:
    """The section `data.source` of a config, on images made here."""
    noise = np.random.default_rng(0).integers(0, 256, (IMAGES, 20, 20, 3)).astype(np.uint8)
    for split, images in (("train", noise), ("val", noise[: IMAGES // 2])):
        for number, image in enumerate(images):
            path = root / "folder" / split / f"class{number % 4}" / f"{number:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image[:] = image // 4 + 48 * (number % 4)
            Image.fromarray(image).save(path)
    quiet, formats = Console(quiet=True), {"resident": "tensor", "ffcv": "ffcv", "dali": "webdataset"}
    convert(str(root / "folder"), root / source, formats[source], console=quiet)  # type: ignore[arg-type]
    ends = {"resident": ".safetensors", "ffcv": ".beton", "dali": ""}[source]
    train, val = (root / source / f"{split}{ends}" for split in ("train", "val"))
    return f"{{name: {source}, train: {train}, val: {val}, workers: 1}}"


def write_config(path: Path, source: str, out: Path, epochs: int) -> None:
    path.write_text(
        CONFIG.format(source=source, epochs=epochs, batch=BATCH, out=out, knn_every=max(1, epochs // 5))
    )  # fmt: skip


def start(config: Path, log: Path) -> list[int]:
    """Forks the ranks of a run, and gives their process ids."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(RANKS):
        sys.stdout.flush()
        if pid := os.fork():
            ranks.append(pid)
            continue
        code = 1
        try:
            for stream in (1, 2):
                os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
            sys.argv = ["launch.py", "pretrain", str(config)]
            code = launch.main()
            sys.stdout.flush()
        finally:
            os._exit(code)
    return ranks


def await_all(ranks: list[int], seconds: float = STILL_S) -> list[int]:
    """Their exit codes. When one has failed the others have a while to notice, and are killed otherwise."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + seconds
    while len(codes) < len(ranks):
        for pid in set(ranks) - codes.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
                if codes[pid]:
                    deadline = min(deadline, time.monotonic() + 20)
        if time.monotonic() > deadline:
            kill(set(ranks) - codes.keys())
        time.sleep(0.002)
    return [codes[pid] for pid in ranks]


def kill(ranks: set[int] | list[int]) -> None:
    for pid in ranks:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def step_of(out: Path) -> int:
    """The last step in the log."""
    with suppress(OSError, ValueError, LookupError), metrics_path(out).open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 2000))
        return int(json.loads(file.read().splitlines()[-1])["step"])
    return 0


def _inode(path: Path) -> int:
    """A start that goes on writes the log anew."""
    with suppress(OSError):
        return path.stat().st_ino
    return 0


def _base(out: Path) -> int:
    """The step from which the next start goes on."""
    with suppress(checkpoint.CheckpointError):
        found = checkpoint.newest(checkpoints_path(out))
        return found[1].about.step if found else 0
    return 0


def undisturbed(config: Path, out: Path) -> None:
    codes = await_all(start(config, out.with_suffix(".log")), seconds=1e9)
    if any(codes):
        raise SystemExit(f"soak: the undisturbed run failed with {codes}: see {out.with_suffix('.log')}")


# --- the kills -------------------------------------------------------------------------------------------------------


def disturbed(config: Path, out: Path, total: int, kills: int, draw: random.Random, report: Report) -> None:
    """Runs to the last step, killed up to `kills` times on the way."""
    while True:
        log, base, old_log = out.with_suffix(".log"), _base(out), _inode(metrics_path(out))
        ranks = start(config, log)
        report.starts += 1
        if kills <= 0:
            codes = await_all(ranks, seconds=1e9)
            if any(codes):
                raise SystemExit(f"soak: the run failed by itself with {codes}: see {log}")
            break

        def taken(steps: int, base: int = base, old_log: int = old_log) -> bool:
            return _inode(metrics_path(out)) != old_log and step_of(out) >= base + steps

        chance, began = draw.random(), time.monotonic()
        if chance < 0.1:  # while it starts
            time.sleep(draw.uniform(0, 0.8))
        elif chance < 0.4:  # while it saves
            _await(lambda: taken(1), ranks)
            _await(lambda: any(checkpoints_path(out).glob(f"{checkpoint.MAKING}*")), ranks, seconds=5)
        else:
            goal = draw.randint(1, 12)
            _await(partial(taken, goal), ranks)
            time.sleep(draw.uniform(0, 0.05))
        if _ended(ranks):  # it had only a few steps to go
            codes = await_all(ranks)
            if any(codes):
                raise SystemExit(f"soak: the run failed by itself with {codes}: see {log}")
            break
        both, moved = draw.random() < 0.5, taken(1)
        report.while_saving += any(checkpoints_path(out).glob(f"{checkpoint.MAKING}*"))
        kill(ranks if both else [draw.choice(ranks)])
        await_all(ranks)
        kills, report.kills, report.one_rank = kills - 1, report.kills + 1, report.one_rank + (not both)
        report.while_starting += not moved
        if time.monotonic() - began > STILL_S:
            raise SystemExit(f"soak: the run does not go on: see {log}")
        if draw.random() < 0.2:
            report.torn += _tear(out, draw)
    report.runs, report.steps = report.runs + 1, report.steps + total
    report.gone_back += out.with_suffix(".log").read_text().count(": going back to step-")


def _await(condition: Callable[[], bool], ranks: list[int], seconds: float = STILL_S) -> bool:
    deadline = time.monotonic() + seconds
    while not (true := condition()) and not _ended(ranks) and time.monotonic() < deadline:
        time.sleep(0.001)
    return true


def _ended(ranks: list[int]) -> bool:
    """Whether one has ended; it is still to be waited for."""
    return any(os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None for pid in ranks)


def _tear(out: Path, draw: random.Random) -> bool:
    """Cuts a file of the newest checkpoint, where there is another to go back to."""
    there = checkpoint.found(checkpoints_path(out))
    if len(there) < 2:
        return False
    with suppress(checkpoint.CheckpointError):
        checkpoint.read(there[1])
        path = there[0] / draw.choice((checkpoint.MODEL, checkpoint.TRAINING, checkpoint.MANIFEST))
        os.truncate(path, path.stat().st_size * draw.randrange(100) // 100)
        return True
    return False


# --- what came of it -------------------------------------------------------------------------------------------------


def differences(one: Path, other: Path) -> list[str]:
    """In which files two runs ended otherwise; of the log, what is not a time."""
    found = []
    for path in (checkpoint.found(checkpoints_path(run))[0] for run in (one, other)):
        checkpoint.read(path)  # whole
    last = [checkpoint.found(checkpoints_path(run))[0] for run in (one, other)]
    if last[0].name != last[1].name:
        return [f"ended at {last[0].name} and {last[1].name}"]
    for name in (checkpoint.MODEL, checkpoint.TRAINING, checkpoint.MANIFEST):
        if (last[0] / name).read_bytes() != (last[1] / name).read_bytes():
            found.append(name)
    logs = [
        [{k: v for k, v in record.items() if k not in TIMES} for record in lines_of(metrics_path(run))]
        for run in (one, other)
    ]
    if logs[0] != logs[1]:
        found.append(metrics_path(one).name)
    return found


def vacuous(report: Report) -> list[str]:
    """What the kills did not meet, so that the run shows less than it should."""
    short = []
    if report.kills and report.while_saving < 0.05 * report.kills:
        short.append(f"only {report.while_saving} of {report.kills} kills met a checkpoint being written")
    if report.kills >= 10 and not report.gone_back:
        short.append("no start met a damaged checkpoint")
    if report.kills >= 10 and not 0 < report.one_rank < report.kills:
        short.append("kills of one rank and of both were not both tried")
    if report.while_starting > 0.5 * report.kills + 1:
        short.append(f"{report.while_starting} of {report.kills} kills came before the first step of a start")
    return short


def soak(
    root: Path, *, source: Source, kills: int, per_run: int, minutes: float, seed: int, tell: Callable[[str], None]
) -> Report:
    """Kills runs until there were `kills` kills, or `minutes` are over; up to `per_run` of them in each."""
    report, draw, began = Report(source), random.Random(seed), time.monotonic()
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    child = os.fork()  # converting starts threads, which would not survive the forks after it
    if child == 0:
        (root / "source").write_text(make_data(root, source))
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        raise SystemExit("soak: its data could not be made")
    words, per_run = (root / "source").read_text(), min(kills, per_run)
    if source == "ffcv":  # what it compiles, which takes seconds, is compiled once for all ranks
        FfcvSource(root / "ffcv" / "train.beton", workers=1, on_corrupt="fail", report=tell)
    if source == "dali":
        import nvidia.dali.fn  # noqa: F401
    epochs = max(4, -(-per_run * STEPS_PER_KILL // STEPS_PER_EPOCH))
    whole = root / "undisturbed"
    write_config(root / "undisturbed.yaml", words, whole, epochs)
    undisturbed(root / "undisturbed.yaml", whole)
    tell(f"undisturbed: {epochs * STEPS_PER_EPOCH} steps, {time.monotonic() - began:.0f} s")
    while report.kills < kills and time.monotonic() - began < 60 * minutes and not report.differing:
        out = root / f"run{report.runs}"
        write_config(out.with_suffix(".yaml"), words, out, epochs)
        asked = min(per_run, kills - report.kills)
        disturbed(out.with_suffix(".yaml"), out, epochs * STEPS_PER_EPOCH, asked, draw, report)
        report.differing = differences(whole, out)
        report.seconds = time.monotonic() - began
        tell(
            f"{report.kills} kills ({report.while_saving} while saving, {report.while_starting} while starting, "
            f"{report.one_rank} of one rank), {report.torn} torn checkpoints, {report.gone_back} gone back; "
            f"{report.runs} runs {'EQUAL' if not report.differing else 'DIFFERENT in ' + ', '.join(report.differing)}, "
            f"{report.seconds:.0f} s"
        )
        if not report.differing:
            shutil.rmtree(out)
    return report


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests/soak.py", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--per-run", type=int, default=50, help="kills that one run meets before its last step")
    parser.add_argument("--minutes", type=float, default=120, help="begin no further run after so long")
    parser.add_argument("--source", choices=("resident", "ffcv", "dali"), default="resident")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/soak"))
    given = parser.parse_args()
    report = soak(
        given.out.absolute(), source=given.source, kills=given.kills, per_run=given.per_run, minutes=given.minutes,
        seed=given.seed, tell=lambda line: print(line, flush=True),
    )  # fmt: skip
    short = vacuous(report)
    for line in short:
        print(f"soak: {line}")
    (given.out / "report.json").write_text(json.dumps(asdict(report), indent=1) + "\n")
    print(f"wrote {given.out / 'report.json'}")
    return 1 if report.differing or short else 0


if __name__ == "__main__":
    sys.exit(main())
