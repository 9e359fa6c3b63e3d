"""What the oracle is built of: control fields, rules, random numbers, floats and their sums, planes."""

from __future__ import annotations

import math
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
    moved scale_init beta1_power beta2_power stripes stripe vote_moved rule
"""
CONTROL = {name: i for i, name in enumerate(FIELDS.split())}
RULES = {  # bits of residual, bits of momentum, residual units per cell
    "residual8": (8, 0, 128),
    "residual8_momentum4": (8, 4, 128),
    "residual8_momentum8": (8, 8, 128),
    "residual16": (16, 0, 16384),
    "residual4": (4, 0, 15),
    "residual4_momentum4": (4, 4, 15),
    "residual2": (2, 0, 3),
    "byte": (8, 0, 85),
    "stochastic": (0, 0, 1),
}
DEAD_ZONE = {"residual2": 1.5, "stochastic": 1.5}  # of votes, in units of u
STEPWISE = (3, 4, 5, 9)  # VOTE, MOMENTUM, MOMENTUM_STEP, CAST: one number for each weight, turned at each step
INDEPENDENT = (6, 7)  # SKETCH, INIT
INPUT_GRAD, WEIGHT_GRAD, VOTE, MOMENTUM, MOMENTUM_STEP, SKETCH, INIT, COMBINE, CAST = range(1, 10)


# ------------------------------------------------------------------ random numbers
def splitmix64(x: Any) -> Array:
    """SplitMix64's finaliser of x + golden ratio; uint64 in, uint64 out."""
    with np.errstate(over="ignore"):
        x = np.asarray(x, np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _turn(step: int, micro: int) -> int:
    rank, part = divmod(micro, 2**32)
    return (step * 0x9E3779B9 + part * 0xC13FA9A9 + rank * 0x91E10DA5) % 2**32


def draw(control: Array, micro: int, stream: int, rows: Array, columns: Array) -> Array:
    """32 random bits (rows, columns) of a layer's stream at control's seed, layer and step.

    A row's are a Kronecker sequence a + column (sqrt 2 - 1) mod 1, 24 bits of it; independent streams have a hash.
    """
    seed, layer, step, stripe = (int(control[CONTROL[name]]) for name in ("seed", "layer", "step", "stripe"))
    place, turn, key = (step + (stripe << 32), micro), 0, np.uint64(0)
    if stream in STEPWISE:
        place, turn = (0, 0), _turn(step, int(micro))
    for field in (seed, layer, *place, stream):
        key = splitmix64(key ^ np.uint64(field))
    with np.errstate(over="ignore"):
        words = splitmix64(key + rows.astype(np.uint64))[:, None]
        a, b = (
            (words & np.uint64(0xFFFFFFFF)).astype(np.uint32),
            (words >> np.uint64(32)).astype(np.uint32),
        )
        if stream not in INDEPENDENT:
            root = np.uint32((math.isqrt(2 << 48) - 2**24 | 1) << 8)
            return columns.astype(np.uint32)[None, :] * root + (a + np.uint32(turn) & np.uint32(0xFFFFFF00))
        x = columns.astype(np.uint32)[None, :] * np.uint32(0x9E3779B9) + a
        x = ((x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)) ^ b
        x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
        return x ^ (x >> np.uint32(16))


def stochastic_round(
    v: Array, control: Array, micro: int, stream: int, limit: int = 127, rows: Array | None = None
) -> Array:
    """SR of v (rows, columns) float32 at its own logical positions, or those of outputs `rows` -> int64."""
    rows = np.arange(len(v)) if rows is None else rows
    bits = draw(control, micro, stream, rows, np.arange(v.shape[1]))
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


# ------------------------------------------------------------------ planes
def rule_of(planes: Planes) -> str:
    """Name of the rule that control names."""
    return list(RULES)[int(planes["control"][CONTROL["rule"]])]


def trained_rows(planes: Planes | None, n: int) -> Array:
    """Outputs that own planes: all, or one stripe of them."""
    if planes is None or planes["control"][CONTROL["stripes"]] < 2:
        return np.arange(n)
    return np.arange(int(planes["control"][CONTROL["stripe"]]), n, int(planes["control"][CONTROL["stripes"]]))


def read_fields(stored: Array, bits: int, k: int) -> Array:
    """Signed fields (rows, k) of 2, 4, 8 bits in blocks of 64 columns: field j in byte j mod 8 bits, low bits first."""
    shifts = np.arange(0, 8, bits)[:, None]
    fields = stored.astype(np.int64)[:, :, None, :] >> shifts & (1 << bits) - 1
    fields = np.where(fields < 1 << (bits - 1), fields, fields - (1 << bits))
    return fields.reshape(len(stored), stored.shape[1] * 64)[:, :k]


def write_fields(stored: Array, bits: int, values: Array) -> None:
    """Store them; what lies beyond the last column stays."""
    full = read_fields(stored, bits, stored.shape[1] * 64)
    full[:, : values.shape[1]] = values
    fields = (full & (1 << bits) - 1).reshape(*stored.shape[:2], 8 // bits, 8 * bits)
    stored[...] = (fields << np.arange(0, 8, bits)[:, None]).sum(axis=2).astype(np.uint8).view(stored.dtype)


def read_residual(planes: Planes) -> Array:
    """Residual (rows, K) int64; zeros where the rule has none."""
    bits, shape = RULES[rule_of(planes)][0], (len(planes["row_factor"]), len(planes["col_factor"]))
    if bits == 0:
        return np.zeros(shape, np.int64)
    residual = planes["residual"]
    return residual.astype(np.int64) if bits >= 8 else read_fields(residual, bits, shape[1])


def write_residual(planes: Planes, e: Array) -> None:
    """Store what read_residual gave."""
    bits = RULES[rule_of(planes)][0]
    if bits >= 8:
        planes["residual"][...] = e
    elif bits > 0:
        write_fields(planes["residual"], bits, e)
