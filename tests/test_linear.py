"""Forward, dX and absmean against the NumPy oracle; optional arguments; degenerate sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import pytest
import shapes
from oracle import BF16, F32, Array
from shapes import assert_same_bits, random_problem

from onebit_ext import _core

IMPLEMENTATIONS = [_core, _core.reference]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_forward_and_dx(isa: str, impl: Any, dtype: Any, rows: bool, bias: bool) -> None:
    for m, n, k in ((13, 70, 33), (1, 1, 1), (9, 129, 200), (64, 64, 64)):
        p = random_problem(m, m, n, k, dtype=dtype, rows=rows, bias=bias, micro=2)
        codes = oracle.unpack(p.packed, (n, k))
        y, xq, sx = oracle.linear_forward(p.x, codes, p.scale, p.bias)
        dx, nonfinite = oracle.linear_backward_input(p.dy, codes, p.scale, p.planes["control"])
        got_xq, got_sx = np.empty_like(xq), np.empty_like(sx)
        got = {
            "y": impl.linear_forward(p.x, p.packed, p.scale, n, p.bias, xq=got_xq, sx=got_sx),
            "kept nothing": impl.linear_forward(p.x, p.packed, p.scale, n, p.bias),
            "dx": impl.linear_backward_input(p.dy, p.packed, p.scale, k, p.planes["control"]),
            "xq": got_xq,
            "sx": got_sx,
        }
        want = {"y": y, "kept nothing": y, "dx": dx, "xq": xq, "sx": sx}
        assert_same_bits(got, want, f"{isa}, {p}")
        assert nonfinite == 0 and np.abs(y.astype(F32)).max() > 0


def test_out_is_used(isa: str) -> None:
    p = random_problem(3, 5, 20, 30)
    out, dx = np.full((5, 20), 7, F32), np.full((5, 30), 7, F32)
    y = _core.linear_forward(p.x, p.packed, p.scale, 20, out=out)
    back = _core.linear_backward_input(p.dy, p.packed, p.scale, 30, p.planes["control"], out=dx)
    assert y is out and back is dx
    codes = oracle.unpack(p.packed, (20, 30))
    want_dx, _ = oracle.linear_backward_input(p.dy, codes, p.scale, p.planes["control"])
    want = {"y": oracle.linear_forward(p.x, codes, p.scale)[0], "dx": want_dx}
    assert_same_bits({"y": out, "dx": dx}, want, isa)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_no_inputs_give_the_bias(isa: str, impl: Any) -> None:
    p = random_problem(3, 4, 70, 0, bias=True)
    assert p.bias is not None
    y = impl.linear_forward(p.x, p.packed, p.scale, 70, p.bias)
    assert (y == p.bias).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_no_outputs_give_zero_dx(isa: str, impl: Any) -> None:
    p = random_problem(3, 4, 0, 70)
    dx = impl.linear_backward_input(p.dy, p.packed, p.scale, 70, p.planes["control"])
    assert dx.shape == (4, 70) and not dx.any()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_weight_codes_of_every_byte(isa: str, impl: Any) -> None:
    """Every byte without the reserved code, in every position of a tile, times every activation code."""
    codes = np.array(np.meshgrid(*[[-1, 0, 1]] * 4)).reshape(4, -1).T.astype(np.int8)  # (81, 4)
    tile = np.zeros((81, 64), np.int8)
    rng = np.random.default_rng(0)
    for first in range(16):
        tile[:, [first // 4 * 16 + first % 4 + 4 * p for p in range(4)]] = rng.permutation(codes)
    x = np.arange(-127, 128, dtype=F32)[:, None] * np.ones((1, 64), F32)
    x[:, 0] = 127  # absmax 127: the activation codes are the integers themselves
    p = shapes.pack(tile)
    one = np.ones(1, F32)
    y = impl.linear_forward(x, p, one, 81)
    assert (y == x.astype(np.int64) @ tile.T.astype(np.int64)).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_activation_codes_round_half_to_even(isa: str, impl: Any) -> None:
    x = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]], F32)
    xq, sx = np.empty((1, 16), np.int8), np.empty(1, F32)
    impl.linear_forward(x, shapes.pack(np.ones((1, 8), np.int8)), np.ones(1, F32), 1, xq=xq, sx=sx)
    assert xq[0, :8].tolist() == [127, 0, 2, 2, 0, -2, -2, 126] and sx[0] == 1


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_absmean(isa: str, impl: Any, dtype: Any) -> None:
    rng = np.random.default_rng(1)
    for n, k in ((1, 1), (63, 65), (64, 64), (130, 17), (0, 5), (5, 0), (33, 200)):
        w = (rng.normal(size=(n, k)) * 0.02).astype(F32).astype(dtype)
        codes, scale = oracle.absmean(w)
        packed, got = impl.absmean(w)
        want = {"packed": oracle.pack(codes), "scale": scale}
        assert_same_bits({"packed": packed, "scale": got}, want, f"absmean ({n}, {k})")


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_absmean_rounds_half_to_even_and_has_a_floor(impl: Any) -> None:
    packed, scale = impl.absmean(np.array([[0.5, -0.5, 1.5, 1.5]], F32))  # mean 1: ties at 1/2
    assert scale[0] == 1 and oracle.unpack(packed, (1, 4)).tolist() == [[0, 0, 1, 1]]
    packed, scale = impl.absmean(np.full((3, 3), 1e-6, F32))
    assert scale[0] == F32(1e-5) and not oracle.unpack(packed, (3, 3)).any()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_absmean_refuses_nonfinite(impl: Any, bad: float) -> None:
    w = np.zeros((5, 70), F32)
    w[4, 69] = bad
    with pytest.raises(ValueError, match=r"absmean\(\)"):
        impl.absmean(w)


def votes_without_planes(impl: Any, p: shapes.Problem, want_ds: bool, want_db: bool) -> dict[str, Array]:
    m, k = p.x.shape
    _, xq, sx = oracle.linear_forward(p.x, oracle.unpack(p.packed, (p.dy.shape[1], k)), p.scale)
    out = {}
    if want_ds:
        out["ds"] = np.full(len(p.scale), 0.5, F32)
    if want_db:
        out["db"] = np.full(p.dy.shape[1], 0.5, F32)
    control = p.planes["control"].copy()
    impl.vote(p.dy, xq, sx, p.packed, p.scale, k, control=control, **out)
    assert (control == p.planes["control"]).all()
    return out


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("want_ds, want_db", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("rows", [False, True])
def test_vote_without_planes(isa: str, impl: Any, want_ds: bool, want_db: bool, rows: bool) -> None:
    """A layer that trains only its scale or bias: gradients, and nothing else is touched."""
    p = random_problem(8, 37, 67, 70, rows=rows, micro=3)
    want = votes_without_planes(shapes.Oracle, p, want_ds, want_db)
    assert_same_bits(votes_without_planes(impl, p, want_ds, want_db), want, f"{isa}, {p}")
