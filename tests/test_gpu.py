"""What only a GPU can show: the same draws and views as on the CPU, and a step that never makes the host wait."""

from pathlib import Path

import pytest
import torch
from rich.console import Console

import launch
from pipelines import build_loaders
from pipelines.draws import uniforms
from ressl.config_file import load_config
from ressl.method import build_method
from ressl.optim import build_optimizer
from ressl.runtime import Runtime
from ressl.step import TrainStep

pytestmark = pytest.mark.gpu
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_random_bits_are_those_of_the_cpu() -> None:
    index = torch.arange(1000)
    numbers = {"seed": 3, "epoch": 7, "view": 2, "lanes": 40}
    assert torch.equal(uniforms(index.cuda(), **numbers).cpu(), uniforms(index, **numbers))


@pytest.mark.parametrize("source", ["resident", "folder"])
def test_views_are_those_of_the_cpu(source: str, tiny_config: Path, tiny_data: Path) -> None:
    overrides = ["views.weak.solarize_prob=0.5", "views.strong.0.grayscale_prob=0.5", "run.device=cuda"]
    if source == "folder":
        overrides.append(f"data.source={{name: folder, train: {tiny_data}/folder/train}}")
    cfg = load_config(tiny_config, overrides)
    streams = [build_loaders(cfg, device=device).train for device in (CPU, GPU)]
    for cpu, gpu in zip(*(stream.epoch(1) for stream in streams), strict=True):
        assert gpu.strong[0].is_cuda and torch.equal(cpu.index, gpu.index.cpu())
        for a, b in zip((*cpu.weak, *cpu.strong), (*gpu.weak, *gpu.strong), strict=True):
            # 1e-3 of a standard deviation; a value at solarize's threshold may fall on the other side
            assert ((a - b.cpu()).abs() > 1e-3).float().mean() < 1e-3


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_learns_in_every_precision(precision: str, tiny_config: Path, tmp_path: Path) -> None:
    cfg = load_config(
        tiny_config, ["run.device=auto", f"run.precision={precision}", f"run.out_dir={tmp_path}/{precision}"]
    )
    assert launch.run(cfg, Console(quiet=True)) > 0
    console = Console(quiet=True)
    found = launch.evaluate_run(cfg, console, network="student", knn=True, linear=False, untrained=False)
    assert found["knn"] > 0.9


@pytest.mark.parametrize(
    "source",
    [
        "{name: resident, train: DATA/train.safetensors}",
        "{name: resident, train: DATA/folder/train, memory: host, pixels: yuv420}",
        "{name: folder, train: DATA/folder/train}",
        "{name: dali, train: DATA/folder/train}",
    ],
)
def test_five_steady_steps_never_wait_for_the_device(source: str, tiny_config: Path, tiny_data: Path) -> None:
    if "dali" in source:
        pytest.importorskip("nvidia.dali")
    overrides = ["run.device=auto", "run.precision=bf16", "optim.batch_size=8"]
    cfg = load_config(tiny_config, [*overrides, f"data.source={source.replace('DATA', str(tiny_data))}"])
    runtime = Runtime(cfg.run)
    stream = build_loaders(cfg, device=runtime.device, dtype=runtime.dtype).train
    method = build_method(cfg.method, cfg.encoder, runtime.collectives).to(runtime.device)
    optimizer = build_optimizer(method.student, cfg.optim)
    take_step, batches = TrainStep(method, optimizer, runtime, accumulate=1), stream.epoch(0)

    def step() -> None:
        take_step(batches, lr=0.01, momentum=0.99)

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
