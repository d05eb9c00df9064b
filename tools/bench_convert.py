"""Compares what our conversions cost with the least that they could, and with FFCV's own writer.

    python -m tools.bench_convert IMAGES [--rounds 5] [--images 2000] [--out DIRECTORY]

IMAGES is a folder of images or a .tar of one. Every turn is taken twice, of few images and of all of them, and only the
difference counts: starting up, and what a conversion tries beforehand, is left out on every side.
"""

import argparse
import importlib.util
import io
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

from PIL import Image
from rich.console import Console

from pipelines.images import BadImage, decoded_size, read_file, scan_folder
from ressl.batch import DataError
from tools.baselines import ffcv_write, folder_files, load_ffcv_writer
from tools.bench_convert_report import Record, markdown, print_report
from tools.bench_data import prepare
from tools.bench_loaders import answer, shuffled
from tools.convert import DiskFull, convert
from tools.estimate import SAMPLES
from tools.loader_arms import ArmFailed, own_cpu_seconds
from tools.machine import machine, machine_cpu_seconds
from tools.output import keep, make_out

PAIRS = {"tar": "ours-header", "decode": "ours-decode", "ffcv": "ours-ffcv"}  # what ours is compared with
ARMS = (*PAIRS, *PAIRS.values())
MAX_SIDE, QUALITY = 400, 90  # of the .beton files
FEW = SAMPLES  # images; at least as many as a conversion tries beforehand, so that these too are left out
AT_ONCE = 16  # files that a decoding worker takes
PATIENCE_S = 900  # FFCV's writer waits for ever where a worker of it fails


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one run of an arm."""

    seconds: float  # by the clock
    sync_s: float  # more, until the disk has it all; 0 where the arm waits for that itself, or writes nothing
    cpu_s: float  # user and system time of all its processes
    bytes: int  # written


# --- the arms, each in a process of its own --------------------------------------------------------------------------


def run(arm: str, images: Path, out: Path, workers: int) -> Cost:
    """Runs the arm on the folder `images`; it writes nothing but `out`, a file or a directory. Raises DataError."""
    work = _work(arm, images, out, workers)
    cpu_before, started = own_cpu_seconds(), time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    for process in multiprocessing.active_children():  # FFCV's, whose time counts when they have ended
        process.join()
    cpu_s = own_cpu_seconds() - cpu_before
    started = time.perf_counter()
    if out.is_file():
        with out.open("rb") as file:
            os.fsync(file.fileno())
    sync_s = time.perf_counter() - started if out.is_file() else 0.0
    files = [path for path in (out, *out.rglob("*")) if path.is_file()]
    return Cost(seconds, sync_s, cpu_s, sum(path.stat().st_size for path in files))


def _work(arm: str, images: Path, out: Path, workers: int) -> Callable[[], object]:
    ours = partial(convert, str(images), out, workers=workers, console=Console(file=io.StringIO()))
    match arm:
        case "tar":
            return partial(subprocess.run, ["tar", "cf", str(out), "-C", str(images), "."], check=True)
        case "decode":
            return partial(decode_all, images, workers)
        case "ffcv":
            return partial(ffcv_write, images, out, max_side=MAX_SIDE, quality=QUALITY, workers=workers)
        case "ours-header":
            return partial(ours, "webdataset", check="header")
        case "ours-decode":
            return partial(ours, "webdataset", check="decode")
        case "ours-ffcv":
            return partial(ours, "ffcv", mode="jpg", max_side=MAX_SIDE, quality=QUALITY)
    raise ValueError(arm)


def decode_all(images: Path, workers: int) -> None:
    """The least that reading images takes: Pillow decodes them in forked processes, and nothing is kept."""
    files = folder_files(images)
    context = multiprocessing.get_context("fork")
    taken = context.Value("q", 0)
    processes = [context.Process(target=_decode_some, args=(files, taken)) for _ in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError("a worker failed")


def _decode_some(files: list[str], taken: "Synchronized[int]") -> None:
    while True:
        with taken.get_lock():
            first = taken.value
            taken.value += AT_ONCE
        if first >= len(files):
            return
        for name in files[first : first + AT_ONCE]:
            with open(name, "rb") as file:  # noqa: PTH123 - the least
                data = file.read()
            with Image.open(io.BytesIO(data)) as image:
                image.load()


def in_child(work: Callable[[], Cost], log: Path, patience: float = PATIENCE_S) -> Cost:
    """What `work` returns in a process and session of its own, which ends with it. Raises ArmFailed and DataError."""
    context = multiprocessing.get_context("fork")  # all libraries are imported
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_tell, args=(work, theirs, log))
    process.start()
    theirs.close()
    try:
        if not ours.poll(patience):
            raise ArmFailed(f"no answer for {patience:,.0f} s; see {log}")
        answer = ours.recv()
    except EOFError:
        raise ArmFailed(f"its process ended; see {log}") from None
    finally:
        assert process.pid is not None
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
        ours.close()
    if isinstance(answer, Exception):
        raise answer
    assert isinstance(answer, Cost)
    return answer


def _tell(work: Callable[[], Cost], connection: Connection, log: Path) -> None:
    os.setsid()
    with log.open("w", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        connection.send(work())
    except (DataError, DiskFull) as error:
        connection.send(error)
    except Exception as error:
        words = " ".join(str(error).split())
        connection.send(ArmFailed(f"{type(error).__name__}: {words[:200]}"))


# --- in the benchmark's process --------------------------------------------------------------------------------------


def missing(arms: tuple[str, ...]) -> dict[str, str]:
    """Arm -> why it cannot run here."""
    found = {}
    if "tar" in arms and shutil.which("tar") is None:
        found["tar"] = "there is no tar"
    if "ffcv" in arms and importlib.util.find_spec("ffcv") is None:
        found["ffcv"] = "ffcv is not installed"
    return found


def copy_images(files: Path, all_images: Path, few_images: Path, count: int) -> tuple[int, int]:
    """Makes folders of `count` and of FEW of the images under `files` that can be read, again and again where they are
    too few: so they are in memory, and none is a link. Returns how many there are, and how many cannot be read.
    Raises DataError."""
    paths, bad = [], 0
    for path in scan_folder(files).paths:
        try:
            decoded_size(read_file(files / path))
            paths.append(path)
        except BadImage:
            bad += 1
    if not paths:
        raise DataError(f"{files}: none of the {bad:,} images can be read")
    step = max(1, len(paths) // FEW)
    for folder, chosen in ((all_images, range(count)), (few_images, range(0, FEW * step, step))):
        for i in chosen:
            source, again = files / paths[i % len(paths)], i // len(paths)
            to = folder / source.relative_to(files).parent / f"{again}-{source.name}"
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, to)
    os.sync()
    return len(paths), bad


def order_of(round_number: int) -> list[str]:
    """Each of ours beside what it is compared with, so that whatever else the machine does falls on both alike: before
    it in one round, after it in the next. The pairs are in another order in each round."""
    pairs = [(theirs, PAIRS[theirs]) for theirs in shuffled(list(PAIRS), round_number)]
    return [arm for pair in pairs for arm in (reversed(pair) if round_number % 2 else pair)]


def take_rounds(
    arms: list[str], place: Path, arguments: argparse.Namespace, left_out: dict[str, str], console: Console
) -> tuple[dict[str, list[dict[str, Cost]]], list[list[str]]]:
    """The costs of each arm with few and with all images, a round each, and the order of each round. An arm that fails
    loses its turns."""
    turns: dict[str, list[dict[str, Cost]]] = {arm: [] for arm in arms}
    orders = []
    for number in range(arguments.rounds):
        began = time.perf_counter()
        orders.append([arm for arm in order_of(number) if arm in turns])
        for arm in orders[-1]:
            try:
                turns[arm].append({part: _turn(arm, place, part, arguments.workers) for part in ("few", "all")})
            except ArmFailed as error:
                left_out[arm] = f"failed in round {number + 1}: {error}"
                del turns[arm]
                console.print(f"left out: {arm}: {error}", markup=False, soft_wrap=True)
        took = time.perf_counter() - began
        left = took * (arguments.rounds - number - 1)
        console.print(f"round {number + 1} of {arguments.rounds}: {took:,.0f} s; about {left:,.0f} s to go")
    return turns, orders


def _turn(arm: str, place: Path, part: str, workers: int) -> Cost:
    out = place / "out"
    os.sync()  # what others wrote
    try:
        return in_child(partial(run, arm, place / part, out, workers), place.parent / f"{arm}.log")
    finally:
        if out.is_dir():
            shutil.rmtree(out)
        out.unlink(missing_ok=True)


def bench(arguments: argparse.Namespace, console: Console) -> Record:
    """Everything that was measured and how, ready for JSON. Raises DataError and DiskFull."""
    left_out = missing(ARMS)
    if "ffcv" not in left_out:
        load_ffcv_writer()  # takes seconds, and would in each turn
    prepared = prepare(arguments.images, arguments.work, arguments.count)
    with tempfile.TemporaryDirectory(dir=prepared.root, prefix="convert-") as directory:
        place = Path(directory)
        console.print(f"copying {arguments.count:,} images, and trying each")
        try:
            distinct, bad = copy_images(prepared.root / "files", place / "all", place / "few", arguments.count)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise DataError(f"{error.filename or place}: {reason}; is there room in {arguments.work}?") from None
        size = sum(path.stat().st_size for path in (place / "all").rglob("*") if path.is_file())
        before, started = machine_cpu_seconds(), time.perf_counter()
        arms = [arm for arm in ARMS if arm not in left_out]
        turns, orders = take_rounds(arms, place, arguments, left_out, console)
        ours = sum(cost.cpu_s for all_turns in turns.values() for turn in all_turns for cost in turn.values())
        others = max(0.0, machine_cpu_seconds() - before - ours)
        others_share = others / (time.perf_counter() - started) / (os.cpu_count() or 1)
    return {
        "date": str(date.today()),
        "machine": machine(),
        "options": {"rounds": arguments.rounds, "workers": arguments.workers},
        "data": {"images": arguments.count, "few": FEW, "distinct": distinct, "bad": bad, "bytes": size},
        "others_share": others_share,
        "arms": {
            arm: [{part: asdict(cost) for part, cost in turn.items()} for turn in all_turns]
            for arm, all_turns in turns.items()
        },
        "order": orders,
        "left_out": left_out,
    }


def write(record: Record, out: Path) -> list[Path]:
    """convert-cpu-<date>.md and .json in `out`."""
    return keep(record, markdown(record), out / f"convert-cpu-{record['date']}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.bench_convert", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("images", type=Path, metavar="IMAGES", help="a folder of images, or a .tar of one")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="for the tables (docs/results)")
    parser.add_argument("--work", type=Path, default=Path("runs/bench-convert"), help="for copies (runs/bench-convert)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each arm, an odd number (5)")
    parser.add_argument("--images", type=int, default=2000, dest="count", help="images of a turn (2000)")
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes of each arm (all cores)"
    )
    return parser.parse_args(argv)


def check(arguments: argparse.Namespace) -> None:
    """Raises DataError before anything long is begun."""
    if arguments.rounds < 1 or arguments.rounds % 2 == 0:
        raise DataError(f"--rounds {arguments.rounds}: expected an odd number, so that the median is one of them")
    if arguments.count < 2 * FEW:
        raise DataError(f"--images {arguments.count}: expected at least {2 * FEW}, as {FEW} are not counted")
    if arguments.workers < 1:
        raise DataError(f"--workers {arguments.workers}: expected at least 1")
    make_out(arguments.out)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)

    def measure() -> tuple[Record, list[Path]]:
        check(arguments)
        record = bench(arguments, Console(stderr=True))
        return record, write(record, arguments.out)

    return answer(measure, print_report)


if __name__ == "__main__":
    sys.exit(main())
