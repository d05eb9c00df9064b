import hashlib
import io
import os
import pickle
import resource
from pathlib import Path

import pytest
import torch
from torch import nn

from ressl import checkpoint
from ressl.checkpoint import CheckpointError, NonFiniteWeights, SaveError


def trained(width: int = 3) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(2, width)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(4, 2)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_what_was_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer = trained()
    checkpoint.save(tmp_path / "deep" / "c.pt", step=7, images=5, method=model, optimizer=optimizer)
    other, other_optimizer = trained()
    assert checkpoint.restore(tmp_path / "deep" / "c.pt", method=other, optimizer=other_optimizer) == 7
    assert torch.equal(other.weight, model.weight)
    momenta = [o.state_dict()["state"][0]["momentum_buffer"] for o in (optimizer, other_optimizer)]
    assert torch.equal(*momenta)


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    model, optimizer = trained()
    path = tmp_path / "c.pt"
    checkpoint.save(path, step=7, images=5, method=model, optimizer=optimizer)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # a disk that is full after 1,000 bytes
    try:
        with pytest.raises(SaveError, match=r"c\.pt: needs [\d.]+ MiB, [\d,]+ MiB are free there: File too large"):
            checkpoint.save(path, step=8, images=5, method=model, optimizer=optimizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["c.pt"]


def write(path: Path, content: bytes) -> None:
    path.write_bytes(content + hashlib.sha256(content).digest())


def saved(state: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def test_code_in_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    write(tmp_path / "zip.pt", saved({"format": 1, "step": 0, "images": 1, "method": Evil(), "optimizer": {}}))
    write(tmp_path / "plain.pt", pickle.dumps(Evil(), protocol=2))
    for name in ("zip.pt", "plain.pt"):
        with pytest.raises(CheckpointError, match=name):
            checkpoint.load(tmp_path / name)
    assert not (tmp_path / "executed").exists()


def test_other_files_are_refused_with_their_name(tmp_path: Path) -> None:
    write(tmp_path / "newer.pt", saved({"format": 99}))
    write(tmp_path / "list.pt", saved([1]))
    write(tmp_path / "part.pt", saved({"format": 1}))
    (tmp_path / "empty.pt").write_bytes(b"")
    for name, reason in (
        ("newer.pt", "checkpoint format 99, this build reads 1"),
        ("list.pt", "damaged or not a checkpoint"),
        ("part.pt", "damaged or not a checkpoint: 'step'"),
        ("empty.pt", "damaged or not a checkpoint"),
        ("missing.pt", "no checkpoint here"),
    ):
        with pytest.raises(CheckpointError, match=f"{name}: {reason}"):
            checkpoint.load(tmp_path / name)


def test_any_flipped_bit_and_any_cut_is_noticed(tmp_path: Path) -> None:
    model, optimizer = trained()
    path = tmp_path / "c.pt"
    checkpoint.save(path, step=7, images=5, method=model, optimizer=optimizer)
    whole = path.read_bytes()
    for place in range(0, len(whole), 37):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        for damaged in (bytes(flipped), whole[:place]):
            path.write_bytes(damaged)
            with pytest.raises(CheckpointError, match="damaged or not a checkpoint"):
                checkpoint.load(path)


def test_weights_that_are_not_finite_are_not_saved_over_good_ones(tmp_path: Path) -> None:
    model, optimizer = trained()
    path = tmp_path / "c.pt"
    with torch.no_grad():
        good = model.bias.clone()
        for broken, kept in ((float("nan"), "nothing was saved"), (float("inf"), "is the last good one")):
            model.bias.fill_(broken)
            with pytest.raises(NonFiniteWeights, match=f"after step 8: lower optim.lr; .*{kept}"):
                checkpoint.save(path, step=8, images=5, method=model, optimizer=optimizer)
            model.bias.copy_(good)
            checkpoint.save(path, step=7, images=5, method=model, optimizer=optimizer)
    assert checkpoint.load(path).step == 7


def test_a_data_set_of_another_size_is_refused(tmp_path: Path) -> None:
    model, optimizer = trained()
    checkpoint.save(tmp_path / "c.pt", step=7, images=5, method=model, optimizer=optimizer)
    with pytest.raises(CheckpointError, match="the run saw 5 images, data.source.train has 6 now"):
        checkpoint.restore(tmp_path / "c.pt", method=model, images=6)


def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path) -> None:
    model, optimizer = trained(3)
    checkpoint.save(tmp_path / "c.pt", step=7, images=5, method=model, optimizer=optimizer)
    other, _ = trained(4)
    with pytest.raises(
        CheckpointError, match="does not fit the configured encoder, method and optimizer: size mismatch"
    ):
        checkpoint.restore(tmp_path / "c.pt", method=other)
