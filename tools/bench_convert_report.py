"""The tables and the text of the conversions' benchmark, computed from its record alone."""

from dataclasses import dataclass
from statistics import median
from typing import Any

from rich.console import Console

from tools.loader_report import Sheet, print_sheets, spread

Record = dict[str, Any]  # as bench_convert.py writes it to JSON
IMAGENET = 1_281_167  # images
CORES = 16  # of the machine that the hours are for
LABELS = {
    "tar": "tar cf",
    "decode": "bare decode",
    "ffcv": "FFCV's writer",
    "ours-header": "ours: shards, headers checked",
    "ours-decode": "ours: shards, decoded",
    "ours-ffcv": "ours: .beton",
}
MEANS = {
    "tar": "tar cf: one process puts the files into one, and looks at nothing.",
    "decode": "bare decode: Pillow decodes the files in forked processes, and nothing is kept.",
    "ffcv": "FFCV's writer: its stock DatasetWriter makes JPEG of quality 90 of the images as Pillow reads them, "
    "shrunk to 400 pixels.",
    "ours-header": "ours, shards: `convert --to webdataset`, which keeps the bytes of the files; with `--check "
    "header`, or each of them decoded.",
    "ours-ffcv": "ours, .beton: `convert --to ffcv --mode jpg --max-side 400 --quality 90`.",
}


@dataclass(frozen=True, slots=True)
class Goal:
    """`ours` is to take at most `limit` times what `theirs` takes by the clock; `synced`: until the disk has it."""

    ours: str
    theirs: str
    synced: bool
    limit: float


GOALS = (
    Goal("ours-header", "tar", False, 1.5),
    Goal("ours-header", "tar", True, 1.5),
    Goal("ours-decode", "decode", False, 1.3),
    Goal("ours-ffcv", "ffcv", False, 1.0),
    Goal("ours-ffcv", "ffcv", True, 1.0),
)


def per_image(record: Record, arm: str, *keys: str) -> list[float]:
    """What an image adds to the sum of these costs, one number a round: that of all images less that of few."""
    data = record["data"]
    return [
        sum(turn["all"][key] - turn["few"][key] for key in keys) / (data["images"] - data["few"])
        for turn in record["arms"][arm]
    ]


def ratios(record: Record, goal: Goal, key: str = "seconds") -> list[float]:
    """Ours over theirs, within each round. Ours always waits for the disk."""
    keys = [key, "sync_s"] if goal.synced else [key]
    pairs = zip(per_image(record, goal.ours, key), per_image(record, goal.theirs, *keys), strict=True)
    return [ours / theirs for ours, theirs in pairs]


def sheets(record: Record) -> list[Sheet]:
    found = [_costs(record), _goals(record)]
    return [sheet for sheet in found if sheet.rows]


def _costs(record: Record) -> Sheet:
    rows = []
    for arm in record["arms"]:
        clock, cpu = per_image(record, arm, "seconds"), per_image(record, arm, "cpu_s")
        synced, size = per_image(record, arm, "seconds", "sync_s"), per_image(record, arm, "bytes")
        startup = [
            turn["few"]["seconds"] - record["data"]["few"] * seconds
            for turn, seconds in zip(record["arms"][arm], clock, strict=True)
        ]
        hours = f"{median(cpu) * IMAGENET / CORES / 3600:.2f}" if arm != "tar" else "-"
        rows.append(
            (
                LABELS[arm],
                spread([1000 * one for one in clock]),
                spread([1000 * one for one in synced]) if synced != clock else "-",
                spread([1000 * one for one in cpu]),
                f"{1 / median(clock):,.0f}",
                f"{median(size) / 1000:.1f}" if median(size) else "-",
                f"{median(startup):.2f}",
                hours,
            )
        )
    columns = ("", "ms by the clock", "and synced", "CPU-ms", "images/s", "KB written", "s besides", "hours")
    return Sheet("What an image adds", columns, rows)


def _goals(record: Record) -> Sheet:
    rows = []
    for goal in GOALS:
        if goal.ours in record["arms"] and goal.theirs in record["arms"]:
            clock = ratios(record, goal)
            verdict = "yes" if median(clock) <= goal.limit else "NO"
            theirs = LABELS[goal.theirs] + (", then synced" if goal.synced else "")
            cpu = spread(ratios(record, goal, "cpu_s")) if not goal.synced else "-"
            rows.append((LABELS[goal.ours], theirs, spread(clock), f"{goal.limit:g}", verdict, cpu))
    columns = ("ours", "over", "time by the clock", "at most", "kept", "CPU time")
    return Sheet("Ours over theirs, within a round", columns, rows)


def notes(record: Record) -> list[str]:
    """How it was measured, in sentences."""
    options, data = record["options"], record["data"]
    again = "" if data["distinct"] >= data["images"] else f" (copies of {data['distinct']:,})"
    bad = f" {data['bad']:,} that cannot be read were left out." if data["bad"] else ""
    size = data["bytes"] / data["images"] / 1000
    words = [
        f"{data['images']:,} images{again}, {size:,.0f} KB each on average, in memory, read from and written to one "
        f"file system.{bad} {options['workers']} workers, but one process for tar. {options['rounds']} rounds; in "
        "each, every arm has one turn, in a process of its own, and ours has its turn beside what it is compared with.",
        f"A turn is two runs, of {data['few']:,} images and of all. The figures are the difference, for each image "
        "more: so what does not grow with the images is not counted, on any side. That is starting processes, what a "
        'conversion tries beforehand, and renaming; it is in the column "s besides". Numbers are the median over the '
        "rounds and, in brackets, the range; ratios are taken within a round. Times by the clock depend on what else "
        f"the machine does: other processes used {record['others_share']:.0%} of its CPU time meanwhile.",
        *(f"- {text}" for arm, text in MEANS.items() if arm in record["arms"]),
        "Ours is timed until its files are on the disk under their names. tar and FFCV's writer do not wait for the "
        'disk; "and synced" is with an fsync of their file.',
        f"The hours are the CPU time of {IMAGENET:,} such images divided by {CORES} cores: it is assumed that the work "
        "spreads over them without loss, and that the disk keeps up.",
    ]
    words += [f"Left out: {arm}: {reason}." for arm, reason in record["left_out"].items()]
    return words


def print_report(record: Record, console: Console) -> None:
    print_sheets(sheets(record), record["left_out"], console)


def markdown(record: Record) -> str:
    machine = "; ".join(f"{key} {value}" for key, value in record["machine"].items())
    lines = [f"# What conversions cost, CPU, {record['date']}", ""]
    for text in (*notes(record), f"Machine: {machine}."):
        lines += [text] if text.startswith("- ") and lines[-1].startswith("- ") else ["", text]
    for sheet in sheets(record):
        lines += ["", f"## {sheet.title}", "", _line(sheet.columns), _line(("---",) * len(sheet.columns))]
        lines += map(_line, sheet.rows)
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


def _line(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
