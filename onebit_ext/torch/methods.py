"""prepare(): a model and its optimizer, by method; ShadowLinear, the hybrid baseline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from onebit_ext import _core

from . import ops
from .nn import BitLinear
from .optim import FlipOptimizer
from .swap import convert, linear_layers, replace_linear, swap

METHODS = ("residual", "frozen", "shadow")


class ShadowLinear(nn.Module):
    """The hybrid recipe of BitNet b1.58: a float weight (N, K), quantised by absmean at every forward.

    Forward and dX run through the ternary kernels; dW is dense and float, straight through the quantiser.  It is here
    to be compared with: 32 bits a weight, and more in its optimizer.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        if weight.ndim != 2 or weight.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"ShadowLinear: 'weight' must be float32 or bfloat16 (N, K), got {weight.dtype}")
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.control = torch.from_numpy(_core.new_control())

    @classmethod
    def from_bitlinear(cls, layer: BitLinear, dtype: torch.dtype = torch.float32) -> Self:
        """The float weight T * s / share of nonzeros, whose absmean gives T * s back."""
        codes = layer.codes().to(torch.float32)
        share = codes.abs().mean().clamp(min=1 / max(codes.numel(), 1))
        scale = layer.scale.detach().mean() / share
        return cls((codes * scale).to(dtype), layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) float32 or bfloat16 -> (..., N)."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if x.dtype not in (torch.float32, torch.bfloat16):
            raise TypeError(f"ShadowLinear: input must be float32 or bfloat16, got {x.dtype}")
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"ShadowLinear: input must be of shape (..., {self.in_features}), got {tuple(x.shape)}")
        return ops.shadow_linear(x, self.weight, self.bias, self.control)[0]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def prepare(
    model: nn.Module,
    method: str = "residual",
    lr: float | None = None,
    float_lr: float = 1e-3,
    scale_lr: float = 1e-4,
    skip: Sequence[str] = ("lm_head",),
    residual_bits: int | None = None,
    momentum_bits: int | None = None,
    shadow_dtype: torch.dtype = torch.float32,
    **options: Any,
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Swap the linear layers of `model` and make its optimizer.

    Methods: "residual" (ours; lr is eta, default .03), "frozen" (codes stay; scales and floats train), "shadow" (float
    weights of `shadow_dtype` under AdamW; lr default 1e-3).  `options` go to the optimizer.
    """
    if method not in METHODS:
        raise ValueError(f"prepare: 'method' must be one of {METHODS}, got {method!r}")
    if method == "shadow":
        model = _shadows(model, skip, shadow_dtype)
        layers = [module for module in model.modules() if isinstance(module, ShadowLinear)]
        shadows = [layer.weight for layer in layers]
        known = {id(weight) for weight in shadows}
        rest = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
        groups = [{"params": shadows, "lr": 1e-3 if lr is None else lr}, {"params": rest, "lr": float_lr}]
        options.setdefault("betas", (0.9, 0.95))
        options.setdefault("weight_decay", 0.0)
        return model, torch.optim.AdamW([group for group in groups if group["params"]], **options)
    model = replace_linear(model, skip)
    options |= {"residual_bits": residual_bits, "momentum_bits": momentum_bits}
    if method == "frozen":
        options["recipe"] = "frozen"
    return model, FlipOptimizer(model, 0.03 if lr is None else lr, float_lr, scale_lr, **options)


def _shadows(model: nn.Module, skip: Sequence[str], dtype: torch.dtype) -> nn.Module:
    targets = dict(linear_layers(model, skip))
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, BitLinear):
            targets.setdefault(module, []).append(name)

    def make(module: Any) -> nn.Module:
        if isinstance(module, BitLinear):
            return ShadowLinear.from_bitlinear(module, dtype)
        if hasattr(module, "weight_scale"):
            return ShadowLinear.from_bitlinear(convert(module), dtype)
        return ShadowLinear(module.weight.detach().to(dtype), module.bias)

    return swap(model, targets, make)
