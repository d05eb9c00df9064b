import io
import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console

from ressl.recorder import NonFiniteLoss, Recorder
from ressl.run_dir import keep_metrics_until


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
def test_a_loss_that_is_not_finite_is_not_recorded_but_raised(value: float, tmp_path: Path) -> None:
    with recorder(tmp_path, io.StringIO()) as rec, pytest.raises(NonFiniteLoss, match="at step 3: lower optim.lr"):
        rec.step(3, [{"loss": torch.tensor(value)}, {"loss": torch.tensor(1.0)}], lr=0.1)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_evaluations_and_bad_images_are_recorded_and_told(tmp_path: Path) -> None:
    text = io.StringIO()
    with recorder(tmp_path, text) as rec:
        rec.bad_image("a[/x].jpg: truncated; replaced by b.jpg")
        rec.evaluated(4, {"knn": 0.5}, 2.0)
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["knn"] == 0.5
    bad = json.loads((tmp_path / "bad_images.jsonl").read_text())
    assert bad == {"after_step": 0, "rank": 0, "message": "a[/x].jpg: truncated; replaced by b.jpg"}
    assert "warning: a[/x].jpg: truncated; replaced by b.jpg" in text.getvalue()
    assert "after epoch 1: knn 50.00 %  (2 s)" in text.getvalue()


def test_records_after_the_step_gone_on_from_are_dropped_and_a_torn_line_too(tmp_path: Path) -> None:
    record_all(tmp_path, io.StringIO())
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    keep_metrics_until(tmp_path, 4)
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [3, 4]
