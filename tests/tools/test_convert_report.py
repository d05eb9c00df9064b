"""A person sees how far a conversion is, also where there is no terminal, and whatever names files have."""

import io
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from pipelines.beton import open_beton
from tools import convert_report
from tools.convert import convert


def save(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 12, 3), np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    """Two classes of five images."""
    for i in range(10):
        save(tmp_path / "src" / "ab"[i // 5] / f"{i}.png", i)
    return tmp_path / "src"


@pytest.fixture
def output():
    return io.StringIO()


@pytest.fixture
def console(output):
    return Console(file=output, width=200)


def test_a_line_now_and_then_tells_how_far_it_is_where_there_is_no_terminal(
    folder, tmp_path, console, output, monkeypatch
):
    monkeypatch.setattr(convert_report, "TELL_SECONDS", 0)
    (folder / "a" / "0.png").write_text("text")
    convert(str(folder), tmp_path / "out", "ffcv", workers=1, max_skipped=0.5, console=console)
    lines = re.findall(r"train: (\d+) of 10 images, .*images/s, .*MB/s, about .* left, 1 skipped", output.getvalue())
    assert lines == ["4", "8", "10"]
    with io.StringIO() as file:  # a bar tells it
        terminal = Console(file=file, width=200, force_terminal=True)
        convert(str(folder), tmp_path / "other", "ffcv", max_skipped=0.5, console=terminal)
        assert "of 10 images, " not in file.getvalue()


def test_a_destination_that_is_not_text_is_printed(folder, tmp_path, console, output):
    out = tmp_path / os.fsdecode(b"caf\xe9")
    convert(str(folder), out, "ffcv", console=console)
    assert "caf\ufffd" in output.getvalue()
    assert open_beton(out / "train.beton").label.tolist() == [0] * 5 + [1] * 5
