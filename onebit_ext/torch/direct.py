"""Inference without the dispatcher: a GEMV takes 40 us, and PyTorch's way to a Python operator as long.

After a kernel that streams its weights through the caches, every call into torch costs microseconds: so there are few.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from onebit_ext import _core

from . import ops

if TYPE_CHECKING:
    from .nn import BitLinear

Views = tuple[int, int, np.ndarray[Any, Any], np.ndarray[Any, Any]]  # addresses and arrays of codes and scale


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


def linear(layer: BitLinear, x: Tensor) -> Tensor:
    """x (..., K) float32|bfloat16 -> y (..., N) of x's dtype."""
    weight, scale, bias = layer.weight, layer.scale, layer.bias
    views = layer._views
    if views is None or views[0] != weight.data_ptr() or views[1] != scale.data_ptr():
        views = layer._views = (weight.data_ptr(), scale.data_ptr(), ops.array(weight), ops.array(scale))
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], layer.out_features))
    offset = None if bias is None else ops.array(bias.float())
    out = y.numpy() if y.dtype == torch.float32 else ops.array(y)
    _core.linear_forward(ops.array(x), views[2], views[3], layer.out_features, offset, out=out)
    return y
