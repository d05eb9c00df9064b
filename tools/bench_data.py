"""The images of the loader benchmark, from a folder or a .tar of one, and the files that are converted from them."""

import hashlib
import os
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from rich.console import Console

from pipelines.images import IMAGE_SUFFIXES, scan_folder
from ressl.batch import DataError
from tools.convert import convert

Data = Literal["files", "jpg500", "jpg400", "raw400", "tensor400"]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A directory of the work directory that belongs to these images: all of their names, sizes and dates are in its
    name."""

    root: Path
    images: int
    bytes: int  # of the image files
    of: int  # images of the source


def prepare(source: Path, work: Path, limit: int) -> Prepared:
    """WORK/<name>-<hash>/files/CLASS/NAME for up to `limit` images from all over `source`, or its train/ if it has one.

    A folder's files are linked, a tar's unpacked. What is there from last time is used again. Raises DataError.
    """
    try:
        work.mkdir(parents=True, exist_ok=True)
        if source.is_file():
            return _unpack(source, work, limit)
        return _link(source / "train" if (source / "train").is_dir() else source, work, limit)
    except tarfile.TarError:
        raise DataError(f"{source}: not a tar file, or a damaged one: give a .tar of images or a folder") from None
    except OSError as error:
        name = error.filename or source
        raise DataError(f"{name}: {(error.strerror or str(error)).lower()}; is there room in {work}?") from None


def converted(prepared: Prepared, data: Data, workers: int, console: Console) -> Path:
    """The files themselves, or what `launch.py convert` makes of them. Raises DataError and DiskFull."""
    files = prepared.root / "files"
    match data:
        case "files":
            return files
        case "jpg500" | "jpg400":
            return _convert(files, prepared.root / data, "ffcv", "jpg", int(data[3:]), workers, console)
        case "raw400":
            return _convert(files, prepared.root / data, "ffcv", "raw", 400, workers, console)
        case "tensor400":
            return _convert(files, prepared.root / data, "tensor", "auto", 400, workers, console)


def _convert(
    files: Path,
    to: Path,
    kind: Literal["ffcv", "tensor"],
    mode: Literal["jpg", "raw", "auto"],
    max_side: int,
    workers: int,
    console: Console,
) -> Path:
    path = to / ("train.beton" if kind == "ffcv" else "train.safetensors")
    if not path.exists():
        convert(str(files), to, kind, mode=mode, max_side=max_side, split="train", workers=workers, console=console)
    return path


def _link(folder: Path, work: Path, limit: int) -> Prepared:
    paths = scan_folder(folder).paths
    chosen = evenly(list(paths), limit)
    status = [(folder / path).stat() for path in chosen]
    facts = [f"{path} {s.st_size} {s.st_mtime_ns}" for path, s in zip(chosen, status, strict=True)]

    def fill(files: Path) -> None:
        for path in chosen:
            (files / path).parent.mkdir(parents=True, exist_ok=True)
            (files / path).symlink_to((folder / path).resolve())

    name = folder.parent.name if folder.name == "train" else folder.name
    root = _once(work, name, [str(folder.resolve()), *facts], fill)
    return Prepared(root, len(chosen), sum(s.st_size for s in status), len(paths))


def _unpack(tar: Path, work: Path, limit: int) -> Prepared:
    with tarfile.open(tar) as archive:
        members = {str(PurePosixPath(m.name)): m for m in archive if m.isfile() and _is_image(m.name)}
        inside = [name for name in members if name.startswith("train/")]
        names = sorted(inside or members)
        if not names:
            raise DataError(f"{tar}: no images found in it (looked for {' '.join(IMAGE_SUFFIXES)})")
        chosen = evenly(names, limit)

        def fill(files: Path) -> None:
            for name in sorted(chosen, key=lambda name: members[name].offset):
                member = members[name].replace(name=name.removeprefix("train/"), deep=False)
                archive.extract(member, files, filter="data")

        status = tar.stat()
        root = _once(
            work, tar.stem, [str(tar.resolve()), str(status.st_size), str(status.st_mtime_ns), str(limit)], fill
        )
        return Prepared(root, len(chosen), sum(members[name].size for name in chosen), len(names))


def evenly(items: list[str], limit: int) -> list[str]:
    """`limit` of the items from all over the list, or all where there are fewer."""
    count = min(limit, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def _is_image(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() in IMAGE_SUFFIXES and not any(
        part.startswith(".") and part != "." for part in path.parts
    )


def _once(work: Path, name: str, facts: list[str], fill: Callable[[Path], None]) -> Path:
    """A directory for these facts, whose files/ `fill` has filled: whole, or not there."""
    digest = hashlib.sha256("\0".join(facts).encode("utf-8", "surrogateescape")).hexdigest()
    root = work / f"{name}-{digest[:12]}"
    if (root / "files").is_dir():
        return root
    part = work / f"{root.name}.part-{os.getpid()}"
    try:
        (part / "files").mkdir(parents=True)
        fill(part / "files")
        part.rename(root)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return root
