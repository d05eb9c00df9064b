"""Whose statistics normalise an image: the batch-norm policies `local`, `sync`, `split` and `shuffle`.

`local` is torch's own layer. `sync` and `split` replace the layers of an encoder. `shuffle` and `split` also change
which images the teacher sees together, so that no group of images is normalised alike in both networks: with the same
group on both sides, its statistics would give the answer away (He et al. 2019, https://arxiv.org/abs/1911.05722,
section 3.3).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ressl.batch import DataError
from ressl.collectives import Collectives
from ressl.config import BatchNorm, LocalBatchNorm, ShuffleBatchNorm, SplitBatchNorm, SyncBatchNorm


class SplitBatchNorm2d(nn.BatchNorm2d):
    """Normalises each of `groups` equal, contiguous parts of the batch by its own statistics, as that many devices do.

    The running statistics are the mean of those that the groups would keep. Evaluation is torch's.
    """

    groups: int = 1

    def forward(self, images: Tensor) -> Tensor:  # (B, C, H, W)
        if not self.training:
            return super().forward(images)
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        means = self.running_mean.repeat(self.groups, 1).unbind()
        variances = self.running_var.repeat(self.groups, 1).unbind()
        out = [
            F.batch_norm(part, mean, variance, self.weight, self.bias, True, self.momentum, self.eps)
            for part, mean, variance in zip(images.chunk(self.groups), means, variances, strict=True)
        ]
        self.running_mean.copy_(torch.stack(means).mean(0))
        self.running_var.copy_(torch.stack(variances).mean(0))
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        return torch.cat(out)


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Normalises by the mean and variance over the images of all ranks; gradients flow through both.

    torch.nn.SyncBatchNorm refuses the CPU; this one works wherever the collectives do.
    """

    collectives: Collectives

    def forward(self, images: Tensor) -> Tensor:  # (B, C, H, W)
        if not self.training:
            return super().forward(images)
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        x = images if images.dtype == torch.float64 else images.float()
        moments = torch.stack([x.mean(dim=(0, 2, 3)), (x * x).mean(dim=(0, 2, 3))])
        mean, square = self.collectives.mean(moments).unbind()
        variance = (square - mean * mean).clamp(min=0)
        with torch.no_grad():
            count = images.numel() // images.shape[1] * self.collectives.world_size
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / max(1, count - 1)), self.momentum)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        shift = self.bias - mean * scale
        return (x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)).to(images.dtype)


def normalised_together(policy: BatchNorm, images: int, world_size: int) -> int:
    """How many images share their statistics, where each rank passes `images` at a time. Raises DataError where they
    cannot be dealt out."""
    match policy:
        case LocalBatchNorm():
            together = images
        case SyncBatchNorm():
            together = images * world_size
        case SplitBatchNorm(groups=groups):
            if images % groups:
                raise DataError(f"{images} images do not split into encoder.batchnorm.groups={groups}")
            together = images // groups
        case ShuffleBatchNorm():
            if images % world_size:
                raise DataError(
                    f"{images} images of a rank cannot be dealt out over {world_size} ranks (batchnorm shuffle)"
                )
            together = images
    if together < 2:
        raise DataError("batch norm needs at least 2 images together: raise optim.batch_size or lower optim.accumulate")
    return together


@torch.no_grad()
def flat_statistics_(module: nn.Module) -> Tensor | None:
    """Puts the running statistics of all layers, one after another as in the state_dict, into one buffer, and makes
    views of it of them; so all are kept, put back and averaged at once. The buffer, (values,); None where there are
    none."""
    layers = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d) and m.running_mean is not None]
    found = [statistic for m in layers for statistic in (m.running_mean, m.running_var) if statistic is not None]
    if not found:
        return None
    flat = torch.cat([statistic.flatten() for statistic in found])
    views = iter(flat.split([statistic.numel() for statistic in found]))
    for layer in layers:
        # .data: each counts its changes apart. A compiled block keeps one for its backward pass, and would take
        # a change of the next layer's for one of its own.
        layer.running_mean, layer.running_var = next(views).data, next(views).data
    return flat


def set_batchnorm_(module: nn.Module, policy: BatchNorm, collectives: Collectives) -> None:
    """Puts the policy into every batch-norm layer of `module`, in place. Weights and names stay as they are."""
    layers = [m for m in module.modules() if type(m) is nn.BatchNorm2d]
    match policy:
        case LocalBatchNorm() | ShuffleBatchNorm():
            pass
        case SplitBatchNorm():
            for layer in layers:
                layer.__class__ = SplitBatchNorm2d
                assert isinstance(layer, SplitBatchNorm2d)
                layer.groups = policy.groups
        case SyncBatchNorm():
            for layer in layers:
                layer.__class__ = SyncBatchNorm2d
                assert isinstance(layer, SyncBatchNorm2d)
                layer.collectives = collectives


def shuffled(policy: BatchNorm, collectives: Collectives, images: Tensor) -> Tensor:
    """The teacher's images (B, ...) in the company in which they are normalised. `unshuffled` undoes it.

    NOTE: the authors draw a random permutation each step. The batch is already a random permutation of the images, so
    dealing it out like cards, one to each group in turn, mixes the groups as well and needs no random numbers.
    """
    match policy:
        case LocalBatchNorm() | SyncBatchNorm():
            return images
        case SplitBatchNorm(groups=groups):
            return images.unflatten(0, (groups, -1)).transpose(0, 1).flatten(0, 1)
        case ShuffleBatchNorm():
            return collectives.exchange(images)


def unshuffled(policy: BatchNorm, collectives: Collectives, embeddings: Tensor) -> Tensor:
    """The embeddings (B, D) of `shuffled` images, back in the order of the batch."""
    match policy:
        case LocalBatchNorm() | SyncBatchNorm():
            return embeddings
        case SplitBatchNorm(groups=groups):
            return embeddings.unflatten(0, (-1, groups)).transpose(0, 1).flatten(0, 1)
        case ShuffleBatchNorm():
            return collectives.exchange(embeddings)
