"""Operators of the methods that keep a float of the weight's shape: to be compared with, and honest about it."""

from typing import Any

import torch
from torch import Tensor

from onebit_ext import _core

from .ops import CONTROL, array, as_rows, linear_backward_input, linear_outputs, refuse_double_backward


@torch.library.custom_op("onebit::absmean", mutates_args=(), device_types="cpu")
def absmean(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Float (N, K) -> codes (tile16) and scale float32 (1,): s = max(mean |w|, 1e-5), T = clamp(rint(w / s), +-1)."""
    packed, scale = _core.absmean(array(weight.contiguous()))
    return torch.from_numpy(packed), torch.from_numpy(scale)


@absmean.register_fake
def _(weight):
    n, k = weight.shape
    packed = weight.new_empty(((n + 63) // 64, (k + 15) // 16, 4, 16, 4), dtype=torch.uint8)
    return packed, weight.new_empty((1,), dtype=torch.float32)


@torch.library.custom_op("onebit::dense_linear", mutates_args=(), device_types="cpu")
def dense_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, latent: Tensor, control: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`linear` for the methods with a float of the weight's shape: `latent` (N, K), not read, gets the dense dL/dW.

    dX and the forward are the ternary kernels'; dW = (dy sx)^T xq in float32; ds_n = sum_k T_nk dW_nk.
    """
    y, xq, sx = linear_outputs(x, latent.shape[0], True)
    rows = as_rows(x)
    offset = None if bias is None else array(bias.float())
    out = array(y.view(rows.shape[0], latent.shape[0]))
    arguments = (array(rows), array(weight), array(scale), latent.shape[0], offset)
    _core.linear_forward(*arguments, out=out, xq=array(xq), sx=array(sx))
    return y, xq, sx


@dense_linear.register_fake
def _(x, weight, scale, bias, latent, control):
    return linear_outputs(x, latent.shape[0], True)


@torch.library.custom_op("onebit::scale_gradient", mutates_args=(), device_types="cpu")
def scale_gradient(dw: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """ds like scale from a dense dL/dW (N, K): sum_k T_nk dW_nk, of all rows for a tensor scale."""
    codes = torch.from_numpy(_core.unpack(array(weight), (dw.shape[0], dw.shape[1])))
    rows = (dw.float() * codes).sum(1)
    return rows if scale.numel() != 1 else rows.sum(0, keepdim=True)


@scale_gradient.register_fake
def _(dw, weight, scale):
    return torch.empty_like(scale)


def _dense_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, weight, scale, bias, latent, control = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(weight, scale, *output[1:])
    ctx.control, ctx.in_features, ctx.dtype = control, latent.shape[1], latent.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


def _dense_backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if dy is None:
        return None, None, None, None, None, None
    refuse_double_backward()
    weight, scale, xq, sx = ctx.saved_tensors
    need_x, _, need_scale, need_bias, need_latent, _ = ctx.needs_input_grad
    dx = ds = dw = db = None
    rows = as_rows(dy)
    if need_x:
        dx = linear_backward_input(dy, weight, scale, ctx.control, ctx.in_features)
    if need_latent:
        dw = (rows.float() * sx[:, None]).t() @ xq[:, : ctx.in_features].float()
        ds = scale_gradient(dw, weight, scale) if need_scale else None
        dw = dw.to(ctx.dtype)
    if need_bias:
        db = rows.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    ctx.control.narrow(0, CONTROL["micro"], 1).add_(1.0)
    return dx, None, ds, db, dw, None


dense_linear.register_autograd(_dense_backward, setup_context=_dense_setup)
