import copy
from collections.abc import Iterator
from pathlib import Path

import torch

from ressl.batch import Batch
from ressl.config_file import load_config
from ressl.runtime import Runtime
from ressl.step import build_step

BATCH = 16


def batches(count: int) -> Iterator[Batch]:
    gen, index = torch.Generator().manual_seed(0), torch.arange(BATCH // 2)
    for _ in range(count):
        weak, strong = (torch.randn(BATCH // 2, 3, 16, 16, generator=gen) for _ in range(2))
        yield Batch(weak=(weak,), strong=(strong,), index=index, label=index)


def trained(config: Path, *overrides: str) -> dict[str, torch.Tensor]:
    """Everything after six steps of two micro-batches, in which rate and momentum change."""
    cfg = load_config(config, ["optim.accumulate=2", *overrides])
    torch.manual_seed(0)
    take_step, stream = build_step(cfg, Runtime(cfg.run)), batches(12)
    for step in range(6):
        logs = take_step(stream, lr=0.05 * step, momentum=0.9 + 0.01 * step)
    state = take_step.method.state_dict()
    return {**copy.deepcopy(state), "loss": logs[1]["loss"].clone(), "agreement": logs[0]["agreement"].clone()}


def test_a_step_that_can_be_captured_computes_what_the_plain_one_does(tiny_config: Path) -> None:
    """On held batches, with rate and momentum on the device. A float32 rate is rounded, so not to the bit."""
    plain, held = trained(tiny_config), trained(tiny_config, "run.cuda_graphs=true")
    assert plain.keys() == held.keys()
    for name, value in plain.items():
        torch.testing.assert_close(held[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_the_logs_are_those_of_each_micro_batch_and_hold_no_graph(tiny_config: Path) -> None:
    cfg = load_config(tiny_config, ["optim.accumulate=2"])
    logs = build_step(cfg, Runtime(cfg.run))(batches(2), lr=0.1, momentum=0.9)
    assert len(logs) == 2 and logs[0]["loss"] != logs[1]["loss"]
    assert not any(value.requires_grad for log in logs for value in log.values())
