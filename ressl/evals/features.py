"""Frozen features of images, the input of every evaluation."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ressl.batch import Probe


@dataclass(frozen=True, slots=True)
class Features:
    values: Tensor  # (N, F) float32, not normalised
    labels: Tensor  # (N,) int64


class NonFiniteFeatures(RuntimeError):
    """NaN or infinity in features or in the classifier on them: no accuracy would mean anything."""


@torch.inference_mode()
def extract(backbone: nn.Module, probe: Probe, gather: Callable[[Tensor], Tensor] = lambda rows: rows) -> Features:
    """Passes every image of `probe` through the backbone in evaluation mode, and leaves it in the mode it was in.

    `gather` joins the rows of all ranks, so that every rank returns the features of the whole split.
    """
    was_training = backbone.training
    backbone.eval()
    try:
        pairs = [(backbone(images).float(), labels) for images, labels, _ in probe]
    finally:
        backbone.train(was_training)
    values = gather(torch.cat([v for v, _ in pairs]))
    labels = gather(torch.cat([labels for _, labels in pairs]))
    broken = int((~values.isfinite().all(dim=1)).sum())
    if broken:
        raise NonFiniteFeatures(f"NaN or infinity in the features of {broken:,} of {len(values):,} images")
    return Features(values, labels)
