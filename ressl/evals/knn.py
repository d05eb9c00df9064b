"""Weighted k-nearest-neighbour accuracy of frozen features: Wu et al. 2018, https://arxiv.org/abs/1805.01978."""

import torch
from torch.nn import functional as F

from ressl.config import KnnConfig
from ressl.evals.features import Features


@torch.inference_mode()
def knn_accuracy(bank: Features, queries: Features, cfg: KnnConfig, *, num_classes: int, chunk: int = 1024) -> float:
    """Top-1 accuracy in [0, 1]. Each of the k most similar images of the bank (cosine) votes for its class with weight
    exp(similarity / temperature). `chunk` queries at a time bound the memory to chunk x N similarities."""
    keys = F.normalize(bank.values, dim=1)
    hits = 0
    for part, labels in zip(queries.values.split(chunk), queries.labels.split(chunk), strict=True):
        similarity = F.normalize(part, dim=1) @ keys.T
        nearest, neighbour = similarity.topk(min(cfg.k, len(keys)), dim=1)  # (chunk, k)
        votes = torch.zeros(len(part), num_classes, device=part.device)
        # the nearest neighbour's own similarity is taken off, so that a small temperature cannot overflow
        votes.scatter_add_(1, bank.labels[neighbour], ((nearest - nearest[:, :1]) / cfg.temperature).exp())
        hits += int((votes.argmax(dim=1) == labels).sum())
    return hits / len(queries.labels)
