"""Training without a flip consumer raises: an optimizer that steps the scales of a layer whose codes nobody flips."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .nn import BitLinear, layer_of
from .optim import FlipOptimizer


def owned_layers(optimizer: torch.optim.Optimizer) -> list[BitLinear]:
    """The BitLinear layers whose scale is a parameter of this optimizer, in its order."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    layers = [(layer_of(parameter), parameter) for parameter in parameters]
    return [layer for layer, parameter in layers if layer is not None and layer.scale is parameter]


def check_consumer(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Pre-step hook: RuntimeError if this step would move scales and no optimizer of ours moves the codes."""
    if isinstance(optimizer, FlipOptimizer):
        return
    for layer in owned_layers(optimizer):
        if layer._auto is None and layer._planes is None and layer.scale.grad is not None:
            raise RuntimeError(
                f"{type(optimizer).__name__} steps the scales of BitLinear layers, but nothing flips their codes: call "
                "replace_linear(model, auto=True), or train with FlipOptimizer (recipe='frozen' keeps codes on purpose)"
            )


register_optimizer_step_pre_hook(check_consumer)
