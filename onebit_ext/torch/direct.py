"""BitLinear without the dispatcher: a GEMV takes 40 us, and PyTorch's way to a Python operator as long."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from onebit_ext import _core

from . import calls, ops

if TYPE_CHECKING:
    from .nn import BitLinear


def views_of(layer: BitLinear) -> calls.Views:
    """The arrays of a layer's tensors."""
    if layer._views is None:
        layer._views = {}
    return layer._views


def inference(layer: BitLinear, x: Tensor) -> Tensor:
    """x (..., K) float32|bfloat16 -> y (..., N) of x's dtype, no gradient.

    `calls.array` and `calls.forward` are written out: where a GEMV has emptied the caches, a function costs 2 us.
    """
    parameters, views = layer._parameters, views_of(layer)  # nn.Module looks everywhere else first
    weight, scale = parameters.get("weight"), parameters.get("scale")
    if weight is None or scale is None:  # parametrized
        weight, scale = layer.weight, layer.scale
    codes, factors = calls.kept(views, "weight", weight), calls.kept(views, "scale", scale)
    bias, half = layer.bias, x.dtype == torch.bfloat16
    x = x.contiguous()
    if x.requires_grad:
        x = x.detach()
    rows = (x.view(torch.uint16) if half else x).numpy()
    if rows.shape[-1:] != (layer.in_features,):
        layer.refuse_shape(x)
    offset = None if bias is None else calls.array(bias.float())
    y = torch.from_numpy(_core.linear_forward(rows, codes, factors, layer.out_features, offset))
    return y.view(torch.bfloat16) if half else y


class Linear(torch.autograd.Function):
    """`onebit::linear` and its gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        out_features: int,
        keep: bool,
        control: Tensor,
        planes: Sequence[Tensor],
        position: Tensor | None,
        views: calls.Views,
    ) -> Tensor:
        codes, factors = calls.kept(views, "weight", weight), calls.kept(views, "scale", scale)
        arguments = (calls.array(x.contiguous()), codes, factors, bias, out_features)
        y, xq, sx = calls.forward_keeping(*arguments) if keep else (calls.forward(*arguments), None, None)
        ops.remember(ctx, x, weight, scale, bias, control, planes, position, xq, sx, views)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Any, ...]:
        if dy is None:
            return (None,) * 10
        need_x, _, need_scale, need_bias = ctx.needs_input_grad[:4]
        dx, ds, db = ops.linear_backward(ctx, dy, need_x, need_scale, need_bias)
        return dx, None, ds, db, None, None, None, None, None, None
