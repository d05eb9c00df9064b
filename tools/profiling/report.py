"""What a person sees of a profile in the terminal, and the files that are kept of it."""

from pathlib import Path

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from ressl.batch import DataError
from tools.output import atomic_output
from tools.profiling.figures import BINDS, ON_A_CPU, advice_gain, images_per_s, machine_line, setting_line
from tools.profiling.page import page
from tools.profiling.record import Profile
from tools.profiling.tables import Sheet, run_sheet, scaling_sheet, stage_sheet, stage_words, totals
from tools.verify_report import printed


def write_profile(profile: Profile, out: Path) -> list[Path]:
    """Writes profile.json and profile.html into `out` (made if missing), each whole or not at all; returns their paths.

    Raises DataError where they cannot be written.
    """
    files = {"profile.json": profile.model_dump_json(indent=1) + "\n", "profile.html": page(profile)}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            with atomic_output(out / name) as file:
                file.write(text.encode())
    except OSError as error:
        raise DataError(f"{out}: cannot be written: {error.strerror or error}; choose another --out") from None
    return [out / name for name in files]


def print_profile(profile: Profile, console: Console) -> None:
    """The report that people quote, in 80 columns; the verdict comes last, where the eye is."""
    console.print(Text.assemble((printed(profile.title), "bold"), f": {setting_line(profile)}"))
    console.print(Text(printed(machine_line(profile)), style="dim"))
    if profile.device == "cpu":
        console.print(Text(ON_A_CPU, style="yellow"))
    console.print()
    print_sheet(stage_sheet(profile), console)
    console.print(Text("\n".join(map(printed, stage_words(profile))) + "\n", style="dim"))
    print_sheet(run_sheet(profile), console)
    print_sheet(scaling_sheet("decoding threads", profile.loader_scaling), console)
    if len(profile.scaling) > 1:
        print_sheet(scaling_sheet("processes", profile.scaling, ideal=profile.device == "cuda"), console)
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for name, text in totals(profile):
        table.add_row(name, Text(text))
    console.print(table)
    for note in profile.notes:
        console.print(Text(printed(note), style="dim"))
    console.print()
    _print_verdict(profile, console)


def print_sheet(sheet: Sheet, console: Console) -> None:
    """In the width of the console: closer together, then without the columns that it can spare, then in more lines.
    Nothing where it has no rows."""
    if not sheet.rows:
        return
    fewer = [sheet.without(sheet.spare[:count]) for count in range(1, len(sheet.spare) + 1)]
    tables = [_table(sheet, gap=1), *(_table(one, gap=0) for one in (sheet, *fewer))]
    free = console.options.update_width(10 * console.width)  # in less a table measures as wide as it may be
    fitting = (table for table in tables if console.measure(table, options=free).maximum <= console.width)
    console.print(next(fitting, tables[-1]))
    console.print()


def _table(sheet: Sheet, *, gap: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, gap, 0, 0))
    for number, column in enumerate(sheet.columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in sheet.rows:
        heading = len(row) == 1
        indent = " " * any(len(other) == 1 and not heading for other in sheet.rows)
        table.add_row(*(Text(cell, style="italic" if heading else "") for cell in (indent + row[0], *row[1:])))
    return table


def _print_verdict(profile: Profile, console: Console) -> None:
    verdict, now = profile.verdict, images_per_s(profile, profile.runs.real)
    console.print(Rule(Text(f"Verdict: {BINDS[verdict.binding]}", style="bold"), style="cyan"))
    console.print(Text(printed(verdict.sentence), style="bold"))
    for advice in verdict.advice:
        console.print()
        console.print(Text(f"  {printed(advice.line)}", style="bold green"), soft_wrap=True)  # to be copied whole
        for text in (advice.why, advice_gain(advice.images_per_s, now)):
            console.print(Padding(Text(printed(text)), (0, 0, 0, 4)))
