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


def test_split_is_a_batch_norm_of_each_group_with_the_mean_of_their_statistics() -> None:
    layer = layer_with(SPLIT)
    copies = [nn.BatchNorm2d(3) for _ in range(4)]
    for copy in copies:
        copy.load_state_dict(layer.state_dict())
    for _ in range(2):
        expected = torch.cat([copy(part) for copy, part in zip(copies, images().chunk(4), strict=True)])
        torch.testing.assert_close(layer(images()), expected)
        mean = torch.stack([copy.running_mean for copy in copies]).mean(0)
        variance = torch.stack([copy.running_var for copy in copies]).mean(0)
        torch.testing.assert_close(layer.running_mean, mean)
        torch.testing.assert_close(layer.running_var, variance)
        for copy in copies:
            copy.running_mean.copy_(mean)
            copy.running_var.copy_(variance)


def test_split_does_not_mind_the_memory_layout() -> None:
    plain, last = layer_with(SPLIT), layer_with(SPLIT)
    last.load_state_dict(plain.state_dict())
    torch.testing.assert_close(last(images().contiguous(memory_format=torch.channels_last)), plain(images()))


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


def test_sync_on_one_process_is_torchs_batch_norm_with_its_gradients() -> None:
    ours = layer_with(SyncBatchNorm(name="sync"))
    theirs = nn.BatchNorm2d(3)
    theirs.load_state_dict(ours.state_dict())
    grads = []
    for layer in (ours.double(), theirs.double()):
        x = images().double().requires_grad_()
        (layer(x) * torch.arange(x.numel()).view_as(x).sin()).sum().backward()
        grads.append((x.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


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
