"""Persistent bits per weight of an arm at the small study's shapes, counted on the C core's own planes."""

from __future__ import annotations

from typing import Any

import numpy as np

from onebit_ext import _core

SHAPES = ((1536, 512), (512, 512), (2816, 512), (512, 1408))  # (N, K) of a block's layers


def bits_of(arm: dict[str, Any]) -> float:
    """Codes, scale, planes and factors of a rule; weight and both Adam moments of a float shadow."""
    weights = sum(n * k for n, k in SHAPES)
    if arm.get("method") == "shadow":
        return 2 + 3 * (32.0 if arm["dtype"] == "float32" else 16.0)
    if arm["rule"] is None:
        return 2 + 8 * sum(4 for _ in SHAPES) / weights
    total = 0
    for n, k in SHAPES:
        specs = _core.plane_specs(n, k, arm["rule"], stripes=arm.get("stripes", 1))
        total += n * k // 4 + 4 + sum(int(np.prod(shape)) * np.dtype(kind).itemsize for shape, kind in specs.values())
    return 8 * total / weights
