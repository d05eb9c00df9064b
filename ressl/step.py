"""One optimizer step: forward and backward of each micro-batch, the optimizer, then queue and teacher."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ressl.batch import Batch
from ressl.method import AnyMethod
from ressl.optim import set_learning_rate_
from ressl.runtime import Runtime

Logs = list[dict[str, Tensor]]  # of each micro-batch, () tensors on the device


class TrainStep:
    """Makes the step of a run from its parts. It never waits for the device, but for fp16 without a fused optimizer."""

    def __init__(
        self, method: AnyMethod, optimizer: torch.optim.Optimizer, runtime: Runtime, *, accumulate: int
    ) -> None:
        self.method, self.runtime, self.accumulate = method, runtime, accumulate
        self.replica: nn.Module = runtime.replicate(method)
        self.optimizer = runtime.prepare_optimizer(optimizer)

    def __call__(self, batches: Iterator[Batch], *, lr: float, momentum: float) -> Logs:
        """Takes the next `accumulate` batches. `momentum` is the teacher's."""
        set_learning_rate_(self.optimizer, lr)
        return self.run(batches, momentum)

    def run(self, batches: Iterator[Batch], momentum: float | Tensor) -> Logs:
        """The step with the learning rate that is set."""
        carries, logs = [], []
        for micro in range(self.accumulate):
            with self.runtime.micro_step(self.replica, last=micro == self.accumulate - 1):
                out = self.replica(next(batches))
                self.runtime.backward(out.loss / self.accumulate)
            carries.append(out.carry)
            logs.append(out.logs)
            del out  # the loss holds its graph
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        joined = (torch.cat(parts) for parts in zip(*carries, strict=True))
        # queue and teacher change here alone, when the backward pass is over
        self.method.after_step(*map(self.runtime.collectives.gather, joined), momentum=momentum)
        return logs
