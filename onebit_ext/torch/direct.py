"""Inference without the dispatcher: a GEMV takes 50 us, and PyTorch's way to a Python operator as long."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from onebit_ext import _core

from . import ops


def possible(x: Tensor) -> bool:
    """True where nobody can tell a direct call from `onebit::linear`: plain CPU tensors, no gradient, and no compiler,
    tracer, dispatch mode or transform that wants to see the operator."""
    return (
        type(x) is Tensor
        and not torch.is_grad_enabled()
        and x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and _get_current_dispatch_mode() is None
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
    )


def linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    """x (..., K) float32|bfloat16 -> y (..., N) of x's dtype."""
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], out_features))
    offset = None if bias is None else ops.array(bias.float())
    _core.linear_forward(ops.array(x), ops.array(weight), ops.array(scale), out_features, offset, out=ops.array(y))
    return y
