"""A step whose numbers are not finite changes nothing, wherever they come from."""

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ressl.batch import Batch
from ressl.collectives import Collectives, alone
from ressl.config_file import load_config
from ressl.guard import Guard, spoiled
from ressl.runtime import Runtime
from ressl.step import TrainStep, build_step

BATCH = 16
OPTIMIZERS = {
    "sgd": "optim={name: sgd, epochs: 2, batch_size: 16, lr: 0.06, warmup_epochs: 0}",
    "lars": "optim={name: lars, epochs: 2, batch_size: 16, lr: 0.1, warmup_epochs: 0}",
    "adamw": "optim={name: adamw, epochs: 2, batch_size: 16, lr: 0.001, warmup_epochs: 0}",
}


def batch(step: int, device: torch.device) -> Batch:
    draw = torch.Generator().manual_seed(step)
    weak, strong = (torch.randn(BATCH, 3, 16, 16, generator=draw).to(device) for _ in range(2))
    index = torch.arange(BATCH * step, BATCH * (step + 1), device=device)
    return Batch(weak=(weak,), strong=(strong,), index=index, label=index)


def state(step: TrainStep) -> dict[str, Tensor]:
    """All that a step may change, but for the number of batches that batch norm has seen, which nothing reads."""
    method = {k: v for k, v in step.method.state_dict().items() if "tracked" not in k}
    momenta = {
        f"{key}.{name}": value
        for key, entry in step.plain.state_dict()["state"].items()
        for name, value in entry.items()
        if isinstance(value, Tensor)
    }
    return copy.deepcopy(method | momenta)


def put(tensor: Tensor, value: float) -> None:
    with torch.no_grad():
        tensor[(0,) * tensor.ndim] = value


def in_the_strong_view(step: TrainStep, images: Batch) -> None:
    put(images.strong[0], math.nan)


def in_the_weak_view(step: TrainStep, images: Batch) -> None:
    put(images.weak[0], math.inf)


def in_the_teacher(step: TrainStep, images: Batch) -> None:
    put(next(step.method.teacher.parameters()), math.nan)


def in_the_queue(step: TrainStep, images: Batch) -> None:
    put(step.method.queue.keys, math.nan)


def in_a_gradient(step: TrainStep, images: Batch) -> None:
    weight = next(step.method.student.parameters())
    hook = weight.register_hook(lambda gradient: (hook.remove(), gradient * math.inf)[1])


PLACES = [in_the_strong_view, in_the_weak_view, in_the_teacher, in_the_queue, in_a_gradient]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_is_not_finite_changes_nothing(
    place: Callable[[TrainStep, Batch], None], optimizer: str, tiny_config: Path
) -> None:
    check(place, tiny_config, OPTIMIZERS[optimizer], "optim.batch_size=16")


@pytest.mark.gpu
@pytest.mark.parametrize("place", PLACES[:4], ids=lambda place: place.__name__)
@pytest.mark.parametrize(
    ("optimizer", "precision", "graphs"),
    [
        ("sgd", "fp32", "false"), ("sgd", "bf16", "true"), ("sgd", "fp16", "false"), ("lars", "fp32", "true"),
        ("adamw", "fp32", "true"),
    ],
)  # fmt: skip
def test_nor_does_it_on_a_gpu(
    place: Callable[[TrainStep, Batch], None], optimizer: str, precision: str, graphs: str, tiny_config: Path
) -> None:
    settings = ["run.device=auto", f"run.precision={precision}", f"run.cuda_graphs={graphs}"]
    check(place, tiny_config, OPTIMIZERS[optimizer], *settings)


def check(place: Callable[[TrainStep, Batch], None], config: Path, *overrides: str) -> None:
    cfg = load_config(config, overrides)
    torch.manual_seed(0)
    runtime = Runtime(cfg.run)
    step = build_step(cfg, runtime)
    for number in range(14):  # past the capture of a graph
        step(iter([batch(number, runtime.device)]), lr=0.01, momentum=0.9)
    assert int(step.guarded.skipped) == 0
    good = batch(14, runtime.device)
    bad = batch(15, runtime.device)
    whole = state(step)
    place(step, bad)
    before = state(step)
    (logs,) = step(iter([bad]), lr=0.01, momentum=0.9)
    after = state(step)
    for name, value in before.items():
        assert torch.equal(after[name].nan_to_num(), value.nan_to_num()), name
    assert int(step.guarded.skipped) == 1 == int(logs["skipped"])
    if place in (in_the_strong_view, in_the_weak_view):
        said = step.guarded.describe(0, alone())
        assert "of step 15 were not finite" in said and str(15 * BATCH) in said
    step.method.load_state_dict(whole, strict=False)  # the broken place mended
    step(iter([good]), lr=0.01, momentum=0.9)
    assert int(step.guarded.skipped) == 1
    changed = state(step)
    assert any(not torch.equal(changed[name], value) for name, value in whole.items())
    assert all(value.isfinite().all() for value in changed.values())


def test_a_step_that_was_left_out_does_not_disturb_those_after_it(tiny_config: Path) -> None:
    """A run that met a bad batch goes on as one that never saw it."""

    def trained(numbers: list[int]) -> dict[str, Tensor]:
        cfg = load_config(tiny_config)
        torch.manual_seed(0)
        runtime = Runtime(cfg.run)
        step = build_step(cfg, runtime)
        for number in numbers:
            images = batch(max(number, 0), runtime.device)
            if number < 0:
                in_the_strong_view(step, images)
            step(iter([images]), lr=0.01, momentum=0.9)
        return state(step)

    one, other = trained([1, 2, 3]), trained([1, -1, 2, -1, 3])
    for name, value in one.items():
        assert torch.equal(other[name], value), name


def test_one_micro_batch_leaves_out_the_whole_step(tiny_config: Path) -> None:
    cfg = load_config(tiny_config, ["optim.accumulate=2", "optim.batch_size=32"])
    step = build_step(cfg, Runtime(cfg.run))
    first, second = batch(0, torch.device("cpu")), batch(1, torch.device("cpu"))
    before = state(step)
    put(second.strong[0][4:], math.nan)
    step(iter([first, second]), lr=0.01, momentum=0.9)
    assert all(torch.equal(value, state(step)[name]) for name, value in before.items())
    assert f"images {', '.join(str(16 + i) for i in range(16))}" in step.guarded.describe(0, alone())


def test_the_images_of_each_rank_are_told_apart() -> None:
    """Two ranks of three images, of which the second one's loss was not finite."""
    guard = Guard(torch.device("cpu"), rows=6, own=3)
    mine, theirs = torch.ones(3, 2), torch.ones(3, 2)
    carry = torch.cat([*spoiled((mine,), torch.tensor(1.0)), *spoiled((theirs,), torch.tensor(math.nan))])
    skip = guard.look([torch.ones(4)], [carry], torch.tensor([10, 11, 12]))
    assert bool(skip) and int(guard.skipped) == 1
    two = Collectives(2, lambda own: torch.cat([own, own + 90]), lambda x: x, lambda rows: rows)
    said = guard.describe(7, two)
    assert said == "the loss or the embeddings of step 8 were not finite on rank 1; images 100, 101, 102"


def test_a_carry_that_is_no_number_stays_what_it_is() -> None:
    keys, labels = spoiled((torch.ones(2, 3), torch.arange(2)), torch.tensor(math.inf))
    assert keys.isnan().all() and torch.equal(labels, torch.arange(2))


def test_only_what_was_skipped_is_kept_in_a_checkpoint() -> None:
    guard, other = (Guard(torch.device("cpu"), rows=2, own=2) for _ in range(2))
    guard.look([torch.tensor([math.nan])], [torch.ones(2, 1)], torch.arange(2))
    other.load_state(guard.state())
    assert int(other.skipped) == 1
    assert "the gradient of step 4 was not finite; its images: 0, 1" in guard.describe(3, alone())


def batches(count: int) -> Iterator[Batch]:
    return (batch(number, torch.device("cpu")) for number in range(count))


def test_the_guard_changes_no_bit_of_a_healthy_run(tiny_config: Path) -> None:
    cfg = load_config(tiny_config)
    found = []
    for guarded in (True, False):
        torch.manual_seed(0)
        step = build_step(cfg, Runtime(cfg.run))
        if not guarded:
            step.guard = None
        for images in batches(4):
            step(iter([images]), lr=0.05, momentum=0.9)
        found.append(state(step))
    for name, value in found[0].items():
        assert torch.equal(found[1][name], value), name
