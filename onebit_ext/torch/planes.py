"""Training state of one layer as tensors: what an optimizer's state holds for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from onebit_ext import _core

from . import ops
from .nn import BitLinear

CONTROL = _core.CONTROL
RECIPES = {"finetune": (8, 0), "pretrain": (8, 4)}  # bits of residual, bits of momentum


def choose_rule(recipe: str, residual_bits: int | None, momentum_bits: int | None) -> str | None:
    """Name of the flip rule, None for recipe "frozen" (codes stay, scales and float parameters train)."""
    if recipe == "frozen":
        return None
    if recipe not in RECIPES:
        raise ValueError(f"'recipe' must be one of {[*RECIPES, 'frozen']}, got {recipe!r}")
    residual, momentum = RECIPES[recipe]
    residual = residual if residual_bits is None else residual_bits
    momentum = momentum if momentum_bits is None else momentum_bits
    rule = f"residual{residual}" + (f"_momentum{momentum}" if momentum else "")
    known = _core.RULES[:2]
    if rule not in known:
        raise ValueError(
            f"no flip rule with residual_bits={residual}, momentum_bits={momentum}; there are {', '.join(known)}"
        )
    return rule


def specs(layer: BitLinear) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of everything that any rule keeps for a layer."""
    n, k = layer.out_features, layer.in_features
    blocks = (k + 63) // 64
    rows, columns = ((n,), torch.float32), ((k,), torch.float32)
    control = ((len(CONTROL),), torch.float64)
    return {
        "residual": ((n, k), torch.int8),
        "row_factor": rows,
        "col_factor": columns,
        "row_sum": rows,
        "col_sum": columns,
        "sketch": rows,
        "momentum": ((n, blocks, 32), torch.uint8),
        "momentum_scale": ((n, blocks), torch.bfloat16),
        "control": control,
        "draws": control,
    }


def new_planes(layer: BitLinear, rule: str, /, **options: Any) -> dict[str, Tensor]:
    """Fresh planes for a layer; options as `_core.new_planes` takes them."""
    options["scale_init"] = float(layer.scale.detach().mean())
    arrays = _core.new_planes(layer.out_features, layer.in_features, rule, **options)
    kinds = specs(layer)
    planes = {name: _tensor(value, kinds[name][1]) for name, value in arrays.items()}
    start, layer._start = layer._start, None
    if start is not None and rule.startswith("residual8") and start.shape == planes["residual"].shape:
        planes["residual"] = start
    return planes


def _tensor(value: np.ndarray[Any, Any], dtype: torch.dtype) -> Tensor:
    if dtype == torch.bfloat16:
        return torch.from_numpy(value.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(value)


def check(layer: BitLinear, name: str, value: Tensor, where: str) -> None:
    """ValueError unless `value` can be this layer's plane `name`."""
    wanted = specs(layer).get(name)
    if wanted is None:
        raise ValueError(f"{where} has an unknown plane {name!r}")
    if not isinstance(value, Tensor) or (tuple(value.shape), value.dtype) != wanted:
        got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{where}: {name!r} must be {wanted[1]} {wanted[0]}, got {got}")


def control_of(layer: BitLinear) -> np.ndarray[Any, Any]:
    """The control that the layer's optimizer reads and writes, as a live view."""
    return ops.array(layer.control if layer._planes is None else layer._planes["control"])


def field(control: np.ndarray[Any, Any], name: str) -> float:
    """One field of a control."""
    return float(control[CONTROL[name]])


def nonfinite(layer: BitLinear) -> bool:
    """Whether a backward since the last step met a gradient that is not finite."""
    if layer._planes is not None and field(control_of(layer), "nonfinite") > 0:
        return True
    return layer.scale.grad is not None and not bool(torch.isfinite(layer.scale.grad).all())
