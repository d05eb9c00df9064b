import pytest
import torch
from torch import nn

from ressl.config import ResNet
from ressl.config_optim import SGDConfig
from ressl.encoder import build_encoder
from ressl.optim import build_optimizer, learning_rate


def config(**changes: object) -> SGDConfig:
    return SGDConfig(**{"name": "sgd", "epochs": 10, "batch_size": 8, "lr": 0.5, "warmup_epochs": 2.0, **changes})


def test_the_rate_rises_from_zero_and_falls_to_zero() -> None:
    rates = [learning_rate(step, steps_per_epoch=5, cfg=config()) for step in range(51)]
    assert rates[0] == 0
    assert rates[5] == pytest.approx(0.25) and rates[10] == pytest.approx(0.5)
    assert rates[30] == pytest.approx(0.25)  # half way down the cosine
    assert rates[50] == pytest.approx(0, abs=1e-12)
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)


def test_the_imagenet_recipe_decays_what_the_authors_decay() -> None:
    encoder = build_encoder(ResNet(name="resnet18"), hidden_dim=8, embed_dim=4)
    optimizer = build_optimizer(encoder, config(no_decay=("bn", "bias"), weight_decay=1e-4))
    names = {id(p): name for name, p in encoder.named_parameters()}
    decayed, free = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-4, 0.0]
    assert "backbone.layer2.0.downsample.1.weight" in decayed  # its name has no bn in it
    assert {"backbone.layer1.0.bn1.weight", "backbone.bn1.bias", "projector.0.bias"} <= free
    assert len(decayed) + len(free) == len(names)


def test_without_words_everything_is_decayed() -> None:
    optimizer = build_optimizer(nn.Linear(2, 2), config(weight_decay=5e-4))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [5e-4]


def test_a_step_is_the_literal_update() -> None:
    """v <- momentum v + gradient + decay w;  w <- w - lr v."""
    layer = nn.Linear(2, 1, bias=False)
    w, v = layer.weight.detach().clone(), torch.zeros(1, 2)
    optimizer = build_optimizer(layer, config(lr=0.1, momentum=0.9, weight_decay=0.01))
    for _ in range(3):
        layer(torch.tensor([[1.0, 2.0]])).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        v = 0.9 * v + torch.tensor([[1.0, 2.0]]) + 0.01 * w
        w = w - 0.1 * v
    torch.testing.assert_close(layer.weight.detach(), w)
