"""An independent NumPy reading of csrc/README.md: what every kernel must compute, to the bit.

Codes are plain int8 matrices (N, K) here, products are int64, float steps are float32 in the
stated order, random numbers are uint32/uint64 arrays.  Nothing is imported from the package.
Planes are dicts of arrays as `_core.new_planes` makes.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Planes = dict[str, Array]

F32 = np.float32
BF16 = np.dtype(ml_dtypes.bfloat16)
TINY = F32(2.0**-100)
TOKENS_PER_VOTE = 65536
NAN = np.array(0x7FC00000, np.uint32).view(F32)[()]
FIELDS = """
    seed layer step micro nonfinite eta eta_peak guard cap clip beta1 beta2 grad_scale sketch_energy
    moved scale_init beta1_power beta2_power reserved0 reserved1
"""
CONTROL = {name: i for i, name in enumerate(FIELDS.split())}
INPUT_GRAD, WEIGHT_GRAD, VOTE, MOMENTUM, MOMENTUM_STEP, SKETCH, INIT = range(1, 8)


# ------------------------------------------------------------------ random numbers
def splitmix64(x: Any) -> Array:
    """SplitMix64's finaliser of x + golden ratio; uint64 in, uint64 out."""
    with np.errstate(over="ignore"):
        x = np.asarray(x, np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def draw(control: Array, micro: int, stream: int, rows: Array, columns: Array) -> Array:
    """32 random bits (rows, columns) of a layer's stream at control's seed, layer and step."""
    key = np.uint64(0)
    for field in (
        *(int(control[CONTROL[name]]) for name in ("seed", "layer", "step")),
        micro,
        stream,
    ):
        key = splitmix64(key ^ np.uint64(field))
    with np.errstate(over="ignore"):
        words = splitmix64(key + rows.astype(np.uint64))[:, None]
        a, b = (
            (words & np.uint64(0xFFFFFFFF)).astype(np.uint32),
            (words >> np.uint64(32)).astype(np.uint32),
        )
        x = columns.astype(np.uint32)[None, :] * np.uint32(0x9E3779B9) + a
        x = ((x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)) ^ b
        x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def stochastic_round(v: Array, control: Array, micro: int, stream: int, limit: int = 127) -> Array:
    """SR of v (rows, columns) float32 at its own logical positions -> int64."""
    rows, columns = v.shape
    bits = draw(control, micro, stream, np.arange(rows), np.arange(columns))
    r = (bits >> np.uint32(8)).astype(F32) * F32(2.0**-24)
    return np.clip(np.floor(v + r), -limit, limit).astype(np.int64)


# ------------------------------------------------------------------ floats
def as_float(x: Array) -> Array:
    """float32 of a float32 or bfloat16 (ml_dtypes or raw uint16) array."""
    if x.dtype == F32:
        return x
    return (x.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(F32)


def store(y: Array, dtype: Any) -> Array:
    """y as float32 or bfloat16 (to nearest even), every NaN the canonical one."""
    y = np.where(np.isnan(y), NAN, y).astype(F32)
    if np.dtype(dtype) == F32:
        return y
    bits = y.view(np.uint32)
    bits = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    return (bits >> np.uint32(16)).astype(np.uint16).view(dtype)


def absmax(x: Array, axis: int) -> Array:
    """max |x| as the integer maximum of bits, float32; 0 for none."""
    bits = x.view(np.uint32) & np.uint32(0x7FFFFFFF)
    return np.max(bits, axis=axis, initial=0).astype(np.uint32).view(F32)


def in_order(x: Array) -> Any:
    """Sum over axis 0, one after the other from 0, in x's own type."""
    zero = np.zeros((1, *x.shape[1:]), x.dtype)
    return np.add.accumulate(np.concatenate([zero, x]), axis=0)[-1]


def sum_rows(q: Array) -> Array:
    """(N, K) float32 -> (N,): strips of 64 columns, each 16 lanes and a tree, in order."""
    n, k = q.shape
    if k == 0:
        return np.zeros(n, F32)
    strips = np.zeros((n, -(-k // 64) * 64), F32)
    strips[:, :k] = q
    q = strips.reshape(n, strips.shape[1] // 64, 4, 16)
    lane = ((q[:, :, 0] + q[:, :, 1]) + q[:, :, 2]) + q[:, :, 3]
    for half in (8, 4, 2, 1):
        lane = lane[:, :, :half] + lane[:, :, half : 2 * half]
    return np.add.accumulate(lane[:, :, 0], axis=1)[:, -1]


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
            _scale_and_bias(acc, hs, codes, len(scale), as_float(dy)[part], ds, db)
            if planes is not None:
                unscaled = np.broadcast_to(scale, codes.shape[:1]) * F32(1.0 / state[CONTROL["grad_scale"]])
                _measure(acc, hs, unscaled, planes)
                if state[CONTROL["step"]] > 0:
                    _cast(acc, hs, unscaled, planes, micro + chunk)
                state[CONTROL["micro"]] += 1
    return 0


def _scale_and_bias(
    acc: Array, hs: Array, codes: Array, scales: int, dy: Array, ds: Array | None, db: Array | None
) -> None:
    d = (codes.astype(np.int64) * acc).sum(axis=1)
    if ds is not None and scales == 1:
        ds += F32(in_order(d.astype(np.float64) * hs.astype(np.float64)))
    elif ds is not None:
        ds += d.astype(F32) * hs
    if db is not None:
        db += in_order(dy)


def _measure(acc: Array, hs: Array, unscaled: Array, planes: Planes) -> None:
    n, k = acc.shape
    control = planes["control"]
    g = (acc.astype(F32) * hs[:, None]) * unscaled[:, None]
    planes["row_sum"] += sum_rows(g * g) / F32(max(k, 1))
    planes["col_sum"] += in_order(g * g) / F32(max(n, 1))
    negative = draw(control, 0, SKETCH, np.arange(1), np.arange(k)) >> np.uint32(31) == 1
    z = sum_rows(np.where(negative, -g, g))
    planes["sketch"] += z
    control[CONTROL["sketch_energy"]] += in_order(z.astype(np.float64) ** 2)


def _cast(acc: Array, hs: Array, unscaled: Array, planes: Planes, micro: int) -> None:
    if acc.size == 0:
        return
    control, rows, cols = planes["control"], planes["row_factor"], planes["col_factor"]
    q = rows / F32(in_order(rows.astype(np.float64)) / len(acc))
    a = np.where(q > 0, (hs * unscaled) / np.sqrt(q), F32(0))
    c = np.where(cols > 0, F32(1) / np.sqrt(cols), F32(0))
    clip = F32(control[CONTROL["clip"]])
    u = (acc.astype(F32) * a[:, None]) * c[None, :]
    u = np.where(np.isnan(u), F32(0), np.clip(u, -clip, clip)).astype(F32)
    if "momentum" in planes:
        _vote_momentum(u, planes, micro)
    else:
        _add_residual(u * step_size(control), planes, micro, VOTE)


def step_size(control: Array) -> Any:
    """-128 * eta * guard, float32."""
    return (F32(-128) * F32(control[CONTROL["eta"]])) * F32(control[CONTROL["guard"]])


def _add_residual(v: Array, planes: Planes, micro: int, stream: int) -> None:
    moved = planes["residual"].astype(np.int64) + stochastic_round(v, planes["control"], micro, stream)
    planes["residual"][...] = np.clip(moved, -127, 127)


def read_momentum(planes: Planes) -> Array:
    """Momentum (N, 64 ceil(K/64)) float32."""
    bytes_ = planes["momentum"].astype(np.int64)
    nibbles = np.concatenate([bytes_ & 15, bytes_ >> 4], axis=2)
    m = np.where(nibbles < 8, nibbles, nibbles - 16).astype(F32) * as_float(planes["momentum_scale"])[:, :, None]
    return m.reshape(len(m), m.shape[1] * 64)


def _vote_momentum(u: Array, planes: Planes, micro: int) -> None:
    n, k = u.shape
    control = planes["control"]
    beta1, share = F32(control[CONTROL["beta1"]]), F32(1.0 - control[CONTROL["beta1"]])
    m = read_momentum(planes)
    m[:, :k] = (beta1 * m[:, :k] if micro == 0 else m[:, :k]) + share * u
    m[:, k:] = 0
    blocks = m.reshape(n, m.shape[1] // 64, 64)
    top = absmax(blocks, 2)
    live = top >= TINY
    up = (((top / F32(7)).view(np.uint32) + np.uint32(0xFFFF)) >> np.uint32(16)).astype(np.uint16)
    up = np.where(live, up, 0).astype(np.uint16)
    inverse = np.where(live, F32(1) / np.where(live, as_float(up), F32(1)), F32(0)).astype(F32)
    codes = stochastic_round((blocks * inverse[:, :, None]).reshape(m.shape), control, micro, MOMENTUM, 7)
    codes = np.where(live[:, :, None], codes.reshape(blocks.shape), 0) & 15
    planes["momentum"][...] = codes[:, :, :32] | codes[:, :, 32:] << 4
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
        if "momentum" in planes:
            v = read_momentum(planes)[:, : codes.shape[1]] * step_size(control)
            _add_residual(v, planes, 0, MOMENTUM_STEP)
        e = planes["residual"].astype(np.int64)
        shift = np.where((e > 64) & (codes < 1), 1, np.where((e < -64) & (codes > -1), -1, 0))
        codes += shift.astype(np.int8)
        planes["residual"][...] = np.where(shift != 0, e - 128 * shift, np.clip(e, -64, 64))
        moved = int(np.count_nonzero(shift))
    _update_guard(control, moved, codes.size)
    control[CONTROL["step"]] += 1
    control[CONTROL["moved"]] = moved
    discard(planes)
    control[CONTROL["micro"]] = 0
    return moved


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
