"""The step as csrc/README.md states it: votes into the rule's planes, codes, factors, guard, and Adam on the scale."""

from __future__ import annotations

from typing import Any

import numpy as np
from oracle_basics import (
    CAST,
    CONTROL,
    DEAD_ZONE,
    F32,
    INIT,
    MOMENTUM,
    MOMENTUM_STEP,
    RULES,
    TINY,
    VOTE,
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
    sum_rows,
    trained_rows,
    write_fields,
    write_residual,
)


def row_ratio(planes: Planes) -> Array:
    """R_n over the mean of R."""
    row_factor = planes["row_factor"]
    return row_factor / F32(in_order(row_factor.astype(np.float64)) / max(len(row_factor), 1))


def apply_vote(u: Array, codes: Array, rows: Array, planes: Planes, micro: int, held: bool) -> None:
    """A rule's vote of u (rows, K), which a vote plane may have held."""
    if "momentum" in planes:
        _vote_momentum(u, rows, planes, micro, CAST if held else MOMENTUM)
    else:
        moved = _add_votes(u, codes, rows, planes, micro, CAST if held else VOTE)
        planes["control"][CONTROL["vote_moved"]] += moved


def step_size(control: Array) -> Any:
    """-units * eta * guard, float32; eta at most .06 while the guard is on."""
    units, eta = list(RULES.values())[int(control[CONTROL["rule"]])][2], F32(control[CONTROL["eta"]])
    eta = min(eta, F32(0.06)) if control[CONTROL["cap"]] > 0 else eta
    return (F32(-units) * eta) * F32(control[CONTROL["guard"]])


def _add_votes(u: Array, codes: Array, rows: Array, planes: Planes, micro: int, stream: int) -> int:
    """Votes u (rows, K) into the residual; below 8 bits the codes move too.  Returns how many."""
    bits, _, units = RULES[rule_of(planes)]
    limit = 16256 if bits == 16 else 127
    zone = F32(DEAD_ZONE.get(rule_of(planes), 0))
    v = np.sign(u) * np.maximum(np.abs(u) - zone, F32(0)) * step_size(planes["control"])
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


def _vote_momentum(u: Array, rows: Array, planes: Planes, micro: int, stream: int) -> None:
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
    codes = stochastic_round(v, control, micro, stream, top_code, rows)
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
    fresh = {total: planes[total] * F32(rho) for total in ("row_sum", "col_sum")}
    if get("step") > 0 and "votes" in planes:
        _take_held(codes, planes, fresh)
    for factor, total in (("row_factor", "row_sum"), ("col_factor", "col_sum")):
        r = fresh[total]
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


def _take_held(codes: Array, planes: Planes, fresh: dict[str, Array]) -> None:
    """The vote plane's content as one vote, and the step's mean g^2 where it tells them."""
    clip, rows = F32(planes["control"][CONTROL["clip"]]), trained_rows(planes, len(codes))
    with np.errstate(all="ignore"):
        u = planes["votes"].astype(F32) * F32(2.0**-10)
        q, cols = row_ratio(planes), planes["col_factor"]
        q = np.where(q > 0, q, F32(0))
        blocks = np.array([in_order(u[i : i + 64] ** 2 * q[i : i + 64, None]) for i in range(0, len(u), 64)], F32)
        total = np.add.accumulate(blocks, axis=0)[-1] if len(u) else np.zeros(len(cols), F32)
        square = {
            "row_sum": sum_rows(u**2 * cols) / F32(u.shape[1]) * q,
            "col_sum": total / F32(len(u)) * cols,
        }
        for name, live, factor in (("row_sum", q > 0, planes["row_factor"]), ("col_sum", cols > 0, cols)):
            told = live & (square[name] <= F32(256) * factor)
            fresh[name] = np.where(told, square[name], fresh[name])
    if u.size:
        apply_vote(np.clip(u, -clip, clip), codes, rows, planes, 0, True)
    planes["votes"][...] = 0


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
    """Forget the step's sums; votes stay, but not in a vote plane; later micro-batches draw fresh numbers."""
    for name in ("row_sum", "col_sum", "sketch", "votes"):
        if name in planes:
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
