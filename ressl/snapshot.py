"""What a run is between two steps: taken for a checkpoint while the run goes on, and put back into a new one."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ressl.checkpoint import TRAINING, Checkpoint, CheckpointError, Manifest
from ressl.guard import Guard
from ressl.optim import load_optimizer_
from ressl.runtime import Runtime

STATES = ("optimizer", "scaler", "guard", "statistics", "random")  # what there is beside the method
STATISTICS = ("running_mean", "running_var")  # the ends of the names of what batch norm keeps, other on each rank


@dataclass(frozen=True, slots=True)
class Snapshot:
    saved: Checkpoint
    left_out: Tensor
    """() bool: whether the step before was, which is known on the device first."""
    copied: torch.cuda.Event | None
    """When it has happened, the tensors are what they are to be; None: they are."""

    def wait(self) -> Checkpoint:
        if self.copied is not None:
            self.copied.synchronize()
        return replace(self.saved, about=replace(self.saved.about, left_out=bool(self.left_out)))


def take_snapshot(
    about: Manifest, method: nn.Module, optimizer: torch.optim.Optimizer, guard: Guard, runtime: Runtime
) -> Snapshot | None:
    """Called on all ranks between the same two steps; None on others than rank 0. The host does not wait for the
    device, but in fp16 for its scale: copies into page-locked memory are queued behind the last step."""
    state, own = method.state_dict(), _statistics(guard)
    statistics = runtime.collectives.gather(own[None])  # (ranks, values)
    random = runtime.collectives.gather(_random_numbers(runtime.device)[None])
    if not runtime.is_main:
        return None
    model = {name: value.contiguous() for name, value in state.items()}
    names = [name for name in state if name.endswith(STATISTICS)]
    means = statistics.mean(dim=0).split([state[name].numel() for name in names])
    model |= {name: mean.view_as(state[name]) for name, mean in zip(names, means, strict=True)}
    training = {
        "optimizer": optimizer.state_dict(),
        "scaler": runtime.scaler_state(),
        "guard": guard.state(),
        "statistics": statistics,
        "random": random,
    }
    saved, left_out = Checkpoint(about, _on_host(model), _on_host(training)), _on_host(guard.left_out)
    copied = None
    if runtime.device.type == "cuda":
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(runtime.device))
    return Snapshot(saved, left_out, copied)


def restore_method_(method: nn.Module, saved: Checkpoint, path: Path) -> None:
    """Fills student, teacher and queue. Raises CheckpointError where they are of another shape."""
    own = method.state_dict()
    lacking = [name for name in own if name not in saved.model]
    beyond = [name for name in saved.model if name not in own]
    other = [name for name in own if name in saved.model and own[name].shape != saved.model[name].shape]
    problems = [
        *([f"{other[0]} is {_shape(saved.model[other[0]])} there and {_shape(own[other[0]])} here"] if other else []),
        *([f"{lacking[0]} is not there"] if lacking else []),
        *([f"{beyond[0]} is not here"] if beyond else []),
    ]
    if problems:
        count = len(lacking) + len(beyond) + len(other)
        raise CheckpointError(
            f"{path}: made with another encoder or method than the config's: {'; '.join(problems)} "
            f"({count:,} of {len(own):,} tensors differ)"
        )
    method.load_state_dict(saved.model)


def _shape(value: Tensor) -> str:
    return " x ".join(map(str, value.shape)) or "one number"


def restore_(
    saved: Checkpoint,
    path: Path,
    *,
    method: nn.Module,
    optimizer: torch.optim.Optimizer,
    guard: Guard,
    runtime: Runtime,
) -> None:
    """Makes a run what it was. With as many ranks as then, each gets its own running statistics and random numbers
    back; otherwise all get the mean of the statistics. Raises CheckpointError."""
    restore_method_(method, saved, path)
    if lacking := [name for name in STATES if name not in saved.training]:
        raise CheckpointError(f"{path / TRAINING} lacks {', '.join(lacking)}: what the run was is not known whole")
    try:
        load_optimizer_(optimizer, saved.training["optimizer"])
        runtime.load_scaler_state(saved.training["scaler"])
        guard.load_state(saved.training["guard"])
        if saved.about.world_size == runtime.world_size:
            _statistics(guard).copy_(saved.training["statistics"][runtime.rank])
            _set_random_numbers(saved.training["random"][runtime.rank], runtime.device)
    except (RuntimeError, ValueError, LookupError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(f"{path / TRAINING}: does not fit this run: {reason}") from None


def _statistics(guard: Guard) -> Tensor:
    """The running statistics of this rank, in the order in which they stand in the method's state."""
    return torch.empty(0) if guard.statistics is None else guard.statistics


def _random_numbers(device: torch.device) -> Tensor:
    """The state of torch's generators, (bytes,) uint8: that of the CPU and that of the device. Training draws none of
    its numbers from them; a method may."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    joined = torch.cat(states)
    return joined.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else joined


def _set_random_numbers(states: Tensor, device: torch.device) -> None:
    cpu = torch.get_rng_state().numel()
    torch.set_rng_state(states[:cpu].clone())
    if device.type == "cuda" and states.numel() > cpu:
        torch.cuda.set_rng_state(states[cpu:].clone(), device)


def _on_host(tree: Any) -> Any:
    """A copy of its own, so that the run may go on and change what it was made from."""
    match tree:
        case Tensor() if tree.is_cuda:
            # strides are kept: an optimizer wants its momenta laid out as its parameters are
            return torch.empty_like(tree, device="cpu", pin_memory=True).copy_(tree.detach(), non_blocking=True)
        case Tensor():
            return tree.detach().clone()
        case dict():
            return {key: _on_host(branch) for key, branch in tree.items()}
        case list() | tuple():
            return [_on_host(branch) for branch in tree]
    return tree
