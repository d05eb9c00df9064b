"""Runs on a disk that fills up: they go on or end in one line, and lose nothing that was whole."""

import json
from collections.abc import Callable
from pathlib import Path

from ressl import checkpoint
from ressl.run_dir import checkpoints_path

Launch = Callable[..., tuple[int, str, str]]
PAGE = 4096


def state(run: Path) -> list[bytes]:
    (newest, *_) = checkpoint.found(checkpoints_path(run))
    return [(newest / name).read_bytes() for name in (checkpoint.MODEL, checkpoint.TRAINING)]


def test_on_a_disk_of_any_size_a_run_ends_in_one_line_and_can_be_finished_later(
    disk: Callable[[int], Path], ressl: Launch, tiny_config: Path, tmp_path: Path
) -> None:
    short = ["optim.epochs=1", "run.checkpoint.steps=2"]
    assert ressl("pretrain", tiny_config, *short)[0] == 0
    whole, codes, early_ones = state(tmp_path / "run"), set(), set()
    for number in range(20):
        place = disk(PAGE * (2 + 4 * number))
        run = place / f"run{number}"
        code, out, err = ressl("pretrain", tiny_config, *short, f"run.out_dir={run}")
        codes.add(code)
        assert code in (0, 2, 4) and "Traceback" not in err and err.count("ressl: error: ") == (code != 0), err
        if "needs" in err:
            assert "MiB are free in" in err and "No space left on device" in err
            early = "; the next one is tried" in out  # else it was the last one
            assert early == ("those before it stay" in out or "there is none yet, so all is lost if" in out)
            early_ones.add(early)
        for path in checkpoint.found(checkpoints_path(run)):
            checkpoint.read(path)  # whole, or it would not be there
        if (run / "metrics.jsonl").exists():
            assert all(json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
        place = disk(1 << 24)
        assert ressl("pretrain", tiny_config, *short, f"run.out_dir={run}")[0] == 0
        assert state(run) == whole
        assert not [*checkpoints_path(run).glob(".*")]
        for path in sorted(place.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    assert codes >= {0, 4} and True in early_ones
