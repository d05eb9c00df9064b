import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from tools import replay_trace
from tools.replay_trace import LIMIT, TraceEncoder, deviation, read_trace, replay

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden"
SETTINGS = {
    "steps": 3, "batch": 4, "strong_sizes": [8, 6], "queue_size": 8, "embed_dim": 4, "hidden_dim": 8,
    "ema_momentum": 0.9, "tau_teacher": 0.04, "tau_student": 0.1, "lr": 0.05, "sgd_momentum": 0.9, "weight_decay": 1e-4,
}  # fmt: skip


def record() -> dict[str, torch.Tensor]:
    """A trace made by the algorithm written out plainly, with the teacher moving first, in float64."""
    torch.manual_seed(0)
    student, teacher = TraceEncoder(8, 4).double(), TraceEncoder(8, 4).double()
    queue, pointer = F.normalize(torch.randn(4, 8, dtype=torch.float64), dim=0), 0
    out: dict[str, torch.Tensor] = {}

    def keep(when: str) -> None:
        out.update({f"{when}/{name}.{k}": v.clone() for name, net in (("student", student), ("teacher", teacher))
                    for k, v in net.state_dict().items()})  # fmt: skip
        out[f"{when}/queue"], out[f"{when}/queue_ptr"] = queue.clone(), torch.tensor([pointer])

    keep("init")
    momentum = {name: torch.zeros_like(p) for name, p in student.named_parameters()}
    losses = []
    for step in range(3):
        views = {"weak": torch.randn(4, 3, 8, 8, dtype=torch.float64)}
        views |= {f"strong{j}": torch.randn(4, 3, s, s, dtype=torch.float64) for j, s in enumerate((8, 6))}
        out.update({f"step{step}/{name}": view for name, view in views.items()})
        with torch.no_grad():
            for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
                t.copy_(0.9 * t + 0.1 * s)
            keys = teacher(views["weak"])
        terms = []
        for j in range(2):
            logits = student(views[f"strong{j}"]) @ queue
            terms.append(-((keys @ queue / 0.04).softmax(1) * (logits / 0.1).log_softmax(1)).sum(1).mean())
        loss = torch.stack(terms).mean()
        losses.append(loss.detach())
        queue = queue.clone()
        queue[:, pointer : pointer + 4] = keys.T
        pointer = (pointer + 4) % 8
        gradients = torch.autograd.grad(loss, list(student.parameters()))
        with torch.no_grad():
            for (name, p), g in zip(student.named_parameters(), gradients, strict=True):
                decay = 0.0 if "bn" in name or "bias" in name else 1e-4
                momentum[name] = 0.9 * momentum[name] + g + decay * p
                p.sub_(0.05 * momentum[name])
        out[f"step{step}/queue"] = queue.clone()
    keep("final")
    out["losses"] = torch.stack(losses)
    return out


def saved(tensors: dict[str, torch.Tensor], path: Path) -> Path:
    contiguous = {name: value.contiguous().clone() for name, value in tensors.items()}
    save_file(contiguous, path, metadata={"json": json.dumps(SETTINGS)})
    return path


def exit_code(path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["replay_trace", str(path)])
    return replay_trace.main()


def test_a_trace_of_the_plain_algorithm_is_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(record(), tmp_path / "trace.safetensors")
    assert max(replay(read_trace(path)).values()) < 1e-12
    assert exit_code(path, monkeypatch) == 0


@pytest.mark.parametrize(
    "name",
    ["losses", "step1/queue", "step0/weak", "step2/strong1", "init/teacher.backbone.conv1.weight", "init/queue",
     "final/student.head.linear2.bias", "final/teacher.backbone.bn1.running_var", "final/queue_ptr"],
)  # fmt: skip
def test_a_falsified_trace_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = record()
    changed = tensors[name].clone().view(-1)
    changed[0] += 1 if changed.dtype == torch.int64 else 1e-6
    tensors[name] = changed.view_as(tensors[name])
    assert exit_code(saved(tensors, tmp_path / "false.safetensors"), monkeypatch) == 1
    assert "deviates" in capsys.readouterr().out


def test_what_is_not_a_trace_is_refused_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.safetensors").write_text("no trace")
    tensors = record()
    del tensors["step1/weak"]
    saved(tensors, tmp_path / "part.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    for name in ("missing.safetensors", "text.safetensors", "part.safetensors", "other.safetensors"):
        assert exit_code(tmp_path / name, monkeypatch) == 2
        assert "ressl: error:" in capsys.readouterr().err


def test_nan_and_another_shape_deviate_without_end() -> None:
    one = torch.ones(3)
    assert deviation(one, one) == 0
    assert deviation(one * float("nan"), one) == float("inf") == deviation(torch.ones(4), one)


@pytest.mark.parametrize("name", ["ressl_single", "ressl_multicrop"])
def test_the_recorded_traces_agree(name: str) -> None:
    path = GOLDEN / f"{name}.safetensors"
    if not path.exists():
        pytest.skip("the recorded traces are not here")
    assert max(replay(read_trace(path)).values()) <= LIMIT
