"""prepare(): a model and its optimizer, by method; each method is a file of this folder or of the one above."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..optim import FlipOptimizer
from ..swap import replace_linear
from .bop import Bop
from .dense import DenseOptimizer
from .latent import LatentAdam
from .shadow import ShadowLinear, eta_from_hybrid, replace_with_shadows, shadow_optimizer

__all__ = ["METHODS", "Bop", "DenseOptimizer", "LatentAdam", "ShadowLinear", "eta_from_hybrid", "prepare"]

METHODS = {  # and the default of lr
    "residual": 0.03,
    "optimizer": 1e-3,
    "shadow": 1e-3,
    "stochastic": 0.02,
    "bop": 1e-2,
    "frozen": 0.0,
}


def prepare(
    model: nn.Module,
    method: str = "residual",
    lr: float | None = None,
    float_lr: float = 1e-3,
    scale_lr: float = 2e-3,
    skip: Sequence[str] = ("lm_head",),
    recipe: str | None = None,
    residual_bits: int | None = None,
    momentum_bits: int | None = None,
    rule: str | None = None,
    stripes: int = 1,
    stripe_steps: int | None = None,
    shadow_dtype: torch.dtype = torch.float32,
    **options: Any,
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Swap the linear layers of `model` and make its optimizer.

    Methods, with the persistent bits per weight and what `lr` is (None: the default):
        "residual"    ours, 4 to 18 bits by recipe, bits or rule, fewer with stripes; eta in cells per step, .03
        "optimizer"   codes in the layer; float residual and Adam's moments of `shadow_dtype` in the optimizer,
                      2 + 96 or 2 + 48; AdamW's, 1e-3
        "shadow"      float weights of `shadow_dtype` under AdamW, 96 or 48; AdamW's, 1e-3
        "stochastic"  2 bits: codes move by stochastic rounding alone (rule "stochastic"); eta, .02
        "bop"         2 + 32 or 2 + 16, by `shadow_dtype`: `Bop`; the rate of its mean, .01
        "frozen"      2 bits: codes stay, scales and floats train
    float_lr, scale_lr: of the float parameters and of the scales ("shadow" has none); `options` go to the optimizer.
    skip: layers left alone, as `replace_linear`.
    recipe, residual_bits, momentum_bits, rule, stripes, stripe_steps: of "residual", as `FlipOptimizer`.
    Raises ValueError for a method, or an option of another method.
    """
    if method not in METHODS:
        raise ValueError(f"prepare: 'method' must be one of {tuple(METHODS)}, got {method!r}")
    ours: dict[str, Any] = {
        "recipe": recipe,
        "residual_bits": residual_bits,
        "momentum_bits": momentum_bits,
        "rule": rule,
        "stripes": None if stripes == 1 else stripes,
        "stripe_steps": stripe_steps,
    }
    given: dict[str, Any] = {name: value for name, value in ours.items() if value is not None}
    if method != "residual" and given.keys() - ({"stripes", "stripe_steps"} if method == "stochastic" else set()):
        raise ValueError(f"prepare: {sorted(given)} are of method 'residual', got method={method!r}")
    lr = METHODS[method] if lr is None else lr
    if method == "shadow":
        model = replace_with_shadows(model, skip, shadow_dtype)
        return model, shadow_optimizer(model, lr, float_lr, **options)
    model = replace_linear(model, skip)
    if method in ("optimizer", "bop"):
        dense = LatentAdam if method == "optimizer" else Bop
        return model, dense(model, lr, float_lr, scale_lr, dtype=shadow_dtype, **options)
    if method == "stochastic":
        given["rule"] = "stochastic"
    if method == "frozen":
        given["recipe"] = "frozen"
    return model, FlipOptimizer(model, lr, float_lr, scale_lr, **given | options)
