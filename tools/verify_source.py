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


@dataclass(frozen=True, slots=True)
class Source:
    """What one split was converted from."""

    images: ImageSet
    options: Options
    same: np.ndarray  # (N,) bool, the stored images whose entry in the source has their name


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
    try:
        origin = detect(place, labels or (Path(noted.labels) if noted.labels else None))
        if noted.split not in origin.sets:
            report.leave(f"{place} has no split {noted.split}, only {', '.join(origin.sets)}", "source")
            return None
        images = origin.sets[noted.split]()
    except DataError as error:
        if given:
            raise
        report.leave(f"{str(error).split(';')[0]}; --source says where it is now", "source")
        return None
    return Source(images, options, _compare_entries(stored, images, record, report))


def compare_image(stored: Stored, source: Source, i: int, data: bytes) -> tuple[str, bool]:
    """What is wrong with an image of these bytes, or "", and whether it is like its source, but not to the bit."""
    if not source.same[i]:
        return "", False  # that was told already
    entry = int(stored.index[i])
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
            return _unlike(stored, i, data, now)


def _unlike(stored: Stored, i: int, data: bytes, now: bytes) -> tuple[str, bool]:
    height, width = stored.size[i].tolist()
    if stored.mode[i] == RAW:
        here, there = (np.frombuffer(pixels, np.uint8).reshape(height, width, 3) for pixels in (data, now))
    else:
        here, there = decode_image(data), decode_image(now)
    found = psnr(here, there)
    return ("", True) if found >= ALIKE else (f"not the image of its source (PSNR {found:.1f} dB)", False)


def _compare_entries(stored: Stored, images: ImageSet, record: SplitRecord, report: Report) -> np.ndarray:
    count = len(images.labels)
    expected = record.count + len(record.skipped)
    if count != expected:
        report.add("source", f"{record.file}: made of {expected:,} entries, but its source has {count:,}")
    if tuple(map(printable, images.classes)) != record.classes:
        report.add("source", f"{record.file}: its source has other classes than manifest.json says")
    same = stored.index < count
    for i, entry in enumerate(stored.index.tolist()):
        if not same[i]:
            continue  # counted above
        name = printable(images.name(entry))
        if name != stored.name(i):
            report.add("source", f"{stored.where(i)}: that entry of its source is {name}")
            same[i] = False
        elif images.labels[entry] != stored.label[i]:
            report.add(
                "source", f"{stored.where(i)}: label {stored.label[i]}, but {images.labels[entry]} in its source"
            )
    for left_out in record.skipped:
        entry, name = left_out["index"], left_out["name"]
        if entry < count and printable(images.name(entry)) != name:
            report.add("source", f"{record.file}: skipped entry {entry} was {name}, but its source has another there")
    return same


def _text(value: Any) -> str:
    return " x ".join(map(str, np.atleast_1d(value).tolist()))
