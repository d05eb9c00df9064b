"""Progress of what is decoded before the first step, where a source keeps all images in memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from ressl.batch import Split


@contextmanager
def shown_decoding(console: Console, *, enabled: bool = True) -> Iterator[Callable[[Split, int, int], None]]:
    """Gives what is to be told (split, images done, images in all): a bar for each split, with rate and time left."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    tasks: dict[Split, TaskID] = {}
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not enabled) as progress:

        def tell(split: Split, done: int, count: int) -> None:
            if split not in tasks:
                tasks[split] = progress.add_task(f"decoding {split}", total=count, rate="")
            speed = progress.tasks[tasks[split]].speed
            progress.update(tasks[split], completed=done, rate=f"{speed:,.0f} images/s" if speed else "")

        yield tell
