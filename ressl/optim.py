"""SGD as the authors run it: parameter groups by name, linear warm-up from 0, then a cosine to 0, at every step."""

import math

import torch
from torch import Tensor, nn

from ressl.config_optim import SGDConfig


def build_optimizer(student: nn.Module, cfg: SGDConfig) -> torch.optim.SGD:
    """Parameters whose name contains a word of `cfg.no_decay` get no weight decay.

    NOTE: with the authors' words, bn and bias, the batch norms inside down-sampling branches (`downsample.1.weight`)
    are decayed, as in their ImageNet code.
    """
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in student.named_parameters():
        (free if any(word in name for word in cfg.no_decay) else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": cfg.weight_decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.SGD(
        [g for g in groups if g["params"]], lr=cfg.peak_lr, momentum=cfg.momentum, nesterov=cfg.nesterov
    )


def learning_rate(step: int, *, steps_per_epoch: int, cfg: SGDConfig) -> float:
    """Of the optimizer step `step`, counted from 0 over the whole run."""
    warmup, total = cfg.warmup_epochs * steps_per_epoch, cfg.epochs * steps_per_epoch
    if step < warmup:
        return cfg.peak_lr * step / warmup
    return 0.5 * cfg.peak_lr * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def set_learning_rate_(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """In place: a rate that is a tensor on the device, as a captured step reads it, stays that tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
