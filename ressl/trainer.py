"""The training loop. Everything it uses is built elsewhere and handed in."""

from collections.abc import Callable

from ressl.batch import ViewLoader
from ressl.config_optim import Optim
from ressl.optim import learning_rate
from ressl.recorder import Recorder
from ressl.step import TrainStep


def train(
    take_step: TrainStep,
    loader: ViewLoader,
    recorder: Recorder,
    cfg: Optim,
    *,
    start_step: int = 0,
    on_step: Callable[[int], bool] = lambda step: False,
) -> int:
    """Runs from optimizer step `start_step` to the last one and returns how many are taken.

    `on_step(step)` follows each, saves and evaluates, and ends the run early where it gives true. The body of the loop
    never waits for the device, except where the recorder reads the logs.
    """
    step, total = start_step, cfg.epochs * loader.steps_per_epoch
    try:
        for epoch in range(start_step // loader.steps_per_epoch, cfg.epochs):
            take_step.method.train()
            batches = loader.epoch(epoch, step % loader.steps_per_epoch)
            for _ in range(step % loader.steps_per_epoch, loader.steps_per_epoch):
                lr = learning_rate(step, steps_per_epoch=loader.steps_per_epoch, cfg=cfg)
                logs = take_step(batches, lr=lr, momentum=take_step.method.momentum(step / total))
                step += 1
                recorder.step(step, logs, lr=lr)
                if on_step(step):
                    return step
    finally:
        take_step.release()
    return step
