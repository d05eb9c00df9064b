"""One file from which a run goes on after its last whole epoch. Ours, not accelerate's save_state.

Written beside its name, flushed and renamed, so a killed run never leaves half a file under the name. Read with
`weights_only`: nothing in the file is ever executed.
"""

import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. The message names the file and what is wrong."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    step: int  # optimizer steps taken
    method: Mapping[str, Any]
    optimizer: Mapping[str, Any]


def save(path: Path, *, step: int, method: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    state = {"format": FORMAT, "step": step, "method": method.state_dict(), "optimizer": optimizer.state_dict()}
    try:
        with part.open("wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        part.replace(path)
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
