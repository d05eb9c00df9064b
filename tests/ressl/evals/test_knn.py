import math

import pytest
import torch

from ressl.config import KnnConfig
from ressl.evals.features import Features
from ressl.evals.knn import knn_accuracy


def features(count: int, seed: int, classes: int = 4, width: int = 6) -> Features:
    gen = torch.Generator().manual_seed(seed)
    return Features(torch.randn(count, width, generator=gen), torch.randint(classes, (count,), generator=gen))


def literal(bank: Features, queries: Features, k: int, temperature: float, classes: int) -> float:
    hits = 0
    for query, label in zip(queries.values.tolist(), queries.labels.tolist(), strict=True):
        similar = []
        for key, its_label in zip(bank.values.tolist(), bank.labels.tolist(), strict=True):
            dot = sum(a * b for a, b in zip(query, key, strict=True))
            similar.append((dot / (math.hypot(*query) * math.hypot(*key)), its_label))
        votes = [0.0] * classes
        for similarity, its_label in sorted(similar, reverse=True)[:k]:
            votes[its_label] += math.exp(similarity / temperature)
        hits += votes.index(max(votes)) == label
    return hits / len(queries.labels)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (5, 0.07), (7, 1.0), (500, 0.1)])
def test_it_is_the_literal_vote(k: int, temperature: float) -> None:
    bank, queries = features(60, 0), features(40, 1)
    found = knn_accuracy(bank, queries, KnnConfig(k=k, temperature=temperature), num_classes=4, chunk=7)
    assert found == pytest.approx(literal(bank, queries, k, temperature, 4))


def test_a_tiny_temperature_does_not_overflow() -> None:
    bank = features(60, 0)
    assert knn_accuracy(bank, bank, KnnConfig(k=5, temperature=1e-4), num_classes=4) == 1.0
