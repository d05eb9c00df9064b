import json
import sys
from pathlib import Path

import pytest

from tools import bench
from tools.bench import Part, measure


def test_rounds_are_interleaved_and_the_first_is_not_counted() -> None:
    calls: list[str] = []
    parts = [Part(name, lambda steps, name=name: calls.extend([name] * steps)) for name in ("a", "b")]
    seconds = measure(parts, steps=2, rounds=3, wait=lambda: None)
    assert calls == ["a", "a", "b", "b"] * 4
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}
    assert all(value >= 0 for values in seconds.values() for value in values)


def test_it_times_the_parts_of_a_run_and_writes_a_table(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["bench", str(tiny_config), "--rounds", "2", "--steps", "3", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", arguments)
    assert bench.main() == 0
    assert "all together" in capsys.readouterr().out
    (record,) = (json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json"))
    assert {name: len(values) for name, values in record["seconds_a_step"].items()} == {
        "frames": 2, "views": 2, "training step": 2, "all together": 2,
    }  # fmt: skip
    (table,) = ((path.read_text()) for path in (tmp_path / "out").glob("*.md"))
    assert table.count("\n| ") == 5


@pytest.mark.parametrize(
    ("extra", "message"),
    [(["--steps", "99"], "--steps 99, but an epoch has only 4"), (["optim.lr=x"], "optim.lr: expected a valid number")],
)
def test_a_mistake_ends_in_one_message(
    extra: list[str],
    message: str,
    tiny_config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", str(tiny_config), *extra])
    assert bench.main() == 2 and message in capsys.readouterr().err
