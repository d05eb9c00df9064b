"""kNN and linear evaluation of a frozen backbone, over all ranks, as `cfg.evaluate` says."""

from collections.abc import Callable

from torch import Tensor, nn

from ressl.batch import DataError, Probes
from ressl.config import EvaluateConfig
from ressl.evals.features import Features, extract
from ressl.evals.knn import knn_accuracy
from ressl.evals.linear import linear_accuracy

Gather = Callable[[Tensor], Tensor]


def evaluate(
    backbone: nn.Module,
    probes: Probes,
    cfg: EvaluateConfig,
    *,
    knn: bool = True,
    linear: bool = True,
    seed: int = 0,
    gather: Gather = lambda rows: rows,
    progress: Callable[[str], None] = lambda stage: None,
) -> dict[str, float]:
    """Top-1 accuracies in [0, 1]: `knn`, `linear` (last epoch) and `linear_best` (best epoch on the test images).

    `gather` joins rows of all ranks; every rank returns the same. `progress` is told what is being done.
    """
    check_probes(probes)
    classes = probes.num_classes
    progress("features of the test images")
    val = _labelled(extract(backbone, probes.probe("val"), gather), "val")
    results: dict[str, float] = {}
    centre: Features | None = None
    if knn or (linear and cfg.linear.crops == "centre"):
        progress("features of the training images")
        centre = _labelled(extract(backbone, probes.probe("train"), gather), "train")
    if knn and centre is not None:
        progress("nearest neighbours")
        results["knn"] = knn_accuracy(centre, val, cfg.knn, num_classes=classes)
    if linear:

        def train_features(epoch: int) -> Features:
            if centre is not None and cfg.linear.crops == "centre":
                return centre
            return _labelled(extract(backbone, probes.probe("train", "random", epoch), gather), "train")

        result = linear_accuracy(
            train_features,
            val,
            cfg.linear,
            num_classes=classes,
            seed=seed,
            progress=lambda epoch: progress(f"linear classifier, epoch {epoch}/{cfg.linear.epochs}"),
        )
        results |= {"linear": result.last, "linear_best": result.best}
    return results


def check_probes(probes: Probes, world_size: int = 1) -> None:
    """Raises DataError where an evaluation cannot work, before any image is decoded."""
    if probes.num_classes == 0:
        raise DataError("the images have no labels: put them in one directory for each class to evaluate an encoder")
    fewest = min(probes.count("train"), probes.count("val"))
    if fewest < world_size:
        raise DataError(f"{fewest} images are too few to evaluate with {world_size} processes")


def _labelled(features: Features, split: str) -> Features:
    rows = (features.labels >= 0).nonzero().squeeze(1)
    if len(rows) == 0:
        raise DataError(f"no image of data.source.{split} has a label: an evaluation needs them")
    return Features(features.values[rows], features.labels[rows]) if len(rows) < len(features.labels) else features
