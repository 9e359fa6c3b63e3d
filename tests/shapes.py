"""What exactness tests share: shapes around every tile edge, random layers, comparison of bits."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import oracle
from oracle import BF16, CONTROL, F32, Array, Planes

# Around the heights of register tiles (1..8), the 16-column steps and the 64-column strips.
EDGES = (*range(10), 15, 16, 17, 31, 33, 47, 63, 64, 65, 66, 79, 127, 128, 130, 191)
RULES = tuple(oracle.RULES)


def aligned(array: Array) -> Array:
    """A writable C-contiguous copy on a 64-byte boundary."""
    buffer = np.empty(array.nbytes + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    copy = buffer[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def pack(codes: Array) -> Array:
    """The tile16 plane of codes (N, K), aligned."""
    return aligned(oracle.pack(codes))


def least_outputs(planes: Planes) -> int:
    """The fewest outputs a layer with such planes can have."""
    rows, control = len(planes["row_factor"]), planes["control"]
    stripe, stripes = int(control[CONTROL["stripe"]]), max(1, int(control[CONTROL["stripes"]]))
    return stripe + stripes * (rows - 1) + 1 if rows else 0


class Oracle:
    """The oracle with the signatures of `_core`, so that one test drives both."""

    @staticmethod
    def linear_forward(
        x: Array,
        packed: Array,
        scale: Array,
        out_features: int,
        bias: Array | None = None,
        *,
        xq: Array | None = None,
        sx: Array | None = None,
    ) -> Array:
        y, q, s = oracle.linear_forward(x, oracle.unpack(packed, (out_features, x.shape[1])), scale, bias)
        if xq is not None and sx is not None:
            xq[...], sx[...] = q, s
        return y

    @staticmethod
    def linear_backward_input(dy: Array, packed: Array, scale: Array, in_features: int, control: Array) -> Array:
        codes = oracle.unpack(packed, (dy.shape[1], in_features))
        dx, nonfinite = oracle.linear_backward_input(dy, codes, scale, control)
        control[CONTROL["nonfinite"]] += nonfinite > 0
        return dx

    @staticmethod
    def vote(
        dy: Array,
        xq: Array,
        sx: Array,
        packed: Array,
        scale: Array,
        in_features: int,
        planes: Planes | None = None,
        *,
        control: Array | None = None,
        ds: Array | None = None,
        db: Array | None = None,
    ) -> None:
        codes = oracle.unpack(packed, (dy.shape[1], in_features))
        before = codes.copy()
        nonfinite = oracle.vote(dy, xq, sx, codes, scale, planes, control=control, ds=ds, db=db)
        if (codes != before).any():
            packed[...] = oracle.pack(codes)
        if control is not None:  # with planes the operation counts it itself
            control[CONTROL["nonfinite"]] += nonfinite

    @staticmethod
    def flip(packed: Array, planes: Planes) -> int:
        full = oracle.unpack(packed, (64 * len(packed), len(planes["col_factor"])))
        moved = oracle.flip(full[: least_outputs(planes)], planes)
        packed[...] = oracle.pack(full)
        return moved

    @staticmethod
    def absmean(w: Array) -> tuple[Array, Array]:
        codes, scale = oracle.absmean(w)
        return oracle.pack(codes), scale

    @staticmethod
    def weight_gradient(
        dy: Array,
        xq: Array,
        sx: Array,
        packed: Array,
        scale: Array,
        in_features: int,
        control: Array,
    ) -> Array:
        return oracle.weight_gradient(dy, xq, sx, (dy.shape[1], in_features), control)


@dataclass
class Problem:
    """One layer in the middle of its training, and one batch."""

    x: Array  # (M, K) float32 or bfloat16
    dy: Array  # (M, N), x's dtype
    packed: Array
    scale: Array  # (1,) or (N,)
    bias: Array | None  # (N,)
    planes: Planes

    def __str__(self) -> str:
        m, k = self.x.shape
        stripe, stripes = (int(self.planes["control"][CONTROL[name]]) for name in ("stripe", "stripes"))
        held = " held" * ("votes" in self.planes)
        rule = f"{oracle.rule_of(self.planes)}{held} {stripe}/{stripes}"
        return f"M={m} N={self.dy.shape[1]} K={k} {self.x.dtype} scales={len(self.scale)} {rule}"


def sample_shapes(seed: int, count: int) -> Iterator[tuple[int, int, int]]:
    """`count` shapes (M, N, K); from len(EDGES) on, each edge is at each position."""
    rng = random.Random(seed)
    columns = []
    for _ in range(3):
        values = list(itertools.islice(itertools.cycle(EDGES), count))
        rng.shuffle(values)
        columns.append(values)
    yield from zip(*columns, strict=True)


def random_control(rng: np.random.Generator, step: int = 7, micro: int = 0) -> Array:
    """A control array with every hyper-parameter off its default."""
    values = {
        "seed": int(rng.integers(2**53)),
        "layer": int(rng.integers(2**20)),
        "step": step,
        "micro": micro,
        "eta": rng.uniform(0.01, 0.9),
        "eta_peak": rng.uniform(0.01, 1.2),
        "guard": rng.uniform(0.3, 1),
        "cap": rng.choice([0.0, 0.007, 0.3]),
        "clip": rng.uniform(0.7, 4.0),
        "beta1": rng.uniform(0.5, 0.88),
        "beta2": rng.uniform(0.5, 0.93),
        "grad_scale": rng.choice([3.0, 1024.0]),
        "sketch_energy": rng.uniform(0, 1) * micro,
        "moved": 5,
        "scale_init": 0.37,
        "beta1_power": 0.6,
        "beta2_power": 0.9,
    }
    control = np.zeros(len(CONTROL))
    for name, value in values.items():
        control[CONTROL[name]] = value
    return control


def random_planes(
    rng: np.random.Generator,
    n: int,
    k: int,
    rule: str,
    step: int = 7,
    micro: int = 0,
    stripes: int = 1,
    held: bool = False,
) -> Planes:
    """Planes of one layer with random content, of a stripe in the middle; some factors are zero, some tiny."""

    def positive(length: int) -> Array:
        values = np.exp(rng.normal(size=length) * 2 - 8).astype(F32)
        values[rng.random(length) < 0.05] = 0
        values[rng.random(length) < 0.03] = 1e-42
        return values

    blocks, stripe = -(-k // 64), stripes // 2
    n = len(range(n)[stripe::stripes])
    residual_bits, momentum_bits, units = oracle.RULES[rule]
    limit = {16: 16256, 8: 127}.get(residual_bits, (units - 1) // 2)
    residual = rng.integers(-limit, limit + 1, (n, k), np.int16 if residual_bits == 16 else np.int8)
    planes: Planes = {
        "row_factor": positive(n),
        "col_factor": positive(k),
        "row_sum": positive(n) * F32(micro > 0),
        "col_sum": positive(k) * F32(micro > 0),
        "sketch": rng.normal(size=n).astype(F32) * F32(micro > 0),
        "control": random_control(rng, step, micro),
    }
    for name, value in {"rule": RULES.index(rule), "stripes": stripes, "stripe": stripe}.items():
        planes["control"][CONTROL[name]] = value
    if residual_bits >= 8:
        planes["residual"] = residual
    elif residual_bits > 0:
        planes["residual"] = np.zeros((n, blocks, 8 * residual_bits), np.uint8)
        oracle.write_residual(planes, residual)
    if momentum_bits > 0:
        planes["momentum"] = np.zeros((n, blocks, 8 * momentum_bits), np.int8 if momentum_bits == 8 else np.uint8)
        limit = (1 << (momentum_bits - 1)) - 1
        oracle.write_fields(planes["momentum"], momentum_bits, rng.integers(-limit, limit + 1, (n, k)))
        scale = (rng.uniform(0, 1.4, (n, blocks)) / limit).astype(BF16)
        scale[rng.random(scale.shape) < 0.1] = 0
        planes["momentum_scale"] = scale.view(np.uint16)
    if held:
        planes["votes"] = held_votes(rng, n, k) * np.int16(micro > 0 and step > 0)
    return planes


def held_votes(rng: np.random.Generator, n: int, k: int) -> Array:
    """A vote plane (n, k) between micro-batches: of all sizes, some rows and columns at their bound, some empty."""
    size = np.exp(rng.normal(size=(n, 1)) + rng.normal(size=k)) * rng.normal(size=(n, k)) * 1024
    rows, cols = rng.random((2, max(n, k)))
    size[rows[:n] < 0.1] *= 1000
    size[:, cols[:k] < 0.1] *= 1000
    size[rows[:n] > 0.95] = 0
    return np.clip(np.rint(size), -32767, 32767).astype(np.int16)


def random_problem(
    seed: int, m: int, n: int, k: int, *, dtype: Any = F32, rows: bool = False, bias: bool = False,
    rule: str = "residual8", step: int = 7, micro: int = 0, stripes: int = 1, held: bool = False,
) -> Problem:  # fmt: skip
    """A layer with random state; tokens and gradients of many sizes, some of them zero."""
    rng = np.random.default_rng(seed)

    def floats(shape: tuple[int, int], size: float) -> Array:
        values = rng.normal(size=shape) * size * np.exp(rng.normal(size=(shape[0], 1)) * 2)
        values[rng.random(shape[0]) < 0.05] = 0
        values[:, rng.random(shape[1]) < 0.05] *= 1e-33
        return values.astype(F32).astype(dtype)

    return Problem(
        x=floats((m, k), 1.0),
        dy=floats((m, n), 1e-3),
        packed=pack(rng.integers(-1, 2, (n, k), np.int8)),
        scale=rng.uniform(0.01, 0.1, n if rows else 1).astype(F32),
        bias=rng.normal(size=n).astype(F32) if bias else None,
        planes=random_planes(rng, n, k, rule, step, micro, stripes, held),
    )


def sample_problems(seed: int, count: int) -> Iterator[Problem]:
    """`count` problems over the edges: both dtypes, scales and rules, bias or none, any step."""
    rng = random.Random(seed)
    for i, (m, n, k) in enumerate(sample_shapes(seed, count)):
        yield random_problem(
            seed * 1000 + i, m, n, k, dtype=rng.choice([F32, BF16]), rows=rng.random() < 0.5,
            bias=rng.random() < 0.5, rule=rng.choice(RULES), step=rng.choice([0, 1, 7, 7, 123456]),
            micro=rng.choice([0, 0, 1, 3]), stripes=rng.choice([1, 1, 2, 3]), held=rng.random() < 0.4,
        )  # fmt: skip


def copy_planes(planes: Planes) -> Planes:
    return {name: aligned(array) for name, array in planes.items()}


def outputs(impl: Any, p: Problem, votes: int = 2) -> dict[str, Array]:
    """All that one training step writes: forward, dX, `votes` micro-batches, flip."""
    (m, k), n = p.x.shape, p.dy.shape[1]
    out: dict[str, Array] = {
        "xq": np.full((m, -(-k // 16) * 16), 99, np.int8),
        "sx": np.full(m, 99, F32),
    }
    out["y"] = impl.linear_forward(p.x, p.packed, p.scale, n, p.bias, xq=out["xq"], sx=out["sx"])
    out["dx"] = impl.linear_backward_input(p.dy, p.packed, p.scale, k, p.planes["control"].copy())
    planes = copy_planes(p.planes)
    out["packed"] = aligned(p.packed)
    out["ds"], out["db"] = np.ones(len(p.scale), F32), np.ones(n, F32)
    for _ in range(votes):
        impl.vote(p.dy, out["xq"], out["sx"], out["packed"], p.scale, k, planes, ds=out["ds"], db=out["db"])
    out.update({f"voted {name}": array.copy() for name, array in planes.items()})
    out["voted packed"] = out["packed"].copy()
    out["moved"] = np.array([impl.flip(out["packed"], planes)], np.int64)
    out.update({f"flipped {name}": array for name, array in planes.items()})
    return out


def count(out: dict[str, Array]) -> int:
    return sum(array.size for array in out.values())


def assert_same_bits(got: dict[str, Array], want: dict[str, Array], what: Any) -> int:
    """Fail unless all dtypes, shapes and bits are the same; returns how many numbers there were."""
    assert got.keys() == want.keys()
    for name, array in want.items():
        other = got[name]
        assert (other.dtype, other.shape) == (array.dtype, array.shape), f"{name} of {what}"
        if np.ascontiguousarray(other).tobytes() != np.ascontiguousarray(array).tobytes():
            bits = np.dtype(f"u{array.dtype.itemsize}")
            wrong = np.argwhere(np.ascontiguousarray(other).view(bits) != np.ascontiguousarray(array).view(bits))
            first = tuple(int(i) for i in wrong[0])
            raise AssertionError(
                f"{name} of {what}: {len(wrong)} of {array.size} differ, first at {first}: "
                f"got {other[first]!r}, want {array[first]!r}"
            )
    return count(want)
