"""LARS: SGD whose layers each get a rate in proportion to their weights' norm.

You et al. 2017, https://arxiv.org/abs/1708.03888, algorithm 1.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class LARS(torch.optim.Optimizer):
    """For each parameter w with gradient g:

        ratio = trust_coefficient * |w| / (|g| + weight_decay * |w|), or 1 where |w| or |g| is 0
        v <- momentum * v + ratio * (g + weight_decay * w);  w <- w - lr * v

    Groups with `adapt=False` have the ratio 1: SGD. The parameters of a group share device and type; each gradient lies
    in memory as its parameter does, as autograd makes it. `lr` may be a () float32 tensor on that device. No step reads
    anything on the host, so a CUDA graph can capture it after a first one, which makes the momenta.

    torch.amp.GradScaler hands over its scale and whether a gradient overflowed as tensors: such a step changes neither
    weights nor momenta, and the host does not wait to know.

    NOTE: the paper multiplies by lr before the momentum, which differs only while lr changes; torch's SGD and the
    recipes for self-supervised learning do it after.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float | Tensor,
        momentum: float = 0.9,
        trust_coefficient: float = 0.001,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "trust_coefficient": trust_coefficient,
                "weight_decay": weight_decay,
                "adapt": True,
            },
        )
        self._step_supports_amp_scaling = True  # GradScaler looks for this name

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            grads = [p.grad for p in params]
            if not params:
                continue
            if grad_scale is not None:
                torch._foreach_mul_(grads, grad_scale.reciprocal())
            adapt, decay = group["adapt"], group["weight_decay"]
            torch._fused_sgd_(
                params,
                adapted(params, grads, trust_coefficient=group["trust_coefficient"], decay=decay) if adapt else grads,
                [self._momentum(p) for p in params] if group["momentum"] else [],
                weight_decay=0.0 if adapt else decay,
                momentum=group["momentum"],
                lr=group["lr"],
                dampening=0.0,
                nesterov=False,
                maximize=False,
                is_first_step=False,
                found_inf=found_inf,
            )
        return loss

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]


def adapted(params: list[Tensor], grads: list[Tensor], *, trust_coefficient: float, decay: float) -> list[Tensor]:
    """ratio * (g + decay * w) of each parameter, in new memory."""
    weight = torch.stack(torch._foreach_norm(params))  # (parameters,)
    gradient = torch.stack(torch._foreach_norm(grads))
    ratio = trust_coefficient * weight / (gradient + decay * weight)
    ratio = ratio.where((weight > 0) & (gradient > 0), 1.0)
    updates = torch._foreach_add(grads, params, alpha=decay)
    torch._foreach_mul_(updates, ratio.unbind())
    return list(updates)
