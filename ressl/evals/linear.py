"""Linear evaluation: one linear layer, trained by SGD on frozen features."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from ressl.config import LinearConfig
from ressl.evals.features import Features, NonFiniteFeatures


@dataclass(frozen=True, slots=True)
class LinearResult:
    last: float  # top-1 accuracy in [0, 1] after the last epoch
    best: float  # of the best epoch on these very images, as the authors report; flattering by a little


def linear_accuracy(
    train: Callable[[int], Features],
    val: Features,
    cfg: LinearConfig,
    *,
    num_classes: int,
    seed: int,
    progress: Callable[[int], None] = lambda epoch: None,
) -> LinearResult:
    """`train(epoch)` gives the training features of an epoch: new crops each time, or always the same ones.

    Weights start as N(0, 0.01), the bias as 0 (authors' code).
    """
    device, width = val.values.device, val.values.shape[1]
    generator = torch.Generator().manual_seed(seed)
    classifier = nn.Linear(width, num_classes)
    with torch.no_grad():
        classifier.weight.copy_(torch.randn(num_classes, width, generator=generator) * 0.01)
        classifier.bias.zero_()
    classifier.to(device)
    optimizer = torch.optim.SGD(classifier.parameters(), lr=cfg.lr, momentum=cfg.momentum, nesterov=cfg.nesterov)
    accuracies = []
    for epoch in range(cfg.epochs):
        features = train(epoch)
        batches = torch.randperm(len(features.labels), generator=generator).to(device).split(cfg.batch_size)
        for i, rows in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = _rate(epoch + i / len(batches), cfg)
            loss = F.cross_entropy(classifier(features.values[rows]), features.labels[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        with torch.inference_mode():
            accuracies.append(float((classifier(val.values).argmax(dim=1) == val.labels).float().mean()))
        progress(epoch + 1)
    if not bool(torch.stack([p.isfinite().all() for p in classifier.parameters()]).all()):
        raise NonFiniteFeatures("the linear classifier became NaN or infinite: lower evaluate.linear.lr")
    return LinearResult(last=accuracies[-1], best=max(accuracies))


def _rate(epoch: float, cfg: LinearConfig) -> float:
    match cfg.schedule:
        case "cosine":
            return 0.5 * cfg.lr * (1 + math.cos(math.pi * epoch / cfg.epochs))
        case "step":
            return cfg.lr * 0.1 ** sum(epoch >= share * cfg.epochs for share in (0.6, 0.8))
