"""Replays a recorded training trace through the project's own method and optimizer, and measures the deviation.

    python -m tools.replay_trace TRACE.safetensors

A trace holds the state before the first step, the views of each step, and the losses, queues and final state that came
out. It was recorded with the teacher moving at the start of each step. Ours moves at the end, so the replay makes one
move before step 0 and compares the teacher before its own last one. Exit code 1 above a deviation of 1e-9, 2 for a file
that is not a trace.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ressl.batch import Batch, DataError
from ressl.collectives import alone
from ressl.config import LocalBatchNorm, ReSSLConfig
from ressl.config_optim import SGDConfig
from ressl.ema import ema_update_
from ressl.encoder import unit_rows
from ressl.method import ReSSL
from ressl.optim import build_optimizer

LIMIT = 1e-9


class TraceBackbone(nn.Module):
    """Two strided convolutions with batch norm, averaged over the image: (B, 3, h, w) -> (B, 16)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.bn1(self.conv1(images)).relu()
        return self.bn2(self.conv2(hidden)).relu().mean(dim=(2, 3))


class TraceHead(nn.Module):
    def __init__(self, hidden_dim: int, embed_dim: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(16, hidden_dim)
        self.linear2 = nn.Linear(hidden_dim, embed_dim)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear2(self.linear1(features).relu())


class TraceEncoder(nn.Module):
    """The encoder of the traces, under the names of its tensors there."""

    def __init__(self, hidden_dim: int, embed_dim: int) -> None:
        super().__init__()
        self.backbone = TraceBackbone()
        self.head = TraceHead(hidden_dim, embed_dim)

    def forward(self, images: Tensor) -> Tensor:
        return unit_rows(self.head(self.backbone(images)))


@dataclass(frozen=True, slots=True)
class Trace:
    settings: dict[str, Any]
    tensors: dict[str, Tensor]


def read_trace(path: Path) -> Trace:
    try:
        with safe_open(path, framework="pt") as file:
            settings = json.loads((file.metadata() or {})["json"])
            trace = Trace(settings, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (FileNotFoundError, IsADirectoryError):
        raise DataError(f"{path}: no such file") from None
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: not a recorded trace: {str(error)[:200]}") from None
    return trace


def replay(trace: Trace) -> dict[str, float]:
    """The largest relative deviation of each recorded quantity. Raises DataError where the trace lacks something."""
    try:
        return _replay(trace.settings, trace.tensors)
    except KeyError as error:
        raise DataError(f"not a complete trace: {error.args[0]} is missing") from None
    except RuntimeError as error:
        raise DataError(f"not a trace of this algorithm: {str(error).splitlines()[0]}") from None


def _replay(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, float]:
    method = _method(settings, tensors)
    optimizer = build_optimizer(method.student, _optim(settings))
    for group in optimizer.param_groups:
        group["lr"] = settings["lr"]
    index = torch.arange(settings["batch"])
    worst = {"losses": 0.0, "queues": 0.0}

    ema_update_(method.teacher, method.student, method.cfg.teacher_momentum)
    for step in range(settings["steps"]):
        views = tuple(tensors[f"step{step}/strong{j}"] for j in range(len(settings["strong_sizes"])))
        out = method(Batch(weak=(tensors[f"step{step}/weak"],), strong=views, index=index, label=index))
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        teacher = {name: value.clone() for name, value in method.teacher.state_dict().items()}
        method.after_step(*out.carry, momentum=method.cfg.teacher_momentum)
        worst["losses"] = max(worst["losses"], deviation(out.loss.detach(), tensors["losses"][step]))
        worst["queues"] = max(worst["queues"], deviation(method.queue.keys.T, tensors[f"step{step}/queue"]))

    worst["final student"] = _state_deviation(method.student.state_dict(), tensors, "final/student.")
    worst["final teacher"] = _state_deviation(teacher, tensors, "final/teacher.")
    worst["final queue"] = deviation(method.queue.keys.T, tensors["final/queue"])
    worst["final queue_ptr"] = deviation(method.queue.cursor.view(1), tensors["final/queue_ptr"])
    return worst


def _method(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ReSSL:
    cfg = ReSSLConfig(
        name="ressl",
        hidden_dim=settings["hidden_dim"],
        embed_dim=settings["embed_dim"],
        queue_size=settings["queue_size"],
        student_temperature=settings["tau_student"],
        teacher_temperature=settings["tau_teacher"],
        teacher_momentum=settings["ema_momentum"],
    )
    student = TraceEncoder(cfg.hidden_dim, cfg.embed_dim)
    method = ReSSL(cfg, student, LocalBatchNorm(), alone()).double().train()
    method.student.load_state_dict(_under(tensors, "init/student."))
    method.teacher.load_state_dict(_under(tensors, "init/teacher."))
    method.queue.keys.copy_(tensors["init/queue"].T)
    method.queue.cursor.copy_(tensors["init/queue_ptr"][0])
    return method


def _optim(settings: Mapping[str, Any]) -> SGDConfig:
    return SGDConfig(
        name="sgd",
        epochs=1,
        warmup_epochs=0.0,
        batch_size=settings["batch"],
        lr=settings["lr"],
        momentum=settings["sgd_momentum"],
        weight_decay=settings["weight_decay"],
        no_decay=("bn", "bias"),
    )


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _state_deviation(state: Mapping[str, Tensor], tensors: Mapping[str, Tensor], prefix: str) -> float:
    recorded = _under(tensors, prefix)
    if recorded.keys() != state.keys():
        raise DataError(f"not a complete trace: {prefix}{sorted(recorded.keys() ^ state.keys())[0]}")
    return max(deviation(state[name], recorded[name]) for name in state)


def deviation(ours: Tensor, recorded: Tensor) -> float:
    """The largest difference, relative to the largest recorded magnitude; infinite for NaN or another shape."""
    if ours.shape != recorded.shape:
        return float("inf")
    scale = recorded.double().abs().max().clamp(min=1e-300)
    found = float((ours.double() - recorded.double()).abs().max() / scale)
    return found if found == found else float("inf")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.replay_trace", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("trace", type=Path, help="a recorded trace, .safetensors")
    path = parser.parse_args().trace
    try:
        worst = replay(read_trace(path))
    except DataError as error:
        print(f"ressl: error: {error}", file=sys.stderr)
        return 2
    table = Table("quantity", "largest relative deviation", title=f"{path.name}: limit {LIMIT:g}", title_justify="left")
    for name, value in worst.items():
        table.add_row(name, f"{value:.2e}" if value <= LIMIT else f"[red]{value:.2e}[/]")
    console = Console()
    console.print(table)
    largest = max(worst.values())
    verdict = "[green]agrees[/]" if largest <= LIMIT else "[red]deviates[/]"
    console.print(f"largest of all {largest:.2e}: {verdict}")
    return 0 if largest <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
