import copy
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.resnet import BasicBlock

from ressl.batch import Batch
from ressl.batchnorm import flat_statistics_
from ressl.collectives import alone
from ressl.compiled import compile_blocks_, not_compiled
from ressl.config import LocalBatchNorm, ReSSLConfig, SmallResNet, SplitBatchNorm
from ressl.method import ReSSL, build_method

CFG = ReSSLConfig(name="ressl", hidden_dim=16, embed_dim=8, queue_size=32)


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def method(policy: LocalBatchNorm | SplitBatchNorm) -> ReSSL:
    torch.manual_seed(0)
    return build_method(CFG, SmallResNet(name="resnet_small", width=4, batchnorm=policy), alone()).train()


def batch(seed: int) -> Batch:
    gen = torch.Generator().manual_seed(seed)
    views = [torch.randn(8, 3, size, size, generator=gen) for size in (16, 16, 12)]
    views = [view.to(memory_format=torch.channels_last) for view in views]
    return Batch(weak=(views[0],), strong=(views[1], views[2]), index=torch.arange(8), label=torch.arange(8))


def train(trained: ReSSL, steps: range) -> list[float]:
    optimizer = torch.optim.SGD(trained.student.parameters(), lr=0.1)
    losses = []
    for step in steps:
        out = trained(batch(step))
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        trained.after_step(*out.carry, momentum=0.9)
        losses.append(out.loss.item())
    return losses


@pytest.mark.parametrize("policy", [LocalBatchNorm(), SplitBatchNorm(name="split", groups=2)])
def test_blocks_compile_whole_once_and_are_what_they_were(policy: LocalBatchNorm | SplitBatchNorm) -> None:
    """Every shape of views in the first step; none after it, and no block falls apart into several graphs."""
    plain, compiled = method(policy), method(policy)
    names = list(compiled.state_dict())
    assert compile_blocks_(compiled, backend="aot_eager") == 2 * 3  # of the student and of the teacher
    flat_statistics_(compiled)  # as a guarded step does
    assert list(compiled.state_dict()) == names
    expected = train(plain, range(5))
    losses = train(compiled, range(1))
    assert counters["frames"]["ok"] > 0 and not counters["graph_break"]
    with torch.compiler.set_stance("fail_on_recompile"):
        losses += train(compiled, range(1, 5))
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)


def test_evaluations_compile_nothing() -> None:
    compiled = method(LocalBatchNorm())
    compile_blocks_(compiled, backend="aot_eager")
    compiled.eval()
    with not_compiled(), torch.no_grad():
        compiled.student(torch.randn(3, 3, 20, 20))
    assert counters["frames"]["total"] == 0


def test_blocks_stay_whole_where_gradients_travel_in_buckets() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        network = nn.Sequential(BasicBlock(256, 256))  # more than the 1 MiB of the first bucket
        compile_blocks_(network, backend="aot_eager")
        DistributedDataParallel(network)(torch.randn(2, 256, 2, 2)).sum().backward()
    finally:
        dist.destroy_process_group()
    assert counters["aot_autograd"]["total"] == 1


@pytest.mark.slow
def test_what_inductor_makes_of_a_block_has_its_values_and_gradients() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(BasicBlock(4, 4))
    compiled = copy.deepcopy(plain)
    compile_blocks_(compiled)
    images = torch.randn(3, 4, 6, 6).to(memory_format=torch.channels_last)
    for network in (plain, compiled):
        network(images).square().mean().backward()
    for a, b in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)
    for a, b in zip(compiled.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b)
