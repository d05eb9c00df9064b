"""Compiling the residual blocks: fewer kernels, which read and write each activation fewer times."""

from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import nn

Backend = Literal["inductor", "aot_eager"]
SHAPES = 512  # of inputs that one kind of block meets: blocks x views x (with gradient, without)


def compile_blocks_(module: nn.Module, *, backend: Backend = "inductor") -> int:
    """Compiles every residual block of `module` at its first call, in place, and returns their number.

    Blocks, not the whole network: equal ones are compiled once, and whatever stands between them may stay as it is.
    Each shape of views is compiled apart, as kernels for one shape are faster. Names and weights stay as they are.
    `aot_eager` finds out what can be compiled without compiling it.
    """
    from torchvision.models.resnet import BasicBlock, Bottleneck

    torch._dynamo.config.optimize_ddp = False  # it would cut blocks where a bucket of gradients ends
    torch._dynamo.config.recompile_limit = max(SHAPES, torch._dynamo.config.recompile_limit)
    torch._dynamo.config.accumulated_recompile_limit = max(4 * SHAPES, torch._dynamo.config.accumulated_recompile_limit)
    blocks = [m for m in module.modules() if isinstance(m, BasicBlock | Bottleneck)]
    for block in blocks:
        block.compile(backend=backend, dynamic=False)
    return len(blocks)


def not_compiled() -> AbstractContextManager[None]:
    """In it, blocks run as they are written: evaluations meet shapes once that would take a minute each to compile."""
    return torch.compiler.set_stance("force_eager")
