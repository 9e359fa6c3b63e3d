"""Every flip rule at the NumPy level: start of the residual, training against the oracle, stripes, resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import shapes
from oracle import CONTROL, Array
from shapes import RULES, assert_same_bits, random_planes

import onebit_ext as ob
from onebit_ext import _core

F32 = np.float32
N, K, M = 83, 70, 5


def normal(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(F32)


def as_oracle(planes: dict[str, Array], codes: Array) -> dict[str, Array]:
    """A copy of new planes with the residual that the oracle starts them with."""
    copy = {name: array.copy() for name, array in planes.items()}
    oracle.start_residual(codes, copy)
    return copy


# ------------------------------------------------------------------ planes
@pytest.mark.parametrize("vote_plane", [False, True])
@pytest.mark.parametrize("stripes", [1, 3])
@pytest.mark.parametrize("rule", RULES)
def test_new_planes(rule: str, stripes: int, vote_plane: bool) -> None:
    codes = np.random.default_rng(3).integers(-1, 2, (N, K), np.int8)
    packed = ob.pack(codes)
    for stripe in range(stripes):
        where = {"stripes": stripes, "stripe": stripe}
        planes = ob.new_planes(N, K, rule, packed=packed, seed=4, layer=6, **where, vote_plane=vote_plane)
        assert [planes["control"][CONTROL[name]] for name in ("rule", *where)] == [RULES.index(rule), *where.values()]
        assert_same_bits(planes, as_oracle(planes, codes), rule)
        specs = _core.plane_specs(N, K, rule, **where, vote_plane=vote_plane)
        assert specs == {name: (array.shape, array.dtype) for name, array in planes.items()}
        assert ("votes" in planes) is vote_plane
        assert len(planes["row_factor"]) == len(range(stripe, N, stripes))
        bits = sum(oracle.RULES[rule][:2])
        held = sum(planes[name].nbytes for name in ("residual", "momentum") if name in planes)
        assert held >= len(range(stripe, N, stripes)) * K * bits / 8
        random = random_planes(np.random.default_rng(0), N, K, rule, stripes=stripes)
        random["control"][CONTROL["stripe"]] = stripes // 2
        assert _core.saturated(packed, random) == oracle.saturated(codes, random)


def test_coarse_residuals_start_uniform_within_a_third_of_a_cell() -> None:
    codes, shares = ob.random_codes(512, 512, 1), {}
    t = oracle.unpack(codes, (512, 512))
    for rule in ("residual4", "residual4_momentum4", "residual2"):
        e = oracle.read_residual(ob.new_planes(512, 512, rule, seed=1))
        values, counts = np.unique(e, return_counts=True)
        shares[rule] = counts / e.size
        assert list(values) == ([-1, 0, 1] if rule == "residual2" else list(range(-4, 5)))
        assert abs((t * e).mean()) < 5 * np.sqrt((e**2.0).mean() * 2 / 3 / e.size)  # codes of the same seed
        for other in ({"seed": 2}, {"layer": 1}, {"seed": 1, "stripes": 2, "stripe": 1}):
            another = oracle.read_residual(ob.new_planes(512, 512, rule, **other))
            assert 0.05 < (another == e[: len(another)]).mean() < 0.5
    np.testing.assert_allclose(shares["residual4"], 1 / 9, atol=0.005)
    np.testing.assert_allclose(shares["residual2"], [2 / 9, 5 / 9, 2 / 9], atol=0.005)


def test_planes_must_be_those_that_control_names() -> None:
    packed, other = ob.random_codes(N, K), ob.random_codes(N + 64, K)
    with pytest.raises(ValueError, match=r"new_planes\(\): 'packed' must be given: rule byte"):
        ob.new_planes(N, K, "byte")
    with pytest.raises(ValueError, match="'stripe' must be an integer in"):
        ob.new_planes(N, K, stripes=3, stripe=3)
    planes = ob.new_planes(N, K)
    planes["control"][CONTROL["rule"]] = RULES.index("residual8_momentum4")
    with pytest.raises(ValueError, match="lacks the key 'momentum'.*residual8_momentum4"):
        ob.flip(packed, planes)
    planes["control"][CONTROL["rule"]] = RULES.index("stochastic")
    with pytest.raises(ValueError, match="must not have the key 'residual'"):
        ob.flip(packed, planes)
    planes["control"][CONTROL["rule"]] = RULES.index("residual16")
    with pytest.raises(TypeError, match="'residual' must be int16"):
        ob.flip(packed, planes)
    planes = ob.new_planes(N, K, stripes=3, stripe=1)
    assert ob.flip(packed, planes) == 0
    with pytest.raises(ValueError, match="'packed' must be uint8 of shape"):
        ob.flip(other, planes)
    planes["control"][CONTROL["stripe"]] = 3
    with pytest.raises(ValueError, match="'stripe' below 'stripes'"):
        ob.flip(packed, planes)


@pytest.mark.parametrize("impl", [_core, _core.reference])
def test_what_lies_beyond_the_last_column_stays(isa: str, impl: Any) -> None:
    """Padding of the codes, and of the blocks of coarse residuals."""
    for rule in ("residual4", "residual2", "stochastic", "residual4_momentum4"):
        p = shapes.random_problem(2, 40, 33, 70, rule=rule)
        p.planes["control"][[CONTROL["eta"], CONTROL["cap"]]] = 300, 0
        p.planes["control"][CONTROL["clip"]] = 9  # votes beyond the dead zones
        out = shapes.outputs(impl, p)
        assert out["moved"] > 100
        _core.validate(out["packed"], (33, 70))
        if rule != "stochastic":
            bits = oracle.RULES[rule][0]
            assert not oracle.read_fields(out["flipped residual"], bits, 128)[:, 70:].any()


@pytest.mark.parametrize("impl", [_core, _core.reference])
@pytest.mark.parametrize("rule", ["residual8", "residual4"])
def test_the_guard_takes_a_large_eta_as_its_limit(impl: Any, rule: str) -> None:
    def voted(eta: float, cap: float) -> Array:
        p = shapes.random_problem(2, 40, 33, 70, rule=rule)
        p.planes["control"][[CONTROL["eta"], CONTROL["cap"], CONTROL["guard"]]] = eta, cap, 0.75
        return shapes.outputs(impl, p, votes=1)["voted residual"]

    limit = _core.ETA_LIMIT
    assert limit == F32(0.06)
    assert np.array_equal(voted(5, 0.02), voted(limit, 0.02)) and np.array_equal(voted(limit, 0), voted(limit, 0.02))
    assert not np.array_equal(voted(5, 0), voted(limit, 0))
    assert not np.array_equal(voted(0.9 * limit, 0.02), voted(limit, 0.02))


# ------------------------------------------------------------------ the optimizer
OPTIONS = [
    *({"rule": rule} for rule in RULES),
    *({"rule": rule, "stripes": 3} for rule in ("residual8", "residual8_momentum8", "byte", "residual4", "stochastic")),
    *({"rule": rule, "vote_plane": True} for rule in RULES),
    {"rule": "residual4_momentum4", "stripes": 3, "vote_plane": True},
]


def pair(seed: int = 9, **options: Any) -> tuple[ob.TernaryLinear, ob.FlipOptimizer]:
    layer = ob.TernaryLinear(K, N, scale="row", bias=True, seed=seed)
    return layer, ob.FlipOptimizer([layer], **options)


def as_dict(planes: Any) -> dict[str, Array]:
    assert planes is not None
    return dict(planes)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_training_is_the_oracles(options: dict[str, Any]) -> None:
    cap = 0 if "stripes" in options else 0.02
    layer, opt = pair(lr=0.4, scale_lr=0, betas=(0.6, 0.85), flip_rate_cap=cap, seed=5, **options)
    codes, moved = layer.codes(), 0
    for step in range(16):
        if step % 4 == 0:
            if step and opt.stripes > 1:
                opt.rotate()
            assert opt.stripe == step // 4 % opt.stripes
            fresh = as_dict(layer.planes)
            assert fresh["control"][CONTROL["stripe"]] == opt.stripe
            if step == 0 or opt.stripes > 1:
                assert fresh["control"][CONTROL["step"]] == fresh["control"][CONTROL["moved"]] == 0
                planes = as_oracle(fresh, codes)
                assert_same_bits(fresh, planes, options)
        opt.zero_grad()
        ds, db = np.zeros(N, F32), np.zeros(N, F32)
        for micro in range(1 + step % 2):
            x, dy = normal(100 * step + micro, M, K), normal(100 * step + 50 + micro, M, N)
            y, xq, sx = oracle.linear_forward(x, codes, layer.scale, layer.bias)
            assert np.array_equal(layer.forward(x), y)
            dx, _ = oracle.linear_backward_input(dy, codes, layer.scale, planes["control"])
            assert np.array_equal(layer.backward(dy), dx)
            oracle.vote(dy, xq, sx, codes, layer.scale, planes, ds=ds, db=db)
        assert np.array_equal(layer.scale_grad, ds) and np.array_equal(layer.bias_grad, db)
        opt.step()
        moved += oracle.flip(codes, planes)
        powers = [CONTROL["beta1_power"], CONTROL["beta2_power"]]
        planes["control"][powers] = as_dict(layer.planes)["control"][powers]  # the scale's
        assert np.array_equal(layer.codes(), codes)
        assert_same_bits(as_dict(layer.planes), planes, options)
        (stats,) = opt.stats()
        assert stats["saturated"] == oracle.saturated(codes, planes) / (len(planes["row_factor"]) * K)
    assert moved > N * K / 50 and opt.rule == options["rule"]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_resuming_is_never_having_stopped(options: dict[str, Any], tmp_path: Path) -> None:
    def run(layer: ob.TernaryLinear, opt: ob.FlipOptimizer, steps: range) -> None:
        for step in steps:
            if opt.stripes > 1 and step % 4 == 2:
                opt.rotate()
            layer.forward(normal(step, M, K))
            layer.backward(normal(step + 500, M, N))
            opt.step()
            opt.zero_grad()

    layer, opt = pair(lr=0.3, seed=3, **options)
    run(layer, opt, range(9))
    assert opt.stripe == (2 if opt.stripes > 1 else 0)
    ob.save(tmp_path / "run", {"fc": layer}, opt)
    loaded = ob.load(tmp_path / "run")
    copy, other = loaded.layers["fc"], loaded.optimizer
    assert other is not None and (other.rule, other.stripes, other.stripe) == (opt.rule, opt.stripes, opt.stripe)
    run(layer, opt, range(9, 20))
    run(copy, other, range(9, 20))
    assert np.array_equal(copy.packed, layer.packed) and np.array_equal(copy.scale, layer.scale)
    assert_same_bits(as_dict(copy.planes), as_dict(layer.planes), options)


def test_a_state_of_other_rules_or_stripes_is_refused() -> None:
    layer, opt = pair(stripes=3)
    opt.rotate()
    state, before = opt.state_dict(), layer.planes
    for options in ({}, {"stripes": 2}, {"stripes": 3, "rule": "byte"}):
        _, other = pair(**options)
        with pytest.raises(ValueError, match="must"):
            other.load_state_dict(state)
        assert other.stripe == 0
    state["layers"][0]["row_sum"] = np.zeros(3, F32)
    fresh, other = pair(stripes=3)
    with pytest.raises(ValueError, match="row_sum"):
        other.load_state_dict(state)
    assert other.stripe == 0 and as_dict(fresh.planes)["control"][CONTROL["stripe"]] == 0
    assert before is not None


def test_choosing_a_rule() -> None:
    for options, rule in (
        ({"residual_bits": 16}, "residual16"),
        ({"residual_bits": 4, "momentum_bits": 4}, "residual4_momentum4"),
        ({"recipe": "pretrain", "residual_bits": 4}, "residual4_momentum4"),
        ({"momentum_bits": 8}, "residual8_momentum8"),
        ({"residual_bits": 2}, "residual2"),
        ({"rule": "byte", "recipe": "pretrain"}, "byte"),
    ):
        layer, opt = pair(**options)
        assert opt.rule == rule and f"rule={rule})" in repr(layer)
    with pytest.raises(ValueError, match="'rule' says the bits too"):
        pair(rule="byte", residual_bits=8)
    with pytest.raises(ValueError, match=r"must be one of \(8, 0\), .*\(0, 0\), got \(3, 0\)"):
        pair(residual_bits=3)
    with pytest.raises(RuntimeError, match="no other stripe"):
        pair()[1].rotate()


def test_more_stripes_than_rows() -> None:
    layer, opt = pair(stripes=N + 5)
    for step in range(N + 6):
        layer.forward(normal(step, M, K))
        layer.backward(normal(step, M, N))
        opt.step()
        assert len(as_dict(layer.planes)["row_factor"]) == (step % (N + 5) < N)
        opt.rotate()


def test_a_control_edited_behind_the_optimizer_moves_no_memory() -> None:
    """Which rows own planes is fixed when they are made: the control's copy of it is for those who store it."""
    for field, value in (("stripes", 1), ("stripe", 0), ("rule", 3), ("stripes", 2**40), ("stripe", np.nan)):
        layer, opt = pair(stripes=3, rule="residual8")
        opt.rotate()
        as_dict(layer.planes)["control"][CONTROL[field]] = value
        before = layer.codes()
        for step in range(6):
            layer.forward(normal(step, M, K))
            layer.backward(normal(step + 9, M, N))
            opt.step()
        moved = (layer.codes() != before).any(axis=1)
        assert not moved[0::3].any() and not moved[2::3].any()


@pytest.mark.parametrize("stripes", [1, 3])
def test_an_infinite_gradient_of_any_row_counts(stripes: int) -> None:
    layer, opt = pair(stripes=stripes)
    for n in range(3):
        layer.forward(normal(1, M, K))
        dy = normal(2, M, N)
        dy[2, n] = np.inf
        with pytest.raises(FloatingPointError):
            layer.backward(dy, input_grad=False)
        assert not layer.bias_grad.any() and not layer.scale_grad.any() and opt.stripes == stripes


# ------------------------------------------------------------------ numbers that turn
@pytest.mark.parametrize(
    ("rule", "parts", "rank"),
    [("residual8", 1, 0), ("residual8", 3, 0), ("residual8", 1, 5), ("residual8_momentum8", 1, 0)],
)
def test_rounding_errors_of_a_steady_vote_cancel(rule: str, parts: int, rank: int) -> None:
    """Votes of .384 units a step: 100 independent roundings would spread the residuals by 4.9 (momentum apart)."""
    n, k, steps = 40, 64, 100
    x, signs = np.ones((16, k), F32), np.where(np.arange(n) % 2, 1, -1).astype(F32)
    dy = np.ones((16, 1), F32) * signs * F32(0.5)  # +-127 at the top of their range: g is the same at every step
    packed, scale = ob.pack(np.zeros((n, k), np.int8)), np.ones(1, F32)
    planes = ob.new_planes(n, k, rule, eta=0.003, cap=0, seed=7, layer=2)
    for step in range(steps + 1):  # the first measures
        planes["control"][CONTROL["micro"]] = rank * 2.0**32
        for _ in range(parts):
            _, xq, sx = oracle.linear_forward(x, np.zeros((n, k), np.int8), scale)
            _core.vote(dy, xq, sx, packed, scale, k, planes)
        planes["control"][CONTROL["micro"]] = parts
        ob.flip(packed, planes)
        assert planes["control"][CONTROL["step"]] == step + 1
    u = 1 if "momentum" not in rule else 1 - 0.7 * (1 - 0.7**steps) / (1 - 0.7) / steps
    error = planes["residual"] * -signs[:, None] - steps * 0.384 * u
    assert np.abs(error.mean()) < 1 and 0.2 < error.std() < 1.5  # each weight has its own number


def test_rounding_errors_of_a_row_cancel(isa: str) -> None:
    """One vote of .384 units for each of 4,096 columns: independent roundings would miss their sum by 31."""
    n, k = 40, 4096
    x, dy = np.ones((16, k), F32), np.full((16, n), 0.5, F32)
    packed, scale = ob.pack(np.zeros((n, k), np.int8)), np.ones(1, F32)
    planes = ob.new_planes(n, k, "residual8", eta=0.003, cap=0, seed=7, layer=2)
    _, xq, sx = oracle.linear_forward(x, np.zeros((n, k), np.int8), scale)
    for _ in range(2):  # the first measures
        _core.vote(dy, xq, sx, packed, scale, k, planes)
        ob.flip(packed, planes)
    missed = (planes["residual"] + 0.384).cumsum(1)
    assert 0.3 < np.abs(missed).max() < 3
    assert len(np.unique(planes["residual"], axis=0)) > n // 2  # each row begins elsewhere
