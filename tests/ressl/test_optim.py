import copy
import io

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn

from ressl.config import ResNet
from ressl.config_optim import Optim, SGDConfig
from ressl.encoder import build_encoder
from ressl.lars import LARS
from ressl.optim import build_optimizer, learning_rate, load_optimizer_, set_learning_rate_


def config(**changes: object) -> SGDConfig:
    return SGDConfig(**{"name": "sgd", "epochs": 10, "batch_size": 8, "lr": 0.5, "warmup_epochs": 2.0, **changes})


def test_the_rate_rises_from_zero_and_falls_to_zero() -> None:
    rates = [learning_rate(step, steps_per_epoch=5, cfg=config()) for step in range(51)]
    assert rates[0] == 0
    assert rates[5] == pytest.approx(0.25) and rates[10] == pytest.approx(0.5)
    assert rates[30] == pytest.approx(0.25)  # half way down the cosine
    assert rates[50] == pytest.approx(0, abs=1e-12)
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)


def test_the_warm_up_may_start_and_the_cosine_may_end_above_zero() -> None:
    cfg = config(warmup_lr=0.1, final_lr=0.2)
    rates = [learning_rate(step, steps_per_epoch=5, cfg=cfg) for step in range(51)]
    assert [rates[step] for step in (0, 5, 10, 30, 50)] == pytest.approx([0.1, 0.3, 0.5, 0.35, 0.2])


@pytest.mark.parametrize(("scaling", "peak"), [("none", 0.075), ("linear", 1.2), ("sqrt", 4.8)])
def test_the_highest_rate_grows_with_the_batch_as_asked(scaling: str, peak: float) -> None:
    """0.075 * sqrt(4096) is the rate of WCL (https://arxiv.org/abs/2110.04770)."""
    cfg = config(lr=0.075, batch_size=4096, lr_scaling=scaling)
    assert cfg.peak_lr == pytest.approx(peak)
    assert learning_rate(10, steps_per_epoch=5, cfg=cfg) == pytest.approx(peak)


def test_the_imagenet_recipe_decays_what_the_authors_decay() -> None:
    encoder = build_encoder(ResNet(name="resnet18"), hidden_dim=8, embed_dim=4)
    optimizer = build_optimizer(encoder, config(no_decay=("bn", "bias"), weight_decay=1e-4))
    names = {id(p): name for name, p in encoder.named_parameters()}
    decayed, free = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-4, 0.0]
    assert "backbone.layer2.0.downsample.1.weight" in decayed  # its name has no bn in it
    assert {"backbone.layer1.0.bn1.weight", "backbone.bn1.bias", "projector.0.bias"} <= free
    assert len(decayed) + len(free) == len(names)


def test_without_words_everything_is_decayed() -> None:
    optimizer = build_optimizer(nn.Linear(2, 2), config(weight_decay=5e-4))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [5e-4]


def test_a_step_is_the_literal_update() -> None:
    """v <- momentum v + gradient + decay w;  w <- w - lr v."""
    layer = nn.Linear(2, 1, bias=False)
    w, v = layer.weight.detach().clone(), torch.zeros(1, 2)
    optimizer = build_optimizer(layer, config(lr=0.1, momentum=0.9, weight_decay=0.01))
    for _ in range(3):
        layer(torch.tensor([[1.0, 2.0]])).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        v = 0.9 * v + torch.tensor([[1.0, 2.0]]) + 0.01 * w
        w = w - 0.1 * v
    torch.testing.assert_close(layer.weight.detach(), w)


# --- kinds -----------------------------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, object]] = {
    "sgd": {"name": "sgd", "momentum": 0.9, "nesterov": True},
    "lars": {"name": "lars", "momentum": 0.9, "trust_coefficient": 0.1},
    "adamw": {"name": "adamw", "betas": (0.8, 0.95), "eps": 1e-6},
}


def kind(name: str, **changes: object) -> Optim:
    schedule = {"epochs": 10, "batch_size": 8, "lr": 0.25, "warmup_epochs": 2.0, "weight_decay": 0.01}
    return TypeAdapter(Optim).validate_python({**KINDS[name], **schedule, **changes})


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def take_steps(net: nn.Module, optimizer: torch.optim.Optimizer, rates: list[float]) -> list[torch.Tensor]:
    """One step with each rate, on inputs that depend on the rate alone; the weights after."""
    device = next(net.parameters()).device
    for rate in rates:
        set_learning_rate_(optimizer, rate)
        optimizer.zero_grad()
        inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(int(1e6 * rate))).to(device)
        net(inputs).square().sum().backward()
        optimizer.step()
    return [p.detach().clone() for p in net.parameters()]


def test_lars_takes_vectors_out_of_decay_and_adaptation() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    optimizer = build_optimizer(net, kind("lars", no_decay=("2.",)))
    found = [([p.ndim for p in g["params"]], g["weight_decay"], g["adapt"]) for g in optimizer.param_groups]
    assert found == [([4], 0.01, True), ([1, 1, 1, 2, 1], 0.0, False)]
    assert isinstance(optimizer, LARS) and optimizer.param_groups[0]["trust_coefficient"] == 0.1


def test_adamw_takes_the_literal_step() -> None:
    """Loshchilov and Hutter 2017, algorithm 2."""
    layer = nn.Linear(2, 1, bias=False)
    optimizer = build_optimizer(layer, kind("adamw"))
    w, m, v = layer.weight.detach().clone(), torch.zeros(1, 2), torch.zeros(1, 2)
    for step, x in enumerate(([1.0, 2.0], [3.0, -1.0]), start=1):
        layer(torch.tensor([x])).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        m, v = 0.8 * m + 0.2 * torch.tensor([x]), 0.95 * v + 0.05 * torch.tensor([x]).square()
        update = (m / (1 - 0.8**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-6)
        w = w - 0.25 * (update + 0.01 * w)
    torch.testing.assert_close(layer.weight.detach(), w)


def test_words_of_no_decay_reach_adamw() -> None:
    optimizer = build_optimizer(network(), kind("adamw", no_decay=("bias",)))
    assert [(len(g["params"]), g["weight_decay"]) for g in optimizer.param_groups] == [(2, 0.01), (2, 0.0)]


@pytest.mark.parametrize("name", KINDS)
def test_a_capturable_optimizer_has_its_rate_in_a_tensor_and_takes_the_same_steps(name: str) -> None:
    rates, found = [0.0, 0.25, 0.3], []
    for capturable in (False, True):
        net = network()
        optimizer = build_optimizer(net, kind(name), capturable=capturable)
        lrs = [group["lr"] for group in optimizer.param_groups]
        assert all(isinstance(lr, torch.Tensor) == capturable for lr in lrs)
        found.append(take_steps(net, optimizer, rates))
        if capturable:
            assert all(group["lr"] is lr for group, lr in zip(optimizer.param_groups, lrs, strict=True))
            assert all(lr.dtype == torch.float32 and lr.shape == () and float(lr) == pytest.approx(0.3) for lr in lrs)
    torch.testing.assert_close(*found)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def through_a_file(state: dict) -> dict:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, map_location="cpu", weights_only=True)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("saved_as", "loaded_as"), [(False, False), (False, True), (True, False), (True, True)])
def test_a_loaded_optimizer_goes_on_as_the_saved_one_would_have(name: str, saved_as: bool, loaded_as: bool) -> None:
    first, second = network(), network(seed=1)
    saved = build_optimizer(first, kind(name), capturable=saved_as)
    take_steps(first, saved, [0.1, 0.2])
    second.load_state_dict(first.state_dict())
    loaded = build_optimizer(second, kind(name), capturable=loaded_as)
    rates = [group["lr"] for group in loaded.param_groups]
    load_optimizer_(loaded, through_a_file(saved.state_dict()))
    assert all(isinstance(rate, torch.Tensor) == loaded_as for rate in rates)
    assert all(group["lr"] is rate for group, rate in zip(loaded.param_groups, rates, strict=True))
    torch.testing.assert_close(take_steps(second, loaded, [0.3, 0.15]), take_steps(first, saved, [0.3, 0.15]))


@pytest.mark.parametrize("name", KINDS)
def test_two_optimizers_share_nothing_after_loading(name: str) -> None:
    first, second = network(), network()
    saved, loaded = (build_optimizer(net, kind(name), capturable=True) for net in (first, second))
    take_steps(first, saved, [0.1])
    load_optimizer_(loaded, saved.state_dict())
    before = copy.deepcopy(loaded.state_dict())
    take_steps(first, saved, [0.2])
    after = loaded.state_dict()
    for key, entry in before["state"].items():
        assert all(torch.equal(value, after["state"][key][name]) for name, value in entry.items())
    assert all(float(group["lr"]) == 0.25 for group in loaded.param_groups)


def test_settings_stay_those_of_the_config() -> None:
    net = network()
    saved = build_optimizer(net, kind("sgd"))
    take_steps(net, saved, [0.1])
    loaded = build_optimizer(net, kind("sgd", momentum=0.5, weight_decay=0.3))
    load_optimizer_(loaded, saved.state_dict())
    (group,) = loaded.param_groups
    assert (group["momentum"], group["weight_decay"], group["lr"]) == (0.5, 0.3, 0.25)


def test_a_state_from_before_the_first_step_can_be_loaded() -> None:
    net = network()
    loaded = build_optimizer(net, kind("adamw"))
    load_optimizer_(loaded, through_a_file(build_optimizer(net, kind("adamw")).state_dict()))
    torch.testing.assert_close(
        take_steps(net, loaded, [0.1]), take_steps(other := network(), build_optimizer(other, kind("adamw")), [0.1])
    )


@pytest.mark.parametrize(("saved", "loaded"), [("sgd", "lars"), ("lars", "sgd"), ("sgd", "adamw"), ("adamw", "lars")])
def test_the_state_of_another_kind_of_optimizer_is_refused(saved: str, loaded: str) -> None:
    layer = nn.Linear(2, 2, bias=False)
    with pytest.raises(ValueError, match=r"of another kind: see optim\.name"):
        load_optimizer_(build_optimizer(layer, kind(loaded)), build_optimizer(layer, kind(saved)).state_dict())


def test_the_state_of_other_groups_is_refused() -> None:
    net = network()
    state = build_optimizer(net, kind("sgd", no_decay=("bias",))).state_dict()
    with pytest.raises(ValueError, match=r"groups of \[2, 2\] parameters, this one of \[4\]"):
        load_optimizer_(build_optimizer(net, kind("sgd")), state)


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", KINDS)
def test_the_gpu_takes_the_steps_of_the_cpu_and_its_state_can_come_back(name: str) -> None:
    there, here = network().cuda(), network()
    optimizer, reference = (build_optimizer(net, kind(name)) for net in (there, here))
    after, expected = take_steps(there, optimizer, [0.1, 0.2]), take_steps(here, reference, [0.1, 0.2])
    torch.testing.assert_close([p.cpu() for p in after], expected)
    load_optimizer_(reference, optimizer.state_dict())
    assert all(not v.is_cuda for entry in reference.state.values() for v in entry.values())
    load_optimizer_(optimizer, reference.state_dict())
    after, expected = take_steps(there, optimizer, [0.3]), take_steps(here, reference, [0.3])
    torch.testing.assert_close([p.cpu() for p in after], expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", KINDS)
def test_a_captured_step_is_replayed_with_another_rate(name: str) -> None:
    nets = [network().cuda() for _ in range(2)]
    captured, eager = (build_optimizer(net, kind(name), capturable=True) for net in nets)
    for net, optimizer in zip(nets, (captured, eager), strict=True):
        take_steps(net, optimizer, [0.1])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for rate in (0.2, 0.05):
        set_learning_rate_(captured, rate)
        graph.replay()
        set_learning_rate_(eager, rate)
        eager.step()
    torch.testing.assert_close(list(nets[0].parameters()), list(nets[1].parameters()))


@pytest.mark.gpu
@pytest.mark.parametrize("name", KINDS)
def test_an_overflow_at_the_first_step_changes_nothing_and_nobody_waits(name: str) -> None:
    net, plain = network().cuda(), network().cuda()
    optimizer, reference = (build_optimizer(n, kind(name)) for n in (net, plain))
    scaler = torch.amp.GradScaler("cuda", init_scale=8.0)
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(3)).cuda()
    before = [p.detach().clone() for p in net.parameters()]
    for inputs in (x * float("inf"), x, x):
        optimizer.zero_grad()
        scaler.scale(net(inputs).square().sum()).backward()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            scaler.step(optimizer)
            scaler.update()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if inputs is not x:
            torch.testing.assert_close([p.detach() for p in net.parameters()], before, rtol=0, atol=0)
            continue
        reference.zero_grad()
        plain(x).square().sum().backward()
        reference.step()
    torch.testing.assert_close(list(net.parameters()), list(plain.parameters()))
