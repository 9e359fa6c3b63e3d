"""Method "shadow": the hybrid baseline, a float weight that is quantised at every forward and trained by AdamW."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from onebit_ext import _core

from ..dense import absmean, dense_linear
from ..nn import BitLinear
from ..swap import convert, linear_layers, swap


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
        packed, scale = absmean(self.weight.detach())
        return dense_linear(x, packed, scale, self.bias, self.weight, self.control)[0]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def shadow_optimizer(
    model: nn.Module, lr: float, float_lr: float, betas: tuple[float, float] = (0.9, 0.95), **options: Any
) -> torch.optim.AdamW:
    """AdamW with the shadows in group 0 at lr, every other parameter at float_lr; without decay unless told."""
    shadows = [module.weight for module in model.modules() if isinstance(module, ShadowLinear)]
    known = {id(weight) for weight in shadows}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    groups = [{"params": shadows, "lr": lr, "kind": "codes"}, {"params": rest, "lr": float_lr}]  # kind: for schedules
    options = {"weight_decay": 0.0} | options
    return torch.optim.AdamW([group for group in groups if group["params"]], betas=betas, **options)


def replace_with_shadows(model: nn.Module, skip: Sequence[str], dtype: torch.dtype) -> nn.Module:
    """Every linear layer, ternary ones too, becomes a ShadowLinear of `dtype`; in place, as `replace_linear`."""
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


def eta_from_hybrid(model: nn.Module, lr: float) -> float:
    """eta in cells per step that moves codes as fast as AdamW with `lr` moved a float shadow: lr / mean|W|.

    mean|W| is over all ternary layers of a model, or over one layer; for codes it is their scale, as absmean sets
    it.  Before the layers are swapped, over every `nn.Linear`.  ValueError if there is none, or they are all zero.
    """
    if not (math.isfinite(lr) and lr >= 0):
        raise ValueError(f"eta_from_hybrid: 'lr' must be finite and not negative, got {lr!r}")
    ternary = [module for module in model.modules() if isinstance(module, (BitLinear, ShadowLinear))]
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    total = count = 0.0
    for layer in ternary or linear:
        weights = layer.in_features * layer.out_features
        mean = layer.scale if isinstance(layer, BitLinear) else layer.weight.abs()
        total, count = total + weights * float(mean.detach().float().mean()), count + weights
    if not total > 0:
        raise ValueError("eta_from_hybrid: there is no linear layer with weights")
    return lr * count / total
