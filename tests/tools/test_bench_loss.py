import json
import os
import sys
from pathlib import Path

import pytest
import torch

from tools import bench_loss


def test_it_times_every_way_beside_the_definition_and_writes_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--size", "64,2,16384,16", "--rounds", "2", "--seconds", "0", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["bench_loss", *options])
    assert bench_loss.main() == 0
    assert "chunked" in capsys.readouterr().out
    (record,) = (json.loads(path.read_text()) for path in (tmp_path / "out").glob("loss-*.json"))
    (entry,) = record["sizes"]
    assert entry["size"] == [64, 2, 16384, 16] and record["machine"]["torch"]
    assert {"torch", "chunked"} <= set(entry["seconds"]) and all(len(times) == 2 for times in entry["seconds"].values())
    (table,) = (path.read_text() for path in (tmp_path / "out").glob("loss-*.md"))
    assert table.count("\n| 64 x 2, 16,384, 16 |") == len(entry["seconds"])
    assert table.count(" | 1.00 (1.00 to 1.00) | ") == 1  # the definition over itself


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="a peak cannot be forgotten here")
def test_the_peak_is_that_of_the_similarities() -> None:
    """Two matrices of the definition at least, of 16 MiB each; a tile of 8 MiB and what is small in chunks."""
    cpu = torch.device("cpu")
    step = bench_loss.step_of((128, 1, 32768, 8), "float32", cpu)
    definition, chunked = (bench_loss.peak_bytes(step, way, cpu) for way in (bench_loss.TORCH, bench_loss.CHUNKED))
    assert definition >= 32 << 20
    assert 7 << 20 <= chunked <= definition / 2  # some of its pages may be there already


@pytest.mark.parametrize("size", ["8,2,512", "8,2,512,x", "8,0,512,16"])
def test_a_size_that_is_none_is_refused_in_one_line(
    size: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_loss", "--size", size])
    with pytest.raises(SystemExit, match="2"):
        bench_loss.main()
    assert f"argument --size: {size!r}" in capsys.readouterr().err
