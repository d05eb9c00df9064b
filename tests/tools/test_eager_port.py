import copy
from pathlib import Path

import pytest
import torch

from ressl.batch import Batch
from ressl.collectives import alone
from ressl.config import ReSSLConfig, RunConfig, SmallResNet
from ressl.config_optim import SGDConfig
from ressl.method import ReSSL, build_method
from ressl.optim import build_optimizer
from ressl.runtime import Runtime
from ressl.step import TrainStep
from tools.eager_port import EagerPort, plain_sgd

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGES, STEPS = 8, 5
OPTIM = SGDConfig(
    name="sgd", epochs=1, batch_size=IMAGES, lr=0.5, weight_decay=0.1, no_decay=("bias",), warmup_epochs=0
)


def fresh(dtype: torch.dtype) -> ReSSL:
    """A queue of 24, so that five batches of 8 go round it."""
    torch.manual_seed(0)
    cfg = ReSSLConfig(name="ressl", hidden_dim=12, embed_dim=6, queue_size=24, teacher_momentum=0.6)
    return build_method(cfg, SmallResNet(name="resnet_small", width=4), alone()).to(dtype)


def batches(views: int, dtype: torch.dtype) -> list[Batch]:
    rng = torch.Generator().manual_seed(1)
    index = torch.arange(IMAGES)

    def view(size: int) -> torch.Tensor:
        return torch.randn(IMAGES, 3, size, size, generator=rng, dtype=dtype)

    return [
        Batch(weak=(view(8),), strong=tuple(view(8 - 2 * j) for j in range(views)), index=index, label=index)
        for _ in range(STEPS)
    ]


def port_of(method: ReSSL, autocast: torch.dtype | None = None) -> EagerPort:
    student, teacher = copy.deepcopy(method.student), copy.deepcopy(method.teacher)
    optimizer = plain_sgd(student, OPTIM)
    return EagerPort(student, teacher, method.queue.keys, method.cfg, optimizer, autocast=autocast)


@pytest.mark.parametrize("views", [1, 3])
def test_the_port_and_ours_train_the_same(views: int, tmp_path: Path) -> None:
    method = fresh(torch.float64)
    port = port_of(method)
    ours = TrainStep(method, build_optimizer(method.student, OPTIM), Runtime(RunConfig(out_dir=tmp_path, device="cpu")))
    losses = []
    for batch in batches(views, torch.float64):
        (logs,) = ours(iter([batch]), lr=OPTIM.lr, momentum=method.cfg.teacher_momentum)
        losses.append(float(logs["loss"]))
        assert port.step(batch) == pytest.approx(losses[-1], rel=1e-11)
    assert len(set(losses)) == STEPS
    port.move_teacher()  # the port does that when the next step begins
    pairs = [(port.queue.T, method.queue.keys), (port.place[0], method.queue.cursor)]
    for name in ("student", "teacher"):
        theirs, mine = getattr(port, name).state_dict(), getattr(method, name).state_dict()
        assert theirs.keys() == mine.keys()
        pairs += [(theirs[key], mine[key]) for key in mine]
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_the_port_leaves_what_it_was_given_as_it_was() -> None:
    method = fresh(torch.float32)
    before = copy.deepcopy(method.state_dict())
    port = port_of(method)
    port.step(batches(1, torch.float32)[0])
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())
    assert not torch.equal(port.queue.T, before["queue.keys"])


def test_under_autocast_it_computes_nearly_the_same() -> None:
    method = fresh(torch.float32)
    batch = batches(1, torch.float32)[0]
    exact, coarse = port_of(method).step(batch), port_of(method, torch.bfloat16).step(batch)
    assert coarse == pytest.approx(exact, rel=0.02) and coarse != exact


def test_its_optimizer_decays_what_ours_decays_one_parameter_after_another() -> None:
    student = fresh(torch.float32).student
    ours, plain = build_optimizer(student, OPTIM).param_groups, plain_sgd(student, OPTIM).param_groups
    assert [(g["weight_decay"], len(g["params"])) for g in plain] == [
        (g["weight_decay"], len(g["params"])) for g in ours
    ]
    assert [g["weight_decay"] for g in plain] == [0.1, 0.0]
    assert all(g["foreach"] is None and g["fused"] is None for g in plain)  # as the authors leave it
