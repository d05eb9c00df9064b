from collections import deque

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from ressl.queue import FeatureQueue


def rows(first: int, count: int) -> torch.Tensor:
    return torch.arange(first, first + count, dtype=torch.float32).view(-1, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pushes", [[2, 2], [5], [3, 3, 3], [4, 7, 1], [12], [5, 11, 2, 5], [1] * 13])
def test_it_holds_the_last_rows_like_a_bounded_list(pushes: list[int], dtype: torch.dtype) -> None:
    """Batches that divide the queue, do not, fill it, and are larger than it; each row is rounded to the queue's
    type and to nothing else."""
    queue, draw = FeatureQueue(5, 3, dtype=dtype), torch.Generator().manual_seed(0)
    literal = deque(queue.keys.clone(), maxlen=5)
    for count in pushes:
        batch = torch.randn(count, 3, generator=draw)
        queue.push(batch)
        literal.extend(batch.to(dtype))
        assert queue.keys.dtype == dtype
        assert torch.equal(queue.keys.roll(-int(queue.cursor), 0), torch.stack(list(literal)))


def test_an_empty_batch_changes_nothing() -> None:
    queue = FeatureQueue(5, 1)
    queue.push(rows(0, 3))
    before = queue.keys.clone()
    queue.push(rows(0, 0))
    assert torch.equal(queue.keys, before) and int(queue.cursor) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_host_reads_nothing_of_it(dtype: torch.dtype) -> None:
    """A fake tensor has no values: whoever asks for one is refused."""
    with FakeTensorMode():
        queue = FeatureQueue(5, 3, dtype=dtype)
        for count in (2, 5, 12):
            queue.push(torch.randn(count, 3))
        with pytest.raises(DataDependentOutputException):
            int(queue.cursor)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captured_push_goes_on_where_the_last_one_ended(dtype: torch.dtype) -> None:
    queue, literal = (FeatureQueue(5, 3, dtype=dtype).cuda() for _ in range(2))
    literal.load_state_dict(queue.state_dict())
    batch = torch.randn(3, 3, device="cuda")
    queue.push(batch)
    literal.push(batch)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        queue.push(batch)
    for _ in range(4):
        batch.normal_()
        graph.replay()
        literal.push(batch)
        assert torch.equal(queue.keys, literal.keys) and torch.equal(queue.cursor, literal.cursor)


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


@pytest.mark.parametrize("skip", [False, True])
def test_where_a_step_is_skipped_nothing_is_pushed(skip: bool) -> None:
    """As a device decides it: without being asked."""
    torch.manual_seed(0)
    queue, plain = FeatureQueue(5, 3), FeatureQueue(5, 3)
    plain.load_state_dict(queue.state_dict())
    for keys in torch.randn(3, 4, 3):
        queue.push(keys, torch.tensor(skip))
        if not skip:
            plain.push(keys)
    assert torch.equal(queue.keys, plain.keys) and torch.equal(queue.cursor, plain.cursor)
