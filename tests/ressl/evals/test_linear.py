import pytest
import torch

from ressl.config import LinearConfig
from ressl.evals.features import Features, NonFiniteFeatures, extract
from ressl.evals.linear import linear_accuracy


def blobs(count: int, seed: int, spread: float = 0.3) -> Features:
    gen = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    centres = torch.eye(3, 5) * 2
    return Features(centres[labels] + spread * torch.randn(count, 5, generator=gen), labels)


@pytest.mark.parametrize("schedule", ["cosine", "step"])
def test_it_learns_what_a_line_can_separate(schedule: str) -> None:
    cfg = LinearConfig(epochs=10, batch_size=16, lr=0.5, schedule=schedule)
    result = linear_accuracy(lambda epoch: blobs(200, 0), blobs(100, 1), cfg, num_classes=3, seed=0)
    assert result.last > 0.97 and result.best >= result.last


def test_it_cannot_learn_labels_that_mean_nothing() -> None:
    train, val = blobs(300, 0), blobs(300, 1)
    shuffled = Features(train.values, train.labels[torch.randperm(300, generator=torch.Generator().manual_seed(0))])
    result = linear_accuracy(lambda epoch: shuffled, val, LinearConfig(epochs=5, lr=0.1), num_classes=3, seed=0)
    assert result.last < 0.7


def test_a_classifier_that_overflows_is_refused() -> None:
    huge = Features(blobs(60, 0).values * 1e30, blobs(60, 0).labels)
    with pytest.raises(
        NonFiniteFeatures, match=r"the linear classifier became NaN or infinite: lower evaluate\.linear\.lr"
    ):
        linear_accuracy(lambda epoch: huge, huge, LinearConfig(epochs=1, lr=1e20), num_classes=3, seed=0)


def test_each_epoch_asks_for_its_own_features_and_the_seed_decides_the_rest() -> None:
    asked: list[int] = []

    def train(epoch: int) -> Features:
        asked.append(epoch)
        return blobs(60, epoch, spread=2.0)

    cfg = LinearConfig(epochs=3, batch_size=7)
    results = [linear_accuracy(train, blobs(50, 9, spread=2.0), cfg, num_classes=3, seed=4) for _ in range(2)]
    assert asked == [0, 1, 2, 0, 1, 2] and results[0] == results[1]


def test_broken_features_are_refused_with_their_number() -> None:
    probe = [(torch.full((2, 3, 4, 4), float("nan")), torch.zeros(2), torch.zeros(2))]
    with pytest.raises(NonFiniteFeatures, match="NaN or infinity in the features of 2 of 2 images"):
        extract(torch.nn.Flatten(), probe)


def test_extraction_leaves_the_mode_of_the_network_as_it_was() -> None:
    net = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Flatten()).train()
    extract(net, [(torch.randn(2, 3, 4, 4), torch.zeros(2), torch.zeros(2))])
    assert net.training and torch.equal(net[0].running_mean, torch.zeros(3))
