"""One file from which a run goes on after its last whole epoch. Ours, not accelerate's save_state.

Written beside its name, flushed and renamed, so a killed run never leaves half a file under the name. A digest at its
end shows any damage. Read with `weights_only`: nothing in the file is ever executed.
"""

import hashlib
import io
import os
import pickle
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ressl.optim import load_optimizer_

FORMAT = 1
DIGEST_BYTES = hashlib.sha256().digest_size


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. The message names the file and what is wrong."""


class SaveError(RuntimeError):
    """A checkpoint could not be written. The message names the file and says why."""


class NonFiniteWeights(RuntimeError):
    """Weights, queue or momentum hold NaN or infinity: they are not saved over a checkpoint that is good."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    step: int  # optimizer steps taken
    images: int  # in the data set: the order of another number of images is another order
    method: Mapping[str, Any]
    optimizer: Mapping[str, Any]


def save(path: Path, *, step: int, images: int, method: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raises SaveError where the disk refuses and NonFiniteWeights; a checkpoint that was there before stays whole."""
    state: dict[str, Any] = {
        "step": step,
        "images": images,
        "method": method.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    momenta = [value for entry in state["optimizer"]["state"].values() for value in entry.values()]
    values = [v for v in (*state["method"].values(), *momenta) if isinstance(v, Tensor) and v.is_floating_point()]
    if not bool(torch.stack([v.isfinite().all() for v in values]).all()):
        kept = f"{path} is the last good one" if path.exists() else "nothing was saved"
        raise NonFiniteWeights(f"weights are NaN or infinite after step {step:,}: lower optim.lr; {kept}")
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as f:
            f.write(buffer.getbuffer())
            f.write(hashlib.sha256(buffer.getbuffer()).digest())
            f.flush()
            os.fsync(f.fileno())
        part.replace(path)
        directory = os.open(path.parent, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)
    except OSError as error:
        free = shutil.disk_usage(next(p for p in path.absolute().parents if p.exists())).free / 2**20
        size = buffer.tell() / 2**20
        raise SaveError(f"{path}: needs {size:,.1f} MiB, {free:,.0f} MiB are free there: {error.strerror}") from None
    finally:
        with suppress(OSError):
            part.unlink()


def load(path: Path) -> Checkpoint:
    """On the CPU. Raises CheckpointError where the file is missing, damaged or of another format."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no checkpoint here") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    content, digest = memoryview(data)[:-DIGEST_BYTES], data[-DIGEST_BYTES:]
    if hashlib.sha256(content).digest() != digest:
        raise CheckpointError(f"{path}: damaged or not a checkpoint: its digest does not match")
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if state["format"] != FORMAT:
            raise CheckpointError(f"{path}: checkpoint format {state['format']}, this build reads {FORMAT}")
        return Checkpoint(int(state["step"]), int(state["images"]), state["method"], state["optimizer"])
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError, TypeError, LookupError) as error:
        if isinstance(error, CheckpointError):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: damaged or not a checkpoint: {reason[:200]}") from None


def restore(
    path: Path, *, method: nn.Module, optimizer: torch.optim.Optimizer | None = None, images: int | None = None
) -> int:
    """Fills `method` and `optimizer` in place and returns the optimizer steps taken. Raises CheckpointError.

    `images` is the size of the data set that the run is to go on with.
    """
    saved = load(path)
    if images is not None and images != saved.images:
        raise CheckpointError(f"{path}: the run saw {saved.images:,} images, data.source.train has {images:,} now")
    try:
        method.load_state_dict(saved.method)
        if optimizer is not None:
            load_optimizer_(optimizer, saved.optimizer)
    except (RuntimeError, ValueError, KeyError) as error:
        reasons = [line.strip() for line in str(error).splitlines() if "size mismatch" in line or "key(s)" in line]
        reason = (reasons or [str(error)])[0][:200]
        raise CheckpointError(f"{path}: does not fit the configured encoder, method and optimizer: {reason}") from None
    return saved.step
