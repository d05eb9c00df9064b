"""One optimizer step: forward and backward of each micro-batch, the optimizer, then queue and teacher.

The guard (ressl/guard.py) stands before both: where it finds a number that is not finite, neither is changed.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ressl.batch import Batch
from ressl.compiled import compile_blocks_
from ressl.config import Config
from ressl.graphs import CapturedStep, Logs
from ressl.guard import Guard, spoiled
from ressl.method import AnyMethod, build_method
from ressl.optim import build_optimizer, set_learning_rate_
from ressl.runtime import Runtime


class TrainStep:
    """The step of a run, made of its parts. It never makes the host wait for the device.

    With `cuda_graphs` the optimizer must have been built `capturable`. The method is replicated here, over the ranks.
    Without a `guard` a step changes what it changes.
    """

    def __init__(
        self,
        method: AnyMethod,
        optimizer: torch.optim.Optimizer,
        runtime: Runtime,
        *,
        guard: Guard | None = None,
        accumulate: int = 1,
        cuda_graphs: bool = False,
    ) -> None:
        self.method, self.runtime, self.accumulate, self.guard = method, runtime, accumulate, guard
        self.parameters = [p for p in method.parameters() if p.requires_grad]
        self.captured: CapturedStep | None = None
        if cuda_graphs:
            self.momentum = torch.zeros((), dtype=torch.float64, device=runtime.device)
            self.captured = CapturedStep(self._captured, runtime.device)
        self.replica = self._replicate(self.captured.side if self.captured else None)
        self.plain, self.optimizer = optimizer, runtime.prepare_optimizer(optimizer)
        if guard:
            guard.watch_statistics_(method)  # a replica gives the buffers other memory

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

    @property
    def guarded(self) -> Guard:
        """The guard of a step that has one."""
        assert self.guard is not None
        return self.guard

    def release(self) -> None:
        """Gives up what a captured step holds: to be called before the processes of the run part."""
        if self.captured is not None:
            self.captured.release()

    def settle(self, batch: Batch, taken: int) -> None:
        """Makes a new replica what it is after `taken` steps: DistributedDataParallel sums the gradients of its first
        two steps in other groups than those of later ones, and so in another order. What a pass over `batch` changes
        is to be restored after this; weights stay."""
        for _ in range(min(taken, 2)):
            self.runtime.backward(self.replica(batch).loss)
            self.optimizer.zero_grad(set_to_none=True)

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
        carries, logs, indices = [], [], []
        if self.guard:
            self.guard.keep()
        for micro in range(self.accumulate):
            batch = next(batches)
            with self.runtime.micro_step(self.replica, last=micro == self.accumulate - 1):
                out = self.replica(batch)
                self.runtime.backward(out.loss / self.accumulate)
            carries.append(spoiled(out.carry, out.loss) if self.guard else out.carry)
            indices.append(batch.index.clone())  # the batch may be gone when the next is asked for
            logs.append(out.logs)
            del out  # its loss holds the graph of this micro-batch
        joined = (torch.cat(parts) for parts in zip(*carries, strict=True))
        carry = [self.runtime.collectives.gather(part) for part in joined]
        skip = self._look(carry, torch.cat(indices))
        if skip is None or skip.is_cuda or not skip:  # a CPU may be asked
            self._update(carry, momentum, skip)
        if self.guard and skip is not None:
            self.guard.put_back_(skip)
        self.optimizer.zero_grad(set_to_none=True)
        return [{**log, "skipped": self.guard.skipped} for log in logs] if self.guard else logs

    def _look(self, carry: list[Tensor], index: Tensor) -> Tensor | None:
        if self.guard is None:
            return None
        # fp16 gradients overflow now and then by design: its scaler leaves such steps out by itself
        gradients = [] if self.runtime.scales_gradients else [p.grad for p in self.parameters if p.grad is not None]
        return self.guard.look(gradients, carry, index)

    def _update(self, carry: list[Tensor], momentum: float | Tensor, skip: Tensor | None) -> None:
        """Optimizer, queue and teacher change here alone, when the backward pass is over; on a GPU not where `skip`."""
        on_gpu = skip is not None and skip.is_cuda
        if on_gpu and not self.runtime.scales_gradients:
            self.plain.found_inf = skip.float()  # type: ignore[union-attr,attr-defined]  # fused optimizers heed it
        self.optimizer.step()
        self.method.after_step(*carry, momentum=momentum, skip=skip if on_gpu else None)


def build_step(cfg: Config, runtime: Runtime) -> TrainStep:
    """The step of a config's run, on the runtime's device, with the weights that torch's seed draws."""
    return step_of(build_method(cfg.method, cfg.encoder, runtime.collectives).to(runtime.device), cfg, runtime)


def step_of(method: AnyMethod, cfg: Config, runtime: Runtime, *, guarded: bool = True) -> TrainStep:
    """The step of a method that is on the runtime's device, as the config has it: optimizer, compiled, captured."""
    optimizer = build_optimizer(method.student, cfg.optim, capturable=cfg.run.cuda_graphs)
    if cfg.run.compile:
        compile_blocks_(method)
    images = cfg.optim.batch_size
    return TrainStep(
        method,
        optimizer,
        runtime,
        guard=Guard(runtime.device, rows=images, own=images // runtime.world_size) if guarded else None,
        accumulate=cfg.optim.accumulate,
        cuda_graphs=cfg.run.cuda_graphs,
    )
