import copy

import pytest
import torch
from torch import nn

from ressl.batch import DataError
from ressl.batchnorm import (
    SplitBatchNorm2d,
    SyncBatchNorm2d,
    normalised_together,
    set_batchnorm_,
    shuffled,
    unshuffled,
)
from ressl.collectives import alone
from ressl.config import LocalBatchNorm, ShuffleBatchNorm, SplitBatchNorm, SyncBatchNorm

SPLIT = SplitBatchNorm(name="split", groups=4)


def images(count: int = 8) -> torch.Tensor:
    return torch.randn(count, 3, 5, 5, generator=torch.Generator().manual_seed(0)) + torch.arange(count).view(
        -1, 1, 1, 1
    )


def layer_with(policy: object) -> nn.BatchNorm2d:
    net = nn.Sequential(nn.BatchNorm2d(3))
    nn.init.uniform_(net[0].weight, 0.5, 2.0)
    nn.init.uniform_(net[0].bias, -1.0, 1.0)
    set_batchnorm_(net, policy, alone())
    return net[0]


def backward(layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Output of a layer and gradients of its input, weight and bias."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    out = layer(x)
    (out * torch.arange(x.numel(), dtype=x.dtype).view_as(x).sin()).sum().backward()
    return [out.detach(), x.grad, layer.weight.grad, layer.bias.grad]


def literal(layer: nn.BatchNorm2d, x: torch.Tensor) -> torch.Tensor:
    """Ioffe and Szegedy 2015 (https://arxiv.org/abs/1502.03167), algorithm 1, for images (B, C, H, W)."""
    mean = x.mean(dim=(0, 2, 3), keepdim=True)
    variance = (x - mean).square().mean(dim=(0, 2, 3), keepdim=True)
    normal = (x - mean) / (variance + layer.eps).sqrt()
    return layer.weight.view(1, -1, 1, 1) * normal + layer.bias.view(1, -1, 1, 1)


@pytest.mark.parametrize("policy", [LocalBatchNorm(), SyncBatchNorm(name="sync"), ShuffleBatchNorm(name="shuffle")])
def test_on_one_process_all_images_are_normalised_together(policy: object) -> None:
    layer, x = layer_with(policy).double(), images().double()
    twin = copy.deepcopy(layer)
    twin.forward = lambda images: literal(twin, images)
    for found, expected in zip(backward(layer, x), backward(twin, x), strict=True):
        torch.testing.assert_close(found, expected)
    channels = x.transpose(0, 1).flatten(1)
    torch.testing.assert_close(layer.running_mean, 0.1 * channels.mean(1))
    torch.testing.assert_close(layer.running_var, 0.9 + 0.1 * channels.var(1, correction=1))
    assert int(layer.num_batches_tracked) == 1


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_split_is_to_the_bit_a_batch_norm_of_each_group(memory_format: torch.memory_format) -> None:
    layer, x = layer_with(SPLIT), images().contiguous(memory_format=memory_format)
    parts = [nn.BatchNorm2d(3) for _ in range(4)]
    for part in parts:
        part.load_state_dict(layer.state_dict())
    for step in range(2):
        layer.zero_grad()
        out, gradient, weight_gradient, bias_gradient = backward(layer, x + step)
        assert out.is_contiguous(memory_format=memory_format)
        wave = torch.arange(x.numel(), dtype=x.dtype).view_as(x).sin()
        expected = []
        for part, group, coefficients in zip(parts, (x + step).chunk(4), wave.chunk(4), strict=True):
            part.zero_grad()
            group = group.clone(memory_format=torch.preserve_format).requires_grad_()
            expected.append(part(group))
            (expected[-1] * coefficients).sum().backward()
            expected[-1] = torch.stack([expected[-1].detach(), group.grad])
        assert torch.equal(torch.stack([out, gradient]), torch.cat(expected, dim=1))
        torch.testing.assert_close(weight_gradient, torch.stack([part.weight.grad for part in parts]).sum(0))
        torch.testing.assert_close(bias_gradient, torch.stack([part.bias.grad for part in parts]).sum(0))
        mean, variance = (torch.stack([getattr(p, f"running_{w}") for p in parts]).mean(0) for w in ("mean", "var"))
        assert torch.equal(layer.running_mean, mean) and torch.equal(layer.running_var, variance)
        for part in parts:
            part.running_mean.copy_(mean)
            part.running_var.copy_(variance)
    assert int(layer.num_batches_tracked) == 2


@pytest.mark.parametrize(
    ("policy", "images", "ranks", "together"),
    [
        (LocalBatchNorm(), 32, 8, 32),
        (SyncBatchNorm(name="sync"), 32, 8, 256),
        (SPLIT, 32, 8, 8),
        (ShuffleBatchNorm(name="shuffle"), 32, 8, 32),
        (SPLIT, 30, 1, "30 images do not split into encoder.batchnorm.groups=4"),
        (ShuffleBatchNorm(name="shuffle"), 30, 4, "30 images of a rank cannot be dealt out over 4 ranks"),
        (SPLIT, 4, 8, "batch norm needs at least 2 images together"),
        (LocalBatchNorm(), 1, 8, "batch norm needs at least 2 images together"),
    ],
)
def test_how_many_images_are_normalised_together(policy: object, images: int, ranks: int, together: int | str) -> None:
    if isinstance(together, int):
        assert normalised_together(policy, images, ranks) == together
    else:
        with pytest.raises(DataError, match=together):
            normalised_together(policy, images, ranks)


@pytest.mark.parametrize(
    "policy", [LocalBatchNorm(), SyncBatchNorm(name="sync"), SPLIT, ShuffleBatchNorm(name="shuffle")]
)
def test_weights_keep_their_names_and_evaluation_is_torchs(policy: object) -> None:
    layer, plain = layer_with(policy), nn.BatchNorm2d(3)
    layer(images())
    plain.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer.eval()(images()), plain.eval()(images()))


def test_only_the_asked_policy_replaces_layers() -> None:
    assert type(layer_with(LocalBatchNorm())) is nn.BatchNorm2d
    assert type(layer_with(SPLIT)) is SplitBatchNorm2d
    assert type(layer_with(SyncBatchNorm(name="sync"))) is SyncBatchNorm2d


def test_the_teacher_sees_each_group_of_the_student_spread_over_all_groups() -> None:
    order = torch.arange(32)
    dealt = shuffled(SPLIT, alone(), order)
    groups = [set((part // 8).tolist()) for part in dealt.chunk(4)]  # which of the student's groups are in each
    assert groups == [{0, 1, 2, 3}] * 4
    assert torch.equal(unshuffled(SPLIT, alone(), dealt), order)


def test_the_policies_of_one_process_deal_nothing() -> None:
    order = torch.arange(8)
    for policy in (LocalBatchNorm(), SyncBatchNorm(name="sync"), ShuffleBatchNorm(name="shuffle")):
        assert torch.equal(shuffled(policy, alone(), order), order)
        assert torch.equal(unshuffled(policy, alone(), order), order)


def test_split_normalises_the_teachers_images_in_the_groups_that_were_dealt() -> None:
    """Of 4 groups of 2 images, the first images of all, then the second ones: 0 2 4 6 1 3 5 7, two by two."""
    layer, x = layer_with(SPLIT), images()
    found = unshuffled(SPLIT, alone(), layer(shuffled(SPLIT, alone(), x)).flatten(1)).view_as(x)
    for pair in ([0, 2], [4, 6], [1, 3], [5, 7]):
        torch.testing.assert_close(found[pair], literal(layer, x[pair]))
