import threading
from pathlib import Path

import pytest
import torch

from ressl import checkpoint
from ressl.checkpoint import Checkpoint, Manifest, NonFiniteWeights, SaveError
from ressl.saver import Saver
from ressl.snapshot import Snapshot


def snapshot(step: int, value: float = 1.0, *, left_out: bool = False) -> Snapshot:
    about = Manifest(step=step, images=5, data=0, world_size=1, local_ranks=1, device="cpu", left_out=False)
    saved = Checkpoint(about, {"w": torch.full((4,), value)}, {"optimizer": {}})
    return Snapshot(saved, torch.tensor(left_out), None)


def saver(directory: Path, told: list[str], **options) -> Saver:
    return Saver(directory / "c", keep=2, log=directory / "metrics.jsonl", tell=told.append, **options)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "c").iterdir())


def test_it_writes_while_the_run_goes_on_and_keeps_the_newest(tmp_path: Path) -> None:
    threads = []
    told: list[str] = []
    it = saver(tmp_path, told)
    for step in range(1, 6):
        it.save(lambda step=step: (threads.append(threading.current_thread()), snapshot(step))[1])
    it.finish()
    assert names(tmp_path) == ["step-00000004", "step-00000005"] and it.saved == 5 and told == []
    assert set(threads) == {threading.main_thread()}  # the copy is made between two steps, the rest is not
    assert 0 < it.held_s < 60


def test_another_rank_writes_nothing(tmp_path: Path) -> None:
    it = saver(tmp_path, [])
    it.save(lambda: None)
    it.finish()
    assert not (tmp_path / "c").exists() and it.saved == 0


def test_a_disk_that_refuses_is_told_and_the_next_save_tries_again(tmp_path: Path) -> None:
    told: list[str] = []
    it = saver(tmp_path, told)
    (tmp_path / "c").touch()  # a file where the directory is to be
    it.save(lambda: snapshot(1))
    with pytest.raises(SaveError, match="step-00000001: cannot be written"):
        it.finish()
    assert len(told) == 1 and told[0].endswith(
        "; there is none yet, so all is lost if the run is killed now; the next one is tried"
    )
    (tmp_path / "c").unlink()
    it.save(lambda: snapshot(2))
    it.finish()
    assert names(tmp_path) == ["step-00000002"] and it.saved == 1
    (tmp_path / "c" / ".part-step-00000003").touch()  # nor can a directory be made here
    it.save(lambda: snapshot(3))
    with pytest.raises(SaveError):
        it.finish()
    assert len(told) == 2 and told[1].endswith("; those before it stay; the next one is tried")
    it.save(lambda: snapshot(3), last=True)
    with pytest.raises(SaveError):
        it.finish()
    assert len(told) == 2  # there is no next one


def test_after_a_step_that_was_left_out_nothing_is_saved_but_at_the_end_and_no_good_one_goes(tmp_path: Path) -> None:
    it = saver(tmp_path, [])
    for step in (1, 2):
        it.save(lambda step=step: snapshot(step))
    for step in (3, 4):
        it.save(lambda step=step: snapshot(step, left_out=True))
        assert not it.wrote(step)
    assert it.wrote(2) and names(tmp_path) == ["step-00000001", "step-00000002"]
    it.save(lambda: snapshot(5, left_out=True), last=True)
    it.finish()
    assert names(tmp_path) == ["step-00000001", "step-00000002", "step-00000005"] and it.saved == 3
    assert checkpoint.about(tmp_path / "c" / "step-00000005").left_out
    again = saver(tmp_path, [])  # as of a run that goes on from there
    again.save(lambda: snapshot(6))
    again.finish()
    assert names(tmp_path) == ["step-00000002", "step-00000006"]


def test_weights_that_are_not_finite_end_the_run_and_what_was_good_stays(tmp_path: Path) -> None:
    it = saver(tmp_path, [])
    it.save(lambda: snapshot(1))
    it.save(lambda: snapshot(2, float("nan")))
    with pytest.raises(NonFiniteWeights, match="step-00000001 is the last good one"):
        it.finish()
    it.close()
    assert names(tmp_path) == ["step-00000001"]


def test_what_no_one_foresaw_is_not_swallowed(tmp_path: Path) -> None:
    it = saver(tmp_path, [])
    saved = Checkpoint(snapshot(1).saved.about, {"w": "no tensor"}, {})  # type: ignore[dict-item]
    broken = Snapshot(saved, torch.tensor(False), None)
    it.save(lambda: broken)
    with pytest.raises((TypeError, AttributeError, ValueError)):
        it.finish()
    it.close()


def test_damaged_ones_go_when_there_is_a_new_one_but_not_what_took_their_place(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.write(tmp_path / "c", snapshot(step).saved)
    damaged = [tmp_path / "c" / f"step-0000000{step}" for step in (2, 3)]
    it = saver(tmp_path, [], damaged=damaged)
    it.save(lambda: snapshot(2, 5.0))
    it.finish()
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    assert checkpoint.read(damaged[0]).model["w"][0] == 5


def test_the_best_stays(tmp_path: Path) -> None:
    it = saver(tmp_path, [])
    for step in range(1, 6):
        it.best = 1
        it.save(lambda step=step: snapshot(step))
    it.finish()
    assert names(tmp_path) == ["step-00000001", "step-00000004", "step-00000005"]
