import io
from pathlib import Path

import pytest
from rich.console import Console

from ressl.batch import DataError
from tools.profiling.record import Point, Runs, Verdict, read_profile
from tools.profiling.report import print_profile, write_profile


def shown(profile, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_profile(profile, console)
    return console.file.getvalue()


def slow(profile):
    """The same in steps of a minute, on eight GPUs."""
    stages = [stage.model_copy(update={"seconds": tuple(1000 * s for s in stage.seconds)}) for stage in profile.stages]
    runs = Runs(real=(61.234, 65.432), synthetic=(60.1, 60.2), loader=(0.1, 0.2), wait=(1.0, 2.0), launch=(0.3, 0.4))
    return profile.model_copy(update={"stages": tuple(stages), "runs": runs, "device": "cuda", "world_size": 8})


def wide(profile):
    """Whose figures take as many digits as any do."""
    stages = [
        stage.model_copy(update={"seconds": (0.00123, 9.87654), "flops": 1e11, "bytes": 1e11, "note": "a note"})
        for stage in profile.stages
    ]
    runs = Runs(real=(4567.8, 9123.4), synthetic=(1e-4, 2.34e-4), loader=(1e-5, 2e-3), wait=(1.0, 2.0))
    points = tuple(Point(count=count, images_per_s=(123456.7, 987654.3)) for count in (1, 64))
    update = {"stages": tuple(stages), "runs": runs, "loader_scaling": points, "scaling": points, "images": 8192}
    return profile.model_copy(update=update)


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("change", [lambda profile: profile, slow, wide])
def test_nothing_is_cut_off_in_a_terminal_of_80_columns(made_profile, width: int, change):
    profile = change(made_profile())
    text = shown(profile, width)
    assert "…" not in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    for words in (*(stage.name for stage in profile.stages), "real / synthetic", "memory peak", "decoding threads"):
        assert words in text


@pytest.mark.parametrize(("table", "column", "width"), [("stage", "images/s", 72), ("whole step", "range", 80)])
def test_columns_are_left_out_before_a_cell_is_cut_or_broken(made_profile, table: str, column: str, width: int):
    def lines(width: int) -> list[str]:
        found = shown(wide(made_profile()), width).splitlines()
        start = next(number for number, line in enumerate(found) if line.startswith(f"{table} "))
        return found[start : found.index("", start)]

    narrow, roomy = lines(width), lines(200)
    assert narrow[0].count(column) == roomy[0].count(column) - 1
    names = [line.strip().split("  ")[0] for line in roomy[2:] if line.strip() and "Share" not in line]
    assert all(any(line.strip().startswith(name) for line in narrow) for name in names)


def test_the_stages_of_a_step_are_told_with_share_and_rate(made_profile):
    line = next(line for line in shown(made_profile(), 80).splitlines() if line.strip().startswith("teacher"))
    assert line.split() == [
        "teacher",
        "20.0",
        "19.6",
        "to",
        "20.4",
        "16",
        "%",
        "5,000",
        "50.0",
        "(50",
        "%)",
        "5.00",
        "(50",
        "%)",
    ]


def test_the_verdict_stands_last_with_lines_to_copy(made_profile):
    advice = made_profile().verdict.advice[0].model_copy(update={"line": "launch.py convert " + "x" * 90})
    verdict = Verdict(binding="views", sentence="Cutting the views binds.", advice=(advice,))
    text = shown(made_profile(verdict=verdict), 80)
    end = text[text.index("Verdict: cutting the views") :]
    assert "Cutting the views binds." in end
    assert f"  {advice.line}\n" in end
    assert "at most 1,000 images/s instead of 800 (1.25x)" in end


def test_a_cpu_is_named_as_one(made_profile):
    assert "Measured on a CPU" in shown(made_profile(), 80)
    assert "Measured on a CPU" not in shown(made_profile(device="cuda"), 80)


def test_a_title_steers_neither_the_terminal_nor_the_tables(made_profile):
    text = shown(made_profile(title="a [red]b\x1b[2J"), 80)
    assert "a [red]b" in text
    assert "\x1b" not in text


def test_what_was_not_measured_is_said_or_left_out(made_profile):
    nothing = Runs(real=(), synthetic=(), loader=(), wait=())
    text = shown(made_profile(stages=(), runs=nothing, loader_scaling=(), scaling=(), timeline=()), 80)
    assert "not measured" in text
    assert "decoding threads" not in text
    assert "Verdict" in text


def test_notes_are_kept(made_profile):
    stage = made_profile().stages[0].model_copy(update={"note": "from the page cache"})
    text = shown(made_profile(stages=(stage,), notes=("few rounds",)), 80)
    assert "decode: from the page cache" in text
    assert "few rounds" in text


def test_the_files_hold_the_profile_and_nothing_else_is_left(made_profile, tmp_path: Path):
    for title in ("first", "second"):
        files = write_profile(made_profile(title=title), tmp_path / "new" / "out")
        assert [file.name for file in files] == ["profile.json", "profile.html"]
        assert read_profile(files[0]) == made_profile(title=title)
        assert title in files[1].read_text()
    assert sorted(path.name for path in files[0].parent.iterdir()) == ["profile.html", "profile.json"]


def test_a_place_that_cannot_be_written_is_named(made_profile, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file: cannot be written"):
        write_profile(made_profile(), tmp_path / "file")
