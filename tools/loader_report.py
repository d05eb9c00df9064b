"""The tables and the text of the loader benchmark, computed from its record alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

BASELINE = "torchvision"
Record = dict[str, Any]  # as bench_loaders.py writes it to JSON


@dataclass(frozen=True, slots=True)
class Sheet:
    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def sheets(record: Record) -> list[Sheet]:
    counts = sorted({arm["views"] for arm in record["arms"].values()})
    found = [_costs(record, views) for views in counts]
    found += [_growth(record), _views_alone(record)]
    if record["device"]:
        found += [_device_views(record["device"]), _device_rates(record["device"])]
    return [sheet for sheet in found if sheet.rows]


def cpu_ms(arm: Record) -> list[float]:
    """CPU-milliseconds an image, one number a round."""
    return [1000 * turn["cpu_s"] / turn["images"] for turn in arm["rounds"]]


def rates(arm: Record) -> list[float]:
    """Images/s by the clock, one number a round."""
    return [turn["images"] / turn["wall_s"] for turn in arm["rounds"]]


def spread(values: list[float], unit: str = "") -> str:
    """Median and range."""
    return f"{_digits(median(values))}{unit} ({_digits(min(values))} to {_digits(max(values))})"


def _digits(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def _paired(one: list[float], other: list[float]) -> list[float]:
    return [a / b for a, b in zip(one, other, strict=True)]


def _arm(record: Record, way: str, views: int) -> Record | None:
    found = [arm for arm in record["arms"].values() if (arm["way"], arm["views"]) == (way, views)]
    return found[0] if found else None


def _costs(record: Record, views: int) -> Sheet:
    base = _arm(record, BASELINE, views)
    rows = []
    for arm in record["arms"].values():
        if arm["views"] == views and arm["kind"] != "views":
            less = spread(_paired(cpu_ms(base), cpu_ms(arm))) if base else "-"
            rows.append((arm["label"], spread(cpu_ms(arm)), less, spread(rates(arm))))
    columns = ("", "CPU-ms an image", "times less CPU than torchvision's PIL", "images/s by the clock")
    return Sheet("One view" if views == 1 else f"{views} views", columns, rows)


def _growth(record: Record) -> Sheet:
    rows = []
    for way in dict.fromkeys(arm["way"] for arm in record["arms"].values()):
        two, six = _arm(record, way, 2), _arm(record, way, 6)
        if two and six:
            rows.append((two["label"], spread(_paired(cpu_ms(six), cpu_ms(two)), "x")))
    return Sheet("CPU time of six views over that of two", ("", "CPU time"), rows)


def _views_alone(record: Record) -> Sheet:
    rows = [
        (str(arm["views"]), spread([1000 / rate for rate in rates(arm)]), spread(cpu_ms(arm)), spread(rates(arm)))
        for arm in record["arms"].values()
        if arm["kind"] == "views"
    ]
    device = record["options"]["device"]
    title = f"Our views alone, on {'the GPU' if device == 'cuda' else 'the CPU'}, of frames that are there already"
    return Sheet(title, ("views", "ms an image", "CPU-ms an image", "images/s by the clock"), rows)


def _device_views(device: Record) -> Sheet:
    step = device["step_ms"]
    rows = [
        (str(row["views"]), row["impl"], f"{row['ms']:.2f}", f"{step:.1f}", f"{row['ms'] / step:.1%}")
        for row in device["views"]
    ]
    height, width = device["frame"]
    title = (
        f"All views of {device['batch']} frames of {height} x {width}, beside one forward and backward of a ResNet-50"
    )
    return Sheet(title, ("views", "implementation", "ms of the views", "ms of the step", "share"), rows)


def _device_rates(device: Record) -> Sheet:
    rows = [
        (
            f"our DALI source, JPEG files, {row['hw_decoder_load']:.0%} on the JPEG engines",
            f"{row['images_s']:,.0f} images/s",
        )
        for row in device["decode"]
    ]
    rows.append(("copy from page-locked memory", f"{device['copy_gb_s']:.1f} GB/s"))
    return Sheet("The GPU's own rates", ("", "rate"), rows)


MEANS = {
    "torchvision": "torchvision: PIL images and transforms in a DataLoader's processes, as the method's authors feed "
    "theirs, with every augmentation.",
    "dali": "DALI on the CPU: decoded once, then every view with every augmentation.",
    "ffcv": "FFCV, decodes for each view: its stock decoder with a random resized crop, and a flip. Colours, blur and "
    "normalising are left to the device and not counted.",
    "frames": "ours: decoded once and put on the device, on the path that training takes. The views are cut on the "
    "device; that is not counted here but measured apart.",
    "whole": "ours, and the views: the whole way to finished batches, the views cut on this machine's device.",
}


def notes(record: Record) -> list[str]:
    """How it was measured, in sentences."""
    options, data = record["options"], record["data"]
    size = data["bytes"] / data["images"] / 1000
    words = [
        f"{data['images']:,} of {data['of']:,} images, {size:,.0f} KB each on average, in batches of "
        f"{options['batch']}. Each arm is a process of its own that has passed one epoch before it is timed, with "
        f"{options['workers']} workers (threads, or processes where it has those) and as many torch threads. "
        f"{options['rounds']} rounds; in each, every arm has one turn, in a new random order: whole epochs, for at "
        f"least {options['seconds']:g} s.",
        "CPU-ms is user and system time of all the arm's processes. Numbers are the median over the rounds and, in "
        "brackets, the range; ratios are taken within a round. Times by the clock depend on what else the machine "
        f"does, CPU times much less: other processes used {record['others_share']:.0%} of its CPU time meanwhile.",
    ]
    kinds = {arm["kind"] for arm in record["arms"].values()}
    words += [f"- {text}" for kind, text in MEANS.items() if kind in kinds]
    if options["device"] == "cuda":
        words.append("Ours ends on the GPU, the copy included; the baselines end in the memory of the host.")
    words += [f"Left out: {name}: {reason}." for name, reason in record["left_out"].items()]
    return words


def print_report(record: Record, console: Console) -> None:
    print_sheets(sheets(record), record["left_out"], console)


def print_sheets(tables: Sequence[Sheet], left_out: dict[str, str], console: Console) -> None:
    """The tables of any benchmark, then the arms that could not run, and why."""
    for sheet in tables:
        table = Table(*sheet.columns, title=sheet.title, title_justify="left")
        for row in sheet.rows:
            table.add_row(*row)
        console.print(table)
    for name, reason in left_out.items():
        console.print(f"left out: {name}: {reason}", markup=False, highlight=False, soft_wrap=True)


def markdown(record: Record) -> str:
    where = "GPU" if record["options"]["device"] == "cuda" else "CPU"
    machine = "; ".join(f"{key} {value}" for key, value in record["machine"].items())
    lines = [
        f"# What loaders cost, {where}, {record['date']}",
        "",
        *_paragraphs(notes(record)),
        f"Machine: {machine}.",
        "",
    ]
    for sheet in sheets(record):
        lines += [f"## {sheet.title}", "", _line(sheet.columns), _line(("---",) * len(sheet.columns))]
        lines += [*map(_line, sheet.rows), ""]
    return "\n".join(lines)


def _paragraphs(words: list[str]) -> list[str]:
    lines: list[str] = []
    for text in words:
        in_list = bool(lines) and lines[-1].startswith("- ") and text.startswith("- ")
        lines += [text] if in_list or not lines else ["", text]
    return [*lines, ""]


def _line(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
