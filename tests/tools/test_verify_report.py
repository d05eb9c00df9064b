"""The table of `verify`, and the lines below it."""

import io

from rich.console import Console

from tools.verify_report import COLUMNS, SHOWN, Report, print_reports


def printed(*reports: Report, width: int = 200) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_reports(reports, [], console)
    return console.file.getvalue()


def test_a_cell_says_how_many_problems_there_are_and_what_was_not_checked():
    report = Report("train")
    assert report.cell("structure") == "ok"
    report.add("structure", "a")
    assert report.cell("structure") == "1 problem"
    report.leave("no time", "structure", "source")
    report.leave("another reason", "source")
    report.add("structure", "b")
    assert report.cell("structure") == "2 problems; not checked"
    assert report.cell("source") == "not checked"
    report.leave("too large", "decoding")
    assert report.reasons() == ["structure, source not checked: no time", "decoding not checked: too large"]


def test_the_first_problems_of_all_splits_are_shown_and_the_rest_counted():
    one, other = Report("train"), Report("val")
    for i in range(SHOWN - 1):
        one.add("checksums", f"train {i}")
    for i in range(3000):
        other.add("decoding", f"val {i}")
    text = printed(one, other)
    assert text.count("\ntrain ") + text.count("\nval ") == SHOWN
    assert f"and {3000 - 1:,} further problems" in text
    assert "3,000 problems" in text
    assert len(other.lines) == SHOWN


def test_the_advice_is_to_copy_or_to_convert_again_or_to_look_at_the_source():
    whole, damaged, moved = Report("a"), Report("b"), Report("c")
    damaged.add("checksums", "x")
    moved.add("source", "y")
    assert "again" not in printed(whole)
    assert "Copy the files again" in printed(whole, damaged, moved)
    assert "The files are whole" in printed(whole, moved)


def test_no_word_of_the_table_is_cut_on_a_terminal_of_80_columns():
    one, other = Report("train"), Report("manifest")
    one.totals.update(images=1_281_167, bytes=138_200_000_000)
    for column in COLUMNS:
        for _ in range(2):
            one.add(column, "x")
        one.leave("no time", column)
        other.leave("the manifest is damaged", column)
    lines = [line for line in printed(one, other, width=80).splitlines() if line[0] in "│┃"]
    assert max(map(len, lines)) <= 80
    words = " ".join(lines).split()
    for column in COLUMNS:
        assert column in words
    assert words.count("problems;") == 4
    assert words.count("checked") == 8
    assert {"train", "manifest", "1,281,167", "138.2", "GB"} <= set(words)


def test_notes_of_no_split_stand_below_the_table():
    console = Console(file=io.StringIO(), width=80)
    print_reports([Report("train")], ["val.beton: not in manifest.json"], console)
    assert console.file.getvalue().splitlines()[-1] == "val.beton: not in manifest.json"


def test_names_cannot_steer_the_terminal_or_be_taken_for_markup():
    report = Report("train")
    report.add("checksums", "[red]a\x1b[31m\nb[/red].jpg: damaged")
    assert "[red]a\ufffd[31m\ufffdb[/red].jpg: damaged\n" in printed(report)
