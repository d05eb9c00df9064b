"""The least that the stages of a step need: multiplications and additions, and bytes read and written."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from pipelines.frames import Frames
from ressl.collectives import alone
from ressl.config import Config, LocalBatchNorm
from ressl.method import AnyMethod, build_method
from tools.profiling.record import StageName

COUNTED = 2  # images; batch norm refuses fewer
OPTIMIZER_BYTES = {"sgd": 20, "lars": 20, "adamw": 28}
"""Of a parameter: the weight, its moments and its gradient are read, weight and moments written, float32 all."""


def needed_flops(cfg: Config, images: int) -> dict[StageName, float]:
    """Of a step of `images` images. The encoder's are counted layer by layer, without computing; the loss's follow from
    its definition: each of V + 1 embeddings of an image meets each row of the queue, and each of V takes a gradient
    from it."""
    encoder = cfg.encoder.model_copy(update={"batchnorm": LocalBatchNorm()})
    with torch.device("meta"):
        method = build_method(cfg.method.model_copy(update={"queue_size": 1}), encoder, alone()).train()
        weak, *strong = (torch.empty(COUNTED, 3, v.size, v.size) for v in (cfg.views.weak, *cfg.views.strong))
        with FlopCounterMode(display=False) as student:
            embeddings = method.embed(tuple(strong))
        with FlopCounterMode(display=False) as teacher:
            method.teach((weak,))
        with FlopCounterMode(display=False) as backward:
            embeddings.sum().backward()
    share = images / COUNTED
    product = 2.0 * images * cfg.method.embed_dim * cfg.method.queue_size
    return {
        "teacher": share * teacher.get_total_flops(),
        "student": share * student.get_total_flops(),
        "loss": product * (len(strong) + 1),
        "backward": share * backward.get_total_flops() + product * len(strong),
    }


def least_bytes(
    cfg: Config, method: AnyMethod, frames: Frames, *, images: int, world_size: int, dtype: torch.dtype
) -> dict[StageName, float]:
    """Of a step of `images` images of this rank, of which `frames` are a sample."""
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
    return found


def frame_bytes(frames: Frames) -> float:
    """Of what a copy to the device moves."""
    return float(sum(tensor.nbytes for tensor in frames.tensors()))
