"""Runs of two ranks that are killed again and again end as one that was not: the short form of `make soak`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(("source", "kills"), [("resident", 20), ("ffcv", 3), ("dali", 3)])
@pytest.mark.timeout(600)
def test_killed_at_random_moments_a_run_becomes_what_it_would_have_been(
    source: str, kills: int, repo: Path, tmp_path: Path
) -> None:
    for module in {"ffcv": ["ffcv"], "dali": ["nvidia.dali"]}.get(source, []):
        pytest.importorskip(module)
    command = [sys.executable, str(repo / "tests" / "soak.py"), "--kills", str(kills), "--source", source]
    environment = os.environ | {"PYTHONPATH": str(repo)}
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "soak")], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "soak" / "report.json").read_text())
    assert report["kills"] == kills and report["runs"] == 1 and report["differing"] == []
    if kills >= 20:  # enough to have met all that there is to meet
        assert report["while_saving"] >= 2 and report["torn"] >= 1 and report["gone_back"] >= 1
        assert 0 < report["one_rank"] < kills and report["while_starting"] < kills / 2
