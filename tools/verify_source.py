"""A converted data set against what it was made of: entry by entry, by name, label and content."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from pipelines.beton import RAW
from pipelines.images import BadImage, decode_image
from pipelines.manifest import SplitRecord
from ressl.batch import DataError
from tools.encode import Encoded, Options, Skipped, encode, printable
from tools.image_sets import detect
from tools.image_sets.image_set import ImageSet
from tools.quality import psnr
from tools.verify_layout import Stored
from tools.verify_report import Report

ALIKE = 40  # dB; versions of a codec differ by less, two images by more
PNG = b"\x89PNG"  # how such a file begins


@dataclass(frozen=True, slots=True)
class Source:
    """What one split was converted from."""

    images: ImageSet
    options: Options
    same: np.ndarray  # (N,) bool, the stored images whose entry in the source has their name
    skipped: tuple[dict[str, Any], ...]  # entries of it that were left out, as the manifest lists them
    description: str


@dataclass(frozen=True, slots=True)
class _Noted:
    """What the manifest says of the source."""

    place: str
    labels: str | None
    split: str


def find_source(
    stored: Stored, record: SplitRecord, given: str | None, labels: Path | None, report: Report
) -> Source | None:
    """The source that the manifest names, or that is `given`, after its entries were compared with the tables; None
    where it cannot be compared, for a reason that is reported. Raises DataError where the one `given` is none."""
    try:
        options = TypeAdapter(Options).validate_json(json.dumps(record.options), strict=True)
        noted = TypeAdapter(_Noted).validate_json(json.dumps(record.source), strict=True)
    except ValidationError:
        report.add("structure", "manifest.json: its options or its source are damaged")
        report.leave("the manifest is damaged", "source")
        return None
    place = given or noted.place
    if "\0" in place + (noted.labels or ""):
        report.add("structure", "manifest.json: its source is no place: damaged")
        report.leave("the manifest is damaged", "source")
        return None
    try:
        origin = detect(place, labels or (Path(noted.labels) if noted.labels else None), download=False)
        if noted.split not in origin.sets:
            report.leave(f"{place} has no split {noted.split}, only {', '.join(origin.sets)}", "source")
            return None
        images = origin.sets[noted.split]()
    except DataError as error:
        if given:
            raise
        report.leave(f"{str(error).split(';')[0]}; --source says where it is now", "source")
        return None
    same, skipped = _compare_entries(stored, images, record, report)
    return Source(images, options, same, skipped, f"{noted.split} of {origin.description}")


def compare_image(stored: Stored, source: Source, i: int, data: bytes) -> tuple[str, bool]:
    """What is wrong with an image of these bytes, or "", and whether it is like its source, but not to the bit."""
    if not source.same[i]:
        return "", False  # that was told already
    entry, found = int(stored.index[i]), None
    try:
        kept = source.options.to == "webdataset" or source.options.mode == "original"
        if kept and (stored.size[i] == stored.original[i]).all():
            found = source.images.read(entry)
            if isinstance(found, bytes) and found == data:
                return "", False
    except BadImage as error:
        return f"its source cannot be read any more: {error}", False
    match encode(source.images, source.options, entry):
        case Skipped(reason=reason):
            return f"its source cannot be converted any more: {reason}", False
        case Encoded(data=now, row=row):
            for what, column in (("mode", stored.mode), ("size", stored.size), ("original", stored.original)):
                if not np.array_equal(row[what], column[i]):
                    return f"its source gives another {what}: {_text(row[what])}, not {_text(column[i])}", False
            if now == data:
                return "", False
            return _unlike(stored, i, data, now, kept=isinstance(found, bytes) and found == now)


def try_skipped(source: Source, k: int) -> str:
    """What is wrong with an entry that was left out, or ""."""
    entry, name, reason = (source.skipped[k][key] for key in ("index", "name", "reason"))
    match encode(source.images, source.options, entry):
        case Encoded():
            return f"entry {entry} ({name}) was skipped, but can be read: changed since, or left out wrongly ({reason})"
    return ""


def _unlike(stored: Stored, i: int, data: bytes, now: bytes, kept: bool) -> tuple[str, bool]:
    """See `compare_image`, for data that are not `now`: those of the source, as they are if `kept`."""
    height, width = stored.size[i].tolist()
    if stored.mode[i] == RAW:
        here, there = (np.frombuffer(pixels, np.uint8).reshape(height, width, 3) for pixels in (data, now))
    else:
        here, there = decode_image(data), decode_image(now)
    found = psnr(here, there)
    if found < ALIKE:
        return f"not the image of its source (PSNR {found:.1f} dB)", False
    whole = (stored.size[i] == stored.original[i]).all()
    if kept:
        return f"not the bytes of its source, though stored as they were (PSNR of its pixels {found:.1f} dB)", False
    if whole and found != np.inf and (stored.mode[i] == RAW or now.startswith(PNG)):
        return f"not the pixels of its source, though stored without loss (PSNR {found:.1f} dB)", False
    return "", True


def _compare_entries(
    stored: Stored, images: ImageSet, record: SplitRecord, report: Report
) -> tuple[np.ndarray, tuple[dict[str, Any], ...]]:
    """See Source, for `same` and `skipped`."""
    count = len(images.labels)
    expected = record.count + len(record.skipped)
    if count != expected:
        report.add("source", f"{record.file}: made of {expected:,} entries, but its source has {count:,}")
    if tuple(map(printable, images.classes)) != record.classes:
        report.add("source", f"{record.file}: its source has other classes than manifest.json says")
    same = stored.index < count
    labels = np.full(len(same), -1, np.int64)
    labels[same] = images.labels[stored.index[same]]
    columns = (stored.index.tolist(), stored.label.tolist(), labels.tolist())
    for i, (entry, label, theirs) in enumerate(zip(*columns, strict=True)):
        if entry >= count:
            continue  # counted above
        name = printable(images.name(entry))
        if name != stored.name(i):
            report.add("source", f"{stored.where(i)}: that entry of its source is {name}")
            same[i] = False
        elif label != theirs:
            report.add("source", f"{stored.where(i)}: label {label}, but {theirs} in its source")
    skipped = []
    for left_out in record.skipped:
        entry, name = left_out["index"], left_out["name"]
        if entry < count and printable(images.name(entry)) != name:
            report.add("source", f"{record.file}: skipped entry {entry} was {name}, but its source has another there")
        elif entry < count:
            skipped.append(left_out)
    return same, tuple(skipped)


def _text(value: Any) -> str:
    return " x ".join(map(str, np.atleast_1d(value).tolist()))
