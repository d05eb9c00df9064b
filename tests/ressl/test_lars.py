import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ressl.lars import LARS


class NothingIsRead(TorchDispatchMode):
    """Refuses to hand the value of a tensor to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host reads a tensor"
        return func(*args, **(kwargs or {}))


def layers(seed: int = 0) -> nn.Sequential:
    """A convolution in channels_last and a linear layer: weights of four and two dimensions, and biases."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4))
    return net.double().to(memory_format=torch.channels_last)


def optimizer_of(net: nn.Module, *, lr: float | Tensor = 0.3, momentum: float = 0.9) -> LARS:
    matrices, vectors = ([p for p in net.parameters() if (p.ndim > 1) == many] for many in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "adapt": False}]
    return LARS(groups, lr=lr, momentum=momentum, trust_coefficient=0.02)


def backward(net: nn.Module, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    net(torch.randn(6, 3, 8, 8, generator=draw, dtype=torch.float64)).square().sum().backward()


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_steps_are_the_literal_algorithm(momentum: float) -> None:
    net, literal = layers(), layers()
    optimizer = optimizer_of(net, momentum=momentum)
    velocity = [torch.zeros_like(p) for p in literal.parameters()]
    for step in range(3):
        optimizer.zero_grad()
        backward(net, step)
        optimizer.step()
        literal.zero_grad()
        backward(literal, step)
        with torch.no_grad():
            for w, v in zip(literal.parameters(), velocity, strict=True):
                ratio, decay = 1.0, 0.0
                if w.ndim > 1:
                    decay = 0.01
                    ratio = float(0.02 * w.norm() / (w.grad.norm() + decay * w.norm()))
                    assert ratio < 0.5
                v.copy_(momentum * v + ratio * (w.grad + decay * w))
                w.sub_(0.3 * v)
    torch.testing.assert_close(list(net.parameters()), list(literal.parameters()))


def test_without_adaptation_it_is_torchs_sgd() -> None:
    ours, theirs = layers(), layers()
    mine = LARS([{"params": list(ours.parameters()), "adapt": False}], lr=0.1, momentum=0.8, weight_decay=0.02)
    reference = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.8, weight_decay=0.02)
    for step in range(3):
        for net, optimizer in ((ours, mine), (theirs, reference)):
            optimizer.zero_grad()
            backward(net, step)
            optimizer.step()
    torch.testing.assert_close(list(ours.parameters()), list(theirs.parameters()))


@pytest.mark.parametrize(("weight", "gradient"), [(0.0, 2.0), (3.0, 0.0), (0.0, 0.0)])
def test_a_parameter_or_gradient_of_norm_zero_has_the_ratio_one(weight: float, gradient: float) -> None:
    w = nn.Parameter(torch.full((2, 2), weight))
    w.grad = torch.full((2, 2), gradient)
    LARS([w], lr=0.1, momentum=0.9, trust_coefficient=0.001, weight_decay=0.5).step()
    torch.testing.assert_close(w.detach(), torch.full((2, 2), weight - 0.1 * (gradient + 0.5 * weight)))


def test_a_rate_in_a_tensor_does_what_the_number_does() -> None:
    number, tensor = layers(), layers()
    rate = torch.tensor(0.5)
    for step, lr in enumerate((0.5, 0.25)):
        rate.fill_(lr)
        for net, given in ((number, lr), (tensor, rate)):
            optimizer = optimizer_of(net, lr=given)
            optimizer.zero_grad()
            backward(net, step)
            optimizer.step()
    torch.testing.assert_close(list(number.parameters()), list(tensor.parameters()))


def test_an_overflow_changes_nothing_even_at_the_first_step_and_a_scale_is_taken_out() -> None:
    plain, scaled = layers(), layers()
    reference, optimizer = optimizer_of(plain), optimizer_of(scaled)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = [p.detach().clone() for p in scaled.parameters()]

    def scaled_step(seed: int, *, overflow: bool) -> None:
        optimizer.zero_grad()
        backward(scaled, seed)
        for p in scaled.parameters():
            p.grad *= scaler.get_scale()
        if overflow:
            scaled[0].weight.grad[2, 1, 0, 2] = float("inf")
        scaler.scale(torch.ones(()))
        scaler.step(optimizer)
        scaler.update()

    scaler.scale(torch.ones(()))  # makes the scale
    scaled_step(0, overflow=True)
    assert scaler.get_scale() == 4
    assert all(torch.equal(p, old) for p, old in zip(scaled.parameters(), before, strict=True))
    assert not any(optimizer.state[p]["momentum_buffer"].any() for p in scaled.parameters())
    for seed in (1, 2):
        scaled_step(seed, overflow=False)
        reference.zero_grad()
        backward(plain, seed)
        reference.step()
    torch.testing.assert_close(list(scaled.parameters()), list(plain.parameters()))


def test_the_host_reads_nothing() -> None:
    net = layers()
    optimizer = optimizer_of(net)
    backward(net, 0)
    optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.zeros(())
    with NothingIsRead():
        optimizer.step()
        with pytest.raises(AssertionError, match="the host reads"):
            torch.ones(()).item()


def test_parameters_without_a_gradient_stay() -> None:
    net = layers()
    net[0].requires_grad_(False)
    optimizer, before = optimizer_of(net), net[0].weight.detach().clone()
    backward(net, 0)
    optimizer.step()
    assert torch.equal(net[0].weight, before) and net[3].weight.grad is not None
    assert len(optimizer.state) == 2


@pytest.mark.gpu
def test_a_captured_step_is_replayed_with_another_rate() -> None:
    nets = [layers().cuda() for _ in range(2)]
    rate = torch.tensor(0.5, device="cuda")
    captured, eager = optimizer_of(nets[0], lr=rate), optimizer_of(nets[1], lr=0.5)
    for net, optimizer in zip(nets, (captured, eager), strict=True):
        for p in net.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=p.dtype).cuda()
            p.grad = p.grad.contiguous(memory_format=torch.channels_last) if p.ndim == 4 else p.grad
        optimizer.step()  # makes the momenta
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for lr in (0.25, 0.125):
        rate.fill_(lr)
        graph.replay()
        for group in eager.param_groups:
            group["lr"] = lr
        eager.step()
    torch.testing.assert_close(list(nets[0].parameters()), list(nets[1].parameters()))
