"""The `onebit::` operator library: schemas, CPU kernels, fakes and autograd.

M tokens, N outputs, K inputs; `weight` is the tile16 plane of the codes, `scale` float32 (1,) or (N,).  `control` is
a float64 tensor of `CONTROL` fields (see csrc/onebit.h), `planes` a list in the order of `PLANES`, empty where nothing
votes.  A forward op has no side effect; what the backward writes (planes, control, with some rules the codes) it writes
through ops that say so.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from onebit_ext import _core

from . import calls, ranks
from .calls import CONTROL, PLANES, Views, array, kept, no_votes, plain, plane_arrays, votes_suspended

__all__ = ["CONTROL", "PLANES", "array", "no_votes", "plane_arrays", "votes_suspended"]


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
    arguments = (array(x.contiguous()), array(weight), array(scale), bias, out_features)
    if keep:
        return calls.forward_keeping(*arguments)
    return calls.forward(*arguments), *linear_outputs(x, out_features, False)[1:]


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
    return calls.backward_input(dy, array(weight), array(scale), array(control), in_features)


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
    arrays = plane_arrays(control, planes) if planes else {"control": array(control)}
    return calls.vote(dy, array(xq), array(sx), array(weight), array(scale), in_features, arrays, want_bias)


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
    check_position(position, control)
    arrays = plane_arrays(control, planes)
    return calls.vote(dy, array(xq), array(sx), array(weight), array(scale), in_features, arrays, want_bias)


def check_position(position: Tensor, control: Tensor) -> None:
    if not torch.equal(position, position_of(control)):
        rule = _core.RULES[int(array(control)[CONTROL["rule"]])]
        raise RuntimeError(
            f"onebit::vote_codes: rule {rule!r} moves codes in the backward, and it did between this forward and its "
            "backward: use such a layer once between two backwards, or train it with residual_bits=8"
        )


def _vote_outputs(dy, xq, sx, weight, scale, in_features, control, planes, want_bias, position=None):
    return torch.empty_like(scale), dy.new_empty((dy.shape[-1] if want_bias else 0,), dtype=torch.float32)


vote.register_fake(_vote_outputs)
vote_codes.register_fake(_vote_outputs)


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, scale, bias, _, _, control, planes, position = inputs
    ctx.mark_non_differentiable(*output[1:])
    remember(ctx, x, weight, scale, bias, control, planes, position, *output[1:])


def remember(
    ctx: Any,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    control: Tensor,
    planes: Sequence[Tensor],
    position: Tensor | None,
    xq: Tensor | None,
    sx: Tensor | None,
    views: Views | None = None,
) -> None:
    """What `linear_backward` needs of a forward."""
    ctx.set_materialize_grads(False)
    # What the backward writes: saved the usual way, autograd would refuse the second backward of a step.
    ctx.control, ctx.planes, ctx.position, ctx.views = control, planes, position, views
    ctx.codes = None if position is None else weight
    ctx.save_for_backward(*([] if position is not None else [weight]), scale, xq, sx)
    ctx.in_features = x.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype


def refuse_double_backward() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError("onebit: double backward (create_graph=True) is not defined: votes have no gradient")


def linear_backward(
    ctx: Any, dy: Tensor, need_x: bool, need_scale: bool, need_bias: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, ds, db and the votes, by the operators or, where nobody can tell, by the C calls."""
    refuse_double_backward()
    *saved, scale, xq, sx = ctx.saved_tensors
    weight = ctx.codes if ctx.position is not None else saved[0]
    control, planes, views, k = ctx.control, ctx.planes, ctx.views, ctx.in_features
    dx = ds = db = None
    if plain(dy):
        codes, factors = kept(views, "weight", weight), kept(views, "scale", scale)
        arrays = plane_arrays(control, planes, views) if planes else {"control": kept(views, "control", control)}
        if need_x:  # before the votes: they move control's random position on
            dx = calls.backward_input(dy, codes, factors, arrays["control"], k)
        if need_scale:
            if ctx.position is not None:
                check_position(ctx.position, control)
                torch.autograd.graph.increment_version(weight)
            ds, db = calls.vote(dy, array(xq), array(sx), codes, factors, k, arrays, need_bias)
    else:
        if need_x:
            dx = linear_backward_input(dy, weight, scale, control, k)
        if need_scale:
            arguments = (dy, xq, sx, weight, scale, k, control, planes, need_bias)
            ds, db = vote(*arguments) if ctx.position is None else vote_codes(*arguments, ctx.position)
    if not need_scale:
        control.narrow(0, CONTROL["micro"], 1).add_(1.0)
        db = as_rows(dy).sum(0, dtype=torch.float32) if need_bias else None
    return dx, ds, db.to(ctx.bias_dtype) if db is not None and need_bias else None


def _linear_backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Any, ...]:
    none = [None] * len(ctx.planes)
    if dy is None:
        return (None, None, None, None, None, None, None, none, None)
    need_x, _, need_scale, need_bias = ctx.needs_input_grad[:4]
    dx, ds, db = linear_backward(ctx, dy, need_x, need_scale, need_bias)
    return dx, None, ds, db, None, None, None, none, None


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
