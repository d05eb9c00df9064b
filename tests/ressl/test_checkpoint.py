import os
import pickle
import resource
from pathlib import Path

import pytest
import torch
from torch import nn

from ressl import checkpoint
from ressl.checkpoint import CheckpointError, SaveError


def trained(width: int = 3) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(2, width)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(4, 2)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_what_was_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer = trained()
    checkpoint.save(tmp_path / "deep" / "c.pt", step=7, method=model, optimizer=optimizer)
    other, other_optimizer = trained()
    assert checkpoint.restore(tmp_path / "deep" / "c.pt", method=other, optimizer=other_optimizer) == 7
    assert torch.equal(other.weight, model.weight)
    momenta = [o.state_dict()["state"][0]["momentum_buffer"] for o in (optimizer, other_optimizer)]
    assert torch.equal(*momenta)


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    model, optimizer = trained()
    path = tmp_path / "c.pt"
    checkpoint.save(path, step=7, method=model, optimizer=optimizer)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # a disk that is full after 1,000 bytes
    try:
        with pytest.raises(SaveError, match=r"c\.pt: cannot be saved \([\d,]+ MiB free there\): "):
            checkpoint.save(path, step=8, method=model, optimizer=optimizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["c.pt"]


def test_code_in_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    torch.save({"format": 1, "step": 0, "method": Evil(), "optimizer": {}}, tmp_path / "zip.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Evil()))
    for name in ("zip.pt", "plain.pt"):
        with pytest.raises(CheckpointError, match=name):
            checkpoint.load(tmp_path / name)
    assert not (tmp_path / "executed").exists()


def test_other_files_are_refused_with_their_name(tmp_path: Path) -> None:
    torch.save({"format": 99}, tmp_path / "newer.pt")
    torch.save([1], tmp_path / "list.pt")
    for name, reason in (
        ("newer.pt", "checkpoint format 99, this build reads 1"),
        ("list.pt", "checkpoint format list"),
        ("missing.pt", "no checkpoint here"),
    ):
        with pytest.raises(CheckpointError, match=f"{name}: {reason}"):
            checkpoint.load(tmp_path / name)


def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path) -> None:
    model, optimizer = trained(3)
    checkpoint.save(tmp_path / "c.pt", step=7, method=model, optimizer=optimizer)
    other, _ = trained(4)
    with pytest.raises(CheckpointError, match="does not fit the configured encoder and method: size mismatch"):
        checkpoint.restore(tmp_path / "c.pt", method=other)
