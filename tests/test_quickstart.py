"""The quickstart in small: IDX files of tiny images, through FFCV, to a summary."""

import gzip
import json
import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

import launch
from ressl.run_dir import lock

KEYS = {"images", "epochs", "images_per_s", "knn_before", "knn_after", "linear_before", "linear_after", "seconds"}


def write_idx(root: Path) -> Path:
    """300 + 100 images of 28 x 28 with a bright bar, whose place tells the class, as gzipped IDX files."""
    root.mkdir()
    for prefix, count in (("train", 300), ("t10k", 100)):
        labels = (np.arange(count) % 4).astype(np.uint8)
        images = np.random.default_rng(count).integers(0, 60, (count, 28, 28), np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[6 * label + 2 : 6 * label + 7] += 150
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            (root / f"{prefix}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
    return root


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["launch.py", "quickstart", *map(str, arguments)])
    return launch.main()


def test_it_leaves_a_summary_a_picture_and_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ffcv")
    images, out = write_idx(tmp_path / "idx"), tmp_path / "with space"
    assert run(monkeypatch, "--out", out, "--images", images, "--epochs", 1) == 0
    shown = capsys.readouterr().out
    assert "kNN top-1" in shown and "through ffcv" in shown
    summary = json.loads((out / "summary.json").read_text())
    assert summary.keys() == KEYS and summary["images"] == 300 and summary["epochs"] == 1
    assert all(0 <= summary[key] <= 1 for key in KEYS if key.startswith(("knn", "linear")))
    assert summary["knn_after"] > 0.5 and summary["images_per_s"] > 0
    assert (out / "views.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "data" / "train.beton").exists() and list((out / "checkpoints").iterdir())

    (out / "left over").write_text("from before")
    assert run(monkeypatch, "--out", out, "--images", images, "--epochs", 2) == 0
    assert json.loads((out / "summary.json").read_text())["epochs"] == 2
    assert not (out / "left over").exists()


def test_without_ffcv_it_runs_from_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tools.quickstart.find_spec", lambda name: None)
    images, out = write_idx(tmp_path / "idx"), tmp_path / "out"
    assert run(monkeypatch, "--out", out, "--images", images, "--epochs", 1) == 0
    shown = capsys.readouterr().out
    assert "FFCV is not installed" in shown and "through resident" in shown
    assert (out / "data" / "train.safetensors").exists()


def test_a_directory_of_somebody_elses_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "precious.txt").write_text("keep me")
    assert run(monkeypatch, "--out", tmp_path) == 2
    assert "is not empty and was not made by a quickstart" in capsys.readouterr().err
    assert (tmp_path / "precious.txt").exists()


def test_images_that_are_not_there_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--out", tmp_path / "out", "--images", tmp_path / "nowhere") == 2
    assert "nowhere" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_mistake_leaves_the_last_quickstart_and_any_run_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, mark in (("before", ".quickstart"), ("run", "config.yaml")):
        (tmp_path / name).mkdir()
        (tmp_path / name / mark).write_text("")
        (tmp_path / name / "precious.txt").write_text("keep me")
        assert run(monkeypatch, "--out", tmp_path / name, "--images", tmp_path / "nowhere") == 2
        assert (tmp_path / name / "precious.txt").exists()
    assert run(monkeypatch, "--out", tmp_path / "run", "--images", write_idx(tmp_path / "idx")) == 2
    assert (tmp_path / "run" / "precious.txt").exists()


@pytest.mark.parametrize("place", ["out/images", "."])
def test_images_inside_the_directory_to_replace_are_not_deleted(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / ".quickstart").touch()
    images = write_idx(tmp_path / "idx")
    if place != ".":
        images = images.rename(tmp_path / place)
    else:
        out = images / "out"
    assert run(monkeypatch, "--out", out, "--images", images) == 2
    assert "one lies in the other" in capsys.readouterr().err
    assert len(list(images.glob("*.gz"))) == 4


def test_a_quickstart_that_is_still_running_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    with lock(tmp_path / "out" / ".quickstart"):
        assert run(monkeypatch, "--out", tmp_path / "out", "--images", write_idx(tmp_path / "idx")) == 2
    assert f"out is in use by process {os.getpid()} on " in capsys.readouterr().err
