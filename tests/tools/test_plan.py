from pathlib import Path

import pytest

from ressl.batch import DataError
from ressl.config_file import load_config
from tools.plan import make_plan

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def test_the_imagenet_run_has_its_known_numbers() -> None:
    plan = make_plan(load_config(CONFIGS / "imagenet_resnet50_200ep_paper.yaml"), images=1_281_167, world_size=8)
    assert plan.backbone == 23_508_032 and plan.projector == 2048 * 4096 + 4096 + 4096 * 512 + 512
    assert (plan.steps_per_epoch, plan.steps, plan.left_out) == (5004, 1_000_800, 143)
    assert plan.logits_bytes == 3 * 32 * 131_072 * 4  # similarities, target and prediction of 32 images
    queue, weights = 512 * 131_072 * 4, (plan.backbone + plan.projector) * 4
    assert plan.state_bytes == queue + 4 * weights
    assert 1.5e9 < plan.activation_bytes < 5e9  # ResNet-50 at 224 in float32 keeps some 80 MB an image


def test_five_crops_keep_as_much_more_as_they_have_pixels() -> None:
    one, five = (
        make_plan(load_config(CONFIGS / f"imagenet_resnet50_200ep{name}_paper.yaml"), images=10_000, world_size=8)
        for name in ("", "_5crops")
    )
    assert five.activation_bytes / one.activation_bytes == pytest.approx(2.76, abs=0.1)
    assert one.logits_bytes > 0 and five.logits_bytes == 0  # five times as many similarities are taken in tiles


def test_the_optimizer_and_the_queue_take_what_they_are() -> None:
    path, adamw = (
        CONFIGS / "cifar10_resnet18_paper.yaml",
        "{name: adamw, epochs: 2, batch_size: 256, lr: 0.001, warmup_epochs: 0}",
    )
    sgd, two_momenta, half_queue = (
        make_plan(load_config(path, overrides), images=10_000, world_size=1)
        for overrides in ([], [f"optim={adamw}"], ["method.queue_dtype=bfloat16"])
    )
    assert two_momenta.state_bytes - sgd.state_bytes == 4 * (sgd.backbone + sgd.projector)
    assert sgd.state_bytes - half_queue.state_bytes == 2 * 128 * 4096


def test_processes_that_do_not_divide_the_batch_are_refused() -> None:
    with pytest.raises(DataError, match="does not split over 7 processes"):
        make_plan(load_config(CONFIGS / "imagenet_resnet50_200ep_paper.yaml"), images=10_000, world_size=7)
