"""Turns images into the files that training reads: `.beton` for FFCV, one tensor file that fits on the device, or
WebDataset shards of the original files for DALI. What is interrupted goes on where it was."""

import errno
import hashlib
import os
import shlex
import time
from contextlib import closing
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import features
from rich.console import Console

from pipelines.manifest import NAME, Manifest, SplitRecord, manifest_text, read_manifest
from pipelines.shards import INDEX
from ressl.batch import DataError
from tools.conversion import SplitWork, finish, go_back, open_layout, open_split, still_true, write_all
from tools.convert_report import conclude, introduce, name_some, shown
from tools.convert_request import (
    SUFFIX,
    Request,
    check_destination,
    check_place,
    check_request,
    choose_splits,
)
from tools.crew import Crew, Measure, Measured
from tools.encode import Check, Format, Mode, Options, changes_of, printable, read_options
from tools.estimate import Estimate, Sample, estimate, fits, free_bytes, show_estimates, size_text, spread
from tools.image_sets import TORCHVISION, TORCHVISION_ROOT, ImageSet, detect
from tools.journal import PART, Past, WorkDirectory
from tools.output import expand

AT_ONCE = 8  # images that a worker tries for the estimate before it tells
CHUNK_BYTES = 16 << 20  # of the images of a chunk, encoded; a worker holds up to three


class DiskFull(RuntimeError):
    """No space for the output. The message names the place and what is free there."""


def convert(
    src: str,
    dst: Path,
    to: Format,
    *,
    mode: Mode = "auto",
    jpg_share: float = 0.5,
    quality: int = 90,
    max_side: int | None = None,
    exif_rotate: bool = False,
    check: Check = "decode",
    shard_mb: int = 1000,
    labels: Path | None = None,
    split: str | None = None,
    max_skipped: float = 0.01,
    shuffle: bool = False,
    workers: int = 0,
    overwrite: bool = False,
    restart: bool = False,
    console: Console | None = None,
) -> Manifest:
    """Writes DST/<split>.beton, DST/<split>.safetensors or DST/<split>/ for each split of `src`, and DST/manifest.json.

    `src` is whatever `tools.image_sets.detect` understands; `labels` a list of labels for its images. `split` picks one
    of several splits, or names the output of a source that has none (default: train). `max_side` in pixels;
    `max_skipped` is the share of a split's images that may be unreadable. `shuffle` writes them in an order that mixes
    the classes, always the same one. An image's index is its place in the source's list, bad ones counted, wherever it
    is written.

    Until all is whole it works in DST/convert.part; then all files get their names together. However it is interrupted,
    the same call goes on where it was and leaves the same bytes; another call is refused unless `restart` discards what
    is there. Raises DataError, DiskFull, and WorkerDied.
    """
    options = Options(to, mode, jpg_share, quality, max_side, exif_rotate, check, shuffle, shard_mb)
    place = Path(os.path.realpath(expand(dst)))
    count = workers or len(os.sched_getaffinity(0))
    request = Request(src, place, labels, options, max_skipped, count, overwrite, restart)
    console = console or Console(stderr=True)
    check_request(request)
    check_place(place)
    origin = detect(src, labels)
    chosen = choose_splits(src, origin.sets, split)
    _say(console, f"source: {origin.description}")
    if not (place / PART).exists():  # else files may be there under their names that belong to what was interrupted
        check_destination(request, list(chosen))
    sets = {name: load() for name, (_, load) in chosen.items()}
    sources = {name: _source_of(request, origin.description, theirs) for name, (theirs, _) in chosen.items()}
    try:
        return _convert(request, sets, sources, console)
    except OSError as error:
        raise _output_error(place, error) from None


def overlap(one: Path, other: Path) -> bool:
    """Whether one of two directories lies in the other, or they are the same."""
    a, b = one.resolve(), other.resolve()
    return a == b or a in b.parents or b in a.parents


# --- the conversion --------------------------------------------------------------------------------------------------


def _convert(
    request: Request, sets: dict[str, ImageSet], sources: dict[str, dict[str, Any]], console: Console
) -> Manifest:
    header = _header(request.options, sets)
    with closing(WorkDirectory(request.dst)) as work:
        past = work.read()
        if past.sealed is None:
            return _write(work, past, header, request, sets, sources, console)
        work.publish(past.sealed)  # it was killed while files got their names
    _say(console, f"finished what was interrupted in {request.dst}")
    if past.header is not None and not _differences(past.header, header):
        return read_manifest(request.dst) or Manifest()
    with closing(WorkDirectory(request.dst)) as work:
        return _write(work, Past(), header, request, sets, sources, console)


def _write(
    work: WorkDirectory,
    past: Past,
    header: dict[str, Any],
    request: Request,
    sets: dict[str, ImageSet],
    sources: dict[str, dict[str, Any]],
    console: Console,
) -> Manifest:
    """Goes on after the past, or begins, up to whole files under their names."""
    options, going_on = request.options, bool(past.chunks) and not request.restart
    try:
        others, left = check_destination(request, list(sets))
        if going_on and (differences := _differences(past.header or {}, header)):
            raise DataError(
                f"{work.path} holds an interrupted conversion of something else: {'; '.join(differences)}; repeat that "
                "command to go on with it, or use --restart to discard it"
            )
        splits = [open_split(name, one, work.path / (name + SUFFIX[options.to]), options) for name, one in sets.items()]
        if not going_on:
            work.clear()
        for split in splits:
            _take_up(split, past, work) if going_on else go_back(split, [])
            introduce(split, console)
    except BaseException:
        if not past.chunks:
            work.discard()
        raise
    try:
        before, begin = sum(split.done for split in splits), time.monotonic()
        with Crew(sets, options, min(request.workers, sum(split.count for split in splits))) as crew:
            _foresee(splits, crew, request, console)
            if not going_on:
                work.begin(header | {"chunks": {split.name: split.chunk for split in splits}})
            with shown(splits, request.max_skipped, console) as telling:
                begin = time.monotonic()
                write_all(splits, crew, work, telling)
        finished = {split.name: _finish(split, options, sources[split.name]) for split in splits}
        records = {name: record for name, (record, _) in finished.items()}
        manifest = Manifest(others | records)
        (work.path / NAME).write_text(manifest_text(manifest), encoding="ascii")
        work.publish(work.seal([*(path.name for _, files in finished.values() for path in files), NAME]))
    except BaseException:
        _leave(work, console)
        raise
    conclude(records, sum(split.done for split in splits) - before, time.monotonic() - begin, console)
    for name in left:
        _say(console, f"{name} stays in {request.dst}, but {NAME} lists it no more; remove it if nothing reads it")
    command = f"python launch.py verify {shlex.quote(str(request.dst))}"
    _say(console, f"wrote {request.dst}; prove it whole with: {command}")
    return manifest


def _take_up(split: SplitWork, past: Past, work: WorkDirectory) -> None:
    split.chunk = (past.header or {})["chunks"][split.name]
    noted = past.chunks.get(split.name, [])
    true = still_true(split, noted)
    if len(true) < len(noted):
        work.forget(split.name, len(true))
    go_back(split, true)


def _say(console: Console, line: str) -> None:
    console.print(printable(line), markup=False, highlight=False, soft_wrap=True)


def _leave(work: WorkDirectory, console: Console) -> None:
    """Says what is kept of a conversion that was interrupted; where that is nothing, nothing is left."""
    past = work.read()
    kept = sum(len(chunk.rows) for chunks in past.chunks.values() for chunk in chunks)
    if kept:
        _say(console, f"{kept:,} images are kept in {work.path}; the same command goes on after them")
    elif past.sealed is None:
        work.discard()


def _source_of(request: Request, description: str, theirs: str) -> dict[str, Any]:
    """What the manifest says of where the images came from."""
    if request.src.startswith(TORCHVISION):
        name, _, root = request.src.removeprefix(TORCHVISION).partition(":")
        place = f"{TORCHVISION}{name}:{expand(Path(root or TORCHVISION_ROOT)).absolute()}"
    else:
        place = str(expand(Path(request.src)).absolute())
    return {
        "description": printable(description),
        "place": printable(place),
        "labels": None if request.labels is None else printable(str(expand(request.labels).absolute())),
        "split": theirs,
    }


def _header(options: Options, sets: dict[str, ImageSet]) -> dict[str, Any]:
    """What has to be the same for a conversion to go on, and to give the same bytes."""
    software = {
        "Pillow": PIL.__version__,
        "its JPEG library": features.version("libjpeg_turbo") or "",
        "torch": torch.__version__,
        "torch's instruction set": torch.backends.cpu.get_cpu_capability(),
    }
    splits = {
        name: {"images": len(images.labels), "fingerprint": _fingerprint(images)} for name, images in sets.items()
    }
    return {"options": read_options(options), "software": software, "splits": splits}


def _fingerprint(images: ImageSet) -> str:
    digest = hashlib.sha256(images.identity.encode())
    digest.update(images.labels.tobytes())
    for name in images.classes:
        digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
    for i in range(len(images.labels)):
        digest.update(images.name(i).encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()


def _differences(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """In words, one for each thing that is not as it was."""
    options = {
        name: [one["options"].get(name, "of no use") for one in (was, now)] for name in was["options"] | now["options"]
    }
    found = [f"--{name.replace('_', '-')} was {old}, is {new}" for name, (old, new) in options.items() if old != new]
    found += [
        f"{key} was {was['software'].get(key)}, is {value}"
        for key, value in now["software"].items()
        if was["software"].get(key) != value
    ]
    if list(was["splits"]) != list(now["splits"]):
        return [*found, f"its splits were {', '.join(was['splits'])}, are {', '.join(now['splits'])}"]
    for name, split in now["splits"].items():
        before = was["splits"][name]
        if before["images"] != split["images"]:
            found.append(f"{name} had {before['images']:,} images, has {split['images']:,}")
        elif before != split:
            found.append(f"the names, the labels or the archives of the source's {name} have changed")
    return found


def _foresee(splits: list[SplitWork], crew: Crew, request: Request, console: Console) -> None:
    """Tries some images, shows what is to be expected, and sees to it that no chunk of theirs is too large for memory.
    Raises DiskFull where the output cannot fit."""
    expected: dict[str, Estimate] = {}
    cores = min(len(crew.workers.processes), len(os.sched_getaffinity(0)))
    for split in splits:
        rest = split.order[split.done :]
        if len(rest):
            samples, layout = _try(split, rest, crew, cores, console), open_layout(split.images, request.options)
            one = estimate(samples, len(split.order), split.done, layout, cores)
            expected[split.name] = one
            if not split.chunks:
                split.chunk = max(1, min(split.chunk, int(CHUNK_BYTES / max(one.mean, 1))))
    if not expected:
        return
    free = free_bytes(request.dst)
    show_estimates(expected, free, cores, console)
    if not fits(list(expected.values()), free):
        needed = sum(one.stored for one in expected.values())
        raise DiskFull(
            f"{request.dst}: the output needs about {size_text(needed)}{' more' * any(s.committed for s in splits)}, "
            f"{size_text(free)} are free there; free some space, or store less: --max-side, --quality"
        )


def _try(split: SplitWork, rest: np.ndarray, crew: Crew, cores: int, console: Console) -> list[Sample]:
    """Images of what is left, evenly spread, encoded by as many workers as there are cores."""
    indices = spread(rest, run=AT_ONCE if split.images.in_order else 1)
    tasks = [indices[i : i + AT_ONCE] for i in range(0, len(indices), AT_ONCE)]
    samples: list[Sample] = []
    waiting = iter(tasks)
    for worker, task in zip(range(cores), waiting, strict=False):
        crew.send(worker, Measure(split.name, task))
    received = 0
    while received < len(tasks):
        for worker, news in crew.receive(timeout=1.0):
            assert isinstance(news, Measured)
            samples += news.samples
            received += 1
            for task in islice(waiting, 1):
                crew.send(worker, Measure(split.name, task))
        if standstill := crew.standstill():
            _say(console, standstill)
    return samples


def _finish(split: SplitWork, options: Options, source: dict[str, Any]) -> tuple[SplitRecord, list[Path]]:
    """Makes a split's outputs whole. Gives its record, and the outputs."""
    skipped = split.skipped
    if len(skipped) == len(split.order):
        raise DataError(f"{split.name}: none of the {len(skipped):,} images can be read: {name_some(skipped)}")
    rows, outputs = finish(split)
    index = outputs[0] / INDEX if outputs[0].is_dir() else outputs[-1]
    files = list(outputs[0].iterdir()) if outputs[0].is_dir() else outputs[:1]
    record = SplitRecord(
        file=outputs[0].name,
        count=len(rows),
        classes=tuple(map(printable, split.images.classes)),
        skipped=tuple({"index": one.index, "name": one.name, "reason": one.reason} for one in skipped),
        changes=changes_of(rows),
        bytes=sum(path.stat().st_size for path in files),
        index=str(index.relative_to(outputs[0].parent)),
        index_sha256=hashlib.sha256(index.read_bytes()).hexdigest(),
        options=asdict(options),
        source=source | {"notes": [printable(note) for note in split.images.notes]},
    )
    return record, outputs


def _output_error(dst: Path, error: OSError) -> Exception:
    reason = (error.strerror or str(error)).lower()
    if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
        return DataError(f"{error.filename or dst}: cannot be written: {reason}")
    return DiskFull(
        f"{dst}: no space for the output ({reason}; {size_text(free_bytes(dst))} free there); make room, and the same "
        "command goes on where it stopped"
    )
