import hashlib
import io
import json
import os
import pickle
import random
import resource
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from ressl import checkpoint
from ressl.checkpoint import (
    MANIFEST,
    MODEL,
    TRAINING,
    Checkpoint,
    CheckpointError,
    Manifest,
    NonFiniteWeights,
    SaveError,
)


def state(step: int, seed: int = 0) -> Checkpoint:
    draw = torch.Generator().manual_seed(seed + step)
    model = {"student.w": torch.randn(3, 4, generator=draw), "queue.cursor": torch.tensor(step)}
    optimizer = {"state": {0: {"momentum_buffer": torch.randn(3, 4, generator=draw)}}, "param_groups": [{"lr": 0.1}]}
    about = Manifest(step=step, images=50, data=7, world_size=2, local_ranks=2, device="cpu", left_out=False)
    return Checkpoint(about, model, {"optimizer": optimizer, "scaler": {}, "random": torch.arange(3)})


def equal(one: object, other: object) -> bool:
    match one, other:
        case Tensor(), Tensor():
            return torch.equal(one, other)
        case dict(), dict():
            return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
        case list(), list():
            return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def same(one: Checkpoint, other: Checkpoint) -> bool:
    return (
        one.about == other.about and equal(dict(one.model), dict(other.model)) and equal(one.training, other.training)
    )


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# --- what works ------------------------------------------------------------------------------------------------------


def test_what_was_written_comes_back_bit_for_bit(tmp_path: Path) -> None:
    path = checkpoint.write(tmp_path / "deep" / "c", state(7))
    assert path.name == "step-00000007" and same(checkpoint.read(path), state(7))
    assert checkpoint.about(path) == state(7).about
    assert names(path) == [MANIFEST, MODEL, TRAINING]


def test_the_same_state_gives_the_same_bytes(tmp_path: Path) -> None:
    one, other = (checkpoint.write(tmp_path / name, state(7)) for name in ("a", "b"))
    for name in (MODEL, TRAINING, MANIFEST):
        assert (one / name).read_bytes() == (other / name).read_bytes()


def test_the_newest_stay_and_so_does_the_best(tmp_path: Path) -> None:
    for step in range(1, 7):
        checkpoint.write(tmp_path, state(step))
        checkpoint.prune(tmp_path, keep=2, best=2)
    assert names(tmp_path) == ["step-00000002", "step-00000005", "step-00000006"]


def test_a_damaged_one_is_not_counted_among_those_that_stay(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.write(tmp_path, state(step))
    checkpoint.prune(tmp_path, keep=2, damaged=[tmp_path / "step-00000003"])
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_one_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    path = checkpoint.write(tmp_path, state(3, seed=1))
    (path / MODEL).write_bytes(b"")
    checkpoint.write(tmp_path, state(3))
    assert same(checkpoint.read(path), state(3)) and names(tmp_path) == [path.name]


# --- what is damaged -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [MODEL, TRAINING, MANIFEST])
def test_any_flipped_bit_and_any_cut_is_noticed_and_the_one_before_is_taken(name: str, tmp_path: Path) -> None:
    checkpoint.write(tmp_path, state(1))
    path = checkpoint.write(tmp_path, state(2)) / name
    whole, draw = path.read_bytes(), random.Random(0)
    for place in [*draw.sample(range(len(whole)), 90), 0, len(whole) - 1]:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << draw.randrange(8)
        for damaged in (bytes(flipped), whole[:place], whole + whole[:1]):
            path.write_bytes(damaged)
            told: list[str] = []
            found = checkpoint.newest(tmp_path, told.append)
            assert found is not None and found[1].about.step == 1 and found[2] == [path.parent]
            assert len(told) == 1 and str(path.parent) in told[0] and told[0].endswith("going back to step-00000001")


@pytest.mark.parametrize("name", [MODEL, TRAINING, MANIFEST])
def test_a_missing_file_is_noticed(name: str, tmp_path: Path) -> None:
    path = checkpoint.write(tmp_path, state(1)) / name
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{name}: damaged: No such file"):
        checkpoint.read(path.parent)


def test_where_all_are_damaged_each_is_told_with_its_reason(tmp_path: Path) -> None:
    for step, name in ((1, MODEL), (2, TRAINING), (3, MANIFEST)):
        os.truncate(checkpoint.write(tmp_path, state(step)) / name, 10)
    with pytest.raises(CheckpointError, match="none of its checkpoints can be used:") as caught:
        checkpoint.newest(tmp_path, pytest.fail)  # each reason is told once
    lines = str(caught.value).splitlines()
    assert len(lines) == 4 and MANIFEST in lines[1] and TRAINING in lines[2] and MODEL in lines[3]


def test_where_there_is_none_there_is_none(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None and checkpoint.newest(tmp_path / "nowhere") is None
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        checkpoint.read(tmp_path / "step-00000001")


def test_one_under_another_s_name_is_refused(tmp_path: Path) -> None:
    checkpoint.write(tmp_path, state(1)).rename(tmp_path / "step-00000009")
    with pytest.raises(CheckpointError, match="is that of step 1"):
        checkpoint.read(tmp_path / "step-00000009")


def forge(path: Path, **changes: object) -> None:
    """A manifest of our making, with the digests of what lies beside it."""
    sums = {
        name: [len(data := (path / name).read_bytes()), hashlib.sha256(data).hexdigest()] for name in (MODEL, TRAINING)
    }
    fields = json.loads((path / MANIFEST).read_bytes().splitlines()[0]) | {"files": sums} | changes
    line = json.dumps(fields).encode()
    (path / MANIFEST).write_bytes(line + b"\n" + hashlib.sha256(line).hexdigest().encode() + b"\n")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format": 99}, "checkpoint format 99, this build reads 3"),
        ({"files": 3}, "not of a checkpoint"),
        ({"files": {}}, "damaged: it is not what MANIFEST.json says"),
        ({"more": 1}, "not of a checkpoint"),
    ],
)
def test_another_manifest_is_refused(changes: dict[str, object], reason: str, tmp_path: Path) -> None:
    path = checkpoint.write(tmp_path, state(1))
    forge(path, **changes)
    with pytest.raises(CheckpointError, match=reason):
        checkpoint.read(path)


# --- malicious files: whoever writes digests of their own making gets no further -------------------------------------


def pickled(payload: object) -> bytes:
    return pickle.dumps(payload, protocol=2)


def zipped(payload: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    return buffer.getvalue()


def header(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


TENSORS = safetensors.torch.save({"a": torch.ones(2)})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (TRAINING, pickled), (TRAINING, zipped), (TRAINING, lambda p: zipped({"optimizer": p})),
        (TRAINING, lambda p: zipped([1])), (TRAINING, lambda p: b""), (TRAINING, lambda p: b"PK\x05\x06" + bytes(18)),
        (MODEL, pickled), (MODEL, zipped), (MODEL, lambda p: b""), (MODEL, lambda p: TENSORS[:-1]),
        (MODEL, lambda p: TENSORS + b"x"), (MODEL, lambda p: header(b"{" * 5000)),
        (MODEL, lambda p: struct.pack("<Q", 1 << 62) + b"{}"),
        (MODEL, lambda p: header(b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}') + bytes(4)),
        (MODEL, lambda p: header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,99999999999]}}') + bytes(4)),
        (MODEL, lambda p: header(b'{"a":{"dtype":"EVIL","shape":[1],"data_offsets":[0,4]}}') + bytes(4)),
    ],
)  # fmt: skip
def test_nothing_in_a_checkpoint_is_ever_executed(
    name: str, content: Callable[[object], bytes], tmp_path: Path
) -> None:
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    path = checkpoint.write(tmp_path / "c", state(1))
    (path / name).write_bytes(content(Evil()))
    forge(path)
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        checkpoint.read(path)
    assert not (tmp_path / "executed").exists()


# --- a disk that is full, weights that are not finite ----------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, 50, 100, 300, 700, 1500])
def test_a_full_disk_leaves_the_old_one_and_nothing_else(limit: int, tmp_path: Path) -> None:
    checkpoint.write(tmp_path, state(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # a disk on which a file may grow no further
    try:
        with pytest.raises(
            SaveError, match=r"step-00000002: needs [\d.]+ MiB, [\d,]+ MiB are free in .*File too large"
        ):
            checkpoint.write(tmp_path, state(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["step-00000001"] and same(checkpoint.read(tmp_path / "step-00000001"), state(1))


def test_a_place_that_cannot_be_written_to_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "deeper", Path("/proc/self/checkpoints")):
        with pytest.raises(SaveError, match="cannot be written"):
            checkpoint.write(place, state(1))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["model", "training"])
def test_what_is_not_finite_is_not_saved(where: str, value: float, tmp_path: Path) -> None:
    broken = state(2)
    tensor = (
        broken.model["student.w"] if where == "model" else broken.training["optimizer"]["state"][0]["momentum_buffer"]
    )
    tensor[1, 2] = value
    with pytest.raises(NonFiniteWeights, match="after step 2: lower optim.lr; nothing was saved"):
        checkpoint.write(tmp_path / "c", broken)
    checkpoint.write(tmp_path / "c", state(1))
    with pytest.raises(NonFiniteWeights, match="step-00000001 is the last good one"):
        checkpoint.write(tmp_path / "c", broken)
    assert names(tmp_path / "c") == ["step-00000001"]


# --- death at any system call ----------------------------------------------------------------------------------------

CALLS = ("open", "write", "fsync", "close", "rename", "unlink", "rmdir", "mkdir")


def die_at(call: int, work: Callable[[], object]) -> bool:
    """Does the work in a process that ends without another word before its system call number `call` to the disk;
    returns whether it got that far."""
    pid = os.fork()
    if pid == 0:
        left = call

        def counted(original: Callable) -> Callable:
            def run(*args, **kwargs):
                nonlocal left
                left -= 1
                if left < 0:
                    os._exit(3)
                return original(*args, **kwargs)

            return run

        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))
        work()
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, 3)
    return code == 3


@pytest.mark.parametrize("keep", [1, 2])
def test_a_death_at_any_system_call_leaves_a_whole_checkpoint_to_go_on_from(keep: int, tmp_path: Path) -> None:
    """Of a save and what it removes. What was left half done disappears with the next save."""

    def save(directory: Path, step: int) -> None:
        checkpoint.write(directory, state(step))
        checkpoint.prune(directory, keep=keep)

    calls, steps = 0, set[int]()
    while True:
        directory = tmp_path / str(calls)
        for step in (1, 2):
            save(directory, step)
        died = die_at(calls, lambda directory=directory: save(directory, 3))
        found = checkpoint.newest(directory)
        assert found is not None and found[2] == [] and found[1].about.step in (2, 3)
        assert same(found[1], state(found[1].about.step))
        steps.add(found[1].about.step)
        save(directory, 4)
        assert names(directory) == [
            checkpoint.name_of(step) for step in ([4] if keep == 1 else [found[1].about.step, 4])
        ]
        shutil.rmtree(directory)
        if not died:
            break
        calls += 1
    assert calls >= 20 and steps == {2, 3}


def test_one_of_another_version_is_not_passed_over(tmp_path: Path) -> None:
    """An older build would write over what a newer one has done."""
    checkpoint.write(tmp_path, state(1))
    forge(checkpoint.write(tmp_path, state(2)), format=99)
    with pytest.raises(CheckpointError, match="step-00000002: checkpoint format 99, this build reads 3"):
        checkpoint.newest(tmp_path)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
