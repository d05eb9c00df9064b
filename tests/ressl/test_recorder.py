import io
import json
import math
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from rich.console import Console

from ressl.batch import DataError
from ressl.recorder import BadImages, Recorder
from ressl.run_dir import keep_metrics_until, lines_of


def recorder(out: Path, text: io.StringIO, every: int = 3) -> Recorder:
    console = Console(file=text, width=60)
    return Recorder(out, console, every=every, images=10, steps_per_epoch=4, epochs=2)


def record_all(out: Path, text: io.StringIO) -> list[dict]:
    with recorder(out, text) as rec:
        for step in range(1, 9):
            rec.step(
                step, [{"loss": torch.tensor(step - d), "agreement": torch.tensor(0.5)} for d in (0.5, -0.5)], lr=0.1
            )
        assert rec.images_per_s > 0
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_it_reads_every_few_steps_and_at_the_end_of_each_epoch(tmp_path: Path) -> None:
    text = io.StringIO()
    found = record_all(tmp_path, text)
    assert [(r["step"], r["loss"], r["epoch"]) for r in found] == [
        (3, 3.0, 0.75), (4, 4.0, 1.0), (6, 6.0, 1.5), (8, 8.0, 2.0),
    ]  # fmt: skip
    assert all(r["images_per_s"] > 0 and r["lr"] == 0.1 for r in found)
    lines = text.getvalue().splitlines()
    assert [line.split("  ")[:2] for line in lines] == [["epoch 1/2", "step 4/8"], ["epoch 2/2", "step 8/8"]]
    assert all("left" in line for line in lines)


def test_values_stay_on_the_device_between_records(tmp_path: Path) -> None:
    """A meta tensor cannot be read: only the steps that are recorded may ask for it."""
    with recorder(tmp_path, io.StringIO()) as rec:
        rec.step(1, [{"loss": torch.empty((), device="meta")}], lr=0.1)
        with pytest.raises(RuntimeError, match="meta"):
            rec.step(3, [{"loss": torch.empty((), device="meta")}], lr=0.1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_null_in_the_log(value: float, tmp_path: Path) -> None:
    with recorder(tmp_path, io.StringIO()) as rec:
        rec.step(3, [{"loss": torch.tensor(value)}, {"loss": torch.tensor(1.0)}], lr=0.1)
    (record,) = lines_of(tmp_path / "metrics.jsonl")
    assert record["loss"] is None and record["lr"] == 0.1


def test_steps_that_were_left_out_are_counted(tmp_path: Path) -> None:
    with recorder(tmp_path, io.StringIO()) as rec:
        for step, skipped in ((3, 0), (4, 2)):
            logs = [{"loss": torch.tensor(1.0), "skipped": torch.tensor(skipped)}] * 2
            rec.step(step, logs, lr=0.1)
            assert rec.skipped == skipped
    assert [record.get("skipped") for record in lines_of(tmp_path / "metrics.jsonl")] == [None, 2]


def test_what_is_watched_is_recorded_and_a_warning_told_once(tmp_path: Path) -> None:
    text = io.StringIO()
    rec = Recorder(
        tmp_path, Console(file=text, width=60), every=1, images=10, steps_per_epoch=4, epochs=2,
        watch=lambda: ({"effective_rank": 1.5}, "the embeddings [/x] collapse"),
    )  # fmt: skip
    with rec:
        for step in (1, 2):
            rec.step(step, [{"loss": torch.tensor(1.0)}], lr=0.1)
    assert text.getvalue().count("warning: the embeddings [/x] collapse") == 1
    records = lines_of(tmp_path / "metrics.jsonl")
    assert [(r["effective_rank"], r["warning"]) for r in records] == [(1.5, "the embeddings [/x] collapse")] * 2


def test_a_full_disk_is_told_once_and_leaves_whole_lines(tmp_path: Path) -> None:
    text = io.StringIO()
    with recorder(tmp_path, text, every=1) as rec:
        rec.step(1, [{"loss": torch.tensor(1.0)}], lr=0.1)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        size = (tmp_path / "metrics.jsonl").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, hard))  # room for a part of the next line
        try:
            for step in (2, 3):
                rec.step(step, [{"loss": torch.tensor(1.0)}], lr=0.1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        rec.step(4, [{"loss": torch.tensor(1.0)}], lr=0.1)
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 4]
    said = " ".join(text.getvalue().split())
    assert said.count("metrics.jsonl: cannot be written") == 1 and "the run goes on without" in said


def test_evaluations_are_recorded_and_told(tmp_path: Path) -> None:
    text = io.StringIO()
    with recorder(tmp_path, text) as rec:
        rec.evaluated(4, {"knn": 0.5}, 2.0)
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["knn"] == 0.5
    assert "after epoch 1: knn 50.00 %  (2 s)" in text.getvalue()


def test_bad_images_are_recorded_and_told_those_before_the_run_is_open_too(tmp_path: Path) -> None:
    text = io.StringIO()
    bad = BadImages(tmp_path / "run", Console(file=text, width=60), rank=1)
    bad.report("a[/x].jpg: truncated; replaced by b.jpg")
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    bad.open()
    bad.check(100, 0.5)
    bad.after_step = 7
    bad.report("c.jpg: empty file; replaced by d.jpg", training=False)
    found = lines_of(tmp_path / "run" / "bad_images.jsonl")
    assert found == [
        {"after_step": 0, "rank": 1, "training": True, "message": "a[/x].jpg: truncated; replaced by b.jpg"},
        {"after_step": 7, "rank": 1, "training": False, "message": "c.jpg: empty file; replaced by d.jpg"},
    ]
    assert "warning: a[/x].jpg: truncated; replaced by b.jpg" in text.getvalue()


def test_bad_images_are_counted_once_each_over_ranks_threads_and_epochs(tmp_path: Path) -> None:
    ranks = [BadImages(tmp_path, Console(quiet=True), rank=rank) for rank in (0, 1)]
    for bad in ranks:
        bad.open()

    def report(part: int) -> None:
        for epoch in range(3):  # each time another takes its place
            for number in range(part, 200, 4):
                ranks[part % 2].report(f"{number}.jpg: empty file; replaced by {number + epoch}.jpg")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(report, range(4)))
    for bad in ranks:
        bad.check(1000, 0.2)
        with pytest.raises(DataError, match=r"^200 of 1,000 images could not be read, more than data.max_bad=0.199"):
            bad.check(1000, 0.199)
    assert len(lines_of(tmp_path / "bad_images.jsonl")) == 600


def test_what_an_interrupted_run_said_of_an_image_is_not_said_twice(tmp_path: Path) -> None:
    for _ in range(2):
        bad = BadImages(tmp_path, Console(quiet=True), rank=0)
        bad.open()
        bad.report("a.jpg: truncated; replaced by b.jpg")
    assert len(lines_of(tmp_path / "bad_images.jsonl")) == 1


def test_records_after_the_step_gone_on_from_are_dropped_and_a_torn_line_too(tmp_path: Path) -> None:
    record_all(tmp_path, io.StringIO())
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    keep_metrics_until(tmp_path, 4)
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [3, 4]
