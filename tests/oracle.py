"""An independent NumPy reading of csrc/README.md: what every kernel must compute, to the bit.

Codes are plain int8 matrices (N, K) here, products are int64, float steps are float32 in the
stated order, random numbers are uint32/uint64 arrays.  Nothing is imported from the package.
Planes are dicts of arrays as `_core.new_planes` makes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from oracle_basics import (
    BF16 as BF16,
)
from oracle_basics import (
    CONTROL,
    F32,
    INIT,
    INPUT_GRAD,
    MOMENTUM,
    MOMENTUM_STEP,
    NAN,
    RULES,
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
    read_fields,
    read_residual,
    rule_of,
    stochastic_round,
    store,
    sum_rows,
    trained_rows,
    write_fields,
    write_residual,
)


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
    else:  # seq2: row by row, four columns per byte
        flat = np.ones((n, -(-k // 4) * 4), np.uint8)
        flat[:, :k] = bits
        pairs = flat.reshape(-1, 4)
    return np.ascontiguousarray((pairs << np.array([0, 2, 4, 6], np.uint8)).sum(-1, dtype=np.uint8))


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
    g = (acc.astype(F32) * hs[:, None]) * unscaled[:, None]
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
    control, row_factor, cols = planes["control"], planes["row_factor"], planes["col_factor"]
    q = row_factor / F32(in_order(row_factor.astype(np.float64)) / len(acc))
    a = np.where(q > 0, (hs * unscaled) / np.sqrt(q), F32(0))
    c = np.where(cols > 0, F32(1) / np.sqrt(cols), F32(0))
    clip = F32(control[CONTROL["clip"]])
    u = (acc.astype(F32) * a[:, None]) * c[None, :]
    u = np.where(np.isnan(u), F32(0), np.clip(u, -clip, clip)).astype(F32)
    if "momentum" in planes:
        _vote_momentum(u, rows, planes, micro)
    else:
        control[CONTROL["vote_moved"]] += _add_votes(u, codes, rows, planes, micro, VOTE)


def step_size(control: Array) -> Any:
    """-units * eta * guard, float32."""
    units = list(RULES.values())[int(control[CONTROL["rule"]])][2]
    return (F32(-units) * F32(control[CONTROL["eta"]])) * F32(control[CONTROL["guard"]])


def _add_votes(u: Array, codes: Array, rows: Array, planes: Planes, micro: int, stream: int) -> int:
    """Votes u (rows, K) into the residual; below 8 bits the codes move too.  Returns how many."""
    bits, _, units = RULES[rule_of(planes)]
    limit = 16256 if bits == 16 else 127
    v = u * step_size(planes["control"])
    moved = read_residual(planes) + stochastic_round(v, planes["control"], micro, stream, limit, rows)
    if bits >= 8:
        write_residual(planes, np.clip(moved, -limit, limit))
        return 0
    top = units + (units - 1) // 2
    x = np.clip(moved + units * codes[rows].astype(np.int64), -top, top)
    now = np.rint(x / units).astype(np.int8)
    changed = int(np.count_nonzero(now != codes[rows]))
    write_residual(planes, x - units * now.astype(np.int64))
    codes[rows] = now
    return changed


def read_momentum(planes: Planes) -> Array:
    """Momentum (rows, 64 ceil(K/64)) float32."""
    codes, scale = planes["momentum"], as_float(planes["momentum_scale"])
    m = read_fields(codes, codes.shape[2] // 8, codes.shape[1] * 64).astype(F32)
    return (m.reshape(*codes.shape[:2], 64) * scale[:, :, None]).reshape(m.shape)


def _vote_momentum(u: Array, rows: Array, planes: Planes, micro: int) -> None:
    n, k = u.shape
    control, bits = planes["control"], planes["momentum"].shape[2] // 8
    top_code = (1 << (bits - 1)) - 1
    beta1, share = F32(control[CONTROL["beta1"]]), F32(1.0 - control[CONTROL["beta1"]])
    m = read_momentum(planes)
    m[:, :k] = (beta1 * m[:, :k] if micro == 0 else m[:, :k]) + share * u
    m[:, k:] = 0
    blocks = m.reshape(n, m.shape[1] // 64, 64)
    top = absmax(blocks, 2)
    live = top >= TINY
    up = (((top / F32(top_code)).view(np.uint32) + np.uint32(0xFFFF)) >> np.uint32(16)).astype(np.uint16)
    up = np.where(live, up, 0).astype(np.uint16)
    inverse = np.where(live, F32(1) / np.where(live, as_float(up), F32(1)), F32(0)).astype(F32)
    v = (blocks * inverse[:, :, None]).reshape(m.shape)
    codes = stochastic_round(v, control, micro, MOMENTUM, top_code, rows)
    write_fields(planes["momentum"], bits, np.where(live[:, :, None], codes.reshape(blocks.shape), 0).reshape(m.shape))
    planes["momentum_scale"][...] = up.view(planes["momentum_scale"].dtype)


# ------------------------------------------------------------------ step
def flip(codes: Array, planes: Planes) -> int:
    """One optimizer step of the codes, in place; returns how many moved."""
    control = planes["control"]

    def get(name: str) -> float:
        return float(control[CONTROL[name]])

    if get("micro") == 0:
        return 0
    rho = 1.0
    if get("micro") != 1 and get("sketch_energy") != 0:
        rho = in_order(planes["sketch"].astype(np.float64) ** 2) / control[CONTROL["sketch_energy"]]
    for factor, total in (("row_factor", "row_sum"), ("col_factor", "col_sum")):
        r = planes[total] * F32(rho)
        if get("step") > 0:
            r = F32(get("beta2")) * planes[factor] + F32(1.0 - get("beta2")) * r
        planes[factor][...] = r
    moved = 0
    if get("step") > 0:
        rows, moved = trained_rows(planes, len(codes)), int(get("vote_moved"))
        if "momentum" in planes:
            m = read_momentum(planes)[:, : codes.shape[1]]
            moved += _add_votes(m, codes, rows, planes, 0, MOMENTUM_STEP)
        moved += _move_codes(codes, rows, planes)
    _update_guard(control, moved, len(planes["row_factor"]) * codes.shape[1])
    control[CONTROL["step"]] += 1
    control[CONTROL["moved"]] = moved
    discard(planes)
    control[CONTROL["micro"]] = control[CONTROL["vote_moved"]] = 0
    return moved


def _move_codes(codes: Array, rows: Array, planes: Planes) -> int:
    """What step() does to codes and residual after any momentum; returns how many codes moved."""
    bits, _, units = RULES[rule_of(planes)]
    if bits < 8:
        return 0
    e, t = read_residual(planes), codes[rows]
    if rule_of(planes) == "byte":
        now = np.rint(e / units).astype(np.int8)
    else:
        half = units // 2
        now = t + ((e > half) & (t < 1)).astype(np.int8) - ((e < -half) & (t > -1)).astype(np.int8)
        write_residual(planes, np.where(now != t, e - units * (now - t).astype(np.int64), np.clip(e, -half, half)))
    codes[rows] = now
    return int(np.count_nonzero(now != t))


def start_residual(codes: Array, planes: Planes) -> None:
    """The residual as training starts, in place."""
    bits, _, units = RULES[rule_of(planes)]
    rows, k = trained_rows(planes, len(codes)), codes.shape[1]
    e = np.zeros((len(rows), k), np.int64)
    if rule_of(planes) == "byte":
        e = units * codes[rows].astype(np.int64)
    elif bits in (2, 4):
        ninth = draw(planes["control"], 1, INIT, rows, np.arange(k)).astype(np.uint64) * np.uint64(9) >> np.uint64(32)
        e = ninth.astype(np.int64) - 4
        e = e if bits == 4 else np.sign(e) * (np.abs(e) > 2)
    write_residual(planes, e)


def saturated(codes: Array, planes: Planes) -> int:
    """How many residuals wait at a bound."""
    bits, _, units = RULES[rule_of(planes)]
    if bits == 0:
        return 0
    e, t = read_residual(planes), codes[trained_rows(planes, len(codes))].astype(np.int64)
    if rule_of(planes) == "byte":
        return int((np.abs(e) == 127).sum())
    if bits >= 8:
        return int((np.abs(e) >= units // 2).sum())
    return int((np.abs(units * t + e) == units + (units - 1) // 2).sum())


def _update_guard(control: Array, moved: int, cells: int) -> None:
    eta, cap = float(control[CONTROL["eta"]]), float(control[CONTROL["cap"]])
    peak = control[CONTROL["eta_peak"]] = max(float(control[CONTROL["eta_peak"]]), eta)
    if cap > 0 and eta > 0:
        factor = min(max(cap * (eta / peak) / (moved / cells), 0.8), 1.05) if moved else 1.05
        control[CONTROL["guard"]] = min(max(float(control[CONTROL["guard"]]) * factor, 1e-3), 1.0)


def discard(planes: Planes) -> None:
    """Forget the step's sums; votes stay, and later micro-batches of the step draw fresh numbers."""
    for name in ("row_sum", "col_sum", "sketch"):
        planes[name][...] = 0
    for name in ("nonfinite", "sketch_energy"):
        planes["control"][CONTROL[name]] = 0


def scale_step(scale: Array, grad: Array, exp_avg: Array, exp_avg_sq: Array, control: Array, lr: float) -> None:
    """Adam on the scale, in place."""
    b1, b2 = float(control[CONTROL["beta1"]]), float(control[CONTROL["beta2"]])
    g = grad * F32(1.0 / control[CONTROL["grad_scale"]])
    exp_avg[...] = F32(b1) * exp_avg + F32(1 - b1) * g
    exp_avg_sq[...] = F32(b2) * exp_avg_sq + (F32(1 - b2) * g) * g
    control[CONTROL["beta1_power"]] *= b1
    control[CONTROL["beta2_power"]] *= b2
    mh = exp_avg / F32(1 - control[CONTROL["beta1_power"]])
    vh = exp_avg_sq / F32(1 - control[CONTROL["beta2_power"]])
    s = scale - (F32(lr * control[CONTROL["scale_init"]]) * mh) / (np.sqrt(vh) + F32(1e-8))
    scale[...] = F32(1) / (F32(1) / np.maximum(s, F32(1e-8)))
