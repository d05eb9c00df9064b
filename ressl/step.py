"""One optimizer step: forward and backward of each micro-batch, the optimizer, then queue and teacher."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ressl.batch import Batch
from ressl.compiled import compile_blocks_
from ressl.config import Config
from ressl.graphs import CapturedStep, Logs
from ressl.method import AnyMethod, build_method
from ressl.optim import build_optimizer, set_learning_rate_
from ressl.runtime import Runtime


class TrainStep:
    """The step of a run, made of its parts. It never makes the host wait for the device.

    With `cuda_graphs` the optimizer must have been built `capturable`. The method is replicated here, over the ranks.
    """

    def __init__(
        self,
        method: AnyMethod,
        optimizer: torch.optim.Optimizer,
        runtime: Runtime,
        *,
        accumulate: int = 1,
        cuda_graphs: bool = False,
    ) -> None:
        self.method, self.runtime, self.accumulate = method, runtime, accumulate
        self.captured: CapturedStep | None = None
        if cuda_graphs:
            self.momentum = torch.zeros((), dtype=torch.float64, device=runtime.device)
            self.captured = CapturedStep(self._captured, runtime.device)
        self.replica = self._replicate(self.captured.side if self.captured else None)
        self.optimizer = runtime.prepare_optimizer(optimizer)

    def _replicate(self, side: torch.cuda.Stream | None) -> nn.Module:
        """Gradients are accumulated on the stream on which the replica is made: the captured one, if there is one."""
        if side is None:
            return self.runtime.replicate(self.method, accumulate=self.accumulate)
        main = torch.cuda.current_stream(self.runtime.device)
        side.wait_stream(main)
        with torch.cuda.stream(side):
            replica = self.runtime.replicate(self.method, accumulate=self.accumulate)
        main.wait_stream(side)
        return replica

    def release(self) -> None:
        """Gives up what a captured step holds: to be called before the processes of the run part."""
        if self.captured is not None:
            self.captured.release()

    def __call__(self, batches: Iterator[Batch], *, lr: float, momentum: float) -> Logs:
        """Takes the next `accumulate` batches, and returns the logs of each. `momentum` is the teacher's."""
        set_learning_rate_(self.optimizer, lr)
        if self.captured is None:
            return self._run(batches, momentum)
        self.momentum.fill_(momentum)
        return self.captured(batches, count=self.accumulate)

    def _captured(self, batches: Iterator[Batch]) -> Logs:
        return self._run(batches, self.momentum)

    def _run(self, batches: Iterator[Batch], momentum: float | Tensor) -> Logs:
        carries, logs = [], []
        for micro in range(self.accumulate):
            with self.runtime.micro_step(self.replica, last=micro == self.accumulate - 1):
                out = self.replica(next(batches))
                self.runtime.backward(out.loss / self.accumulate)
            carries.append(out.carry)
            logs.append(out.logs)
            del out  # its loss holds the graph of this micro-batch
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        joined = (torch.cat(parts) for parts in zip(*carries, strict=True))
        # queue and teacher change here alone, when the backward pass is over
        self.method.after_step(*map(self.runtime.collectives.gather, joined), momentum=momentum)
        return logs


def build_step(cfg: Config, runtime: Runtime) -> TrainStep:
    """The step of a config's run, on the runtime's device, with the weights that torch's seed draws."""
    return step_of(build_method(cfg.method, cfg.encoder, runtime.collectives).to(runtime.device), cfg, runtime)


def step_of(method: AnyMethod, cfg: Config, runtime: Runtime) -> TrainStep:
    """The step of a method that is on the runtime's device, as the config has it: optimizer, compiled, captured."""
    optimizer = build_optimizer(method.student, cfg.optim, capturable=cfg.run.cuda_graphs)
    if cfg.run.compile:
        compile_blocks_(method)
    return TrainStep(method, optimizer, runtime, accumulate=cfg.optim.accumulate, cuda_graphs=cfg.run.cuda_graphs)
