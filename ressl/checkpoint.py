"""The checkpoints of a run: a directory for each, that is whole or not there, and read without executing anything.

    RUN/checkpoints/step-00000800/
        model.safetensors   student, teacher and queue; running statistics are the mean over the ranks
        training.pt         optimizer, loss scale and guard; of each rank its running statistics and random numbers
        MANIFEST.json       what it is, and size and SHA-256 of the other two

Written under another name, flushed, and renamed: a run that is killed leaves nothing half under the name. Only when a
new one is whole are older ones removed. Ours, not accelerate's save_state, which removes the old one first.
"""

import errno
import hashlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

FORMAT = 3
MODEL, TRAINING, MANIFEST = "model.safetensors", "training.pt", "MANIFEST.json"
MAKING = ".part-"  # before the name of one that is being written or removed
DIGITS = 2 * hashlib.sha256().digest_size


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. The message names the file and what is wrong. `foreign`: it is not damaged, but
    of another version, not ours, or out of reach: not to be passed over, and not to be replaced."""

    def __init__(self, message: str, *, foreign: bool = False) -> None:
        super().__init__(message)
        self.foreign = foreign


class SaveError(RuntimeError):
    """A checkpoint could not be written. The message names the place and says why."""


class NonFiniteWeights(RuntimeError):
    """Weights, queue or momentum hold NaN or infinity: they are not saved."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a checkpoint is, without its tensors."""

    step: int  # optimizer steps taken
    images: int  # in the data set: the order of another number of images is another order
    data: int  # hash of the labels and identities of those images
    world_size: int  # ranks
    local_ranks: int  # of them on each machine
    device: str  # cpu or cuda
    left_out: bool  # the last step, as it was not finite: weights that lead to such steps may be of no use


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """On the host. `training` holds tensors, numbers and words in dicts and lists."""

    about: Manifest
    model: Mapping[str, Tensor]
    training: Mapping[str, Any]


# --- writing ---------------------------------------------------------------------------------------------------------


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def write(directory: Path, saved: Checkpoint) -> Path:
    """Makes `directory`/step-N, which replaces one of that name, and returns it.

    Raises SaveError where the disk refuses and NonFiniteWeights; whatever was there before stays as it was.
    """
    _check_finite(saved, directory)
    path, part = directory / name_of(saved.about.step), directory / (MAKING + name_of(saved.about.step))
    training = io.BytesIO()
    torch.save(dict(saved.training), training)
    files = {MODEL: memoryview(safetensors.torch.save(dict(saved.model))), TRAINING: training.getbuffer()}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _clear(directory)
        part.mkdir()
        sums = {name: [len(content), _write(part / name, content)] for name, content in files.items()}
        _write(part / MANIFEST, memoryview(_manifest(saved.about, sums)))
        _flush(part)
        _remove(path)  # a damaged one, or one of a step that is taken again
        part.rename(path)
        _flush(directory)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        needed = sum(len(content) for content in files.values()) / 2**20
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        why = f"needs {needed:,.1f} MiB, {_free(directory)}" if full else "cannot be written"
        raise SaveError(f"{path}: {why}: {error.strerror}") from None
    return path


def prune(directory: Path, *, keep: int, best: int | None = None, damaged: Collection[Path] = ()) -> None:
    """Removes all but the newest, the `keep` newest good ones, and that of step `best`. Those in `damaged` are removed,
    and do not count; neither do those whose last step was left out."""
    whole = [path for path in found(directory) if path not in damaged]
    best_name = None if best is None else name_of(best)
    spared = {*whole[:1], *good(whole)[:keep], *(path for path in whole if path.name == best_name)}
    for path in found(directory):
        if path not in spared:
            _remove(path)


def _remove(path: Path) -> None:
    """Renamed first: what is half removed does not bear the name."""
    if path.exists():
        aside = path.with_name(MAKING + "old-" + path.name)
        path.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)  # what is left goes with the next save


def _clear(directory: Path) -> None:
    """Removes what a killed run was writing or removing."""
    for path in directory.glob(f"{MAKING}*"):
        shutil.rmtree(path, ignore_errors=True)


def _write(path: Path, content: memoryview) -> str:
    """Writes and flushes a new file, and returns its SHA-256."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        done = 0
        while done < len(content):
            done += os.write(file, content[done : done + (64 << 20)])
        os.fsync(file)
    finally:
        os.close(file)
    return hashlib.sha256(content).hexdigest()


def _flush(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some network file systems know no such thing
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def _free(directory: Path) -> str:
    there = next(p for p in (directory, *directory.absolute().parents) if p.exists())
    return f"{shutil.disk_usage(there).free / 2**20:,.0f} MiB are free in {there}"


def _manifest(about: Manifest, sums: Mapping[str, Any]) -> bytes:
    """One line of JSON, and one with its SHA-256."""
    fields = {name: getattr(about, name) for name in Manifest.__slots__}
    line = json.dumps({"format": FORMAT, **fields, "files": sums}).encode()
    return line + b"\n" + hashlib.sha256(line).hexdigest().encode() + b"\n"


def _check_finite(saved: Checkpoint, directory: Path) -> None:
    broken = [name for name, value in _floats("", [saved.model, saved.training]) if not bool(value.isfinite().all())]
    if broken:
        last = next(iter(found(directory)), None)
        kept = f"{last} is the last good one" if last else "nothing was saved"
        raise NonFiniteWeights(
            f"{broken[0].strip('.')} is NaN or infinite after step {saved.about.step:,}: lower optim.lr; {kept}"
        )


def _floats(name: str, tree: object) -> list[tuple[str, Tensor]]:
    match tree:
        case Tensor() if tree.is_floating_point():
            return [(name, tree)]
        case Mapping():
            return [pair for key, branch in tree.items() for pair in _floats(f"{name}.{key}", branch)]
        case list() | tuple():
            return [pair for branch in tree for pair in _floats(name, branch)]
    return []


# --- reading ---------------------------------------------------------------------------------------------------------


def found(directory: Path) -> list[Path]:
    """The checkpoints there, whole or damaged, the newest first."""
    return sorted(directory.glob("step-" + 8 * "[0-9]"), reverse=True)


def good(paths: Iterable[Path]) -> list[Path]:
    """Those whose last step was not left out, as far as can be read."""
    return [path for path in paths if not _left_out(path)]


def _left_out(path: Path) -> bool:
    try:
        return about(path).left_out
    except CheckpointError:
        return False


def newest(
    directory: Path, tell: Callable[[str], None] = lambda message: None
) -> tuple[Path, Checkpoint, list[Path]] | None:
    """The newest checkpoint that is whole, and the damaged ones that are newer, of each of which `tell` is told. None
    where there is none at all. Raises CheckpointError where there are some and all are damaged, or one is foreign."""
    damaged: list[Path] = []
    reasons: list[str] = []
    for path in found(directory):
        try:
            saved = read(path)
        except CheckpointError as error:
            if error.foreign:
                for reason in reasons:
                    tell(reason)
                raise
            damaged.append(path)
            reasons.append(str(error))
        else:
            for reason in reasons:
                tell(f"{reason}: going back to {path.name}")
            return path, saved, damaged
    if not reasons:
        return None
    raise CheckpointError("\n".join([f"{directory}: none of its checkpoints can be used:", *reasons]))


def about(path: Path) -> Manifest:
    """What the checkpoint `path` says of itself. Raises CheckpointError."""
    return _read_manifest(path)[0]


def read(path: Path) -> Checkpoint:
    """Raises CheckpointError where a file is missing, damaged or of another format."""
    said, sums = _read_manifest(path)
    content = {}
    for name in (MODEL, TRAINING):
        data = _content(path / name)
        if [len(data), hashlib.sha256(data).hexdigest()] != sums.get(name):
            raise CheckpointError(f"{path / name}: damaged: it is not what {MANIFEST} says")
        content[name] = data
    try:
        model = safetensors.torch.load(content[MODEL])
        training = torch.load(io.BytesIO(content[TRAINING]), map_location="cpu", weights_only=True)
        if not isinstance(training, dict):
            raise TypeError("not a table of states")
    except (
        RuntimeError, EOFError, pickle.UnpicklingError, ValueError, TypeError, LookupError, safetensors.SafetensorError
    ) as error:  # fmt: skip
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, pickle.UnpicklingError):  # torch's own words tell how to run it
            reason = f"{TRAINING} was refused: it may hold tensors, numbers and words, and nothing that is executed"
        raise CheckpointError(f"{path}: not a checkpoint: {reason[:200]}", foreign=True) from None
    return Checkpoint(said, model, training)


def _read_manifest(path: Path) -> tuple[Manifest, dict[str, Any]]:
    if not path.exists():
        raise CheckpointError(f"{path}: no checkpoint here")
    data = _content(path / MANIFEST)
    line, digest = data[: -DIGITS - 2], data[-DIGITS - 2 :]
    if b"\n" + hashlib.sha256(line).hexdigest().encode() + b"\n" != digest:
        raise CheckpointError(f"{path / MANIFEST}: damaged or not of a checkpoint: its digest does not match")
    try:
        fields = json.loads(line)
        if (version := fields.pop("format")) != FORMAT:
            raise CheckpointError(f"{path}: checkpoint format {version}, this build reads {FORMAT}", foreign=True)
        sums = dict(fields.pop("files"))
        said = Manifest(**fields)
        types = {"device": str, "left_out": bool}
        if not all(type(fields[name]) is types.get(name, int) for name in Manifest.__slots__):
            raise TypeError("its fields are of other types")
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path / MANIFEST}: not of a checkpoint: {error}") from None
    if path.name != name_of(said.step):
        raise CheckpointError(f"{path}: is that of step {said.step}, and bears another's name")
    return said, sums


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise CheckpointError(f"{path}: damaged: {error.strerror}") from None
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}", foreign=True) from None
