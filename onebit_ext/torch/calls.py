"""The C core on CPU tensors: what the operators do, and what `direct` calls without them.

Results lie in memory that the C core recycles.  After kernels that stream through the caches every call into torch
costs microseconds, so there are few, and the arrays of what persists are kept (`Views`).
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _get_tracing_state, _len_torch_dispatch_stack

from onebit_ext import _core

from . import ranks

Array = np.ndarray[Any, Any]


@dataclass(slots=True)
class View:
    """A tensor, its address, its array."""

    tensor: Tensor
    address: int
    array: Array


Views = dict[str, View]  # by name

CONTROL = _core.CONTROL
PLANES = (
    *dict.fromkeys(name for rule in _core.RULES for name in _core.plane_specs(1, 1, rule) if name != "control"),
    "votes",  # optional with every rule
)
MICRO_LIMIT = 16384  # micro-batches without a step(): 1024 accumulated batches of a layer used 16 times

_suspended = 0


@contextlib.contextmanager
def no_votes() -> Iterator[None]:
    """Forwards and backwards inside this context cast no votes (saliency, `torch.autograd.grad`); process-wide."""
    global _suspended
    _suspended += 1
    try:
        yield
    finally:
        _suspended -= 1


def votes_suspended() -> bool:
    """True inside `no_votes()`."""
    return _suspended > 0


def plain(x: Tensor) -> bool:
    """True where nobody can tell the C call from the operator: a plain CPU tensor, and no compiler, tracer, dispatch
    mode or transform that wants to see the operator."""
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and x.is_cpu
        and not _len_torch_dispatch_stack()
        and not _are_functorch_transforms_active()
        and _get_tracing_state() is None
    )


# ------------------------------------------------------------------ tensors and arrays
def array(tensor: Tensor) -> Array:
    """Zero-copy NumPy view of a CPU tensor; bfloat16 as its raw uint16 bits."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def kept(views: Views | None, name: str, tensor: Tensor) -> Array:
    """`array(tensor)`, kept in `views` as long as the tensor and its memory are the same."""
    if views is None:
        return array(tensor)
    view, address = views.get(name), tensor.data_ptr()
    if view is None or view.tensor is not tensor or view.address != address:
        view = views[name] = View(tensor, address, array(tensor))
    return view.array


def tensor_of(value: Array) -> Tensor:
    """A result, float32 or the raw bits of bfloat16, as a tensor on the same memory."""
    tensor = torch.from_numpy(value)
    return tensor.view(torch.bfloat16) if value.itemsize == 2 else tensor


@functools.cache
def _plane_names(rule: int, count: int) -> tuple[str, ...]:
    """Names of `count` planes of a rule; one more than it needs is a vote plane."""
    names = _core.plane_specs(1, 1, _core.RULES[rule])
    return tuple(name for name in PLANES if name in names or (name == "votes" and count == len(names)))


def plane_arrays(control: Tensor, planes: Sequence[Tensor], views: Views | None = None) -> dict[str, Array]:
    """The planes as `_core` takes them, views."""
    fields = kept(views, "control", control)
    names = _plane_names(int(fields[CONTROL["rule"]]), len(planes))
    arrays = {name: kept(views, name, plane) for name, plane in zip(names, planes, strict=True)}
    return arrays | {"control": fields}


# ------------------------------------------------------------------ products
def forward(
    x: Array,
    weight: Array,
    scale: Array,
    bias: Tensor | None,
    out_features: int,
    xq: Array | None = None,
    sx: Array | None = None,
) -> Tensor:
    """x (..., K) float32|bfloat16 -> y (..., N) of x's dtype; xq and sx, if given, are written."""
    offset = None if bias is None else array(bias.float())
    return tensor_of(_core.linear_forward(x, weight, scale, out_features, offset, xq=xq, sx=sx))


def forward_keeping(
    x: Array, weight: Array, scale: Array, bias: Tensor | None, out_features: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`forward`, and what `vote` needs: xq (M, padded K) int8, sx (M,) float32."""
    xq, sx = _core.new_kept(math.prod(x.shape[:-1]), x.shape[-1])
    y = forward(x, weight, scale, bias, out_features, xq, sx)
    return y, torch.from_numpy(xq), torch.from_numpy(sx)


def backward_input(dy: Tensor, weight: Array, scale: Array, control: Array, in_features: int) -> Tensor:
    """dy (..., N) -> dx (..., K), stochastically rounded at control's position; a non-finite token gives NaN."""
    position = control.copy()  # the C function notes a non-finite gradient in it; votes do that here
    position[CONTROL["micro"]] += ranks.first_micro()
    return tensor_of(_core.linear_backward_input(array(dy.contiguous()), weight, scale, in_features, position))


def vote(
    dy: Tensor,
    xq: Array,
    sx: Array,
    weight: Array,
    scale: Array,
    in_features: int,
    planes: dict[str, Array],
    want_bias: bool,
) -> tuple[Tensor, Tensor]:
    """Votes into `planes`; returns ds like scale, and db (N,) float32 (or empty).  A control alone: no votes."""
    rows, control, trains = array(dy.contiguous()), planes["control"], len(planes) > 1
    ds, db = np.zeros(scale.shape, np.float32), np.zeros(rows.shape[-1] if want_bias else 0, np.float32)
    if trains and control[CONTROL["micro"]] >= MICRO_LIMIT:
        raise RuntimeError(
            f"onebit::vote: {MICRO_LIMIT} micro-batches voted and no optimizer step used them; does the optimizer that "
            "steps own this layer's scale?"
        )
    voting = trains and not votes_suspended()
    first = ranks.first_micro()
    control[CONTROL["micro"]] += first
    try:
        _core.vote(
            rows,
            xq,
            sx,
            weight,
            scale,
            in_features,
            planes if voting else None,
            control=None if voting else control,
            ds=ds,
            db=db if want_bias else None,
        )
    finally:
        control[CONTROL["micro"]] -= first
    if voting:
        ranks.voted()
    if not trains:
        control[CONTROL["micro"]] += 1
    return torch.from_numpy(ds), torch.from_numpy(db)
