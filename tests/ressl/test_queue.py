from collections import deque

import pytest
import torch

from ressl.queue import FeatureQueue


def rows(first: int, count: int) -> torch.Tensor:
    return torch.arange(first, first + count, dtype=torch.float32).view(-1, 1)


@pytest.mark.parametrize("pushes", [[2, 2], [5], [3, 3, 3], [4, 7, 1], [12], [5, 11, 2, 5], [1] * 13])
def test_it_holds_the_last_rows_like_a_bounded_list(pushes: list[int]) -> None:
    """Batches that divide the queue, do not, fill it, and are larger than it."""
    queue, literal, pushed = FeatureQueue(5, 1), deque(maxlen=5), 0
    queue.keys.copy_(rows(-5, 5))
    literal.extend(range(-5, 0))
    for count in pushes:
        queue.push(rows(pushed, count))
        literal.extend(range(pushed, pushed + count))
        pushed += count
        oldest_first = queue.keys.roll(-int(queue.cursor), 0).flatten().tolist()
        assert oldest_first == list(literal)


def test_it_starts_with_random_unit_rows() -> None:
    keys = FeatureQueue(100, 16).keys
    torch.testing.assert_close(keys.norm(dim=1), torch.ones(100))
    assert keys.mean(dim=0).abs().max() < 0.15


def test_its_whole_state_is_in_its_buffers() -> None:
    first, second = FeatureQueue(5, 1), FeatureQueue(5, 1)
    first.push(rows(0, 3))
    second.load_state_dict(first.state_dict())
    for queue in (first, second):
        queue.push(rows(7, 4))
    assert torch.equal(first.keys, second.keys) and first.state_dict().keys() == {"keys", "cursor"}


def test_pushing_before_backward_would_spoil_it() -> None:
    """Why StepOutput has a `carry`, and why no copy of the queue is needed."""
    queue = FeatureQueue(5, 3)
    z = torch.randn(2, 3, requires_grad=True)
    loss = (z @ queue.keys.T).logsumexp(dim=1).sum()
    queue.push(torch.randn(2, 3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
