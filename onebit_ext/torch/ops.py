"""The `onebit::` operator library: schemas, CPU kernels, fakes and autograd.

M tokens, N outputs, K inputs; `weight` is the tile16 plane of the codes, `scale` float32 (1,) or (N,).  `control` is
a float64 tensor of `CONTROL` fields (see csrc/onebit.h), `planes` a list in the order of `PLANES`, empty where nothing
votes.  A forward op has no side effect; what the backward writes (planes, control, with some rules the codes) it writes
through ops that say so.
"""

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onebit_ext import _core

from . import ranks

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


def array(tensor: Tensor) -> np.ndarray[Any, Any]:
    """Zero-copy NumPy view of a CPU tensor; bfloat16 as its raw uint16 bits."""
    tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


@functools.cache
def _plane_names(rule: int, count: int) -> tuple[str, ...]:
    """Names of `count` planes of a rule; one more than it needs is a vote plane."""
    names = _core.plane_specs(1, 1, _core.RULES[rule])
    return tuple(name for name in PLANES if name in names or (name == "votes" and count == len(names)))


def plane_arrays(control: Tensor, planes: Sequence[Tensor]) -> dict[str, np.ndarray[Any, Any]]:
    """The planes as `_core` takes them, views."""
    fields = array(control)
    names = _plane_names(int(fields[CONTROL["rule"]]), len(planes))
    return {name: array(plane) for name, plane in zip(names, planes, strict=True)} | {"control": fields}


def as_rows(tensor: Tensor) -> Tensor:
    """(..., C) -> (M, C), also where M or C is 0."""
    return tensor.contiguous().reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def _padded(in_features: int) -> int:
    return (in_features + 15) // 16 * 16


@torch.library.custom_op("onebit::linear", mutates_args=(), device_types="cpu")
def linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    keep: bool,
    control: Tensor,
    planes: Sequence[Tensor],
    position: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """x (..., K) float32|bfloat16 -> y (..., N) of x's dtype, xq (M, padded K) int8, sx (M,) float32.

    xq and sx are empty unless `keep`.  `control`, `planes` and `position` are not read: they are what the backward
    votes into, and, for a rule that moves codes in votes, `position_of(control)` now, as the codes may move until then.
    """
    rows = as_rows(x)
    y, xq, sx = linear_outputs(x, out_features, keep)
    offset = None if bias is None else array(bias.float())
    kept = (array(xq), array(sx)) if keep else (None, None)
    _core.linear_forward(
        array(rows),
        array(weight),
        array(scale),
        out_features,
        offset,
        out=array(y.view(rows.shape[0], out_features)),
        xq=kept[0],
        sx=kept[1],
    )
    return y, xq, sx


def linear_outputs(x: Tensor, out_features: int, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    m = math.prod(x.shape[:-1]) if keep else 0
    y = x.new_empty((*x.shape[:-1], out_features))
    xq = x.new_empty((m, _padded(x.shape[-1])), dtype=torch.int8)
    return y, xq, x.new_empty((m,), dtype=torch.float32)


@linear.register_fake
def _(x, weight, scale, bias, out_features, keep, control, planes, position):
    return linear_outputs(x, out_features, keep)


@torch.library.custom_op("onebit::linear_backward_input", mutates_args=(), device_types="cpu")
def linear_backward_input(dy: Tensor, weight: Tensor, scale: Tensor, control: Tensor, in_features: int) -> Tensor:
    """dy (..., N) -> dx (..., K), stochastically rounded at control's position; a non-finite token gives NaN."""
    rows = as_rows(dy)
    dx = dy.new_empty((*dy.shape[:-1], in_features))
    out = array(dx.view(rows.shape[0], in_features))
    position = array(control.clone())  # the C function notes a non-finite gradient in it; votes do that here
    position[CONTROL["micro"]] += ranks.first_micro()
    _core.linear_backward_input(array(rows), array(weight), array(scale), in_features, position, out=out)
    return dx


@linear_backward_input.register_fake
def _(dy, weight, scale, control, in_features):
    return dy.new_empty((*dy.shape[:-1], in_features))


def position_of(control: Tensor) -> Tensor:
    """STEP and MICRO of a control, float64 (2,), a copy: how far its votes have come."""
    return control.narrow(0, CONTROL["step"], 2).clone()


@torch.library.custom_op("onebit::vote", mutates_args=("control", "planes"), device_types="cpu")
def vote(
    dy: Tensor,
    xq: Tensor,
    sx: Tensor,
    weight: Tensor,
    scale: Tensor,
    in_features: int,
    control: Tensor,
    planes: Sequence[Tensor],
    want_bias: bool,
) -> tuple[Tensor, Tensor]:
    """The weight side of the backward: votes into `planes`; returns ds like scale, and db (N,) float32 (or empty).

    Without planes it gives ds and db alone, and moves control's random position on.
    """
    return _vote(dy, xq, sx, weight, scale, in_features, control, planes, want_bias)


@torch.library.custom_op("onebit::vote_codes", mutates_args=("weight", "control", "planes"), device_types="cpu")
def vote_codes(
    dy: Tensor,
    xq: Tensor,
    sx: Tensor,
    weight: Tensor,
    scale: Tensor,
    in_features: int,
    control: Tensor,
    planes: Sequence[Tensor],
    want_bias: bool,
    position: Tensor,
) -> tuple[Tensor, Tensor]:
    """`vote` by a rule that moves codes while it votes: `weight` is written too.

    RuntimeError if they have moved since the forward, which saw them at `position` (see `position_of`).
    """
    if not torch.equal(position, position_of(control)):
        rule = _core.RULES[int(array(control)[CONTROL["rule"]])]
        raise RuntimeError(
            f"onebit::vote_codes: rule {rule!r} moves codes in the backward, and it did between this forward and its "
            "backward: use such a layer once between two backwards, or train it with residual_bits=8"
        )
    return _vote(dy, xq, sx, weight, scale, in_features, control, planes, want_bias)


def _vote(
    dy: Tensor,
    xq: Tensor,
    sx: Tensor,
    weight: Tensor,
    scale: Tensor,
    in_features: int,
    control: Tensor,
    planes: Sequence[Tensor],
    want_bias: bool,
) -> tuple[Tensor, Tensor]:
    rows = as_rows(dy)
    ds = torch.zeros_like(scale)
    db = dy.new_zeros((dy.shape[-1] if want_bias else 0,), dtype=torch.float32)
    state = array(control)
    if planes and state[CONTROL["micro"]] >= MICRO_LIMIT:
        raise RuntimeError(
            f"onebit::vote: {MICRO_LIMIT} micro-batches voted and no optimizer step used them; does the optimizer that "
            "steps own this layer's scale?"
        )
    voting = bool(planes) and not votes_suspended()
    first = ranks.first_micro()
    state[CONTROL["micro"]] += first
    try:
        _core.vote(
            array(rows),
            array(xq),
            array(sx),
            array(weight),
            array(scale),
            in_features,
            plane_arrays(control, planes) if voting else None,
            control=None if voting else state,
            ds=array(ds),
            db=array(db) if want_bias else None,
        )
    finally:
        state[CONTROL["micro"]] -= first
    if voting:
        ranks.voted()
    if not planes:
        state[CONTROL["micro"]] += 1
    return ds, db


def _vote_outputs(dy, xq, sx, weight, scale, in_features, control, planes, want_bias, position=None):
    return torch.empty_like(scale), dy.new_empty((dy.shape[-1] if want_bias else 0,), dtype=torch.float32)


vote.register_fake(_vote_outputs)
vote_codes.register_fake(_vote_outputs)


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, scale, bias, _, _, control, planes, position = inputs
    _, xq, sx = output
    ctx.mark_non_differentiable(xq, sx)
    ctx.set_materialize_grads(False)
    # What the backward writes: saved the usual way, autograd would refuse the second backward of a step.
    ctx.control, ctx.planes, ctx.position = control, planes, position
    ctx.codes = None if position is None else weight
    ctx.save_for_backward(*([] if position is not None else [weight]), scale, xq, sx)
    ctx.in_features = x.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype


def refuse_double_backward() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError("onebit: double backward (create_graph=True) is not defined: votes have no gradient")


def _linear_backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Any, ...]:
    none = [None] * len(ctx.planes)
    if dy is None:
        return (None, None, None, None, None, None, None, none, None)
    refuse_double_backward()
    *saved, scale, xq, sx = ctx.saved_tensors
    weight = ctx.codes if ctx.position is not None else saved[0]
    need_x, _, need_scale, need_bias = ctx.needs_input_grad[:4]
    dx = ds = None
    if need_x:  # before the votes: they move control's random position on
        dx = linear_backward_input(dy, weight, scale, ctx.control, ctx.in_features)
    if need_scale:
        arguments = (dy, xq, sx, weight, scale, ctx.in_features, ctx.control, ctx.planes, need_bias)
        ds, db = vote(*arguments) if ctx.position is None else vote_codes(*arguments, ctx.position)
    else:
        ctx.control.narrow(0, CONTROL["micro"], 1).add_(1.0)
        db = as_rows(dy).sum(0, dtype=torch.float32)
    return dx, None, ds, db.to(ctx.bias_dtype) if need_bias else None, None, None, None, none, None


linear.register_autograd(_linear_backward, setup_context=_linear_setup)


@torch.library.custom_op("onebit::flip", mutates_args=("weight", "control", "planes"), device_types="cpu")
def flip(weight: Tensor, control: Tensor, planes: Sequence[Tensor]) -> None:
    """One step of a layer's codes, in place; control's MOVED counts them.  Nothing if no micro-batch voted."""
    ranks.check_combined()
    _core.flip(array(weight), plane_arrays(control, planes))


@torch.library.custom_op("onebit::discard", mutates_args=("control", "planes"), device_types="cpu")
def discard(control: Tensor, planes: Sequence[Tensor]) -> None:
    """Forget this step's sums; votes stay in the residual, but not in a vote plane, and no code moves."""
    _core.discard(plane_arrays(control, planes))


@torch.library.custom_op(
    "onebit::scale_step", mutates_args=("scale", "exp_avg", "exp_avg_sq", "control"), device_types="cpu"
)
def scale_step(scale: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, control: Tensor, lr: float) -> None:
    """Adam on a layer's scale, with lr relative to control's SCALE_INIT; afterwards s = 1/(1/s) exactly."""
    grad = grad.contiguous()
    _core.scale_step(array(scale), array(grad), array(exp_avg), array(exp_avg_sq), array(control), lr)


for _op in (flip, discard, scale_step):
    _op.register_fake(lambda *arguments: None)
