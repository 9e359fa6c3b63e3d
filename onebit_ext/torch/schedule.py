"""Learning rates: warmup, then cosine to zero, for every group of an optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

WARMUP = 0.05  # of all steps


def factor(step: int, steps: int, warmup: float = WARMUP) -> float:
    """min(1, (step + 1) / w) (1 + cos(pi step / steps)) / 2, w = warmup * steps; 0 from `steps` on."""
    if step >= steps:
        return 0.0
    rise = min(1.0, (step + 1) / max(warmup * steps, 1.0))
    return rise * 0.5 * (1 + math.cos(math.pi * step / steps))


def cosine_schedule(
    optimizer: torch.optim.Optimizer, steps: int, warmup: float = WARMUP
) -> torch.optim.lr_scheduler.LambdaLR:
    """Warmup over a share of `steps`, then cosine to 0, for every param group; call `.step()` after the optimizer's.

    A block-cyclic optimizer's codes have one such cycle per stripe, `stripe_steps` long; where that is open, it becomes
    steps / stripes, rounded up: one cycle of all stripes per run.
    """
    if steps < 1 or not 0 <= warmup <= 1:
        raise ValueError(f"cosine_schedule: 'steps' must be at least 1, 'warmup' in [0, 1], got {steps!r}, {warmup!r}")
    stripes = getattr(optimizer, "stripes", 1)

    def of(group: dict[str, Any]) -> Callable[[int], float]:
        if stripes == 1 or group.get("kind") != "codes":
            return lambda step: factor(step, steps, warmup)
        if group["stripe_steps"] is None:
            group["stripe_steps"] = math.ceil(steps / stripes)
        cycle = group["stripe_steps"]
        return lambda step: factor(step % cycle, cycle, warmup) if step < stripes * cycle else 0.0

    return torch.optim.lr_scheduler.LambdaLR(optimizer, [of(group) for group in optimizer.param_groups])
