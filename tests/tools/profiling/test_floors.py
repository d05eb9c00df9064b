from pathlib import Path

import pytest
import torch

from pipelines import build_source, build_stream
from ressl.collectives import alone
from ressl.config_file import load_config
from ressl.method import build_method
from tools.profiling.floors import frame_bytes, least_bytes, loss_taken, needed_flops, network_bytes


def test_flops_are_those_of_the_layers(tiny_config: Path) -> None:
    """Of images of 16 x 16 pixels: stem, stages of 16 x 16 x 4, 8 x 8 x 8 and 4 x 4 x 16, projector."""
    found = needed_flops(load_config(tiny_config), images=10, on_gpu=False)
    convolutions = [(256, 3, 4, 9), (256, 4, 4, 9), (256, 4, 4, 9), (64, 4, 8, 9), (64, 8, 8, 9), (64, 4, 8, 1),
                    (16, 8, 16, 9), (16, 16, 16, 9), (16, 8, 16, 1)]  # fmt: skip
    forward = 2 * (sum(p * i * o * k for p, i, o, k in convolutions) + 16 * 32 + 32 * 16)
    assert found["student"] == found["teacher"] == 10 * forward
    first = 2 * 256 * 3 * 4 * 9  # whose images take no gradient
    similarity = 2 * 16 * 40
    assert found["backward"] == 10 * (2 * forward - first + similarity) and found["loss"] == 10 * 2 * similarity


def test_more_crops_and_images_need_more(tiny_config: Path) -> None:
    one, five = (
        needed_flops(
            load_config(tiny_config, [f"views.strong=[{', '.join(['{size: 16}'] * crops)}]"]), images=16, on_gpu=False
        )
        for crops in (1, 5)
    )
    assert five["student"] == 5 * one["student"] and five["teacher"] == one["teacher"]
    assert five["loss"] == 3 * one["loss"]


@pytest.mark.parametrize(("impl", "on_gpu"), [("chunked", False), ("triton", True)])
def test_a_loss_that_makes_its_gradient_in_the_forward_pass_has_those_flops(
    impl: str, on_gpu: bool, tiny_config: Path
) -> None:
    plain, fused = (
        needed_flops(load_config(tiny_config, [f"method.loss_impl={name}"]), images=10, on_gpu=on_gpu)
        for name in ("torch", impl)
    )
    gradient = 10 * 2 * 16 * 40
    assert fused["loss"] == plain["loss"] + gradient and fused["backward"] == plain["backward"] - gradient
    assert fused["student"] == plain["student"]


def test_a_loss_is_named_as_it_would_be_with_another_setting(tiny_config: Path) -> None:
    large = load_config(tiny_config, ["method.queue_size=2000000", "method.loss_impl=torch"])
    assert loss_taken(large, 16, on_gpu=False) == "torch"
    assert loss_taken(large, 16, on_gpu=False, impl="auto") == "chunked"


def test_networks_move_what_layers_read_and_write(tiny_config: Path) -> None:
    """The layers of `test_flops_are_those_of_the_layers`: positions read and written, channels, side of the kernel."""
    two = load_config(tiny_config, ["views.strong=[{size: 16}, {size: 16}]", "optim.accumulate=2"])
    convolutions = [(256, 256, 3, 4, 9), (256, 256, 4, 4, 9), (256, 256, 4, 4, 9), (256, 64, 4, 8, 9),
                    (64, 64, 8, 8, 9), (256, 64, 4, 8, 1), (64, 16, 8, 16, 9), (16, 16, 16, 16, 9),
                    (64, 16, 8, 16, 1)]  # fmt: skip
    passed = sum(i * a + o * b for i, o, a, b, _ in convolutions) + 16 + 32 + 32 + 16
    weights = sum(a * b * k for _, _, a, b, k in convolutions) + 32 * 17 + 16 * 33
    found = network_bytes(two, 10, torch.bfloat16)
    assert found["teacher"] == 2 * (10 * passed + 2 * weights)
    assert found["student"] == 2 * found["teacher"] and found["backward"] == 2 * found["student"]


@pytest.mark.parametrize(
    ("optimizer", "floor"),
    [
        ("name: sgd, momentum: 0.9", 20),
        ("name: sgd, momentum: 0.0", 12),
        ("name: lars, momentum: 0.9", 28),
        ("name: adamw", 28),
    ],
)
def test_bytes_are_those_that_must_move(optimizer: str, floor: int, tiny_config: Path) -> None:
    optim = f"optim={{{optimizer}, epochs: 2, batch_size: 16, lr: 0.1, warmup_epochs: 0}}"
    cfg = load_config(tiny_config, [optim, "method.queue_dtype=bfloat16", "views.strong.0.crop_scale=[0.2, 0.6]"])
    cpu = torch.device("cpu")
    source = build_source(cfg.data, "train", cpu)
    assert source is not None
    frames = next(build_stream(cfg, source, device=cpu).frames(0))
    method = build_method(cfg.method, cfg.encoder, alone())
    found = least_bytes(cfg, method, frames, images=16, world_size=4, dtype=torch.float32)
    parameters = sum(p.numel() for p in method.student.parameters())
    assert found["ema"] == 12 * parameters and found["optimizer"] == floor * parameters
    assert found["all-reduce"] == 4 * parameters and found["loss"] == 40 * 16 * 2
    assert found["queue"] == 64 * 16 * (4 + 2)
    assert found["views"] == pytest.approx(16 * (768 * (0.6 + 0.4) + 2 * 768 * 4))
    assert frame_bytes(frames) >= frames.pixels.nbytes
