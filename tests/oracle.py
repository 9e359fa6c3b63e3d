"""An independent NumPy reading of csrc/README.md: what every kernel must compute, to the bit.

Codes are plain int8 matrices (N, K) here, products are int64, float steps are float32 in the
stated order, random numbers are uint32/uint64 arrays.  Nothing is imported from the package.
Planes are dicts of arrays as `_core.new_planes` makes.
"""

from __future__ import annotations

import numpy as np
from oracle_basics import BF16 as BF16
from oracle_basics import (
    CONTROL,
    F32,
    INPUT_GRAD,
    NAN,
    SKETCH,
    TINY,
    TOKENS_PER_VOTE,
    VOTE,
    WEIGHT_GRAD,
    Array,
    Planes,
    absmax,
    as_float,
    draw,
    in_order,
    stochastic_round,
    store,
    sum_rows,
    trained_rows,
)
from oracle_basics import INIT as INIT
from oracle_basics import RULES as RULES
from oracle_basics import read_fields as read_fields
from oracle_basics import read_residual as read_residual
from oracle_basics import rule_of as rule_of
from oracle_basics import write_fields as write_fields
from oracle_basics import write_residual as write_residual
from oracle_step import apply_vote, row_ratio
from oracle_step import discard as discard
from oracle_step import flip as flip
from oracle_step import read_momentum as read_momentum
from oracle_step import saturated as saturated
from oracle_step import scale_step as scale_step
from oracle_step import start_residual as start_residual
from oracle_step import step_size as step_size


# ------------------------------------------------------------------ formats
def pack(codes: Array, format: str = "tile16") -> Array:
    """int8 codes (N, K) -> uint8 array of a packing: two bits, code + 1, per weight."""
    n, k = codes.shape
    bits = (codes + 1).astype(np.uint8)
    if format == "tile16":  # strip, step, v, o, kk; bit pair p
        full = np.ones((-(-n // 64) * 64, -(-k // 16) * 16), np.uint8)
        full[:n, :k] = bits
        tiles = full.reshape(full.shape[0] // 64, 4, 16, full.shape[1] // 16, 4, 4)  # s v o j p kk
        pairs = tiles.transpose(0, 3, 1, 2, 5, 4)
    elif format == "rows4":  # rows i, i + N/4, i + N/2, i + 3N/4 share byte row i
        pairs = bits.reshape(4, n // 4, k).transpose(1, 2, 0)
    elif format == "trits5":
        return pack_trits(bits)
    else:  # seq2: row by row, four columns per byte
        flat = np.ones((n, -(-k // 4) * 4), np.uint8)
        flat[:, :k] = bits
        pairs = flat.reshape(-1, 4)
    return np.ascontiguousarray((pairs << np.array([0, 2, 4, 6], np.uint8)).sum(-1, dtype=np.uint8))


def pack_trits(bits: Array) -> Array:
    """Codes 0..2 (N, K) -> trits5: one byte for the codes of columns kk, kk + 4 .. kk + 16 of a step of 20."""
    n, k = bits.shape
    full = np.ones((-(-n // 64) * 64, -(-k // 20) * 20), np.int64)
    full[:n, :k] = bits
    c = full.reshape(full.shape[0] // 64, 4, 16, full.shape[1] // 20, 5, 4).transpose(0, 3, 1, 2, 5, 4)
    r = c[..., :4] @ np.array([1, 3, 9, 27])
    return np.ascontiguousarray(np.where(r < 64, 64 * c[..., 4] + r, 192 + 17 * c[..., 4] + r - 64), np.uint8)


def unpack(packed: Array, shape: tuple[int, int]) -> Array:
    """tile16 bytes -> int8 codes (N, K)."""
    strips, steps = packed.shape[:2]
    pairs = packed[..., None] >> np.array([0, 2, 4, 6], np.uint8) & np.uint8(3)
    full = pairs.transpose(0, 2, 3, 1, 5, 4).reshape(strips * 64, steps * 16)
    return full[: shape[0], : shape[1]].astype(np.int8) - np.int8(1)


def absmean(w: Array) -> tuple[Array, Array]:
    """(codes (N, K) int8, scale (1,) float32) of w (N, K)."""
    w = as_float(w)
    total = in_order(np.array([in_order(np.abs(row).astype(np.float64)) for row in w] or [0.0]))
    scale = np.maximum(F32(total / w.size) if w.size else F32(0), F32(1e-5))
    return np.clip(np.rint(w / scale), -1, 1).astype(np.int8), np.array([scale], F32)


# ------------------------------------------------------------------ linear
def quantize_tokens(x: Array) -> tuple[Array, Array]:
    """(xq (M, 16 ceil(K/16)) int8, sx (M,) float32) of x (M, K)."""
    x = as_float(x)
    m, k = x.shape
    top = absmax(x, 1)
    finite = np.isfinite(top)
    a = np.maximum(np.where(finite, top, F32(1)), F32(1e-5))
    v = np.where(finite[:, None], x, F32(0)) * (F32(127) / a)[:, None]
    xq = np.zeros((m, -(-k // 16) * 16), np.int8)
    xq[:, :k] = np.clip(np.rint(v), -127, 127)
    return xq, np.where(finite, a / F32(127), NAN)


def linear_forward(x: Array, codes: Array, scale: Array, bias: Array | None = None) -> tuple[Array, Array, Array]:
    """(y (M, N) of x's dtype, xq, sx)."""
    n, k = codes.shape
    xq, sx = quantize_tokens(x)
    acc = xq[:, :k].astype(np.int64) @ codes.T.astype(np.int64)
    with np.errstate(all="ignore"):
        y = acc.astype(F32) * (sx[:, None] * np.broadcast_to(scale, (n,))[None, :])
        if bias is not None:
            y = y + bias
    return store(y, x.dtype), xq, sx


def linear_backward_input(dy: Array, codes: Array, scale: Array, control: Array) -> tuple[Array, int]:
    """(dx (M, K) of dy's dtype, number of non-finite tokens)."""
    with np.errstate(all="ignore"):
        g = as_float(dy) * np.broadcast_to(scale, codes.shape[:1])[None, :]
        top = absmax(g, 1)
        bad, live = ~np.isfinite(top), np.isfinite(top) & (top >= TINY)
        inverse = np.where(live, F32(127) / np.where(live, top, F32(1)), F32(0))
        v = np.where(live[:, None], g, F32(0)) * inverse[:, None]
        q = stochastic_round(v, control, int(control[CONTROL["micro"]]), INPUT_GRAD)
        q[~live] = 0
        d = np.where(bad, NAN, np.where(live, top / F32(127), F32(0)))
        dx = (q @ codes.astype(np.int64)).astype(F32) * d[:, None]
    return store(dx, dy.dtype), int(bad.sum())


def quantize_outputs(h: Array, control: Array, micro: int) -> tuple[Array, Array]:
    """(hq (N, M) int64, h_scale (N,) float32) of h = dy * sx (M, N)."""
    top = absmax(h, 0)
    live = top >= TINY
    inverse = np.where(live, F32(127) / np.where(live, top, F32(1)), F32(0))
    hq = stochastic_round(h.T * inverse[:, None], control, micro, WEIGHT_GRAD)
    hq[~live] = 0
    return hq, np.where(live, top / F32(127), F32(0)).astype(F32)


def weight_gradient(dy: Array, xq: Array, sx: Array, shape: tuple[int, int], control: Array) -> Array:
    """dW (N, K) float64 as the votes see it, without the weight scale."""
    hq, hs = quantize_outputs(as_float(dy) * sx[:, None], control, int(control[CONTROL["micro"]]))
    return (hq @ xq[:, : shape[1]].astype(np.int64)).astype(np.float64) * hs.astype(np.float64)[:, None]


def vote(
    dy: Array,
    xq: Array,
    sx: Array,
    codes: Array,
    scale: Array,
    planes: Planes | None = None,
    *,
    control: Array | None = None,
    ds: Array | None = None,
    db: Array | None = None,
) -> int:
    """The weight side of the backward, in place; returns 1 if a dy * sx is non-finite."""
    state = planes["control"] if planes is not None else control
    assert state is not None
    tokens = dy.shape[0]
    with np.errstate(all="ignore"):
        h = as_float(dy) * sx[:, None]
        micro = int(state[CONTROL["micro"]])
        chunks = range(0, tokens, TOKENS_PER_VOTE)
        if not np.isfinite(h).all():
            for gradient in (ds, db):
                if gradient is not None:
                    gradient[...] = NAN
            if planes is not None:
                state[CONTROL["nonfinite"]] += 1
                state[CONTROL["micro"]] += len(chunks)
            return 1
        for chunk, first in enumerate(chunks):
            part = slice(first, first + TOKENS_PER_VOTE)
            hq, hs = quantize_outputs(h[part], state, micro + chunk)
            acc = hq @ xq[part, : codes.shape[1]].astype(np.int64)
            rows = trained_rows(planes, len(codes))
            stripes = max(1, int(planes["control"][CONTROL["stripes"]])) if planes is not None else 1
            _scale(acc[rows], hs[rows], codes[rows], rows, stripes, ds)
            if db is not None:
                db += in_order(as_float(dy)[part])
            if planes is not None:
                unscaled = np.broadcast_to(scale, codes.shape[:1]) * F32(1.0 / state[CONTROL["grad_scale"]])
                _measure(acc[rows], hs[rows], unscaled[rows], planes)
                if state[CONTROL["step"]] > 0:
                    _cast(acc[rows], hs[rows], unscaled[rows], codes, rows, planes, micro + chunk)
                state[CONTROL["micro"]] += 1
    return 0


def _scale(acc: Array, hs: Array, codes: Array, rows: Array, stripes: int, ds: Array | None) -> None:
    d = (codes.astype(np.int64) * acc).sum(axis=1)
    if ds is not None and len(ds) == 1:
        ds += F32(in_order(d.astype(np.float64) * hs.astype(np.float64)) * stripes)
    elif ds is not None:
        ds[rows] += d.astype(F32) * hs


def _measure(acc: Array, hs: Array, unscaled: Array, planes: Planes) -> None:
    n, k = acc.shape
    control = planes["control"]
    g = acc.astype(F32) * (hs * unscaled)[:, None]
    planes["row_sum"] += sum_rows(g * g) / F32(max(k, 1))
    blocks = np.array([in_order(g[i : i + 256] * g[i : i + 256]) for i in range(0, n, 256)], F32)
    if n > 0:
        planes["col_sum"] += np.add.accumulate(blocks, axis=0)[-1] / F32(n)
    negative = draw(control, 0, SKETCH, np.arange(1), np.arange(k)) >> np.uint32(31) == 1
    z = sum_rows(np.where(negative, -g, g))
    planes["sketch"] += z
    control[CONTROL["sketch_energy"]] += in_order(z.astype(np.float64) ** 2)


def _cast(acc: Array, hs: Array, unscaled: Array, codes: Array, rows: Array, planes: Planes, micro: int) -> None:
    if acc.size == 0:
        return
    cols = planes["col_factor"]
    q = row_ratio(planes)
    a = np.where(q > 0, (hs * unscaled) / np.sqrt(q), F32(0))
    a = np.where(np.abs(a) < 2.0**90, a, F32(0))
    c = np.where(cols > 0, F32(1) / np.sqrt(cols), F32(0))
    clip = F32(31) if "votes" in planes else F32(planes["control"][CONTROL["clip"]])
    u = (acc.astype(F32) * a[:, None]) * c[None, :]
    u = np.clip(u, -clip, clip)
    if "votes" in planes:
        held = planes["votes"] + stochastic_round(u * F32(1024), planes["control"], micro, VOTE, 2**20, rows)
        planes["votes"][...] = np.clip(held, -32767, 32767)
    else:
        apply_vote(u, codes, rows, planes, micro, False)
