"""The least that the stages of a step need: multiplications and additions, and bytes read and written."""

import torch
from torch import Tensor, nn

from pipelines.frames import Frames
from ressl.collectives import alone
from ressl.config import Config, LocalBatchNorm
from ressl.loss import LossImpl, chosen
from ressl.method import AnyMethod, build_method
from tools.profiling.record import StageName

COUNTED = 2  # images; batch norm refuses fewer
OPTIMIZER_BYTES = {"sgd": 20, "lars": 28, "adamw": 28}
"""Of a parameter: the weight, its moments and its gradient are read, weight and moments written, float32 all. lars
reads weight and gradient once more, for the norms of the layer."""


def needed_flops(cfg: Config, images: int, *, on_gpu: bool) -> dict[StageName, float]:
    """Of a step of `images` images. The encoder's are counted layer by layer, without computing; the loss's follow from
    its definition: each of V + 1 embeddings of an image meets each row of the queue, and each of V takes a gradient
    from it, in the stage in which that is done."""
    from torch.utils.flop_counter import FlopCounterMode  # brings Triton with it, which takes its time

    method, weak, strong = _without_memory(cfg)
    with FlopCounterMode(display=False) as student:
        embeddings = method.embed(tuple(strong))
    with FlopCounterMode(display=False) as teacher:
        method.teach((weak,))
    with FlopCounterMode(display=False) as backward:
        embeddings.sum().backward()
    share = images / COUNTED
    product = 2.0 * images * cfg.method.embed_dim * cfg.method.queue_size
    gradient = product * len(strong)
    later = loss_taken(cfg, images, on_gpu=on_gpu) == "torch"  # the others make it in the forward pass
    return {
        "teacher": share * teacher.get_total_flops(),
        "student": share * student.get_total_flops(),
        "loss": product * (len(strong) + 1) + (0.0 if later else gradient),
        "backward": share * backward.get_total_flops() + (gradient if later else 0.0),
    }


def loss_taken(cfg: Config, images: int, *, on_gpu: bool, impl: LossImpl | None = None) -> str:
    """How the loss of a rank's step of `images` images is computed; with `impl`, if that were set."""
    rows = images // cfg.optim.accumulate * len(cfg.views.strong)
    method = cfg.method
    return chosen(
        impl or method.loss_impl,
        method.loss_precision,
        (rows, method.embed_dim),
        method.queue_size,
        torch.float32,
        on_gpu=on_gpu,
    )


def _without_memory(cfg: Config) -> tuple[AnyMethod, Tensor, list[Tensor]]:
    """The method, and weak and strong views (COUNTED, 3, h, w), on torch's meta device."""
    encoder = cfg.encoder.model_copy(update={"batchnorm": LocalBatchNorm()})
    with torch.device("meta"):
        method = build_method(cfg.method.model_copy(update={"queue_size": 1}), encoder, alone()).train()
        weak, *strong = (torch.empty(COUNTED, 3, v.size, v.size) for v in (cfg.views.weak, *cfg.views.strong))
    return method, weak, strong


def network_bytes(cfg: Config, images: int, dtype: torch.dtype) -> dict[StageName, float]:
    """Of the forward and backward passes of a step of `images` images: each convolution and each linear layer reads
    what it is given and its weights once, and writes what it makes once, in the step's `dtype`. The backward pass does
    so for the gradients of both its input and its weights, so it moves twice that. Normalising, activations and sums
    may pass in the same breath: they are not counted. Weights are read again for each view and micro-batch."""
    method, weak, strong = _without_memory(cfg)
    passed, weights = 0, 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal passed, weights
        passed += inputs[0].numel() + output.numel()
        weights += sum(p.numel() for p in module.parameters())

    def moved(views: list[Tensor]) -> float:
        nonlocal passed, weights
        passed, weights = 0, 0
        for view in views:
            method.student(view)
        return dtype.itemsize * (images / COUNTED * passed + cfg.optim.accumulate * weights)

    for module in method.student.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    student = moved(strong)
    return {"teacher": moved([weak]), "student": student, "backward": 2 * student}


def least_bytes(
    cfg: Config, method: AnyMethod, frames: Frames, *, images: int, world_size: int, dtype: torch.dtype
) -> dict[StageName, float]:
    """Of a step of `images` images of this rank, of which `frames` are a sample; `dtype` is that of its networks."""
    parameters = sum(p.numel() for p in method.student.parameters())
    keys = method.queue.keys
    views = (cfg.views.weak, *cfg.views.strong)
    frame = 3 * float(frames.size.double().prod(dim=1).mean())
    read = sum(frame * sum(view.crop_scale) / 2 for view in views)
    written = sum(3 * view.size**2 * dtype.itemsize for view in views)
    gradient = 2 if cfg.run.gradient_compression == "bf16" else 4
    momentum = cfg.optim.momentum if cfg.optim.name == "sgd" else 1
    found: dict[StageName, float] = {
        "views": images * (read + written),
        "loss": float(keys.nbytes),
        "optimizer": float(parameters * (OPTIMIZER_BYTES[cfg.optim.name] if momentum else 12)),
        "ema": 12.0 * parameters,
        "queue": float(images * world_size * keys.shape[1] * (4 + keys.dtype.itemsize)),
    }
    if world_size > 1:
        found["all-reduce"] = float(gradient * parameters)
    return found | network_bytes(cfg, images, dtype)


def frame_bytes(frames: Frames) -> float:
    """Of what a copy to the device moves."""
    return float(sum(tensor.nbytes for tensor in frames.tensors()))
