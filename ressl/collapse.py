"""Has training collapsed? Measures of the past embeddings in the queue, and when they are worth a warning.

A collapsed network gives all images the same embedding, or uses few of the directions it has. Its loss is as steady
as that of any other run: the embeddings tell.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ressl.queue import FeatureQueue

COMPARED = 64  # embeddings whose relations to the queue are measured

# Both limits lie between runs that went well and runs that did not, 150 to 400 steps each on images of four colours.
# Runs that went well are narrow for a while: from 0.3 of an untrained network down to 0.053, at an entropy of up to
# 0.9987, by step 30, and up again. Those that never came up again (teacher_temperature=0.3 or 1, no momentum, a rate
# ten or a hundred times too large) stayed at 0.0009 to 0.04, with an entropy above 0.9999. Unit vectors drawn at random
# reach that entropy only in more than 400 / temperature^2 dimensions. There is no limit to the effective rank: runs
# that went well were as low as 1.02, in 16 and in 128 dimensions, where most of their images differ in one thing.
SMALLEST_STD = 0.03
LARGEST_ENTROPY = 0.9999


def collapse_measures(queue: FeatureQueue, *, teacher_temperature: float, rows: int = 1024) -> dict[str, Tensor]:
    """Of the newest `rows` embeddings of the queue (all, if there are fewer), each () float32 on its device:

    embedding_std: `embedding_std`.  effective_rank: `effective_rank`.  relation_entropy: `relation_entropy`, of the
    newest 64.  NaN where an embedding is not finite.

    On a GPU the host waits for `effective_rank`: for where the logs are read anyway.
    """
    newest = newest_rows(queue, rows)
    spread = covariance_of(queue.keys[newest].float())
    return {
        "embedding_std": embedding_std(spread),
        "effective_rank": effective_rank(spread),
        "relation_entropy": relation_entropy(queue.keys, newest[:COMPARED], temperature=teacher_temperature),
    }


def newest_rows(queue: FeatureQueue, count: int) -> Tensor:
    """The places of the last `count` embeddings, at most K, newest first: (n,) int64. The host does not wait."""
    size = len(queue.keys)
    return (queue.cursor - 1 - torch.arange(min(count, size), device=queue.keys.device)) % size


def covariance_of(embeddings: Tensor) -> Tensor:
    """Of rows (n, D): (D, D)."""
    centred = embeddings - embeddings.mean(dim=0)
    return centred.T @ centred / len(centred)


def embedding_std(covariance: Tensor) -> Tensor:
    """How far unit rows of this covariance (D, D) are spread: the mean over the dimensions of their standard deviation,
    times sqrt(D). The host does not wait.

    1 where they are spread evenly over the sphere, 0 where all are one point: Chen & He 2020 (SimSiam,
    https://arxiv.org/abs/2011.10566), section 4.1.
    """
    return covariance.diagonal().sqrt().mean() * math.sqrt(len(covariance))


def effective_rank(covariance: Tensor) -> Tensor:
    """How many directions rows of this covariance (D, D) use: exp of the entropy of its eigenvalues, which are made to
    sum to 1. D where all directions are used alike, 1 where the rows lie on a line or in a point.

    The measure is Roy & Vetterli's (2007, "The effective rank"), of the covariance matrix. RankMe (Garrido et al. 2023,
    https://arxiv.org/abs/2210.02885) takes it of the embeddings themselves: not centred, and from the roots of the
    eigenvalues. There the mean counts as a direction, and an untrained network, whose embeddings have much of it in
    common, looks collapsed; and rounding, of which the roots leave much, looks like directions.

    On CUDA the host waits, because torch.linalg.eigvalsh does.
    """
    finite = covariance.isfinite().all()
    values = torch.linalg.eigvalsh(torch.where(finite, covariance, 0)).clamp_min(0)  # which raises at NaN
    share = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
    return torch.where(finite, torch.special.entr(share).sum().exp(), math.nan)


def relation_entropy(keys: Tensor, chosen: Tensor, *, temperature: float) -> Tensor:
    """How undecided the teacher's relations of the rows `chosen` (m,) of `keys` (K, D) to all others are: the mean
    entropy of softmax_j(key_i . key_j / temperature) over j != i, as a share of log(K - 1), the largest there can be.

    1 where every past image is equally alike, 0 where one alone matters. The host does not wait.
    """
    keys = keys.float()
    similarities = keys[chosen] / temperature @ keys.T  # (m, K)
    similarities.scatter_(1, chosen[:, None], torch.finfo(keys.dtype).min)  # with themselves: weighs 0
    similarities -= similarities.amax(dim=1, keepdim=True)
    weights = similarities.exp()
    total = weights.sum(dim=1)
    entropy = total.log() - weights.mul_(similarities).sum(dim=1) / total
    return entropy.mean() / math.log(max(len(keys) - 1, 2))  # of a single other the entropy is 0


def collapse_warning(values: Mapping[str, float], dim: int) -> str | None:
    """One sentence where the `collapse_measures` of embeddings of `dim` numbers tell of a collapse, else None: as well
    where they are NaN. It comes late rather than in vain: see the limits.
    """
    spread, rank, entropy = (values[name] for name in ("embedding_std", "effective_rank", "relation_entropy"))
    if spread < SMALLEST_STD:
        return (
            f"training has collapsed: embedding_std is {spread:.4f} (1: spread evenly, 0: one point), effective_rank "
            f"{rank:.1f} of {dim}: all images get almost the same embedding; lower optim.lr, or raise "
            "method.teacher_momentum"
        )
    if entropy > LARGEST_ENTROPY:
        return (
            f"training is about to collapse: relation_entropy is {entropy:.6f} (1: to the teacher all past images are "
            f"equally alike), embedding_std {spread:.4f}: there is nothing to learn from; lower "
            "method.teacher_temperature or optim.lr"
        )
    return None
