"""The training loop. Everything it uses is built elsewhere and handed in."""

from collections.abc import Callable

import torch

from ressl.batch import ViewLoader
from ressl.config import SGDConfig
from ressl.method import AnyMethod, StepOutput
from ressl.optim import learning_rate
from ressl.recorder import Recorder
from ressl.runtime import Runtime


def train(
    method: AnyMethod,
    loader: ViewLoader,
    optimizer: torch.optim.Optimizer,
    runtime: Runtime,
    recorder: Recorder,
    cfg: SGDConfig,
    *,
    start_step: int = 0,
    on_epoch_end: Callable[[int, int], None] = lambda epoch, step: None,
) -> int:
    """Runs from optimizer step `start_step` to the last one and returns their number.

    `on_epoch_end(epochs, step)` evaluates and saves. The body of the loop never waits for the device, except where the
    recorder reads the logs and, in fp16, the scaler its flag. Queue and teacher change in one place, `after_step`, when
    the backward pass is over.
    """
    replica = runtime.replicate(method)
    optimizer = runtime.prepare_optimizer(optimizer)
    step = start_step
    for epoch in range(start_step // loader.steps_per_epoch, cfg.epochs):
        method.train()
        batches = loader.epoch(epoch, step % loader.steps_per_epoch)
        for _ in range(step % loader.steps_per_epoch, loader.steps_per_epoch):
            lr = learning_rate(step, steps_per_epoch=loader.steps_per_epoch, cfg=cfg)
            for group in optimizer.param_groups:
                group["lr"] = lr

            outputs: list[StepOutput] = []
            for micro in range(cfg.accumulate):
                with runtime.micro_step(replica, last=micro == cfg.accumulate - 1):
                    out = replica(next(batches))
                    runtime.backward(out.loss / cfg.accumulate)
                outputs.append(StepOutput(out.loss.detach(), out.carry, out.logs))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            carries = (torch.cat(parts) for parts in zip(*(o.carry for o in outputs), strict=True))
            method.after_step(*map(runtime.collectives.gather, carries))

            step += 1
            recorder.step(step, [out.logs for out in outputs], lr=lr)
        on_epoch_end(epoch + 1, step)
    return step
