"""The arms of the loader benchmark: each a process of its own that passes epochs when asked, and tells what they cost.

An arm's CPU time is that of all processes of its session: its own threads, and the workers that it started.
"""

import multiprocessing
import os
import resource
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Literal

import torch

from pipelines import build_source, build_stream
from pipelines.frames import Frames
from pipelines.loader import ViewStream
from ressl.batch import Batch, DataError
from ressl.config import Config, DaliSource, FfcvSource, FolderSource, ResidentSource, Source
from ressl.config_file import load_config
from tools.baselines import Pass, dali_cpu, ffcv_per_view, torchvision_pil
from tools.bench_data import Data

RECIPE = Path(__file__).resolve().parents[1] / "configs" / "imagenet_resnet50_200ep_5crops_paper.yaml"
GRACE_S = 20  # to end by themselves
PATIENCE_S = 900  # an arm that says nothing for so long is given up
TICKS = os.sysconf("SC_CLK_TCK")  # a second
Kind = Literal["torchvision", "ffcv", "dali", "frames", "views", "whole"]


@dataclass(frozen=True, slots=True)
class Way:
    """A way to feed views to a trainer. frames: our loader up to the frames on the device; views: our views alone, cut
    from frames that are held; whole: both. The others are baselines."""

    name: str
    label: str
    kind: Kind
    data: Data
    source: Literal["folder", "ffcv", "dali", "resident"] | None = None
    needs: str | None = None  # a package that may be missing
    views: tuple[int, ...] = (2, 6)  # how many of them: one arm each


WAYS = (
    Way("torchvision", "torchvision's PIL transforms", "torchvision", "files", views=(1, 2, 6)),
    Way("dali-cpu", "DALI on the CPU, decodes once", "dali", "files", needs="nvidia.dali", views=(1, 2, 6)),
    Way("ffcv-per-view", "FFCV, decodes for each view; q90, 500 px", "ffcv", "jpg500", needs="ffcv", views=(1, 2, 6)),
    Way("ours-folder", "ours: image files", "frames", "files", "folder"),
    Way("ours-dali", "ours: image files by DALI", "frames", "files", "dali", "nvidia.dali"),
    Way("ours-ffcv500", "ours: FFCV file, q90, 500 px", "frames", "jpg500", "ffcv", "ffcv"),
    Way("ours-ffcv400", "ours: FFCV file, q90, 400 px", "frames", "jpg400", "ffcv", "ffcv"),
    Way("ours-raw400", "ours: FFCV file, raw, 400 px", "frames", "raw400", "ffcv", "ffcv"),
    Way("ours-resident", "ours: resident, RGB, 400 px", "frames", "tensor400", "resident"),
    Way("ours-views", "ours: the views alone, cut from 400 px", "views", "tensor400", "resident"),
    Way("ours-whole", "ours: FFCV file, q90, 400 px, and the views", "whole", "jpg400", "ffcv", "ffcv"),
)


@dataclass(frozen=True, slots=True)
class Arm:
    way: Way
    views: int

    @property
    def name(self) -> str:
        return f"{self.way.name}-{self.views}"


@dataclass(frozen=True, slots=True)
class Job:
    """What is the same for all arms."""

    batch: int
    images: int  # of an epoch, at least, where the library gains from long ones
    workers: int
    device: str
    seconds: float  # an arm's turn: as many whole epochs as it takes to fill them


@dataclass(frozen=True, slots=True)
class Turn:
    """What an arm did when it was its turn."""

    images: int
    epochs: int
    wall_s: float
    cpu_s: float


@dataclass(frozen=True, slots=True)
class Cpu:
    """Seconds of CPU time up to now."""

    own: float
    others: float


class ArmFailed(RuntimeError):
    """An arm ended or fell silent. The message is the reason."""


def all_arms() -> list[Arm]:
    return [Arm(way, views) for way in WAYS for views in way.views]


# --- in the arm's process --------------------------------------------------------------------------------------------


def build(arm: Arm, path: Path, job: Job) -> Pass:
    """What the arm does, on the data at `path`."""
    cfg = recipe(_source(arm, path, job.workers), views=arm.views, batch=job.batch)
    views = [cfg.views.weak, *cfg.views.strong][: arm.views]
    mean, std, batch, workers = cfg.data.mean, cfg.data.std, job.batch, job.workers
    device = torch.device(job.device)
    match arm.way.kind:
        case "torchvision":
            return torchvision_pil(path, views, mean=mean, std=std, batch=batch, workers=workers)
        case "ffcv":
            return ffcv_per_view(path, views, batch=batch, workers=workers, images=job.images)
        case "dali":
            return dali_cpu(path, views, mean=mean, std=std, batch=batch, workers=workers, images=job.images)
        case "frames":
            return _counted(open_stream(cfg, device).frames, device)
        case "views":  # its epoch is one batch
            stream = open_stream(cfg, device)
            held = next(stream.frames(0))
            return _counted(lambda epoch: [stream.cut(held, epoch)], device)
        case "whole":
            return _counted(open_stream(cfg, device).epoch, device)


def recipe(source: Source, *, views: int, batch: int, impl: Literal["auto", "torch", "triton"] = "auto") -> Config:
    """The authors' five-crop recipe for `source`, with `views` of its views: the weak one and the first strong ones."""
    cfg = load_config(RECIPE)
    strong = cfg.views.strong[: max(1, views - 1)]
    return cfg.model_copy(
        update={
            "data": cfg.data.model_copy(update={"source": source}),
            "views": cfg.views.model_copy(update={"strong": strong, "impl": impl}),
            "optim": cfg.optim.model_copy(update={"batch_size": batch}),
        }
    )


def _source(arm: Arm, path: Path, workers: int) -> Source:
    match arm.way.source:
        case "ffcv":
            return FfcvSource(name="ffcv", train=path, workers=workers)
        case "dali":
            return DaliSource(name="dali", train=path, workers=workers)
        case "resident":
            return ResidentSource(name="resident", train=path, workers=workers)
        case "folder" | None:
            return FolderSource(name="folder", train=path, workers=workers)


def open_stream(cfg: Config, device: torch.device) -> ViewStream:
    source = build_source(cfg.data, "train", device)
    assert source is not None
    return build_stream(cfg, source, device=device, dtype=view_dtype(device))


def view_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _counted(batches: Callable[[int], Iterable[Frames | Batch]], device: torch.device) -> Pass:
    """Passes all that an epoch has, and counts its images."""

    def run(epoch: int) -> int:
        images = sum(len(batch.index) for batch in batches(epoch))
        wait(device)
        return images

    return run


def wait(device: torch.device) -> None:
    """For the work of the current stream. `torch.cuda.synchronize` would spin, which is CPU time."""
    if device.type == "cuda":
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(device))
        event.synchronize()


def serve(connection: Connection, arm: Arm, path: Path, job: Job, log: Path) -> None:
    """The process: one epoch to warm up, then a turn for each epoch number that comes, until None comes."""
    os.setsid()
    with log.open("w", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        torch.set_num_threads(job.workers)
        run = build(arm, path, job)
        run(0)
        before = read_cpu()
        connection.send("ready")
        while (epoch := connection.recv()) is not None:
            done, before = take_turn(run, epoch, job.seconds, before)
            connection.send(done)
    except (EOFError, BrokenPipeError):  # the benchmark has ended
        return
    except (DataError, ImportError) as error:
        connection.send(ArmFailed(str(error)))
    except Exception as error:
        traceback.print_exc()
        words = " ".join(str(error).split())
        connection.send(ArmFailed(f"{type(error).__name__}: {words[:200]} (all of it in {log})"))


def take_turn(run: Pass, epoch: int, seconds: float, before: Cpu) -> tuple[Turn, Cpu]:
    """Counts the CPU time since `before`, the end of the turn before this one, and returns the new end: what a library
    prepares ahead in between is part of the turn that gets it."""
    images = epochs = 0
    started = time.perf_counter()
    while epochs == 0 or time.perf_counter() - started < seconds:
        images += run(epoch + epochs)
        epochs += 1
    wall = time.perf_counter() - started
    own = own_cpu_seconds()
    after = read_cpu()
    return Turn(images, epochs, wall, own - before.own + after.others - before.others), after


def read_cpu() -> Cpu:
    others = others_cpu_seconds()  # which costs some itself
    return Cpu(others=others, own=own_cpu_seconds())


def own_cpu_seconds() -> float:
    """User and system time of this process, all its threads, and the children that it has seen end."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime


def others_cpu_seconds() -> float:
    """The same of the other living processes of this session."""
    return sum(_cpu_seconds(pid, fields) for pid, fields in _session() if pid != os.getpid())


def _session() -> Iterator[tuple[int, list[str]]]:
    """Pids of this session with the fields of /proc/PID/stat from the third on (man 5 proc)."""
    session = str(os.getsid(0))
    for entry in os.scandir("/proc"):
        with suppress(OSError):  # it has ended meanwhile
            if entry.name.isdigit():
                fields = Path(entry.path, "stat").read_text().rpartition(")")[2].split()
                if fields[3] == session:
                    yield int(entry.name), fields


def _cpu_seconds(pid: int, fields: list[str]) -> float:
    """Of its threads by its clock, which is exact; of the children that it has seen end by ticks."""
    user, system, ended_user, ended_system = (int(ticks) / TICKS for ticks in fields[11:15])
    try:
        alive = time.clock_gettime(~pid << 3 | 2)  # the clock of a process: clock_getcpuclockid of the C library
    except OSError:
        alive = user + system
    return alive + ended_user + ended_system


# --- in the benchmark's process --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Running:
    """An arm that has warmed up and waits for its turns."""

    arm: Arm
    process: BaseProcess
    connection: Connection


def start(arm: Arm, path: Path, job: Job, log: Path, patience: float = PATIENCE_S) -> Running:
    """Returns when the arm has warmed up. Raises ArmFailed."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, arm, path, job, log), name=arm.name)
    process.start()
    theirs.close()
    running = Running(arm, process, ours)
    try:
        _answer(running, patience)
    except BaseException:
        stop([running])
        raise
    return running


def turn(running: Running, epoch: int, patience: float = PATIENCE_S) -> Turn:
    """Raises ArmFailed."""
    try:
        running.connection.send(epoch)
    except OSError:
        raise ArmFailed("its process has ended") from None
    answer = _answer(running, patience)
    assert isinstance(answer, Turn)
    return answer


def _answer(running: Running, patience: float) -> Turn | str:
    if not running.connection.poll(patience):
        raise ArmFailed(f"no answer for {patience:,.0f} s")
    try:
        answer = running.connection.recv()
    except (EOFError, ConnectionResetError):
        running.process.join(5)
        raise ArmFailed(f"its process ended with exit code {running.process.exitcode}") from None
    if isinstance(answer, ArmFailed):
        raise answer
    assert isinstance(answer, Turn | str)
    return answer


def stop(running: Iterable[Running]) -> None:
    """Ends the arms and whatever they started, by force after a while: an arm's session is its process group."""
    running = list(running)
    for one in running:
        with suppress(OSError):
            one.connection.send(None)
        one.connection.close()
    deadline = time.monotonic() + GRACE_S
    for one in running:
        one.process.join(max(0.0, deadline - time.monotonic()))
        assert one.process.pid is not None
        with suppress(ProcessLookupError):
            os.killpg(one.process.pid, signal.SIGKILL)
        one.process.kill()
        one.process.join()
