"""What `verify` found: a row for each split, then a line for each problem."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tools.estimate import size_text

Column = Literal["structure", "checksums", "decoding", "source"]
COLUMNS: tuple[Column, ...] = ("structure", "checksums", "decoding", "source")
SHOWN = 20  # problems that are printed


@dataclass(frozen=True, slots=True)
class Report:
    """Of one split, filled while it is checked; problems are counted, and the first of them kept."""

    title: str
    counts: Counter[Column] = field(default_factory=Counter)
    lines: list[str] = field(default_factory=list)
    unchecked: dict[Column, str] = field(default_factory=dict)  # why
    notes: list[str] = field(default_factory=list)
    totals: Counter[str] = field(default_factory=Counter)  # "images" and "bytes"

    def add(self, column: Column, line: str) -> None:
        self.counts[column] += 1
        if len(self.lines) < SHOWN:
            self.lines.append(line)

    def leave(self, why: str, *columns: Column) -> None:
        """These were not checked, unless another reason was given before."""
        for column in columns:
            self.unchecked.setdefault(column, why)

    def cell(self, column: Column) -> str:
        count = self.counts[column]
        found = [f"{count:,} problem{'s' * (count != 1)}"] if count else []
        if column in self.unchecked:
            found.append("not checked")
        return "; ".join(found) or "ok"

    def reasons(self) -> list[str]:
        """Why something was not checked, a line for each reason."""
        whys = dict.fromkeys(self.unchecked[column] for column in COLUMNS if column in self.unchecked)
        return [
            f"{', '.join(column for column in COLUMNS if self.unchecked.get(column) == why)} not checked: {why}"
            for why in whys
        ]


def print_reports(reports: Sequence[Report], notes: Sequence[str], console: Console) -> None:
    """With `notes` of none of them below the table."""
    rows = [("split", "images", "size", *COLUMNS)]
    for report in reports:
        totals = report.totals
        cells = [report.title, f"{totals['images']:,}", size_text(totals["bytes"]), *map(report.cell, COLUMNS)]
        rows.append(tuple(printed(cell) for cell in cells))
    table = Table()
    wide = sum(max(map(len, column)) + 3 for column in zip(*rows, strict=True)) + 1 <= console.width
    for column in zip(*rows, strict=True):
        longest = max(len(word) for cell in column for word in cell.split())
        table.add_column(column[0], width=None if wide else longest)  # rich would cut words
    for row in rows[1:]:
        table.add_row(*(Text(cell, style=_colour(cell)) for cell in row))
    console.print(table)
    for report in reports:
        for note in (*report.reasons(), *report.notes):
            _print(console, f"{report.title}: {note}")
    for note in notes:
        _print(console, note)
    problems = sum(report.counts.total() for report in reports)
    lines = [line for report in reports for line in report.lines][:SHOWN]
    for line in lines:
        _print(console, line)
    if problems > len(lines):
        _print(console, f"and {problems - len(lines):,} further problems")
    if not problems:
        return
    if any(report.counts[column] for report in reports for column in COLUMNS[:3]):
        _print(console, "Copy the files again from where they are whole, or convert again with --overwrite.")
    else:
        advice = "if it is right, convert again with --overwrite."
        _print(console, f"The files are whole, but the source is not what they were made of: {advice}")


def printed(text: str) -> str:
    """Names come from files that may be damaged: nothing in them may steer a terminal."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


def _colour(cell: str) -> str:
    return "red" if " problem" in cell else "green" if cell == "ok" else ""


def _print(console: Console, line: str) -> None:
    console.print(printed(line), markup=False, highlight=False, soft_wrap=True)
