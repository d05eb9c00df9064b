"""One file from which a run goes on after its last whole epoch. Ours, not accelerate's save_state.

Written beside its name, flushed and renamed, so a killed run never leaves half a file under the name. Read with
`weights_only`: nothing in the file is ever executed.
"""

import os
import pickle
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. The message names the file and what is wrong."""


class SaveError(RuntimeError):
    """A checkpoint could not be written. The message names the file and says why."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    step: int  # optimizer steps taken
    method: Mapping[str, Any]
    optimizer: Mapping[str, Any]


def save(path: Path, *, step: int, method: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raises SaveError where the disk refuses; a checkpoint that was there before stays whole."""
    part = path.with_name(path.name + ".part")
    state = {"format": FORMAT, "step": step, "method": method.state_dict(), "optimizer": optimizer.state_dict()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        part.replace(path)
    except (OSError, RuntimeError) as error:  # torch turns what the disk says into a RuntimeError
        free = shutil.disk_usage(path.parent).free / 2**20
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise SaveError(f"{path}: cannot be saved ({free:,.0f} MiB free there): {reason}") from None
    finally:
        part.unlink(missing_ok=True)


def load(path: Path) -> Checkpoint:
    """On the CPU. Raises CheckpointError where the file is missing, damaged or of another format."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no checkpoint here") from None
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else "the file is empty"
        raise CheckpointError(f"{path}: damaged or not a checkpoint: {reason[:200]}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(f"{path}: checkpoint format {found}, this build reads {FORMAT}")
    return Checkpoint(step=state["step"], method=state["method"], optimizer=state["optimizer"])


def restore(path: Path, *, method: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Fills `method` and `optimizer` in place and returns the optimizer steps taken. Raises CheckpointError."""
    saved = load(path)
    try:
        method.load_state_dict(saved.method)
        if optimizer is not None:
            optimizer.load_state_dict(dict(saved.optimizer))
    except (RuntimeError, ValueError, KeyError) as error:
        reasons = [line.strip() for line in str(error).splitlines() if "size mismatch" in line or "key(s)" in line]
        reason = (reasons or [str(error)])[0][:200]
        raise CheckpointError(f"{path}: does not fit the configured encoder and method: {reason}") from None
    return saved.step
