import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from ressl.ema import ema_update_, make_teacher
from tools import bench_update
from tools.bench_update import COLUMNS, COPY, MOMENTUM, Job, ema_loop, jobs, report, steps_for, time_jobs

CPU = torch.device("cpu")


def test_ratios_are_taken_within_a_round() -> None:
    """1,000 parameters of 12 bytes; copies of 12,000 values move 96,000 bytes: 8 times as many."""
    work = [Job("ours", lambda: None, 12, "theirs"), Job("theirs", lambda: None, 12)]
    seconds = {COPY: [8.0, 16.0, 8.0], "ours": [2.0, 2.0, 2.0], "theirs": [6.0, 4.0, 8.0]}
    ours, theirs = report(work, seconds, parameters=1000, copied=12_000)
    assert ours == (
        "ours", "2,000.000", "2,000.000 to 2,000.000", "12", "2.00 [1.00 to 2.00]", "3.00 [2.00 to 4.00] (theirs)"
    )  # fmt: skip
    assert theirs[4] == "6.00 [2.00 to 8.00]" and theirs[5] == ""
    assert len(ours) == len(COLUMNS)


def test_the_loop_does_what_our_update_does() -> None:
    student = nn.Linear(3, 4)
    ours, loop = make_teacher(student), make_teacher(student)
    with torch.no_grad():
        student.weight.add_(1)
    ema_update_(ours, student, MOMENTUM)
    ema_loop(loop, student)
    torch.testing.assert_close(list(ours.parameters()), list(loop.parameters()))
    assert not torch.equal(loop.weight, make_teacher(nn.Linear(3, 4)).weight)


def test_every_job_moves_what_it_is_to_move_and_leaves_it_finite() -> None:
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    teacher = make_teacher(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    work = jobs(student, teacher)
    names = {job.name for job in work}
    assert all(job.baseline is None or job.baseline in names for job in work)
    for job in work:
        before = [p.detach().clone() for p in (*student.parameters(), *teacher.parameters())]
        job.run()
        after = [*student.parameters(), *teacher.parameters()]
        moved = [not torch.equal(old, new) for old, new in zip(before, after, strict=True)]
        assert moved == [not job.name.startswith("EMA")] * 4 + ["EMA" in job.name] * 4, job.name
    seconds = time_jobs(work, CPU, steps=1, rounds=2, copied=100)
    assert seconds.keys() == {COPY, *names} and all(len(times) == 2 for times in seconds.values())
    assert all(p.isfinite().all() for p in (*student.parameters(), *teacher.parameters()))


def test_large_networks_take_fewer_steps() -> None:
    assert [steps_for(count, CPU) for count in (1_000, 1_000_000, 100_000_000)] == [20, 10, 2]


def test_it_writes_a_table_and_every_number(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(tiny_config), "--rounds", "2", "--steps", "1", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["bench_update", *arguments])
    monkeypatch.setattr(bench_update, "COPIED", 1000)
    monkeypatch.setenv("COLUMNS", "200")
    assert bench_update.main() == 0
    assert "AdamW, unfused" in capsys.readouterr().out
    (record,) = (json.loads(path.read_text()) for path in (tmp_path / "out").glob("update-tiny-cpu-*.json"))
    assert len(record["seconds"]) == 10 and {len(times) for times in record["seconds"].values()} == {2}
    assert record["parameters"] > 1000 and record["machine"]["device"] == "cpu"
    (table,) = (path.read_text() for path in (tmp_path / "out").glob("*.md"))
    assert table.count("\n|") == 11  # names, rule and nine jobs


@pytest.mark.parametrize(
    ("override", "code", "message"),
    [
        ("optim.lr=x", 2, "optim.lr: expected a valid number"),
        ("run.precision=fp16", 4, "run.precision=fp16 needs a GPU"),
    ],
)
def test_a_mistake_ends_in_one_message(
    override: str,
    code: int,
    message: str,
    tiny_config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_update", str(tiny_config), override])
    assert bench_update.main() == code and message in capsys.readouterr().err
