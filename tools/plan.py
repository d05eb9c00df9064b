"""What a run would be, without running it: the resolved config, the model, the steps, the memory, the places."""

from dataclasses import dataclass

import torch
import yaml
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table
from torch import Tensor, nn

from pipelines.sampler import Sampler
from ressl.batch import Batch
from ressl.batchnorm import normalised_together
from ressl.collectives import alone
from ressl.config import Config, LocalBatchNorm, Source, SyntheticSource
from ressl.config_file import ConfigError
from ressl.config_optim import AdamWConfig
from ressl.loss import can_fuse, chosen
from ressl.method import build_method
from ressl.runtime import MachineError, preferred_device


@dataclass(frozen=True, slots=True)
class Plan:
    images: int
    world_size: int
    steps_per_epoch: int
    steps: int
    left_out: int  # images of each epoch
    together: int  # images that batch norm normalises together
    backbone: int  # parameters
    projector: int  # parameters
    state_bytes: int  # weights, gradients, momentum and queue of one rank
    activation_bytes: int  # of one rank and micro-batch, kept for the backward pass
    logits_bytes: int  # of the similarities to the queue, likewise; 0 where they are never held all at once


def make_plan(cfg: Config, *, images: int, world_size: int) -> Plan:
    """Builds the method without memory (meta device) and follows one micro-batch through it.

    Raises DataError where the images or the processes do not fit the batch.
    """
    optim = cfg.optim
    sampler = Sampler(images, optim.batch_size, cfg.run.seed, world_size=world_size, accumulate=optim.accumulate)
    per_rank = optim.batch_size // world_size // optim.accumulate
    together = normalised_together(cfg.encoder.batchnorm, per_rank, world_size)
    with torch.device("meta"):
        encoder = cfg.encoder.model_copy(update={"batchnorm": LocalBatchNorm()})
        method = build_method(cfg.method, encoder, alone())
        views = [torch.empty(per_rank, 3, v.size, v.size) for v in (cfg.views.weak, *cfg.views.strong)]
        index = torch.empty(per_rank, dtype=torch.int64)
        kept = _activations(method.student, Batch(weak=(views[0],), strong=tuple(views[1:]), index=index, label=index))
    half = 1 if cfg.run.precision in ("fp32", "tf32") else 2
    parameters = count_parameters(method.student)
    momenta = 2 if isinstance(optim, AdamWConfig) else 1
    rows, keys = per_rank * len(cfg.views.strong), cfg.method.queue_size
    on_gpu = can_fuse(preferred_device(cfg.run))
    loss = chosen(
        cfg.method.loss_impl,
        cfg.method.loss_precision,
        (rows, cfg.method.embed_dim),
        keys,
        torch.float32,
        on_gpu=on_gpu,
    )
    return Plan(
        images=images,
        world_size=world_size,
        steps_per_epoch=sampler.steps_per_epoch,
        steps=sampler.steps_per_epoch * optim.epochs,
        left_out=images - sampler.steps_per_epoch * optim.batch_size,
        together=together,
        backbone=count_parameters(method.student.get_submodule("backbone")),
        projector=count_parameters(method.student.get_submodule("projector")),
        # student, its gradient, its momenta and the teacher, all float32; the queue
        state_bytes=4 * (3 + momenta) * parameters + method.queue.keys.nbytes,
        activation_bytes=4 // half * kept,
        logits_bytes=4 * 3 * rows * keys if loss == "torch" else 0,
    )


def count_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _activations(student: nn.Module, batch: Batch) -> int:
    """Values that the layers of the student hand on for all its views: about what the backward pass keeps."""
    kept = 0

    def count(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        nonlocal kept
        kept += output.numel()

    leaves = [m for m in student.modules() if not list(m.children()) and not getattr(m, "inplace", False)]
    hooks = [leaf.register_forward_hook(count) for leaf in leaves]
    for view in batch.strong:
        student(view)
    for hook in hooks:
        hook.remove()
    return kept


def on_processes(cfg: Config, gpus: int, processes: int) -> Config:
    """The config for so many ranks on this machine. Raises what is wrong with such a number."""
    if gpus and processes:
        raise ConfigError("--gpus and --processes exclude each other: --processes is for the CPU")
    if (gpus and cfg.run.device == "cpu") or (processes and cfg.run.device == "cuda"):
        raise ConfigError(f"run.device={cfg.run.device} contradicts {'--gpus' if gpus else '--processes'}")
    if gpus > torch.cuda.device_count():
        raise MachineError(f"--gpus {gpus}, but torch sees {torch.cuda.device_count()} GPUs here: `launch.py doctor`")
    return cfg.model_copy(update={"run": cfg.run.model_copy(update={"device": "cpu"})}) if processes else cfg


def remarks(cfg: Config, world_size: int) -> list[str]:
    """What is allowed and yet may not be meant."""
    found = []
    if cfg.method.teacher_temperature >= cfg.method.student_temperature:
        temperatures = f"{cfg.method.teacher_temperature} >= {cfg.method.student_temperature}"
        found.append(f"note: teacher_temperature {temperatures} student_temperature: targets flatter than predictions")
    if cfg.encoder.batchnorm.name == "shuffle" and world_size == 1:
        found.append("note: encoder.batchnorm shuffle has nothing to shuffle on one process; it is as local")
    if cfg.data.source.name == "ffcv" and cfg.data.source.cache == "process" and cfg.data.shuffle == "global":
        found.append(
            "note: data.source.cache process keeps in memory what the order comes back to: with data.shuffle global, "
            "the whole file"
        )
    if preferred_device(cfg.run).type == "cpu":
        if cfg.run.cuda_graphs:
            found.append("note: run.cuda_graphs has nothing to capture on a CPU")
        if cfg.run.compile:
            found.append("note: run.compile is meant for GPUs: on two CPU cores it was slower (docs/LOG.md)")
    return found


def print_plan(plan: Plan, cfg: Config, console: Console) -> None:
    text = yaml.safe_dump(cfg.model_dump(mode="json"), sort_keys=False, width=100)
    console.print(Syntax(text, "yaml", background_color="default"))
    optim = cfg.optim
    per_rank = optim.batch_size // plan.world_size // optim.accumulate
    accumulated = f" x {optim.accumulate} micro-batches" if optim.accumulate > 1 else ""
    total = plan.state_bytes + plan.activation_bytes + plan.logits_bytes
    rows = {
        "images": f"{plan.images:,} {_where(cfg.data.source)}",
        "model": f"backbone {plan.backbone:,} + projector {plan.projector:,} parameters, and a teacher as large",
        "batch": f"{optim.batch_size:,} = {plan.world_size} processes{accumulated} x {per_rank} images",
        "batch norm": f"{cfg.encoder.batchnorm.name}: {plan.together} images are normalised together",
        "steps": f"{plan.steps:,} = {optim.epochs} epochs x {plan.steps_per_epoch:,}; {plan.left_out:,} images left "
        "out of each epoch, others every time",
        "learning rate": f"{optim.warmup_lr:g} to {optim.peak_lr:g} in {optim.warmup_epochs:g} epochs, "
        f"then to {optim.final_lr:g} on a cosine",
        "memory": f"about {_size(total)} a process: weights, optimizer and queue {_size(plan.state_bytes)}, "
        f"activations {_size(plan.activation_bytes)}, "
        f"similarities {_size(plan.logits_bytes)}; images and libraries extra",
        "output": f"{cfg.run.out_dir}/ (config.yaml, metrics.jsonl, checkpoints/, evaluations.jsonl)",
    }
    table = Table(title="the run", show_header=False, title_justify="left")
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)


def _where(source: Source) -> str:
    return "of noise" if isinstance(source, SyntheticSource) else f"in {source.train}"


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
