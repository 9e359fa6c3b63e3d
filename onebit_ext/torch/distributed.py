"""Training across processes: every rank votes into its own planes, and a step begins by combining them.

It needs no call: with `torch.distributed` initialised, the step of any optimizer that owns BitLinear scales first
  * averages the residuals: int8 all-to-all, exact int32 sum, mean = floor((sum + j) / ranks) with j uniform in
    0..ranks-1 under the stream COMBINE, the same on every rank, int8 all-gather: about 2 bytes per weight on the wire;
  * adds up the factors' sums, sketches, micro-batches and non-finite flags (ranks count as micro-batches), and
    averages the scales' gradients (which DistributedDataParallel may have done already);
  * compares, each `check_every` steps, a hash of codes, scales and factors.
Float parameters are DistributedDataParallel's business.  A rank's vote counts 1/ranks, so it is clipped at
+-3 sqrt(ranks); the clip in the planes' control tells how many ranks trained it.
With vote planes their means are taken instead of the residuals', by any rule: int16 with one rounding of 1/1024, about
4 bytes per weight.  The mean is clipped at +-3 and casts one vote, so all planes are the same on every rank, and their
number may change between two steps.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from onebit_ext import _core

from . import ops, ranks
from .guard import owned_layers
from .nn import BitLinear
from .planes import CONTROL
from .ranks import configure, independent, world_size

__all__ = ["combine", "configure", "independent", "world_size"]

CLIP = 3.0
SUMS = ("row_sum", "col_sum", "sketch")
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
COUNTS = ("nonfinite", "micro", "sketch_energy")


@torch.no_grad()
def combine(layers: Sequence[BitLinear]) -> None:
    """Make the planes of `layers` those of all ranks; every rank must call it with the same layers.

    RuntimeError if the ranks hold different codes, or, without vote planes, if their number changed or for a rule
    without an integer residual.
    A layer that met a non-finite gradient on any rank is flagged on all of them, and its votes stay apart.
    """
    world = world_size()
    voting = [layer for layer in layers if layer._planes is not None]
    for layer in voting:
        _check_ranks(layer, world)
    if world > 1 and layers:
        _check_same(voting)
        _combine_sums(layers, world)
        for layer in voting:
            control = _control(layer)
            if control[CONTROL["step"]] > 0 and control[CONTROL["micro"]] > 0 and not control[CONTROL["nonfinite"]]:
                _combine_plane(layer, "votes" if "votes" in layer._planes else "residual", world)  # type: ignore[operator]
    ranks.state.combined = True


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    layers = owned_layers(optimizer)
    if layers:
        combine(layers)


register_optimizer_step_pre_hook(_before_step)


# ------------------------------------------------------------------ checks
def _check_ranks(layer: BitLinear, world: int) -> None:
    """The clip belongs to the number of ranks; it is set before a layer's first vote."""
    assert layer._planes is not None
    control = _control(layer)
    if "votes" in layer._planes and control[CONTROL["clip"]] == CLIP:
        return
    clip, wanted = control[CONTROL["clip"]], CLIP * math.sqrt(world)
    residual = layer._planes.get("residual", layer.weight)
    if world > 1 and ("momentum" in layer._planes or residual.dtype not in (torch.int8, torch.int16)):
        raise RuntimeError(
            f"{world} ranks: only rules with an integer residual and no momentum can be combined; use "
            "recipe='finetune', or vote_plane=True, which combines every rule"
        )
    if clip == wanted:
        return
    trained = (clip / CLIP) ** 2
    if control[CONTROL["step"]] == 0 and world > 1:
        control[CONTROL["clip"]] = wanted
    elif world > 1 or (trained > 1.5 and abs(trained - round(trained)) < 1e-9):
        raise RuntimeError(
            f"the optimizer's state was trained by {round(trained)} rank(s), now there are {world}; start as many, or "
            "a new optimizer on the saved model"
        )


def _check_same(layers: Sequence[BitLinear]) -> None:
    """RuntimeError unless codes, scales and factors are the same bits on every rank."""
    if not layers or _control(layers[0])[CONTROL["step"]] % ranks.state.check_every:
        return
    mine = torch.tensor([_hash(layer) for layer in layers], dtype=torch.int64)
    for rank, hashes in enumerate(_gather(mine)):
        differing = (hashes != mine).nonzero()
        if len(differing):
            index = int(differing[0])
            step = int(_control(layers[index])[CONTROL["step"]])
            raise RuntimeError(
                f"rank {dist.get_rank(ranks.state.group)} and rank {rank} have diverged: layer {index} "
                f"({layers[index].extra_repr()}) differs at step {step}; start all ranks from the same checkpoint and "
                "seed, and step the same layers on each"
            )


def _hash(layer: BitLinear) -> int:
    """64 bits of the codes, scale and factors of a layer."""
    assert layer._planes is not None
    digest = hashlib.blake2b(digest_size=8)
    for tensor in (layer.weight, layer.scale, layer._planes["row_factor"], layer._planes["col_factor"]):
        digest.update(ops.array(tensor.contiguous()).data)
    control = _control(layer)
    digest.update(b"".join(control[CONTROL[name]].tobytes() for name in ("seed", "layer", "step", "guard")))
    return int.from_bytes(digest.digest(), "little", signed=True)


# ------------------------------------------------------------------ sums
def _combine_sums(layers: Sequence[BitLinear], world: int) -> None:
    """Sums, counts and scale gradients of all ranks, added in the order of the ranks: the same bits on each."""
    total = _gather(torch.cat([part for layer in layers for part in _parts(layer)])).sum(0)
    position = 0

    def take(count: int) -> Tensor:
        nonlocal position
        position += count
        return total[position - count : position]

    for layer in layers:
        has_grad, grad = take(1), take(layer.scale.numel())
        if has_grad.item():
            layer.scale.grad = (grad / world).to(torch.float32).reshape(layer.scale.shape)
        if layer._planes is None:
            continue
        control = _control(layer)
        for name in COUNTS:
            count = take(1).item()
            if name != "micro" or not control[CONTROL["nonfinite"]]:  # a step that is given up keeps its own count
                control[CONTROL[name]] = count
        for name in SUMS:  # the factors are those of the mean gradient, the sketch of the summed one
            plane = layer._planes[name]
            plane.copy_(take(plane.numel()) / (1 if name == "sketch" else world**2))


def _parts(layer: BitLinear) -> list[Tensor]:
    """What a layer contributes, float64."""
    grad = layer.scale.grad
    parts = [torch.tensor([float(grad is not None)]), torch.zeros_like(layer.scale) if grad is None else grad.detach()]
    if layer._planes is not None:
        control = _control(layer)
        parts.append(torch.tensor([control[CONTROL[name]] for name in COUNTS], dtype=torch.float64))
        parts += [layer._planes[name] for name in SUMS]
    return [part.to(torch.float64).reshape(-1) for part in parts]


def _gather(mine: Tensor) -> Tensor:
    """The same tensor of every rank, (ranks, length)."""
    gathered = mine.new_empty((world_size() * mine.numel(),))
    _all_gather(gathered, mine.contiguous(), group=ranks.state.group)
    return gathered.view(world_size(), -1)


# ------------------------------------------------------------------ planes
def _combine_plane(layer: BitLinear, name: str, world: int) -> None:
    """The mean of the ranks' residuals or votes; every rank averages its share of the plane and sends it to all."""
    assert layer._planes is not None
    plane = layer._planes[name]
    share = math.ceil(plane.numel() / world)
    padded = plane.new_zeros(world * share)
    padded[: plane.numel()] = plane.reshape(-1)
    received = torch.empty_like(padded)
    raw = torch.uint8  # gloo moves bytes of any type, but knows no int16
    dist.all_to_all_single(received.view(raw), padded.view(raw), group=ranks.state.group)
    first = share * dist.get_rank(ranks.state.group)
    mean = received.new_empty(share)
    parts = ops.array(received.view(world, share))
    _core.average_residuals(parts, first, plane.shape[1], _control(layer), out=ops.array(mean))
    _all_gather(padded.view(raw), mean.view(raw), group=ranks.state.group)
    plane.copy_(padded[: plane.numel()].view_as(plane))


def _control(layer: BitLinear) -> NDArray[np.float64]:
    assert layer._planes is not None
    return ops.array(layer._planes["control"])
