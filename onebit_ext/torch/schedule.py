"""Learning rates: warmup, then down to zero, for every group of an optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

WARMUP = 0.05  # of all steps
DECAY = 0.4  # of all steps, in `wsd`
Shape = Callable[[int, int, float], float]  # step, steps, warmup -> factor


def _rise(step: int, steps: int, warmup: float) -> float:
    return min(1.0, (step + 1) / max(warmup * steps, 1.0))


def cosine(step: int, steps: int, warmup: float = WARMUP) -> float:
    """min(1, (step + 1) / w) (1 + cos(pi step / steps)) / 2, w = warmup * steps; 0 from `steps` on."""
    if step >= steps:
        return 0.0
    return _rise(step, steps, warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def linear(step: int, steps: int, warmup: float = WARMUP) -> float:
    """Rises as `cosine`, then falls linearly to 0 at `steps`."""
    fall = (steps - step) / max((1 - warmup) * steps, 1.0)
    return min(_rise(step, steps, warmup), max(0.0, fall))


def wsd(step: int, steps: int, warmup: float = WARMUP) -> float:
    """Warmup, stable, decay (MiniCPM, arXiv 2404.06395): rises as `cosine`, stays at 1, falls linearly to 0 over the
    last 40 % of the steps."""
    return _rise(step, steps, warmup) * min(1.0, max(0.0, (steps - step) / (DECAY * steps)))


SHAPES = {"cosine": (cosine, cosine), "linear": (linear, linear), "wsd": (wsd, cosine)}  # of codes, of all else


def cosine_schedule(
    optimizer: torch.optim.Optimizer, steps: int, warmup: float = WARMUP
) -> torch.optim.lr_scheduler.LambdaLR:
    """Warmup over a share of `steps`, then cosine to 0, for every param group; call `.step()` after the optimizer's.

    A block-cyclic optimizer's codes have one such cycle per stripe, `stripe_steps` long; where that is open, it becomes
    steps / stripes, rounded up: one cycle of all stripes per run.
    """
    return scheduled("cosine", optimizer, steps, warmup)


def linear_schedule(
    optimizer: torch.optim.Optimizer, steps: int, warmup: float = WARMUP
) -> torch.optim.lr_scheduler.LambdaLR:
    """As `cosine_schedule`, but linearly to 0 after the warmup, as transformers' default: to fine-tune, every method
    ends lower."""
    return scheduled("linear", optimizer, steps, warmup)


def wsd_schedule(
    optimizer: torch.optim.Optimizer, steps: int, warmup: float = WARMUP
) -> torch.optim.lr_scheduler.LambdaLR:
    """As `cosine_schedule`, but the rate of codes, or of a float shadow, stays at its peak and falls over the last 40 %
    (`wsd`): from scratch every method ends lower, and a stripe of a block-cyclic optimizer makes more of its few steps.
    """
    return scheduled("wsd", optimizer, steps, warmup)


def scheduled(
    name: str, optimizer: torch.optim.Optimizer, steps: int, warmup: float = WARMUP
) -> torch.optim.lr_scheduler.LambdaLR:
    """The schedule SHAPES[name] on every param group."""
    if steps < 1 or not 0 <= warmup <= 1:
        raise ValueError(f"{name}_schedule: 'steps' must be at least 1, 'warmup' in [0, 1], got {steps!r}, {warmup!r}")
    stripes, (shape, others) = getattr(optimizer, "stripes", 1), SHAPES[name]

    def of(group: dict[str, Any]) -> Callable[[int], float]:
        if group.get("kind") != "codes":
            return lambda step: others(step, steps, warmup)
        if stripes == 1:
            return lambda step: shape(step, steps, warmup)
        if group["stripe_steps"] is None:
            group["stripe_steps"] = math.ceil(steps / stripes)
        cycle = group["stripe_steps"]
        return lambda step: shape(step % cycle, cycle, warmup) if step < stripes * cycle else 0.0

    return torch.optim.lr_scheduler.LambdaLR(optimizer, [of(group) for group in optimizer.param_groups])
