"""The vote plane: micro-batches of a step are one batch, up to its grid; saving between them; recovery of dead rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import shapes
from oracle import CONTROL, F32, Array
from shapes import RULES, assert_same_bits, copy_planes

import onebit_ext as ob
from onebit_ext import _core

M, N, K = 96, 130, 70
MOVES_IN_VOTE = ("residual4", "residual2", "stochastic")


def normal(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(F32)


def begun(rule: str = "residual8", vote_plane: bool = True, **options: Any) -> tuple[Array, Array, dict[str, Array]]:
    """Codes and planes of a layer that has measured a gradient of rows and columns of many sizes."""
    codes = np.random.default_rng(3).integers(-1, 2, (N, K), np.int8)
    packed = ob.pack(codes)
    planes = ob.new_planes(N, K, rule, packed=packed, eta=0.1, cap=0, seed=2, vote_plane=vote_plane, **options)
    vote(packed, planes, *batch(0))
    ob.flip(packed, planes)
    return codes, packed, planes


def batch(seed: int) -> tuple[Array, Array]:
    x = normal(seed, M, K) * np.exp(normal(1, K))
    return x.astype(F32), (normal(seed + 99, M, N) * np.exp(normal(2, N)) / M).astype(F32)


def vote(packed: Array, planes: dict[str, Array], x: Array, dy: Array, parts: int = 1) -> Array:
    """Votes of a batch in parts; the sum of the integer gradients that they saw, float64."""
    one, g = np.ones(1, F32), np.zeros((N, K))
    for a, b in zip(np.split(x, parts), np.split(dy, parts), strict=True):
        _, xq, sx = oracle.linear_forward(a, oracle.unpack(packed, (N, K)), one)
        kept = np.ascontiguousarray(b), xq, sx, packed, one, K
        g += _core.reference.weight_gradient(*kept, planes["control"])
        _core.vote(*kept, planes)
    return g


@pytest.mark.parametrize("parts", [1, 4, 16])
def test_votes_and_factors_are_those_of_the_summed_gradient(isa: str, parts: int) -> None:
    _, packed, planes = begun()
    before = copy_planes(planes)
    x, dy = batch(7)
    x[:, :5], dy[:, :9] = x[:1, :5], dy[:1, :9]  # where the parts agree, far more than one number for all can say
    g = vote(packed, planes, x, dy, parts)
    r, c = before["row_factor"].astype(np.float64), before["col_factor"].astype(np.float64)
    u = g / np.sqrt(r / r.mean())[:, None] / np.sqrt(c)
    error = planes["votes"] - u * 1024
    assert np.abs(u).max() < 31
    independent = np.sqrt(parts / 6)  # the error of roundings that know nothing of each other; these cancel in part
    assert np.abs(error).max() < parts + 0.1 and 0.3 < error.std() / independent < (1.1 if parts == 1 else 0.9)
    assert not planes["residual"].any() and planes["control"][CONTROL["micro"]] == parts
    rho = (planes["sketch"].astype(np.float64) ** 2).sum() / planes["control"][CONTROL["sketch_energy"]]
    guessed = planes["row_sum"] * rho / (g**2).mean(1)
    assert parts == 1 or guessed.max() / guessed.min() > 2  # what the factors learn without the plane
    ob.flip(packed, planes)
    assert not planes["votes"].any()
    for name, axis in (("row_factor", 1), ("col_factor", 0)):
        fresh = (planes[name] - 0.95 * before[name]) / 0.05
        np.testing.assert_allclose(fresh, (g**2).mean(axis), rtol=0.01)


@pytest.mark.parametrize("rule", RULES)
def test_no_code_moves_before_the_step(isa: str, rule: str) -> None:
    codes, packed, planes = begun(rule)
    start = copy_planes(planes)
    planes["control"][CONTROL["eta"]] = 40
    for i in range(3):
        vote(packed, planes, *batch(i))
        assert np.array_equal(oracle.unpack(packed, (N, K)), codes)
        for name in ("residual", "momentum", "momentum_scale"):
            assert name not in planes or np.array_equal(planes[name], start[name])
    assert ob.flip(packed, planes) > N * K / 50
    if rule in MOVES_IN_VOTE:
        _, packed, planes = begun(rule, vote_plane=False)
        planes["control"][CONTROL["eta"]] = 40
        vote(packed, planes, *batch(0))
        assert not np.array_equal(oracle.unpack(packed, (N, K)), codes)


def test_dead_and_exploding_rows_and_columns_recover() -> None:
    """Where a factor was zero no vote tells; where it is 10^6 times too small the votes meet their bound."""
    _, packed, planes = begun()
    wanted = {name: planes[name].copy() for name in ("row_factor", "col_factor")}
    planes["row_factor"][:2] = 0, wanted["row_factor"][1] * F32(1e-6)
    planes["col_factor"][:2] = 0, wanted["col_factor"][1] * F32(1e-6)
    vote(packed, planes, *batch(0))
    ob.flip(packed, planes)
    for name, factor in wanted.items():
        assert (planes[name][:2] > 0.03 * factor[:2]).all() and (planes[name][:2] < 0.07 * factor[:2]).all()


@pytest.mark.parametrize("impl", [_core, _core.reference])
def test_sums_saturate(isa: str, impl: Any) -> None:
    p = shapes.random_problem(3, 30, 17, 70, held=True)
    p.planes["col_factor"][...] = 1e-30
    for votes in (1, 3):
        out = shapes.outputs(impl, p, votes)
        assert_same_bits(out, shapes.outputs(shapes.Oracle, p, votes), isa)
        assert np.abs(out["voted votes"]).max() in ((31744, 31745) if votes == 1 else (32767,))


# ------------------------------------------------------------------ the optimizer
OPTIONS: list[dict[str, Any]] = [{"rule": rule} for rule in RULES] + [{"rule": "residual4", "stripes": 3}]


def pair(seed: int = 9, **options: Any) -> tuple[ob.TernaryLinear, ob.FlipOptimizer]:
    layer = ob.TernaryLinear(K, N, scale="row", bias=True, seed=seed)
    return layer, ob.FlipOptimizer([layer], lr=0.3, seed=3, **options)


def run(layer: ob.TernaryLinear, opt: ob.FlipOptimizer, first: int, last: int) -> None:
    """Micro-batches, three a step."""
    for micro in range(first, last):
        layer.forward(normal(micro, 5, K))
        layer.backward(normal(micro + 500, 5, N))
        if micro % 3 == 2:
            opt.step()
            opt.zero_grad()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_resuming_between_micro_batches_is_exact(options: dict[str, Any], tmp_path: Path) -> None:
    layer, opt = pair(**options, vote_plane=True)
    if opt.stripes > 1:
        opt.rotate()
    assert opt.vote_plane
    run(layer, opt, 0, 9)
    assert "votes" not in opt.state_dict()["layers"][0]  # between steps there is nothing to keep
    run(layer, opt, 9, 11)
    assert opt.state_dict()["layers"][0]["votes"].any()
    ob.save(tmp_path / "run", {"fc": layer}, opt)
    loaded = ob.load(tmp_path / "run")
    copy, other = loaded.layers["fc"], loaded.optimizer
    assert other is not None and other.vote_plane
    run(layer, opt, 11, 24)
    run(copy, other, 11, 24)
    assert np.array_equal(copy.packed, layer.packed) and np.array_equal(copy.scale, layer.scale)
    assert layer.planes is not None and copy.planes is not None
    assert_same_bits(dict(copy.planes), dict(layer.planes), options)
    ob.save(tmp_path / "whole", {"fc": layer}, opt)
    whole = ob.load(tmp_path / "whole")
    assert whole.optimizer is not None and whole.optimizer.vote_plane and whole.layers["fc"].planes is not None
    assert_same_bits(dict(whole.layers["fc"].planes), dict(layer.planes), options)


def test_between_micro_batches_the_plane_cannot_come_or_go() -> None:
    for vote_plane in (False, True):
        layer, opt = pair(vote_plane=vote_plane)
        run(layer, opt, 0, 6)
        step = opt.state_dict()
        run(layer, opt, 6, 8)
        micro = opt.state_dict()
        fresh, other = pair(vote_plane=not vote_plane)
        with pytest.raises(ValueError, match="saved between micro-batches of an optimizer with"):
            other.load_state_dict(micro)
        assert fresh.planes is not None and fresh.planes["control"][CONTROL["step"]] == 0
        other.load_state_dict(step)  # between steps it can
        run(fresh, other, 6, 9)


def test_loading_between_steps_empties_the_plane() -> None:
    layer, opt = pair(vote_plane=True)
    run(layer, opt, 0, 6)
    state = opt.state_dict()
    run(layer, opt, 6, 8)
    opt.load_state_dict(state)
    assert layer.planes is not None and not layer.planes["votes"].any()
    state["layers"][0]["votes"] = np.zeros((N, K + 1), np.int16)
    with pytest.raises(ValueError, match="'votes' must be int16 of shape"):
        opt.load_state_dict(state)
