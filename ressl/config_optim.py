"""How the weights move: the optimizers, told apart by name."""

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ressl.config_parts import Count, NotNegative, Positive, Section, require

Rate = Annotated[float, Field(gt=0, le=1e30)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Scaling = Literal["none", "linear", "sqrt"]


class SGDConfig(Section):
    """SGD; the learning rate rises linearly from `warmup_lr` over the warm-up, then falls to `final_lr` on a cosine, at
    every step."""

    name: Literal["sgd"]
    epochs: Count
    batch_size: Count
    """Images per step over all ranks and micro-batches."""
    accumulate: Count = 1
    """Micro-batches of a step: each rank goes forward and backward this many times before the optimizer moves."""
    lr: Rate
    lr_scaling: Scaling = "none"
    """linear: `lr` is meant for 256 images a step and grows with batch_size. sqrt: `lr` is meant for one image a step
    and grows with the root of batch_size, as large-batch recipes for LARS write it."""
    momentum: BelowOne = 0.9
    nesterov: bool = False
    weight_decay: NotNegative = 1e-4
    no_decay: tuple[str, ...] = ()
    """Parameters whose name contains one of these words are not decayed."""
    warmup_epochs: NotNegative = 5.0
    warmup_lr: NotNegative = 0.0
    """The rate at the start of the warm-up, not scaled."""
    final_lr: NotNegative = 0.0
    """The rate at which the cosine ends, after the last step; not scaled."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_schedule(self)
        require(self.momentum > 0 or not self.nesterov, "nesterov", "needs momentum above 0", self.nesterov)
        return self

    @property
    def peak_lr(self) -> float:
        return _peak_lr(self)


class LARSConfig(Section):
    """LARS, You et al. 2017 (https://arxiv.org/abs/1708.03888): SGD that gives each layer a rate of its own, for large
    batches. Fields that SGDConfig has too mean the same."""

    name: Literal["lars"]
    epochs: Count
    batch_size: Count
    accumulate: Count = 1
    lr: Rate
    lr_scaling: Scaling = "none"
    momentum: BelowOne = 0.9
    trust_coefficient: Annotated[float, Field(gt=0, le=1)] = 0.001
    """How much of a layer's norm a step of rate 1 may change."""
    weight_decay: NotNegative = 1e-6
    no_decay: tuple[str, ...] = ()
    """Parameters whose name contains one of these words, and all of one dimension (biases, batch norm), are neither
    decayed nor given a rate of their own."""
    warmup_epochs: NotNegative = 10.0
    warmup_lr: NotNegative = 0.0
    final_lr: NotNegative = 0.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_schedule(self)
        return self

    @property
    def peak_lr(self) -> float:
        return _peak_lr(self)


class AdamWConfig(Section):
    """AdamW, Loshchilov and Hutter 2017 (https://arxiv.org/abs/1711.05101). Fields that SGDConfig has too mean the
    same."""

    name: Literal["adamw"]
    epochs: Count
    batch_size: Count
    accumulate: Count = 1
    lr: Rate
    lr_scaling: Scaling = "none"
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    """Of the running means of the gradient and of its square."""
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.01
    no_decay: tuple[str, ...] = ()
    warmup_epochs: NotNegative = 5.0
    warmup_lr: NotNegative = 0.0
    final_lr: NotNegative = 0.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_schedule(self)
        return self

    @property
    def peak_lr(self) -> float:
        return _peak_lr(self)


Optim = Annotated[SGDConfig | LARSConfig | AdamWConfig, Field(discriminator="name")]


def _check_schedule(cfg: SGDConfig | LARSConfig | AdamWConfig) -> None:
    require(cfg.warmup_epochs < cfg.epochs, "warmup_epochs", f"must be below epochs={cfg.epochs}", cfg.warmup_epochs)
    require(cfg.batch_size % cfg.accumulate == 0, "accumulate",
             f"must divide batch_size={cfg.batch_size}", cfg.accumulate)  # fmt: skip
    scaled = "" if cfg.lr_scaling == "none" else f", lr scaled to batch_size={cfg.batch_size}"
    for key, value in (("warmup_lr", cfg.warmup_lr), ("final_lr", cfg.final_lr)):
        require(value <= cfg.peak_lr, key, f"must not be above the highest rate {cfg.peak_lr:g}{scaled}", value)


def _peak_lr(cfg: SGDConfig | LARSConfig | AdamWConfig) -> float:
    match cfg.lr_scaling:
        case "none":
            return cfg.lr
        case "linear":
            return cfg.lr * cfg.batch_size / 256
        case "sqrt":
            return cfg.lr * math.sqrt(cfg.batch_size)
