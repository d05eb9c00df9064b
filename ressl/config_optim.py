"""How the weights move: the optimizers, told apart by name."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ressl.config_parts import Count, Section, require


class SGDConfig(Section):
    """SGD; the learning rate rises linearly from 0 over the warm-up, then falls to 0 on a cosine, at every step."""

    name: Literal["sgd"]
    epochs: Count
    batch_size: Count
    """Images per step over all ranks and micro-batches."""
    accumulate: Count = 1
    """Micro-batches of a step: each rank goes forward and backward this many times before the optimizer moves."""
    lr: Annotated[float, Field(gt=0, le=1e30)]
    lr_scaling: Literal["none", "linear"] = "none"
    """linear: `lr` is meant for 256 images a step and grows with batch_size."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = False
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    no_decay: tuple[str, ...] = ()
    """Parameters whose name contains one of these words are not decayed."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 5.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        require(self.warmup_epochs < self.epochs, "warmup_epochs", f"must be below epochs={self.epochs}",
                 self.warmup_epochs)  # fmt: skip
        require(self.batch_size % self.accumulate == 0, "accumulate",
                 f"must divide batch_size={self.batch_size}", self.accumulate)  # fmt: skip
        require(self.momentum > 0 or not self.nesterov, "nesterov", "needs momentum above 0", self.nesterov)
        return self

    @property
    def peak_lr(self) -> float:
        return self.lr * self.batch_size / 256 if self.lr_scaling == "linear" else self.lr


Optim = SGDConfig
