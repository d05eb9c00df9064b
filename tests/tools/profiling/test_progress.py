import io

from rich.console import Console

from tools.profiling.progress import Phases


def test_where_there_is_no_terminal_each_phase_is_one_line() -> None:
    file = io.StringIO()
    with Phases(Console(file=file, width=80)) as phases:
        for left in (9.4, 8.0, 5.0):
            phases.tell("measuring", left)
        phases.tell("ending", 1.0)
        phases.tell("late", -2.0)
    lines = file.getvalue().splitlines()
    assert lines == ["measuring, about 9 s left", "ending, about 1 s left", "late, about 0 s left"]


def test_on_a_terminal_a_bar_shows_the_phase_and_the_time_left() -> None:
    file = io.StringIO()
    with Phases(Console(file=file, width=80, force_terminal=True)) as phases:
        phases.tell("measuring", 9.4)
        phases.bar.refresh()
    assert "measuring" in file.getvalue() and "about 9 s left" in file.getvalue()


def test_ranks_but_the_first_are_silent() -> None:
    file = io.StringIO()
    with Phases(Console(file=file, width=80), enabled=False) as phases:
        phases.tell("measuring", 9.4)
    assert file.getvalue().strip() == ""
