"""What `convert` was asked for: checked, and whether its destination may be written."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

from pipelines.manifest import Manifest, SplitRecord, read_manifest
from pipelines.shards import INDEX
from ressl.batch import DataError
from tools.encode import Check, Format, Mode, Options, read_options
from tools.image_sets import ImageSet
from tools.output import expand, refuse_foreign

SUFFIX = {"ffcv": ".beton", "tensor": ".safetensors", "webdataset": ""}  # webdataset: a directory


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for, checked."""

    src: str
    dst: Path  # where the data goes: links are resolved
    labels: Path | None
    options: Options
    max_skipped: float
    workers: int
    overwrite: bool
    restart: bool


def check_request(request: Request) -> None:
    """Raises DataError with all that is impossible in it."""
    options, share = request.options, request.max_skipped
    problems = [
        (options.to not in get_args(Format), f"--to {options.to}: not one of {', '.join(get_args(Format))}"),
        (options.mode not in get_args(Mode), f"--mode {options.mode}: not one of {', '.join(get_args(Mode))}"),
        (options.check not in get_args(Check), f"--check {options.check}: not one of {', '.join(get_args(Check))}"),
        (not 1 <= options.quality <= 100, f"--quality {options.quality}: expected a JPEG quality from 1 to 100"),
        (not 0 <= options.jpg_share <= 1, f"--jpg-share {options.jpg_share}: expected a share from 0 to 1"),
        (
            options.max_side is not None and options.max_side < 8,
            f"--max-side {options.max_side}: expected at least 8 pixels",
        ),
        (options.shard_mb < 1, f"--shard-mb {options.shard_mb}: expected at least 1 MB"),
        (not 0 <= share <= 1, f"--max-skipped {share}: expected a share from 0 to 1"),
        (request.workers < 1, f"--workers {request.workers}: expected at least one, or 0 for all cores"),
    ]
    wrong = [message for is_wrong, message in problems if is_wrong]
    idle = set(asdict(Options(options.to))) - set(read_options(options))
    chosen = f"--to {options.to}" + f" --mode {options.mode}" * (options.to == "ffcv")
    wrong += [
        f"--{name.replace('_', '-')} {value}: changes nothing with {chosen}; leave it out"
        for name, value in asdict(options).items()
        if not wrong and name in idle and value != getattr(Options(options.to), name)
    ]
    if wrong:
        raise DataError("; ".join(wrong))
    folder = Path(os.path.realpath(expand(Path(request.src))))
    if folder.is_dir() and folder in (request.dst, *request.dst.parents):
        raise DataError(
            f"{request.dst} is, or lies inside, {request.src} and would be taken for a class of images: choose another "
            "place"
        )


def choose_splits(
    src: str, sets: dict[str, Callable[[], ImageSet]], split: str | None
) -> dict[str, tuple[str, Callable[[], ImageSet]]]:
    """Name in the output -> name in the source, and what loads it."""
    if split is None:
        return {name: (name, load) for name, load in sets.items()}
    if len(sets) > 1 and split not in sets:
        raise DataError(f"{src}: has no split {split!r}, only {', '.join(sets)}")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", split):
        raise DataError(f"--split {split!r}: use letters, digits, - and _ only")
    theirs = split if split in sets else next(iter(sets))
    return {split: (theirs, sets[theirs])}


def check_place(dst: Path) -> None:
    """Raises DataError where `dst` can be no directory."""
    if dst.exists() and not dst.is_dir():
        raise DataError(f"{dst}: not a directory; choose another place")
    if not dst.name:
        raise DataError(f"{dst}: cannot be written: it is no place for data; choose another place")


def check_destination(request: Request, splits: Sequence[str]) -> tuple[dict[str, SplitRecord], list[str]]:
    """The records of the other splits in `dst`, and the files that the manifest will not list any more but that stay
    there: the data of the splits in other formats. They may still be in use, so nothing removes them."""
    dst, to = request.dst, request.options.to
    files = {split: split + SUFFIX[to] for split in splits}
    for path in (dst / name for name in files.values()):
        if path.is_symlink():
            raise DataError(f"{path}: is a link, which would be replaced; remove it or choose another place")
        if path.exists() and not (path.is_dir() if to == "webdataset" else path.is_file()):
            kind = "directory" if to == "webdataset" else "regular file"
            raise DataError(f"{path}: exists already and is no {kind}, so it is not replaced; choose another place")
        if path.exists() and not request.overwrite:
            raise DataError(f"{path}: exists already; choose another place or use --overwrite")
        if path.is_dir():
            if not (path / INDEX).is_file():
                raise DataError(f"{path}: exists already and holds no {INDEX}, so it is not replaced; choose another")
            refuse_foreign(path)
    records = (read_manifest(dst) or Manifest()).splits
    kept = {name: record for name, record in records.items() if (dst / record.file).exists()}
    others = {name: kept[name].file for name in files if name in kept and kept[name].file != files[name]}
    for name, other in others.items():
        if not request.overwrite:
            raise DataError(f"{dst}: its {name} is {other} already; choose another place or use --overwrite")
    return {name: record for name, record in kept.items() if name not in files}, list(others.values())
