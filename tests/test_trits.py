"""Weights of 1.6 bits: the forward gives tile16's bits at every shape, instruction set and thread count."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import oracle
import pytest
import shapes
from hypothesis import given
from hypothesis import strategies as st
from oracle import BF16, F32
from shapes import EDGES, Problem, assert_same_bits, random_problem

import onebit_ext as ob
from onebit_ext import _core

ISAS = [i["name"] for i in _core.isas() if i["supported"]]
TRIT_EDGES = (*EDGES, 19, 20, 21, 39, 40, 41, 59, 61, 81, 97, 101)  # steps of 20 beside steps of 16


def check(p: Problem, what: str) -> None:
    n, k = p.dy.shape[1], p.x.shape[1]
    codes = oracle.unpack(p.packed, (n, k))
    packed = shapes.aligned(oracle.pack(codes, "trits5"))
    y, xq, sx = oracle.linear_forward(p.x, codes, p.scale, p.bias)
    for impl in (_core, _core.reference):
        got = {"xq": np.full_like(xq, 99), "sx": np.full_like(sx, 99)}
        got["y"] = impl.linear_forward(p.x, packed, p.scale, n, p.bias, **got, packing="trits5")
        got["kept nothing"] = impl.linear_forward(p.x, packed, p.scale, n, p.bias, packing="trits5")
        assert_same_bits(got, {"xq": xq, "sx": sx, "y": y, "kept nothing": y}, f"{what}, {p}")


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("name", ISAS)
def test_every_edge(name: str, threads: int, seed: int) -> None:
    """Each edge as M, N and K; M around the most tokens that are taken one by one."""
    _core.force_isa(name)
    _core.set_num_threads(threads)
    rng = np.random.default_rng(seed)
    columns = [rng.permutation(TRIT_EDGES) for _ in range(3)]
    for i, (m, n, k) in enumerate([*zip(*columns, strict=True), *((m, 70, 97) for m in range(14))]):
        p = random_problem(i, int(m), int(n), int(k), dtype=(F32, BF16)[i % 2], rows=i % 3 == 0, bias=i % 5 < 2)
        check(p, f"{name}, {threads} threads")


@given(
    m=st.integers(0, 20), n=st.integers(0, 200), k=st.integers(0, 400), seed=st.integers(0, 2**32),
    name=st.sampled_from(ISAS), threads=st.integers(1, 4),
)  # fmt: skip
def test_any_shape(m: int, n: int, k: int, seed: int, name: str, threads: int) -> None:
    _core.force_isa(name)
    _core.set_num_threads(threads)
    check(random_problem(seed, m, n, k), name)


@pytest.mark.parametrize("m", [1, 9])
def test_every_byte_in_every_place(isa: str, m: int) -> None:
    """All 243 bytes at each of the 256 places of a step, against activations that tell every code from every other."""
    every = np.array(np.meshgrid(*[[-1, 0, 1]] * 5)).reshape(5, -1).T.astype(np.int8)  # (243, 5)
    x = np.broadcast_to(np.arange(1, 101, dtype=F32), (m, 100)).copy()
    x[:, 0] = 127  # absmax 127: the activation codes are the integers themselves
    for shift in range(4):
        codes = np.zeros((243, 5, 5, 4), np.int8)
        for kk in range(4):
            codes[:, :, :, (kk + shift) % 4] = np.roll(every, 61 * kk, axis=0)[:, None, :]
        flat = np.roll(codes.reshape(243, 100), 16 * shift, axis=0)
        y = _core.linear_forward(x, _core.pack(flat, "trits5"), np.ones(1, F32), 243, packing="trits5")
        assert (y == x.astype(np.int64) @ flat.T.astype(np.int64)).all()


@pytest.mark.parametrize("k", [327_660, 327_680, 327_700, 655_361])
@pytest.mark.parametrize("m", [1, 10])
def test_long_rows(isa: str, m: int, k: int) -> None:
    """The largest sums, around the K at which a kernel empties its accumulators; 5 outputs."""
    for code, x in ((1, 127), (-1, 127), (1, -127), (-1, -127)):
        packed = _core.pack(np.full((5, k), code, np.int8), "trits5")
        y = _core.linear_forward(np.full((m, k), x, F32), packed, np.ones(1, F32), 5, packing="trits5")
        assert (y == F32(code * x * k)).all()


def test_nonfinite_tokens(isa: str) -> None:
    p = random_problem(1, 12, 70, 97)
    p.x[3, 96], p.x[7, 0] = np.nan, np.inf
    check(p, isa)


# ------------------------------------------------------------------ layers
def pair(packing: str = "trits5", bias: bool = True) -> tuple[ob.TernaryLinear, ob.TernaryLinear]:
    layer = ob.TernaryLinear(97, 70, scale="row", bias=bias, seed=3)
    layer.scale[...] = np.linspace(0.1, 1, 70, dtype=F32)
    layer.name = "up"
    return layer, layer.repack(packing)


def test_a_repacked_layer_computes_the_same() -> None:
    layer, small = pair()
    x = np.random.default_rng(1).standard_normal((3, 5, 97)).astype(F32)
    assert (layer.packing, small.packing, small.name) == ("tile16", "trits5", "up")
    assert small.packed.shape == (2, 5, 4, 16, 4) and small.packed.ctypes.data % 64 == 0
    assert np.array_equal(small.codes(), layer.codes())
    assert np.array_equal(small.packed, oracle.pack(layer.codes(), "trits5"))
    assert small.forward(x).tobytes() == layer.forward(x).tobytes()
    assert small.repack("tile16").packed.tobytes() == layer.packed.tobytes()
    assert np.shares_memory(small.scale, layer.scale) and small.bias is not None and layer.bias is not None
    assert np.shares_memory(small.bias, layer.bias) and pair(bias=False)[1].bias is None
    assert "packing='trits5'" in repr(small) and "packing='tile16'" in repr(layer)


def test_constructors() -> None:
    rng = np.random.default_rng(2)
    w, x, bias = (rng.standard_normal(s).astype(F32) for s in ((70, 97), (9, 97), (70,)))
    codes, scale = oracle.absmean(w)
    y = oracle.linear_forward(x, codes, scale, bias)[0]
    packed = ob.pack(codes, "trits5")
    made = [
        ob.TernaryLinear.from_float(w, bias, packing="trits5"),
        ob.TernaryLinear.from_codes(codes, scale, bias, packing="trits5"),
        ob.TernaryLinear.from_packed(packed, scale, (70, 97), bias, packing="trits5"),
    ]
    for layer in made:
        assert layer.packing == "trits5" and np.array_equal(layer.packed, packed)
        assert layer.forward(x).tobytes() == y.tobytes()
    assert np.shares_memory(made[2].packed, packed)
    a, b = (ob.TernaryLinear(97, 70, seed=5, packing=packing) for packing in ("tile16", "trits5"))
    assert np.array_equal(a.codes(), b.codes())
    for shape in ((0, 5), (5, 0)):
        assert ob.TernaryLinear(*shape, packing="trits5").codes().shape == shape[::-1]


def test_there_is_no_backward(tmp_path: Path) -> None:
    small = pair()[1]
    small.forward(np.ones((2, 97), F32))
    with pytest.raises(RuntimeError, match=r"packed as 'trits5' has a forward only: repack\('tile16'\) trains"):
        small.backward(np.ones((2, 70), F32))
    with pytest.raises(ValueError, match=r"'layers' must be packed as 'tile16', got 'trits5' at 0"):
        ob.FlipOptimizer([small])
    with pytest.raises(ValueError, match=r"save\(\): layer 'up' is packed as trits5"):
        ob.save(tmp_path / "x", {"up": small})
    assert not (tmp_path / "x").exists()


def test_refused_bytes() -> None:
    packed = ob.pack(np.zeros((70, 97), np.int8), "trits5")
    for byte, message in ((243, "reserved code"), (255, "reserved code"), (0, "padding")):
        wrong = shapes.aligned(packed)
        wrong[1, 4, 3, 15, 3] = byte
        with pytest.raises(ValueError, match=rf"from_packed\(\): 'packed' must hold ternary codes.*{message}"):
            ob.TernaryLinear.from_packed(wrong, 1.0, (70, 97), packing="trits5")
    for packing in ("rows4", "seq2", "tq1_0"):
        with pytest.raises(ValueError, match="'packing' must be one of 'tile16', 'trits5'"):
            ob.TernaryLinear(97, 70, packing=packing)
    with pytest.raises(ValueError, match="'packed' must be"):
        ob.linear_forward(np.ones((1, 97), F32), packed, np.ones(1, F32), 70)


@pytest.mark.parametrize("m", [1, 20])
def test_memory_that_runs_out(isa: str, m: int) -> None:
    layer, x = pair()[1], np.ones((m, 97), F32)
    want, failed = layer.forward(x), 0
    while True:
        _core.fail_allocation(failed + 1)
        try:
            y = layer.forward(x)
            break
        except MemoryError:
            failed += 1
        finally:
            _core.fail_allocation(-1)
    assert failed >= 1 and y.tobytes() == want.tobytes()
