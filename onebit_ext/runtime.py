"""What runs: instruction sets, threads, memory, and the signature that proves all agree."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._core import (
    CONTROL,
    FORMATS,
    RULES,
    FlipOptimizer,
    TernaryLinear,
    force_isa,
    isa,
    isas,
    memory,
    num_threads,
    reset_peak_memory,
    set_num_threads,
    share_threads,
)

__all__ = [
    "force_isa",
    "isa",
    "isas",
    "kernels",
    "memory",
    "num_threads",
    "reset_peak_memory",
    "set_num_threads",
    "share_threads",
    "signature",
]

Array = NDArray[Any]


def kernels() -> list[dict[str, Any]]:
    """Every kernel of this build, one dict each, worst instruction set first.

    op: forward, backward_input, vote, flip; isa; supported: whether this machine runs it; active;
    tile_rows: rows of its register tile (None where it works row by row); format or rule: what it
    is made for; exact: the same bits as every other kernel of its op, always True here.
    """
    rows: list[dict[str, Any]] = []
    for entry in isas():
        common = {"isa": entry["name"], "supported": entry["supported"], "active": entry["active"], "exact": True}
        forward, backward, vote = entry["tiles"]
        rows.append({"op": "forward", "format": "tile16", "rule": None, "tile_rows": forward, **common})
        rows.append({"op": "forward", "format": "trits5", "rule": None, "tile_rows": forward, **common})
        rows.append({"op": "backward_input", "format": "tile16", "rule": None, "tile_rows": backward, **common})
        for rule in RULES:
            rows.append({"op": "vote", "format": "tile16", "rule": rule, "tile_rows": vote, **common})
            rows.append({"op": "flip", "format": "tile16", "rule": rule, "tile_rows": None, **common})
    for name in FORMATS:  # plain C, the same on every instruction set
        shared = {"isa": "any", "supported": True, "active": True, "exact": True}
        rows.append({"op": "pack", "format": name, "rule": None, "tile_rows": None, **shared})
    return rows


# ------------------------------------------------------------------ signature
def _uniform(shape: tuple[int, int], seed: int) -> Array:
    """float32 multiples of 2^-23 in [-1, 1) from an integer hash: the same on every machine."""
    x = np.arange(shape[0] * shape[1], dtype=np.uint32) * np.uint32(0x9E3779B9) + np.uint32(seed)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    x ^= x >> np.uint32(16)
    return ((x >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1)).reshape(shape)


def _bfloat16(x: Array) -> Array:
    """Raw bfloat16 bits of finite float32, to nearest even."""
    bits = x.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def _float32(x: Array) -> Array:
    return (x.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _train_pass(layers: list[TernaryLinear], x: Array, target: Array, half: bool) -> Array:
    """One micro-batch of the signature's network: forward, squared error, backward."""
    masks: list[Array] = []
    for i, layer in enumerate(layers):
        y = layer.forward(_bfloat16(x) if half else x)
        x = _float32(y) if half else y
        if i + 1 < len(layers):
            masks.append((x > 0).astype(np.float32))
            x = x * masks[-1]
    out = x
    grad = (out - target) * np.float32(1 / 32)
    for i, layer in reversed(list(enumerate(layers))):
        dx = layer.backward(_bfloat16(grad) if half else grad, i > 0)
        if i > 0:
            grad = (_float32(dx) if half else dx) * masks[i - 1]
    return out


def _train_network(digest: Any, steps: int, outer: dict[str, Any], inner: dict[str, Any]) -> None:
    """Three layers; first and last train by one optimizer, the middle one by another.  Adds all that they become."""
    layers = [
        TernaryLinear(37, 70, bias=True, seed=1),
        TernaryLinear(70, 83, scale="row", seed=2),
        TernaryLinear(83, 5, bias=True, seed=3),
    ]
    optimizers = [
        FlipOptimizer(layers[::2], lr=0.06, scale_lr=2e-3, betas=(0.8, 0.9), seed=7, bias_lr=3e-3, **outer),
        FlipOptimizer(layers[1:2], lr=0.05, scale_lr=1e-3, flip_rate_cap=0.01, seed=8, **inner),
    ]
    inputs = _uniform((3 * 32, 37), 11)
    targets = inputs[:, :5] * inputs[:, 5:10] + inputs[:, 10:15] * np.float32(0.5)
    for step in range(steps):
        for optimizer, peak in zip(optimizers, (0.06, 0.05), strict=True):
            optimizer.zero_grad()
            optimizer.lr = peak * (1 - step / 256)
            if optimizer.stripes > 1 and step % 16 == 15:
                optimizer.rotate()
        for micro in range(1 + step % 3):
            rows = slice(32 * micro, 32 * micro + 32)
            out = _train_pass(layers, inputs[rows], targets[rows], half=step % 5 == 4)
            digest.update(out.tobytes())
        for optimizer in optimizers:
            optimizer.step()
    for layer in layers:
        planes = layer.planes or {}
        arrays = [layer.packed, layer.scale, layer.bias, layer.scale_grad, layer.bias_grad]
        arrays += [planes[name] for name in sorted(planes)]
        assert planes["control"][CONTROL["step"]] == (
            steps % 16 + 1 if planes["control"][CONTROL["stripes"]] > 1 else steps
        )
        for array in arrays:
            if array is not None:
                digest.update(array.tobytes())


def signature(vote_plane: bool = False) -> str:
    """sha256 of small networks after training: equal on every machine and thread count.

    Tensor and row scale, with and without bias, sizes off every tile, every flip rule and three
    stripes of rows, one to three micro-batches a step, every fifth step in bfloat16.  Uses our own
    C operations and elementwise NumPy + - * only.  tests/golden/signature.json holds the value, and
    that of the same training with a vote plane.
    """
    import hashlib

    digest = hashlib.sha256()
    held = {"vote_plane": vote_plane}
    _train_network(digest, 200, held, {"recipe": "pretrain", **held})
    stripes: dict[str, Any] = {"rule": "residual8", "stripes": 3, **held}
    others = [stripes, *({"rule": rule, **held} for rule in RULES if rule not in ("residual8", "residual8_momentum4"))]
    for outer, inner in zip(others[::2], others[1::2], strict=True):
        _train_network(digest, 50, outer, inner)
        _train_network(digest, 50, inner, outer)
    return digest.hexdigest()
