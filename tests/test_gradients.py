"""Integer gradients are right on average: over seeds they converge to the dense float64 gradient as 1/sqrt(seeds).

The dense gradient is that of the quantised forward y = (xq sx) (s T)^T, with the straight-through rule for xq and T.
Stochastic rounding of v has variance f (1 - f), f = v - floor(v), so the size of the error is known too, not only its
rate: `assert_converges` compares both.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import oracle
import pytest
import shapes
from oracle import CONTROL, F32, Array
from shapes import Problem, random_planes

from onebit_ext import _core

SEEDS = (64, 512, 4096)
M, N, K = 16, 48, 40


def means(call: Callable[[int], Array]) -> dict[int, Array]:
    """The mean of call(seed) over the first 64, 512 and 4,096 seeds, float64."""
    total, found = np.float64(0), {}
    for seed in range(max(SEEDS)):
        total = total + call(seed).astype(np.float64)
        if seed + 1 in SEEDS:
            found[seed + 1] = total / (seed + 1)
    return found


def assert_converges(call: Callable[[int], Array], dense: Array, variance: Array, chance: float = 1.6) -> None:
    """The squared error at each number of seeds is variance / seeds, within what chance allows.

    A sum over roundings of one row has few degrees of freedom: one number turns through all of them."""
    errors = {}
    for seeds, mean in means(call).items():
        errors[seeds] = ((mean - dense) ** 2).sum()
        ratio = errors[seeds] / (variance.sum() / seeds)
        assert 1 / chance < ratio < chance, f"{seeds} seeds: {ratio:.2f} x the expected squared error"
    for few, many in ((64, 512), (512, 4096)):
        shrink = np.sqrt(errors[few] / errors[many])
        assert np.sqrt(8 / chance) * 0.9 < shrink < np.sqrt(8 * chance) * 1.1, f"{few} -> {many} seeds: {shrink:.2f}"


def rounding_variance(v: Array) -> Array:
    f = v - np.floor(v)
    return f * (1 - f)


class Layer:
    """A problem with what float64 says of it."""

    def __init__(self, rows: bool = True, exact: bool = False) -> None:
        rng = np.random.default_rng(21)
        x, dy = rng.normal(size=(M, K)), rng.normal(size=(M, N)) * np.exp(rng.normal(size=(M, 1)))
        if exact:  # every scale a power of two and every quotient an integer: hq and xq round nothing
            x, dy = rng.integers(-127, 128, (M, K)), rng.integers(-127, 128, (M, N))
            x[:, 0] = dy[0] = 127
            dy = dy * 2.0 ** rng.integers(-12, -4, N)
        self.problem = p = Problem(
            x=x.astype(F32),
            dy=dy.astype(F32),
            packed=shapes.pack(rng.integers(-1, 2, (N, K), np.int8)),
            scale=rng.uniform(0.02, 0.08, N if rows else 1).astype(F32),
            bias=None,
            planes=random_planes(rng, N, K, "residual8"),
        )
        self.control = p.planes["control"]
        self.codes = oracle.unpack(p.packed, (N, K)).astype(np.float64)
        _, self.xq, self.sx = oracle.linear_forward(p.x, oracle.unpack(p.packed, (N, K)), p.scale)
        self.dy = p.dy.astype(np.float64)
        self.x = self.xq[:, :K] * self.sx.astype(np.float64)[:, None]
        self.scale = np.broadcast_to(p.scale, (N,)).astype(np.float64)
        self.dw = self.dy.T @ self.x  # (N, K)
        h = self.dy * self.sx[:, None]
        self.h_scale = np.abs(h).max(0) / 127
        self.h_variance = rounding_variance(h / self.h_scale).T * self.h_scale[:, None] ** 2
        self.dw_variance = self.h_variance @ self.xq[:, :K].astype(np.float64) ** 2

    def seeded(self, seed: int) -> Array:
        self.control[CONTROL["seed"]] = seed
        return self.control

    def weight_gradient(self, seed: int) -> Array:
        p = self.problem
        return _core.reference.weight_gradient(p.dy, self.xq, self.sx, p.packed, p.scale, K, self.seeded(seed))

    def scale_gradient(self, seed: int) -> Array:
        p, ds = self.problem, np.zeros(len(self.problem.scale), F32)
        _core.vote(p.dy, self.xq, self.sx, p.packed, p.scale, K, control=self.seeded(seed), ds=ds)
        return ds

    @property
    def ds_variance(self) -> Array:
        return (self.h_variance * (self.codes @ self.xq[:, :K].T.astype(np.float64)) ** 2).sum(1)

    def input_gradient(self, seed: int) -> Array:
        p = self.problem
        return _core.linear_backward_input(p.dy, p.packed, p.scale, K, self.seeded(seed))

    def votes(self, seed: int) -> Array:
        """Residual after one vote into an empty one."""
        p = self.problem
        self.seeded(seed)
        p.planes["residual"][...] = 0
        self.control[CONTROL["micro"]] = 0
        _core.vote(p.dy, self.xq, self.sx, p.packed, p.scale, K, p.planes)
        return p.planes["residual"]

    def normalised(self) -> Array:
        """g / sqrt(R C / mean R), unclipped: what one vote is worth, from factors that keep it within a few units."""
        rng, planes = np.random.default_rng(5), self.problem.planes
        g = self.dw * (self.scale / self.control[CONTROL["grad_scale"]])[:, None]
        for name, axis in (("row_factor", 1), ("col_factor", 0)):
            size = rng.uniform(0.2, 4, g.shape[1 - axis])
            planes[name][...] = (g**2).mean(axis) * size
        r, c = (planes[name].astype(np.float64) for name in ("row_factor", "col_factor"))
        return g / np.sqrt(np.outer(r / r.mean(), c))


@pytest.mark.parametrize("rows", [False, True])
def test_input_gradient(rows: bool) -> None:
    layer = Layer(rows)
    g = layer.dy * layer.scale
    d = np.abs(g).max(1, keepdims=True) / 127
    variance = (rounding_variance(g / d) * d**2) @ layer.codes**2
    assert_converges(layer.input_gradient, g @ layer.codes, variance)


def test_weight_gradient() -> None:
    layer = Layer()
    assert_converges(layer.weight_gradient, layer.dw, layer.dw_variance)


def test_scale_gradient_by_row() -> None:
    layer = Layer()
    assert_converges(layer.scale_gradient, (layer.codes * layer.dw).sum(1), layer.ds_variance, 2.5)


def test_scale_gradient_of_a_tensor() -> None:
    """One number: its error has to be within five standard deviations at every number of seeds."""
    layer = Layer(rows=False)
    dense, variance = (layer.codes * layer.dw).sum(), layer.ds_variance.sum()
    for seeds, mean in means(layer.scale_gradient).items():
        assert abs(mean[0] - dense) < 5 * np.sqrt(variance / seeds)


@pytest.mark.parametrize("rows", [False, True])
def test_scale_gradient_is_the_slope_of_the_loss(rows: bool) -> None:
    """Central difference of L = sum(y dy) through the real forward; y is linear in s, so the step may be large."""
    layer = Layer(rows)
    p = layer.problem
    sides = [p.scale * F32(1.125), p.scale * F32(0.875)]
    up, down = ((_core.linear_forward(p.x, p.packed, s, N).astype(np.float64) * layer.dy).sum(0) for s in sides)
    width = sides[0].astype(np.float64) - sides[1]
    slope, variance = (up - down) / width, layer.ds_variance
    if not rows:
        slope, variance = slope.sum(keepdims=True), variance.sum(keepdims=True)
    mean = means(layer.scale_gradient)[4096]
    assert (np.abs(mean - slope) < 5 * np.sqrt(variance / 4096) + 1e-5 * np.abs(slope)).all()


def test_factors_are_mean_squares() -> None:
    """The measuring step: R and C against float64, for the gradient that the votes see."""
    layer = Layer()
    p, planes = layer.problem, layer.problem.planes
    layer.control[CONTROL["step"]] = 0
    g = layer.weight_gradient(7) * (layer.scale / layer.control[CONTROL["grad_scale"]])[:, None]
    _core.vote(p.dy, layer.xq, layer.sx, p.packed, p.scale, K, planes)
    _core.flip(p.packed, planes)
    np.testing.assert_allclose(planes["row_factor"], (g**2).mean(1), rtol=2e-6)
    np.testing.assert_allclose(planes["col_factor"], (g**2).mean(0), rtol=2e-6)


def test_votes_on_average() -> None:
    """Where only the vote rounds: E[e] = -128 eta guard clip(u), with some u clipped."""
    layer = Layer(exact=True)
    layer.control[CONTROL["eta"]], layer.control[CONTROL["clip"]] = 0.21, 1.3
    u, step = layer.normalised(), float(oracle.step_size(layer.control))
    clipped = np.clip(u, -1.3, 1.3)
    assert 0.1 < (clipped != u).mean() < 0.9
    assert_converges(layer.votes, step * clipped, rounding_variance(step * clipped))


def test_noisy_votes_on_average() -> None:
    """Where everything rounds and nothing is clipped, the votes still follow the dense float64 gradient."""
    layer = Layer()
    layer.control[CONTROL["eta"]], layer.control[CONTROL["clip"]] = 0.11, 1e4
    u, step = layer.normalised(), float(oracle.step_size(layer.control))
    assert np.abs(step * u).max() < 100
    per_gradient = np.divide(u, layer.dw, where=layer.dw != 0, out=np.zeros_like(u))
    from_hq = layer.dw_variance * (step * per_gradient) ** 2
    assert_converges(layer.votes, step * u, from_hq + 1 / 6)  # f is all but uniform: E[f (1 - f)] = 1/6


@pytest.mark.parametrize("micro", [0, 2])
def test_momentum_on_average(micro: int) -> None:
    """E[m] = beta1 m + (1 - beta1) clip(u) on the first micro-batch, m + (1 - beta1) clip(u) on a later one."""
    layer = Layer(exact=True)
    p, control = layer.problem, layer.control
    start = random_planes(np.random.default_rng(8), N, K, "residual8_momentum4")
    p.planes.update({name: start[name].copy() for name in ("momentum", "momentum_scale")})
    control[CONTROL["rule"]] = start["control"][CONTROL["rule"]]
    control[CONTROL["clip"]], beta1 = 1.3, control[CONTROL["beta1"]]
    u = np.clip(layer.normalised(), -1.3, 1.3)
    old = oracle.read_momentum(start)[:, :K].astype(np.float64)
    want = (old if micro else beta1 * old) + (1 - beta1) * u

    def vote(seed: int) -> Array:
        for name in ("momentum", "momentum_scale"):
            p.planes[name][...] = start[name]
        layer.seeded(seed)[CONTROL["micro"]] = micro
        _core.vote(p.dy, layer.xq, layer.sx, p.packed, p.scale, K, p.planes)
        return oracle.read_momentum(p.planes)[:, :K]

    vote(0)
    scale = oracle.as_float(p.planes["momentum_scale"]).astype(np.float64)
    assert_converges(vote, want, rounding_variance(want / scale) * scale**2)


def test_momentum_step_on_average() -> None:
    """E[e] = -128 eta guard m in the step; here no residual gets far enough to move a code."""
    layer = Layer()
    p, control = layer.problem, layer.control
    start = random_planes(np.random.default_rng(8), N, K, "residual8_momentum4")
    p.planes.update({name: start[name] for name in ("momentum", "momentum_scale")})
    control[CONTROL["rule"]] = start["control"][CONTROL["rule"]]
    control[CONTROL["eta"]] = 0.19
    saved = control.copy()
    want = oracle.read_momentum(p.planes)[:, :K].astype(np.float64) * float(oracle.step_size(control))
    assert 2 < np.abs(want).max() < 63

    def flip(seed: int) -> Array:
        p.planes["residual"][...] = 0
        control[...] = saved
        layer.seeded(seed)[CONTROL["micro"]] = 1
        assert _core.flip(p.packed, p.planes) == 0
        return p.planes["residual"]

    assert_converges(flip, want, rounding_variance(want))
