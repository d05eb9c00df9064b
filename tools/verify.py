"""Whether converted data is whole: every byte against its checksum and, with `deep`, every image against its source."""

import re
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TimeRemainingColumn

from pipelines.manifest import NAME, SplitRecord, manifest_text, read_manifest
from pipelines.shards import INDEX, point_to_shards
from ressl.batch import DataError
from tools.estimate import size_text
from tools.journal import PART
from tools.output import expand
from tools.verify_content import check_content, content_bytes
from tools.verify_layout import BETON, TENSORS, Stored, open_stored, total_bytes
from tools.verify_report import Report, print_reports, printed
from tools.verify_source import Source, find_source

FILE = r"(?!\.)[\w.-]+"  # the name of a data file or a directory of shards


@dataclass(frozen=True, slots=True)
class Target:
    title: str
    path: Path  # a data file, or a directory of shards
    record: SplitRecord | None  # None where no manifest lists it


@dataclass(frozen=True, slots=True)
class Check:
    report: Report
    stored: Stored | None  # None where the tables cannot be understood
    source: Source | None  # what each image is compared with


def verify(
    path: Path,
    *,
    deep: bool = False,
    source: str | None = None,
    labels: Path | None = None,
    workers: int = 0,
    console: Console,
) -> bool:
    """Checks a directory that `convert` wrote, one data file, or one directory of shards; prints a table and what is
    wrong, image by image. True: nothing is.

    Reads every byte once in `workers` processes (0: one for each core). Where there is an index, all bytes are compared
    with it, padding too. `deep` also decodes every image, and compares it with its source, where that is found: at the
    place that the manifest notes, or at `source`, with its list of `labels`. What could not be checked is said, and is
    nothing wrong. Raises DataError where there is nothing to check, or `source` is none.
    """
    path = expand(path)
    manifest_report = Report("manifest")
    targets = _find_targets(path, manifest_report)
    strangers = [] if manifest_report.counts else _find_strangers(path, targets)
    checks = [_open(target, deep, source, labels) for target in targets]
    begin = time.monotonic()
    for check in checks:
        _read(check, deep, workers, console)
    reports = [check.report for check in checks]
    if manifest_report.counts:
        manifest_report.leave("the manifest is damaged", "checksums", "decoding", "source")
        reports.append(manifest_report)
    print_reports(reports, strangers, console)
    size, seconds = sum(report.totals["read"] for report in reports), time.monotonic() - begin + 1e-9
    console.print(f"read {size_text(size)} in {seconds:,.1f} s, {size / seconds / 1e9:.2f} GB/s", highlight=False)
    return not any(report.counts for report in reports)


def _find_targets(path: Path, report: Report) -> list[Target]:
    """What there is to check; problems of the manifest go to the report. Raises DataError where there is nothing."""
    try:
        path.stat()
    except OSError as error:
        raise DataError(f"{path}: {(error.strerror or 'cannot be read').lower()}; give what `convert` wrote") from None
    if path.is_dir() and (path / NAME).exists():
        records = _read_records(path, report)
        if not records and not report.counts:
            raise DataError(f"{path / NAME}: lists nothing; convert again")
        return [Target(split, path / record.file, record) for split, record in records.items()]
    if path.is_dir() and not (path / INDEX).exists():
        if (path / PART).exists():
            raise DataError(f"{path}: its conversion was interrupted; the same `convert` goes on where it was")
        point_to_shards(path)
        raise DataError(f"{path}: holds neither {NAME} nor {INDEX}; give a data file, or what `convert` wrote")
    if not path.is_dir() and not path.is_file():
        raise DataError(f"{path}: neither a file nor a directory; give what `convert` wrote")
    if path.is_file() and path.suffix not in (BETON, TENSORS):
        raise DataError(f"{path}: neither {BETON} nor {TENSORS}; give what `convert` wrote")
    if path.name in ("", ".."):  # `.` and `..` have no name to look for
        path = path.resolve()
    records = _read_records(path.parent, report)
    listed = [(split, record) for split, record in records.items() if record.file == path.name]
    return [Target(split, path, record) for split, record in listed] or [Target(path.name, path, None)]


def _find_strangers(path: Path, targets: list[Target]) -> list[str]:
    """Notes on what lies in a directory that `convert` wrote and looks like its data, but is not in the manifest."""
    known = {target.path.name for target in targets}
    try:
        others = sorted(other for other in path.iterdir() if other.name not in known) if (path / NAME).exists() else []
        ours = [other for other in others if other.suffix in (BETON, TENSORS) or (other / INDEX).exists()]
    except OSError as error:
        return [f"{path}: cannot be listed: {error.strerror or error}"]
    return [f"{other}: not in {NAME}, so not checked; `verify {other}` does it" for other in ours]


def _read_records(directory: Path, report: Report) -> dict[str, SplitRecord]:
    try:
        manifest = read_manifest(directory)
        if manifest is None:
            return {}
        if manifest_text(manifest).encode("ascii") != (directory / NAME).read_bytes():
            report.add("structure", f"{directory / NAME}: not as it was written: damaged or edited")
    except DataError as error:
        report.add("structure", str(error))
        return {}
    except OSError as error:
        report.add("structure", f"{directory / NAME}: cannot be read: {error.strerror or error}")
        return {}
    wrong = [split for split, record in manifest.splits.items() if not _is_sound(record)]
    for split in wrong:
        report.add("structure", f"{directory / NAME}: what it says of {split} cannot be")
    return {split: record for split, record in manifest.splits.items() if split not in wrong}


def _is_sound(record: SplitRecord) -> bool:
    """Whether its values can be what they stand for."""
    try:
        entries = [(entry["index"], entry["name"], entry["reason"]) for entry in record.skipped]
        texts = (*record.classes, *(text for _, *two in entries for text in two), *record.changes)
        numbers = (record.bytes, *(index for index, _, _ in entries), *record.changes.values())
        description = record.source.get("description", "")
    except (TypeError, KeyError, AttributeError):
        return False
    return (
        re.fullmatch(FILE, record.file) is not None
        and isinstance(record.options, dict)
        and all(isinstance(text, str) for text in (*texts, description))
        and all(type(number) is int and 0 <= number < 2**62 for number in numbers)  # True is an int too
    )


def _open(target: Target, deep: bool, source: str | None, labels: Path | None) -> Check:
    """Checks what the tables tell, and finds the source: all that a person's mistake can be in comes before reading."""
    report = Report(target.title)
    if not deep:
        report.leave("--deep does it", "decoding", "source")
    report.totals["bytes"] = total_bytes(target.path)
    stored, found = open_stored(target.path, target.record, report), None
    if stored is not None and deep and target.record is None:
        report.leave(f"no {NAME} says what it was made of", "source")
    elif stored is not None and deep and target.record is not None:
        found = find_source(stored, target.record, source, labels, report)
    return Check(report, stored, found)


def _read(check: Check, deep: bool, workers: int, console: Console) -> None:
    stored, report = check.stored, check.report
    if stored is None:
        return
    if check.source is not None:
        described = printed(f"{report.title}: each image is compared with {check.source.description}")
        console.print(described, markup=False, highlight=False, soft_wrap=True)
    columns = ("{task.description}", BarColumn(None), "{task.percentage:>3.0f} %", "{task.fields[rate]}")
    begin, images = time.monotonic(), 0
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task(report.title, total=content_bytes(stored), rate="")

        def advance(size: int, count: int) -> None:
            nonlocal images
            report.totals["read"] += size
            images += count
            seconds = time.monotonic() - begin + 1e-9
            speed = f"{images / seconds:,.0f} images/s, {report.totals['read'] / seconds / 1e9:.2f} GB/s"
            progress.update(task, advance=size, rate=speed)

        check_content(stored, report, deep=deep, source=check.source, workers=workers, advance=advance)
