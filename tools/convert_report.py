"""What a person sees of a conversion: what is read, how far it is, what came of it."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TimeRemainingColumn
from rich.table import Table

from pipelines.manifest import NAME, SplitRecord
from ressl.batch import DataError
from tools.conversion import SplitWork, Telling
from tools.encode import Skipped, printable
from tools.estimate import size_text, time_text

TELL_SECONDS = 60  # between two lines, where there is no terminal for a bar
NAMED = 10  # bad images that are printed; all are in the manifest


def introduce(split: SplitWork, console: Console) -> None:
    """How many images there are, how many of them are done, and what was left out of the list."""
    line = f"{split.name}: {len(split.order):,} images, {len(split.images.classes):,} classes"
    if split.done:
        line += f"; goes on after {split.done:,} of them"
    for text in (line, *split.images.notes):
        console.print(printable(text), markup=False, highlight=False, soft_wrap=True)


@contextmanager
def shown(splits: Sequence[SplitWork], max_skipped: float, console: Console) -> Iterator[Telling]:
    """A bar for each split: images, images/s, MB/s written, time left, images left out. Bad images are named; more than
    the share `max_skipped` of a split raise DataError."""
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), "{task.fields[rate]}", TimeRemainingColumn())
    with Progress(*columns, "{task.fields[skipped]} skipped", console=console) as progress:
        tasks: dict[str, TaskID] = {}
        began, last, told = dict[str, float](), [time.monotonic()], [time.monotonic()]
        before = {split.name: split.done for split in splits}
        images, written, skipped = Counter[str](), Counter[str](), Counter[str]()
        for split in splits:
            skipped[split.name] = len(split.skipped)
            tasks[split.name] = progress.add_task(
                split.name, total=len(split.order), completed=split.done, rate="", skipped=skipped[split.name]
            )

        def advance(split: SplitWork, count: int, size: int) -> None:
            name = split.name
            images[name] += count
            written[name] += size
            seconds = time.monotonic() - began.setdefault(name, last[0]) + 1e-9
            last[0] = time.monotonic()
            rate = f"{images[name] / seconds:,.0f} images/s, {written[name] / seconds / 1e6:,.1f} MB/s"
            progress.update(tasks[name], advance=count, rate=rate, skipped=skipped[name])
            if not console.is_terminal and last[0] - told[0] >= TELL_SECONDS:  # where no bar is seen
                told[0], done, total = last[0], images[name] + before[name], len(split.order)
                left = time_text((total - done) * seconds / images[name])
                say(f"{name}: {done:,} of {total:,} images, {rate}, about {left} left, {skipped[name]:,} skipped")

        def skip(split: SplitWork, bad: Skipped) -> None:
            name = split.name
            skipped[name] += 1
            if skipped[name] <= NAMED:
                line = f"skipped {bad.name}: {bad.reason}"
                progress.console.print(line, markup=False, highlight=False, soft_wrap=True)
            if skipped[name] == NAMED + 1:
                progress.console.print(f"further skipped images are listed in {NAME}")
            refuse_too_many(split)

        def refuse_too_many(split: SplitWork) -> None:
            bad, total = skipped[split.name], len(split.order)
            if bad > max_skipped * total and max_skipped < 1:
                raise DataError(
                    f"{split.name}: {bad:,} or more of {total:,} images cannot be read, {max_skipped:.2%} may be left "
                    f"out: {name_some(split.skipped)}; repair or remove them, or raise --max-skipped"
                )

        def say(text: str) -> None:
            progress.console.print(printable(text), markup=False, highlight=False, soft_wrap=True)

        for split in splits:
            refuse_too_many(split)
        yield Telling(advance, skip, say)


def name_some(skipped: Sequence[Skipped]) -> str:
    return ", ".join(f"{one.name} ({one.reason})" for one in skipped[:3]) + ", ..." * (len(skipped) > 3)


def conclude(records: dict[str, SplitRecord], done: int, seconds: float, console: Console) -> None:
    """A table of what is there now; `done` images of it were encoded in this run."""
    table = Table()
    for column, where in (("file", "left"), ("images", "right"), ("size", "right"), ("skipped", "right")):
        table.add_column(column, justify="left" if where == "left" else "right")
    table.add_column("changed")
    for record in records.values():
        changes = ", ".join(f"{count:,} {rule}" for rule, count in record.changes.items()) or "nothing"
        row = (record.file, f"{record.count:,}", size_text(record.bytes), f"{len(record.skipped):,}", changes)
        table.add_row(*map(printable, row))
    console.print(table)
    rate = f", {done / seconds:,.0f} images/s" if seconds > 0 and done else ""
    console.print(f"took {time_text(seconds)}{rate}", highlight=False)
