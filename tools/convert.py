"""Turns images into the files that training reads: `.beton` for FFCV, one tensor file that fits on the device, or
WebDataset shards of the original files for DALI."""

import errno
import hashlib
import io
import os
import re
import shutil
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, Literal, cast

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from pipelines.beton import JPG, RAW, open_beton
from pipelines.headers import read_regular
from pipelines.images import BadImage, decode_image, fit_max_side
from pipelines.manifest import NAME, Manifest, SplitRecord, manifest_text, read_manifest
from pipelines.sampler import permutation
from pipelines.shards import INDEX, read_index
from pipelines.tensor_file import read_tensor_file
from ressl.batch import DataError
from tools.beton_writer import EncodedSample, write_beton_to
from tools.image_sets import ImageSet, detect
from tools.output import part_directory, part_file, publish
from tools.shard_writer import Member, write_shards
from tools.tensor_writer import write_tensors_to

Format = Literal["ffcv", "tensor", "webdataset"]
SUFFIX = {"ffcv": ".beton", "tensor": ".safetensors", "webdataset": ""}  # webdataset: a directory
IMAGE_SUFFIX = {b"\xff\xd8": ".jpg", b"\x89P": ".png", b"RI": ".webp", b"BM": ".bmp", b"II": ".tif", b"MM": ".tif"}
RAW_PIXELS = 64 * 64  # `auto` keeps images of up to this many pixels raw
MAX_SIDE = 65500  # pixels; libjpeg's limit, and just under that of .beton
NAMED = 10  # bad images that are printed; all are in the manifest


class DiskFull(RuntimeError):
    """No space for the output, of which nothing is left. The message names the place and what is free there."""


@dataclass(frozen=True, slots=True)
class Options:
    """What decides the bytes of the output."""

    to: Format
    mode: Literal["jpg", "raw", "auto"]
    quality: int
    max_side: int | None
    max_skipped: float
    shuffle: bool


@dataclass(frozen=True, slots=True)
class Skipped:
    index: int
    name: str
    reason: str


Encoded = EncodedSample | Member | Skipped  # what becomes of an image


def convert(
    src: str,
    dst: Path,
    to: Format,
    *,
    mode: Literal["jpg", "raw", "auto"] = "auto",
    quality: int = 90,
    max_side: int | None = None,
    split: str | None = None,
    max_skipped: float = 0.01,
    shuffle: bool = False,
    workers: int = 0,
    overwrite: bool = False,
    console: Console | None = None,
) -> Manifest:
    """Writes DST/<split>.beton, DST/<split>.safetensors or DST/<split>/ for each split of `src`, and DST/manifest.json.

    `src` is a folder of images, of IDX files, or `torchvision:NAME[:ROOT]`. `split` picks one of several splits, or
    names the output of a source that has none (default: train). `max_side` in pixels; `max_skipped` is the share of a
    split's images that may be unreadable. `shuffle` writes them in an order that mixes the classes, always the same
    one. An image's index is its place in the source's sorted list, bad ones counted, wherever it is written. All files
    get their names together when all are whole; on any error or Ctrl-C before that no new one is left, and older ones
    are as they were. Where one is a link, the data goes where it points. Raises DataError and DiskFull.
    """
    dst, folder = Path(dst).expanduser(), Path(src).expanduser()
    options = _check_options(Options(to, mode, quality, max_side, max_skipped, shuffle))
    console = console or Console(stderr=True)
    origin = detect(src)
    if folder.is_dir() and _where(folder) in _where(dst).parents:
        raise DataError(f"{dst} lies inside {src} and would be taken for a class of images: choose another place")
    sets = _choose_splits(src, origin.sets, split)
    console.print(f"source: {_printable(origin.description)}", markup=False, highlight=False, soft_wrap=True)
    before, left = _check_destination(dst, {name: name + SUFFIX[to] for name in sets}, to, overwrite)
    made = not dst.exists()
    try:
        manifest = _write_all(dst, sets, _printable(origin.description), before, options, workers, console)
    except BaseException as error:
        if made:
            with suppress(OSError):
                _where(dst).rmdir()
        raise _output_error(dst, error) if isinstance(error, OSError) else error from None
    records = [manifest.splits[name] for name in sets]
    size = f"{sum(record.bytes for record in records) / 1e6:,.1f} MB"
    console.print(f"wrote {', '.join(r.file for r in records)}, {size}, in {dst}", markup=False, soft_wrap=True)
    for name in left:
        line = f"{name} stays in {dst}, but {NAME} lists it no more; remove it if nothing reads it"
        console.print(_printable(line), markup=False, soft_wrap=True)
    return manifest


def overlap(one: Path, other: Path) -> bool:
    """Whether one of two directories lies in the other, or they are the same."""
    a, b = one.resolve(), other.resolve()
    return a == b or a in b.parents or b in a.parents


def _write_all(
    dst: Path,
    sets: dict[str, Callable[[], ImageSet]],
    source: str,
    before: Manifest,
    options: Options,
    workers: int,
    console: Console,
) -> Manifest:
    try:
        _where(dst).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{dst}: the directory cannot be made: {error.strerror}; choose another place") from None
    records = dict(before.splits)
    names = {split: split + SUFFIX[options.to] for split in sets}
    with ExitStack() as stack:
        manifest_file = stack.enter_context(part_file(_where(dst / NAME)))
        outputs = {split: stack.enter_context(_part_of(dst / name, options.to)) for split, name in names.items()}
        for split, file in outputs.items():
            images = sets[split]()
            classes = tuple(map(_printable, images.classes))
            skipped = _write_split(file, images, split, classes, options, workers, console)
            size, digest = _measure(file)
            records[split] = SplitRecord(
                file=names[split],
                count=len(images.labels) - len(skipped),
                classes=classes,
                skipped=tuple(asdict(one) for one in skipped),
                bytes=size,
                sha256=digest,
                options=asdict(options),
                source=source,
            )
        manifest_file.write(manifest_text(Manifest(records)).encode("ascii"))
        publish(list(outputs.values()), manifest_file)
    return Manifest(records)


def _part_of(path: Path, to: Format) -> AbstractContextManager[BinaryIO | Path]:
    return part_directory(_where(path)) if to == "webdataset" else part_file(_where(path))


def _where(path: Path) -> Path:
    """Where a link points, so that the data is replaced and not the link; unlike resolve(), without loops as errors."""
    return Path(os.path.realpath(path))


def _check_options(options: Options) -> Options:
    if options.to not in SUFFIX:
        raise DataError(f"--to {options.to}: not one of {', '.join(SUFFIX)}")
    if options.mode not in ("jpg", "raw", "auto"):
        raise DataError(f"--mode {options.mode}: not one of jpg, raw, auto")
    if not 1 <= options.quality <= 100:
        raise DataError(f"--quality {options.quality}: expected a JPEG quality from 1 to 100")
    if options.max_side is not None and options.max_side < 8:
        raise DataError(f"--max-side {options.max_side}: expected at least 8 pixels")
    if not 0 <= options.max_skipped <= 1:
        raise DataError(f"--max-skipped {options.max_skipped}: expected a share from 0 to 1")
    return options


def _choose_splits(
    src: str, sets: dict[str, Callable[[], ImageSet]], split: str | None
) -> dict[str, Callable[[], ImageSet]]:
    if split is None:
        return sets
    if len(sets) > 1 and split not in sets:
        raise DataError(f"{src}: has no split {split!r}, only {', '.join(sets)}")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", split):
        raise DataError(f"--split {split!r}: use letters, digits, - and _ only")
    return {split: sets[split] if split in sets else next(iter(sets.values()))}


def _check_destination(dst: Path, files: dict[str, str], to: Format, overwrite: bool) -> tuple[Manifest, list[str]]:
    """The manifest of the other splits in `dst`, and the files that it will not list any more but that stay there:
    the `files` of the splits, by split, in other formats. They may still be in use, so nothing removes them."""
    if dst.exists() and not dst.is_dir():
        raise DataError(f"{dst}: not a directory; choose another place")
    for path in (dst / name for name in files.values()):
        if path.exists() and not (path.is_dir() if to == "webdataset" else path.is_file()):
            kind = "directory" if to == "webdataset" else "regular file"
            raise DataError(f"{path}: exists already and is no {kind}, so it is not replaced; choose another place")
        if path.exists() and not overwrite:
            raise DataError(f"{path}: exists already; choose another place or use --overwrite")
    records = (read_manifest(dst) or Manifest()).splits
    kept = {name: record for name, record in records.items() if (dst / record.file).exists()}
    others = {name: kept[name].file for name in files if name in kept and kept[name].file != files[name]}
    for name, other in others.items():
        if not overwrite:
            raise DataError(f"{dst}: its {name} is {other} already; choose another place or use --overwrite")
    return Manifest({name: record for name, record in kept.items() if name not in files}), list(others.values())


def _output_error(dst: Path, error: OSError) -> Exception:
    reason = (error.strerror or str(error)).lower()
    if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
        return DataError(f"{error.filename or dst}: cannot be written: {reason}")
    place = next(path for path in (dst.absolute(), *dst.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free / 1e9
    return DiskFull(f"{dst}: no space for the output ({reason}; {free:,.1f} GB free there); nothing was kept")


# --- one split -------------------------------------------------------------------------------------------------------


def _write_split(
    file: BinaryIO | Path,
    images: ImageSet,
    split: str,
    classes: tuple[str, ...],
    options: Options,
    workers: int,
    console: Console,
) -> list[Skipped]:
    """Writes the file, or the directory, and checks what was written. Returns the images that were left out."""
    total = len(images.labels)
    for line in (f"{split}: {total:,} images, {len(classes):,} classes", *images.notes):
        console.print(_printable(line), markup=False, highlight=False, soft_wrap=True)
    skipped: list[Skipped] = []
    with closing(_readable_samples(images, split, options, workers, console, skipped)) as samples:
        if isinstance(file, Path):
            write_shards(file, cast(Iterator[Member], samples), total)
            read_index(file)
            return skipped
        encoded = cast(Iterator[EncodedSample], samples)
        if options.to == "ffcv":
            write_beton_to(file, encoded, total)
        else:
            write_tensors_to(file, encoded, total, classes)
    file.flush()
    check: Callable[[Path], object] = open_beton if options.to == "ffcv" else read_tensor_file
    check(Path(file.name))
    return skipped


def _readable_samples(
    images: ImageSet, split: str, options: Options, workers: int, console: Console, skipped: list[Skipped]
) -> Generator[EncodedSample | Member, None, None]:
    """All samples in their order, behind a progress bar. Bad images go to `skipped`; too many raise DataError."""
    total = len(images.labels)
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), "{task.fields[rate]}", TimeRemainingColumn())
    order: Sequence[int] = permutation(total, 0, 0).tolist() if options.shuffle else range(total)
    chunks = (order[i : i + images.chunk] for i in range(0, total, images.chunk))
    begin, done = time.monotonic(), 0
    with (
        Progress(*columns, "{task.fields[skipped]} skipped", console=console) as progress,
        closing(_in_order(partial(_encode_chunk, images, options), chunks, workers)) as results,
    ):
        task = progress.add_task(split, total=total, rate="", skipped=0)
        for chunk in results:
            for result in chunk:
                if isinstance(result, Skipped):
                    _skip(result, skipped, total, split, options.max_skipped, progress.console)
                else:
                    yield result
            done += len(chunk)
            rate = f"{done / (time.monotonic() - begin + 1e-9):,.0f} images/s"
            progress.update(task, completed=done, rate=rate, skipped=len(skipped))
    if len(skipped) == total:
        raise DataError(f"{split}: none of the {total:,} images can be read: {_name_some(skipped)}")


def _skip(bad: Skipped, skipped: list[Skipped], total: int, split: str, share: float, console: Console) -> None:
    skipped.append(bad)
    if len(skipped) <= NAMED:
        console.print(f"skipped {bad.name}: {bad.reason}", markup=False, highlight=False, soft_wrap=True)
    if len(skipped) == NAMED + 1:
        console.print(f"further skipped images are listed in {NAME}")
    if len(skipped) > share * total and share < 1:
        raise DataError(
            f"{split}: {len(skipped):,} or more of {total:,} images cannot be read, {share:.2%} may be left out: "
            f"{_name_some(skipped)}; repair or remove them, or raise --max-skipped"
        )


def _name_some(skipped: list[Skipped]) -> str:
    return ", ".join(f"{one.name} ({one.reason})" for one in skipped[:3]) + ", ..." * (len(skipped) > 3)


# --- images in threads -----------------------------------------------------------------------------------------------


def _in_order(
    work: Callable[[Sequence[int]], list[Encoded]], chunks: Iterable[Sequence[int]], workers: int
) -> Generator[list[Encoded], None, None]:
    """map() in threads (Pillow decodes without Python's lock), with a bounded number of chunks under way."""
    workers = workers or len(os.sched_getaffinity(0))
    pool = ThreadPoolExecutor(workers, thread_name_prefix="convert")
    try:
        ahead: deque[Future[list[Encoded]]] = deque()
        for chunk in chunks:
            ahead.append(pool.submit(work, chunk))
            if len(ahead) > 2 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _encode_chunk(images: ImageSet, options: Options, chunk: Sequence[int]) -> list[Encoded]:
    return [_encode(images, options, i) for i in chunk]


def _encode(images: ImageSet, options: Options, i: int) -> Encoded:
    stored = None  # the image's file, where it may be passed through
    try:
        if options.to == "webdataset" and images.file is not None:
            stored = read_regular(images.file(i))
        image = images.read(i) if stored is None else decode_image(stored)
        original = (image.shape[0], image.shape[1])
        image = fit_max_side(image, options.max_side)
        height, width = image.shape[:2]
        if max(height, width) > MAX_SIDE:
            raise BadImage(f"{width} x {height}: a side over {MAX_SIDE} pixels; --max-side would shrink it")
    except BadImage as error:
        return Skipped(i, _printable(images.name(i)), str(error))
    label = int(images.labels[i])
    if options.to == "webdataset":
        if (height, width) != original:
            stored = _to_jpeg(image, options.quality)
        data = stored or _to_png(image)
        name = _printable(images.name(i))
        return Member(data, IMAGE_SUFFIX[data[:2]], (height, width), original, label, index=i, name=name)
    raw = options.to == "tensor" or options.mode == "raw" or (options.mode == "auto" and height * width <= RAW_PIXELS)
    data = image.tobytes() if raw else _to_jpeg(image, options.quality)
    return EncodedSample(data, RAW if raw else JPG, (height, width), original, label, index=i)


def _to_jpeg(image: np.ndarray, quality: int) -> bytes:
    """Baseline JPEG with halved chroma (4:2:0)."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality, subsampling="4:2:0")
    return file.getvalue()


def _to_png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def _printable(text: str) -> str:
    """File names are bytes: those that are not UTF-8 cannot be printed or stored as text."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _measure(output: BinaryIO | Path) -> tuple[int, str]:
    """Bytes and SHA-256; of a directory, that of its index, which holds those of its shards."""
    if isinstance(output, Path):
        return sum(path.stat().st_size for path in output.iterdir()), _sha256(output / INDEX)
    path = Path(output.name)
    return path.stat().st_size, _sha256(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
