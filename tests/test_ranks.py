"""average_residuals against NumPy: the floor of an exact mean with one uniform draw, whoever averages which share."""

from __future__ import annotations

import numpy as np
import pytest
from oracle_basics import draw

import onebit_ext as ob
from onebit_ext import _core

COMBINE = 8  # csrc/base/rng.h
COLUMNS = 37


def oracle(parts: np.ndarray, first: int, control: np.ndarray, stripes: int, stripe: int) -> np.ndarray:
    ranks, share = parts.shape
    position = np.arange(first, first + share)
    rows = position // COLUMNS * stripes + stripe
    draws = np.array(
        [
            draw(control, 0, COMBINE, np.array([row]), np.array([column])).item()
            for row, column in zip(rows, position % COLUMNS, strict=True)
        ]
    ).reshape(-1)
    j = draws.astype(np.int64) * ranks >> 32
    assert ranks == 1 or share < 100 or set(j) == set(range(ranks))
    return np.floor_divide(parts.astype(np.int64).sum(0) + j, ranks)


@pytest.mark.parametrize(("dtype", "bound"), [(np.int8, 127), (np.int16, 16256)])
@pytest.mark.parametrize(("stripes", "stripe"), [(1, 0), (3, 2)])
@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_mean_of_ranks(dtype: type, bound: int, stripes: int, stripe: int, ranks: int) -> None:
    rng = np.random.default_rng(ranks)
    control = ob.new_control(seed=5, layer=3)
    for name, value in {"step": 9, "stripes": stripes, "stripe": stripe}.items():
        control[_core.CONTROL[name]] = value
    parts = rng.integers(-bound, bound + 1, (ranks, 400)).astype(dtype)
    parts[:, :2] = bound, -bound
    out = np.empty(400, dtype)
    _core.average_residuals(parts, 23, COLUMNS, control, out=out)
    np.testing.assert_array_equal(out, oracle(parts, 23, control, stripes, stripe))


def test_shares_meet() -> None:
    """Many tasks or one, whole or cut anywhere: the same numbers."""
    control = ob.new_control(seed=1)
    parts = np.random.default_rng(0).integers(-127, 128, (3, 200_000)).astype(np.int8)
    whole, pieces = np.empty(200_000, np.int8), np.empty(200_000, np.int8)
    _core.average_residuals(parts, 0, 511, control, out=whole)
    for start, end in ((0, 65_537), (65_537, 65_540), (65_540, 200_000)):
        _core.average_residuals(parts[:, start:end].copy(), start, 511, control, out=pieces[start:end])
    np.testing.assert_array_equal(whole, pieces)
    assert abs(whole.astype(float).mean() - parts.astype(float).mean()) < 0.01  # unbiased


def test_no_ranks() -> None:
    with pytest.raises(ValueError, match="average_residuals.*'parts' must have 1 to 4096 rows, one a rank, got 0"):
        _core.average_residuals(np.empty((0, 3), np.int8), 0, 4, ob.new_control(), out=np.empty(3, np.int8))
