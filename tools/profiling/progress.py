"""What a profile is at, and how long it will take: a bar on a terminal, a line for each phase elsewhere."""

from time import perf_counter
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn


class Phases:
    def __init__(self, console: Console, *, enabled: bool = True) -> None:
        self.console, self.enabled = console, enabled
        self.began, self.text = perf_counter(), ""
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("about {task.fields[left]:.0f} s left"),
            console=console,
            transient=True,
            disable=not (enabled and console.is_terminal),
        )
        self.task = self.bar.add_task("", total=None, left=0.0)

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def tell(self, text: str, left: float) -> None:
        """`left`: seconds until all is done, as far as is known; nobody has less than none left."""
        left = max(0.0, left)
        done = perf_counter() - self.began
        self.bar.update(self.task, description=text, completed=done, total=done + left, left=left)
        if self.enabled and not self.console.is_terminal and text != self.text:
            self.console.print(f"{text}, about {left:.0f} s left", soft_wrap=True)
        self.text = text
