"""The optimizers of a run: parameter groups by name, linear warm-up, then a cosine, at every step."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ressl.config_optim import AdamWConfig, LARSConfig, Optim, SGDConfig
from ressl.lars import LARS

MARKS = {"nesterov", "trust_coefficient", "betas"}  # settings of a group that tell which optimizer it is of


def build_optimizer(student: nn.Module, cfg: Optim, *, capturable: bool = False) -> torch.optim.Optimizer:
    """Parameters whose name contains a word of `cfg.no_decay` get no weight decay; under LARS neither do those of one
    dimension, and both go without a rate of their own. On a GPU one kernel updates many parameters, so the student
    must be there already.

    capturable: the rate is a () float32 tensor on the parameters' device, which `set_learning_rate_` fills, so that a
    captured step can be replayed with another one.

    NOTE: with the authors' words, bn and bias, the batch norms inside down-sampling branches (`downsample.1.weight`)
    are decayed, as in their ImageNet code.
    """
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in student.named_parameters():
        excluded = any(word in name for word in cfg.no_decay) or (cfg.name == "lars" and parameter.ndim <= 1)
        (free if excluded else decayed).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": cfg.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    if cfg.name == "lars":
        groups[1]["adapt"] = False
    groups = [group for group in groups if group["params"]]
    parameters = decayed + free
    on_gpu = all(p.is_cuda for p in parameters)
    lr = torch.tensor(cfg.peak_lr, dtype=torch.float32, device=parameters[0].device) if capturable else cfg.peak_lr
    match cfg:
        case SGDConfig():
            # on the CPU one parameter after another, which the recorded traces and figures were made with
            fused = True if on_gpu else None
            sgd = torch.optim.SGD(groups, lr=lr, momentum=cfg.momentum, nesterov=cfg.nesterov, fused=fused)
            _start_momenta_(sgd)
            return sgd
        case LARSConfig():
            return LARS(groups, lr=lr, momentum=cfg.momentum, trust_coefficient=cfg.trust_coefficient)
        case AdamWConfig():
            # torch refuses to capture AdamW without its own flag, and refuses the flag on a CPU
            flag = capturable and on_gpu
            adamw = torch.optim.AdamW(groups, lr=lr, betas=cfg.betas, eps=cfg.eps, fused=True, capturable=flag)
            adamw._warned_capturable_if_run_uncaptured = True  # the steps before the capture are meant to be plain
            return adamw


def _start_momenta_(optimizer: torch.optim.Optimizer) -> None:
    """Gives a fused SGD the momenta that it has not yet, 0.

    It would take them from uninitialised memory at its first step, and if an fp16 gradient overflows there, as is
    usual, it leaves them like that and goes on with them at the next step.
    """
    for group in optimizer.param_groups:
        if group.get("fused") and group.get("momentum"):
            for p in group["params"]:
                if "momentum_buffer" not in optimizer.state[p]:
                    optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)


def load_optimizer_(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Takes the state of each parameter from `saved`, what a `state_dict()` gave, as a copy.

    The settings stay those that `optimizer` was built with, among them whether it is capturable and its learning rate:
    a tensor stays the same one, which a captured step reads. Raises ValueError where `saved` is of another optimizer or
    of other groups of parameters.
    """
    built, groups = optimizer.param_groups, saved["param_groups"]
    if (sizes := [len(g["params"]) for g in groups]) != (own := [len(g["params"]) for g in built]):
        raise ValueError(f"the saved optimizer has groups of {sizes} parameters, this one of {own}")
    if any(MARKS & theirs.keys() != MARKS & ours.keys() for theirs, ours in zip(groups, built, strict=True)):
        raise ValueError("the saved optimizer is of another kind: see optim.name")
    # counts of steps lie on the CPU or beside the parameters: torch moves them there if need be, but not back
    state = {
        key: {
            name: value.to("cpu" if name == "step" else value.device, copy=True) if isinstance(value, Tensor) else value
            for name, value in entry.items()
        }
        for key, entry in saved["state"].items()
    }
    rates = [group["lr"] for group in built]
    settings = [
        {**ours, "params": theirs["params"], "lr": 0.0} for theirs, ours in zip(groups, built, strict=True)
    ]  # fmt: skip
    optimizer.load_state_dict({"state": state, "param_groups": settings})
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    _start_momenta_(optimizer)


def learning_rate(step: int, *, steps_per_epoch: int, cfg: Optim) -> float:
    """Of the optimizer step `step`, counted from 0 over the whole run."""
    warmup, total = cfg.warmup_epochs * steps_per_epoch, cfg.epochs * steps_per_epoch
    if step < warmup:
        return cfg.warmup_lr + (cfg.peak_lr - cfg.warmup_lr) * step / warmup
    height = cfg.peak_lr - cfg.final_lr
    return cfg.final_lr + 0.5 * height * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def set_learning_rate_(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """In place: a rate that is a tensor on the device, as a captured step reads it, stays that tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
