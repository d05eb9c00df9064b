"""What only a GPU can show: the same draws and views as on the CPU, and a step that never makes the host wait."""

from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pytest
import torch
from rich.console import Console

import launch
from pipelines import build_loaders
from pipelines.draws import uniforms
from ressl import checkpoint
from ressl.checkpoint import Manifest
from ressl.config import Config
from ressl.config_file import load_config
from ressl.graphs import WARM_UP, Logs
from ressl.runtime import Runtime
from ressl.snapshot import take_snapshot
from ressl.step import TrainStep, build_step
from tools.evaluation import chosen_checkpoint

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
    saved = chosen_checkpoint(cfg.run.out_dir, "last", console)
    assert launch.evaluate_run(cfg, console, saved, linear=False)["knn"] > 0.9


def built(cfg: Config) -> tuple[Runtime, TrainStep, Callable[[], Logs]]:
    """The last is a function that takes the next step of the config's run, over as many epochs as it is called for."""
    runtime = Runtime(cfg.run)
    torch.manual_seed(cfg.run.seed)
    stream = build_loaders(cfg, device=runtime.device, dtype=runtime.dtype).train
    take_step, batches = build_step(cfg, runtime), chain.from_iterable(map(stream.epoch, range(100)))
    return runtime, take_step, lambda: take_step(batches, lr=0.01, momentum=0.99)


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.source={name: resident, train: DATA/train.safetensors}"],
        ["data.source={name: resident, train: DATA/folder/train, memory: host, pixels: yuv420}"],
        ["data.source={name: folder, train: DATA/folder/train}"],
        ["data.source={name: dali, train: DATA/folder/train}"],
        ["run.precision=fp16"],
        ["run.compile=true"],
        ["run.cuda_graphs=true"],
        ["run.cuda_graphs=true", "run.compile=true", "optim.accumulate=2"],
        ["optim={name: lars, epochs: 2, batch_size: 8, lr: 0.1, warmup_epochs: 0}"],
        ["optim={name: adamw, epochs: 2, batch_size: 8, lr: 0.001, warmup_epochs: 0}", "run.cuda_graphs=true"],
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_five_steady_steps_never_wait_for_the_device(overrides: list[str], tiny_config: Path, tiny_data: Path) -> None:
    if "dali" in overrides[0]:
        pytest.importorskip("nvidia.dali")
    given = [item.replace("DATA", str(tiny_data)) for item in overrides]
    cfg = load_config(tiny_config, ["run.device=auto", "run.precision=bf16", "optim.batch_size=8", *given])
    runtime, take_step, step = built(cfg)
    for _ in range(WARM_UP + 2):
        step()
    about = Manifest(step=WARM_UP + 4, images=72, data=0, world_size=1, local_ranks=1, device="cuda", left_out=False)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            step()
        snapshot = None
        if not runtime.scales_gradients:  # the scale is read
            snapshot = take_snapshot(about, take_step.method, take_step.plain, take_step.guarded, runtime)
        for _ in range(3):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    if snapshot:
        saved = snapshot.wait()
        assert not saved.about.left_out and all(value.isfinite().all() for value in saved.model.values())


def test_a_captured_run_evaluates_changes_its_sizes_and_goes_on(tiny_config: Path, tmp_path: Path) -> None:
    """Four steps an epoch: two sizes, captured one after the other, and evaluations between replays."""
    base = ["run.device=auto", "run.cuda_graphs=true", "run.knn_every=2", f"run.out_dir={tmp_path}/run"]
    sizes = "views.progressive={start: 0.5, until: 6, multiple: 8}"
    assert launch.run(load_config(tiny_config, [*base, sizes, "optim.epochs=12"]), Console(quiet=True)) > 0
    found = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert found is not None and found[1].about.step == 12 * 4
    again = load_config(tiny_config, [*base, sizes, "optim.epochs=12", "run.cuda_graphs=false"])
    assert launch.evaluate_run(again, Console(quiet=True), found[:2], linear=False)


@pytest.mark.parametrize("optim", ["sgd", "lars", "adamw"])
def test_a_captured_step_trains_as_the_plain_one(optim: str, tiny_config: Path) -> None:
    """Over the warm-up, the capture and replays, in which the views change and the memory is used again."""
    # AdamW's usual eps would make a gradient's rounding as large as the gradient
    rate = "lr: 0.001, eps: 0.001" if optim == "adamw" else "lr: 0.01"
    base = ["run.device=auto", f"optim={{name: {optim}, epochs: 2, batch_size: 16, {rate}, warmup_epochs: 0}}"]
    losses = []
    for graphs in ("false", "true"):
        _, _, step = built(load_config(tiny_config, [*base, f"run.cuda_graphs={graphs}"]))
        losses.append(torch.stack([step()[0]["loss"].clone() for _ in range(2 * WARM_UP)]))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=1e-3)
