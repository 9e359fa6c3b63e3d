"""The optimizer means what it says: whole runs and single steps against the NumPy oracle, bit for bit."""

from __future__ import annotations

import copy
import functools
from typing import Any

import numpy as np
import oracle
import pytest
import shapes
from oracle import BF16, CONTROL, F32, Array, Planes
from shapes import RULES, Oracle, assert_same_bits, copy_planes, random_control, random_planes

from onebit_ext import _core

IMPLEMENTATIONS = [_core, _core.reference]
N, K, M = 40, 70, 24


def test_control_fields() -> None:
    assert _core.CONTROL == CONTROL
    assert _core.RULES == RULES


class Run:
    """A regression that one ternary layer learns: y = x . teacher; loss gradient dy = y - target."""

    def __init__(self, impl: Any, rule: str, rows: bool, dtype: Any, stripes: int = 1) -> None:
        rng = np.random.default_rng(11)
        teacher = rng.integers(-1, 2, (N, K))
        self.impl, self.dtype = impl, dtype
        self.x = rng.normal(size=(64, M, K)).astype(F32).astype(dtype)
        self.target = (oracle.as_float(self.x) @ teacher.T.astype(F32) * F32(0.1)).astype(F32)
        planes = random_planes(rng, N, K, rule, step=0, stripes=stripes)
        control = planes["control"]
        for name, value in {
            "eta": 0.11, "eta_peak": 0.11, "guard": 1.0, "cap": 0.013, "clip": 2.3, "beta1": 0.83,
            "beta2": 0.91, "grad_scale": 64.0, "scale_init": 0.09, "beta1_power": 1.0,
            "beta2_power": 1.0,
        }.items():  # fmt: skip
            control[CONTROL[name]] = value
        for name, plane in planes.items():
            if name != "control":
                plane[...] = 0
        length, codes = N if rows else 1, rng.integers(-1, 2, (N, K), np.int8)
        oracle.start_residual(codes, planes)
        self.state: dict[str, Any] = {
            "packed": shapes.pack(codes),
            "scale": np.full(length, 0.09, F32),
            "exp_avg": np.zeros(length, F32),
            "exp_avg_sq": np.zeros(length, F32),
            "planes": planes,
        }

    def step(self, i: int) -> float:
        """One step of 1 to 3 micro-batches under a learning-rate schedule; returns the loss."""
        s, k = self.state, K
        control = s["planes"]["control"]
        control[CONTROL["eta"]] = 0.11 * (1 + i % 7) / 7
        ds, loss = np.zeros(len(s["scale"]), F32), 0.0
        for j in range(1 + i % 3):
            batch = (i * 3 + j) % len(self.x)
            x, xq, sx = self.x[batch], np.zeros((M, 80), np.int8), np.zeros(M, F32)
            y = self.impl.linear_forward(x, s["packed"], s["scale"], N, xq=xq, sx=sx)
            error = oracle.as_float(y) - self.target[batch]
            dy = (error * F32(64)).astype(self.dtype)
            self.impl.vote(dy, xq, sx, s["packed"], s["scale"], k, s["planes"], ds=ds)
            loss += float((error.astype(np.float64) ** 2).mean())
        self.impl.flip(s["packed"], s["planes"])
        scale_step = oracle.scale_step if self.impl is Oracle else _core.scale_step
        scale_step(s["scale"], ds, s["exp_avg"], s["exp_avg_sq"], control, 0.003)
        return loss / (1 + i % 3)

    def reload(self) -> None:
        """Continue from a copy of the state, as after saving and loading it."""
        state = copy.deepcopy(self.state)
        state["packed"] = shapes.aligned(state["packed"])
        self.state = state

    def snapshot(self) -> dict[str, Array]:
        flat = {name: a for name, a in self.state.items() if name != "planes"}
        return {**flat, **self.state["planes"]}


@functools.cache
def oracle_run(
    rule: str, rows: bool, dtype: Any, steps: int = 200, stripes: int = 1
) -> list[tuple[float, dict[str, Array]]]:
    """Loss and state after each step of the oracle."""
    run = Run(Oracle, rule, rows, dtype, stripes)
    return [(run.step(i), {name: a.copy() for name, a in run.snapshot().items()}) for i in range(steps)]


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("rule", RULES[:2])
def test_200_steps(isa: str, rule: str, rows: bool, dtype: Any) -> None:
    run, losses, moved = Run(_core, rule, rows, dtype), [], 0
    for i, (loss, state) in enumerate(oracle_run(rule, rows, dtype)):
        losses.append(run.step(i))
        moved += int(run.state["planes"]["control"][CONTROL["moved"]])
        assert_same_bits(run.snapshot(), state, f"{isa}, {rule}, step {i}")
        assert losses[-1] == loss
        if i % 20 == 19:
            run.reload()
    assert np.mean(losses[-20:]) < 0.5 * np.mean(losses[:20]) and moved > N * K / 10


@pytest.mark.parametrize("stripes", [1, 3])
@pytest.mark.parametrize("rule", RULES[2:])
def test_50_steps(isa: str, rule: str, stripes: int) -> None:
    """The other rules, and every third row alone."""
    run, moved = Run(_core, rule, stripes == 1, F32, stripes), 0
    for i, (loss, state) in enumerate(oracle_run(rule, stripes == 1, F32, 50, stripes)):
        assert run.step(i) == loss
        moved += int(run.state["planes"]["control"][CONTROL["moved"]])
        assert_same_bits(run.snapshot(), state, f"{isa}, {rule}, step {i}")
        if i % 20 == 19:
            run.reload()
    assert moved > N * K / stripes / 50


def residual_layer(residual: Array, codes: Array, **control: float) -> tuple[Array, Planes]:
    n, k = codes.shape
    planes = random_planes(np.random.default_rng(0), n, k, "residual8", step=3, micro=1)
    planes["residual"][...] = residual
    for name, value in control.items():
        planes["control"][CONTROL[name]] = value
    return shapes.pack(codes), planes


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_every_residual_and_code(isa: str, impl: Any) -> None:
    """All 256 residuals x 3 codes: who moves, what stays, saturation at +-1."""
    e = np.tile(np.arange(-128, 128), (3, 1)).astype(np.int8)
    codes = np.repeat(np.array([[-1], [0], [1]], np.int8), 256, axis=1)
    packed, planes = residual_layer(e, codes)
    assert impl.flip(packed, planes) == 2 * (63 + 64)
    after, residual = oracle.unpack(packed, codes.shape), planes["residual"]
    for t in (-1, 0, 1):
        for value in range(-128, 128):
            moved = 1 if value > 64 and t < 1 else -1 if value < -64 and t > -1 else 0
            left = value - 128 * moved if moved else min(max(value, -64), 64)
            at = t + 1, value + 128
            assert (after[at], residual[at]) == (t + moved, left), (t, value)


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_votes_saturate(isa: str, impl: Any, rule: str, held: bool) -> None:
    """No vote is too large: the largest eta and clip there are leave residuals at their bounds."""
    p = shapes.random_problem(3, 30, 17, 70, rule=rule, held=held)
    for name, value in {"eta": 1e6, "clip": 1e6, "cap": 0, "guard": 1}.items():
        p.planes["control"][CONTROL[name]] = value
    out, want = shapes.outputs(impl, p), shapes.outputs(Oracle, p)
    assert_same_bits(out, want, f"{isa} {p}")
    if rule in ("residual8", "byte") and not held:
        assert out["voted residual"].min() == -127 and out["voted residual"].max() == 127


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "moved, eta, peak, cap, guard, want",
    [
        (0, 0.5, 0.5, 0.1, 0.5, 0.5 * 1.05),  # nothing moved: up
        (0, 0.5, 0.5, 0.1, 0.99, 1.0),  # never above 1
        (20, 0.5, 0.5, 0.2, 0.5, 0.5 * (0.2 / (20 / 100))),  # exactly at the cap
        (100, 0.5, 0.5, 0.1, 0.5, 0.5 * 0.8),  # far above: .8
        (100, 0.5, 0.5, 0.1, 0.0011, 1e-3),  # never below 1e-3
        (20, 0.25, 0.5, 0.4, 0.5, 0.5 * ((0.4 * (0.25 / 0.5)) / (20 / 100))),  # schedule
        (20, 0.5, 0.1, 0.19, 0.5, 0.5 * (0.19 / 0.2)),  # a new peak counts at once
        (100, 0.0, 0.5, 0.1, 0.5, 0.5),  # eta 0: unchanged
        (100, 0.5, 0.5, 0.0, 0.5, 0.5),  # no cap: unchanged
    ],
)
def test_guard(impl: Any, moved: int, eta: float, peak: float, cap: float, guard: float, want: float) -> None:
    residual = np.zeros((10, 10))
    residual.flat[:moved] = 65
    packed, planes = residual_layer(residual, np.zeros((10, 10), np.int8), eta=eta, eta_peak=peak, cap=cap, guard=guard)
    assert impl.flip(packed, planes) == moved
    control = planes["control"]
    assert control[CONTROL["guard"]] == pytest.approx(want, rel=1e-15)
    assert control[CONTROL["eta_peak"]] == max(eta, peak)
    assert control[CONTROL["moved"]] == moved


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("rule", RULES)
def test_unused_layer(isa: str, impl: Any, rule: str) -> None:
    """No micro-batch since the last step: not a bit changes."""
    p = shapes.random_problem(4, 5, 33, 70, rule=rule, micro=0)
    before = {"packed": p.packed.copy(), **copy_planes(p.planes)}
    assert impl.flip(p.packed, p.planes) == 0
    assert_same_bits({"packed": p.packed, **p.planes}, before, isa)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("rule", RULES)
def test_first_step_only_measures(isa: str, impl: Any, rule: str) -> None:
    p = shapes.random_problem(4, 21, 33, 70, rule=rule, step=0)
    out = shapes.outputs(impl, p)
    for name in ("residual", "momentum", "momentum_scale"):
        if name in p.planes:
            assert (out[f"flipped {name}"] == p.planes[name]).all()
    assert (out["packed"] == p.packed).all() and out["moved"] == 0
    assert out["flipped control"][CONTROL["step"]] == 1
    assert (out["flipped row_factor"] > 0).any() and not out["flipped row_sum"].any()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("step", [0, 5])
def test_micro_batches_with_the_sketch(isa: str, impl: Any, rule: str, step: int) -> None:
    """Four different micro-batches, one of them twice, then the step; factors see the sketch."""
    problems = [shapes.random_problem(s, 19, 67, 130, rule=rule, step=step) for s in range(3)]
    first = problems[0]
    states = []
    for runner in (impl, Oracle):
        planes, packed = copy_planes(first.planes), shapes.aligned(first.packed)
        for p in (*problems, problems[1]):
            _, xq, sx = oracle.linear_forward(p.x, oracle.unpack(packed, (67, 130)), first.scale)
            runner.vote(p.dy, xq, sx, packed, first.scale, 130, planes)
        assert planes["control"][CONTROL["micro"]] == 4
        voted = copy_planes(planes)
        runner.flip(packed, planes)
        states.append({"packed": packed, **planes, **{f"voted {n}": a for n, a in voted.items()}})
    assert_same_bits(states[0], states[1], f"{isa}, {rule}")
    voted = states[1]
    energy = voted["voted control"][CONTROL["sketch_energy"]]
    rho = (voted["voted sketch"].astype(np.float64) ** 2).sum() / energy
    assert 0.3 < rho < 3 and rho != 1
    if step == 0:
        want = voted["voted row_sum"] * F32(rho)
        np.testing.assert_allclose(states[0]["row_factor"], want, rtol=1e-6)


@pytest.mark.parametrize("copies, rho", [(1, 1.0), (4, 4.0)])
def test_equal_micro_batches_agree(isa: str, copies: int, rho: float) -> None:
    """Equal gradients a times: the factors are those of the summed gradient, a^2 of one."""
    p = shapes.random_problem(9, 64, 65, 66, step=0)
    p.dy[:, 0] = 0
    _, xq, sx = oracle.linear_forward(p.x, oracle.unpack(p.packed, (65, 66)), p.scale)
    single = copy_planes(p.planes)
    _core.vote(p.dy, xq, sx, p.packed, p.scale, 66, single)
    _core.flip(p.packed, single)
    planes = copy_planes(p.planes)
    for _ in range(copies):
        _core.vote(p.dy, xq, sx, p.packed, p.scale, 66, planes)
    _core.flip(p.packed, planes)
    live = single["row_factor"] > 0
    ratio = planes["row_factor"][live].sum() / single["row_factor"][live].sum()
    assert ratio == pytest.approx(copies * rho, rel=0.02)


@pytest.mark.parametrize("rule", RULES)
def test_discard(isa: str, rule: str) -> None:
    """A skipped step forgets sums and counters; votes stay, no code moves."""
    p = shapes.random_problem(4, 21, 33, 70, rule=rule, micro=2)
    planes, want = copy_planes(p.planes), copy_planes(p.planes)
    planes["control"][CONTROL["nonfinite"]] = want["control"][CONTROL["nonfinite"]] = 3
    _core.discard(planes)
    oracle.discard(want)
    assert_same_bits(planes, want, isa)
    assert planes["control"][CONTROL["micro"]] == 2 and not planes["sketch"].any()
    assert rule == "stochastic" or (planes["residual"] == p.planes["residual"]).all()
    for impl, state in ((_core, planes), (Oracle, want)):  # the next votes count alone
        packed = shapes.aligned(p.packed)
        _, xq, sx = oracle.linear_forward(p.x, oracle.unpack(packed, (33, 70)), p.scale)
        impl.vote(p.dy, xq, sx, packed, p.scale, 70, state)
        assert_same_bits(
            {"rho": oracle.in_order(np.square(state["sketch"], dtype=np.float64))[None]},
            {"rho": state["control"][CONTROL["sketch_energy"]][None]},
            "",
        )
    assert_same_bits(planes, want, isa)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 100])
def test_scale_step(isa: str, length: int) -> None:
    rng = np.random.default_rng(length)
    control = random_control(rng)
    control[CONTROL["beta1_power"]] = control[CONTROL["beta2_power"]] = 1
    got = [rng.uniform(0.01, 0.2, length).astype(F32), *np.zeros((2, length), F32)]
    want, other = [a.copy() for a in got], control.copy()
    for i in range(30):
        grad = (rng.normal(size=length) * 10.0 ** rng.integers(-9, 3, length)).astype(F32)
        lr = 0.5 if i == 20 else 0.01  # one step large enough to meet the floor
        _core.scale_step(got[0], grad, got[1], got[2], control, lr)
        oracle.scale_step(want[0], grad, want[1], want[2], other, lr)
        names = ("scale", "exp_avg", "exp_avg_sq", "control")
        assert_same_bits(
            dict(zip(names, (*got, control), strict=True)),
            dict(zip(names, (*want, other), strict=True)),
            f"{isa}, step {i}",
        )
        assert (F32(1) / (F32(1) / got[0]) == got[0]).all()
    assert (got[0] >= F32(1e-8)).all()
