"""NaN, infinities, -0 and subnormals at every lane and tile edge; the caller's floating-point environment."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import oracle
import pytest
import shapes
from oracle import BF16, CONTROL, F32, NAN, Array
from shapes import RULES, Oracle, Problem, assert_same_bits, copy_planes, outputs, random_problem

from onebit_ext import _core

IMPLEMENTATIONS = [_core, _core.reference]
M, N, K = 9, 69, 83
BAD = {
    "nan": 0x7FC00000,
    "negative nan": 0xFFC00000,
    "nan with a payload": 0x7F812345,  # signalling as float32; its upper half is a NaN too
    "inf": 0x7F800000,
    "-inf": 0xFF800000,
}


def number(bits: int) -> Any:
    return np.array([bits], np.uint32).view(F32)[0]


def put(array: Array, at: tuple[int, int], bits: int) -> Array:
    """A copy of a float32 or bfloat16 array with the number of these float32 bits at `at`, bit for bit."""
    copy = array.copy()
    if array.dtype == F32:
        copy.view(np.uint32)[at] = bits
    else:
        copy.view(np.uint16)[at] = bits >> 16
    return copy


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("kind", BAD)
def test_token_is_not_finite(isa: str, impl: Any, dtype: Any, kind: str) -> None:
    """One bad entry, in every column: that token's y is the canonical NaN, every other bit is as before."""
    p = random_problem(31, M, N, K, dtype=dtype, rows=True, bias=True)
    clean = forward(impl, p, p.x)
    want = {name: array.copy() for name, array in clean.items()}
    for k in range(K):
        m = k % M
        got = forward(impl, p, put(p.x, (m, k), BAD[kind]))
        for name, array in clean.items():
            want[name][...] = array
            want[name][m] = 0 if name == "xq" else NAN.astype(array.dtype)
        assert_same_bits(got, want, f"{kind} at {m}, {k}, {isa}")


def forward(impl: Any, p: Problem, x: Array) -> dict[str, Array]:
    out = {"xq": np.zeros((M, 96), np.int8), "sx": np.zeros(M, F32)}
    return {"y": impl.linear_forward(x, p.packed, p.scale, N, p.bias, **out), **out}


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("kind", BAD)
def test_gradient_is_not_finite(isa: str, impl: Any, dtype: Any, kind: str) -> None:
    """dX: NaN for that token alone.  Votes: ds and db become NaN, two counters count, nothing else changes."""
    p = random_problem(32, M, N, K, dtype=dtype, micro=2)
    _, xq, sx = oracle.linear_forward(p.x, oracle.unpack(p.packed, (N, K)), p.scale)
    clean = impl.linear_backward_input(p.dy, p.packed, p.scale, K, p.planes["control"])
    for n in range(N):
        m = n % M
        dy = put(p.dy, (m, n), BAD[kind])
        control = p.planes["control"].copy()
        want = clean.copy()
        want[m] = NAN.astype(dtype)
        dx = impl.linear_backward_input(dy, p.packed, p.scale, K, control)
        assert_same_bits({"dx": dx}, {"dx": want}, f"{kind} at {m}, {n}, {isa}")
        assert control[CONTROL["nonfinite"]] == 1
        check_no_vote(impl, p, dy, xq, sx)


def check_no_vote(impl: Any, p: Problem, dy: Array, xq: Array, sx: Array) -> None:
    for rule in RULES:
        planes = copy_planes(p.planes)
        if rule != "residual8":
            planes = shapes.random_planes(np.random.default_rng(1), N, K, rule, micro=2)
        want = copy_planes(planes)
        want["control"][CONTROL["nonfinite"]] += 1
        want["control"][CONTROL["micro"]] += 1
        ds, db = np.ones(1, F32), np.ones(N, F32)
        impl.vote(dy, xq, sx, p.packed, p.scale, K, planes, ds=ds, db=db)
        nans = {"ds": np.full(1, NAN), "db": np.full(N, NAN)}
        assert_same_bits({**planes, "ds": ds, "db": db}, {**want, **nans}, rule)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("m", [0, 3, M - 1])
def test_no_vote_after_a_bad_token(isa: str, impl: Any, m: int) -> None:
    """sx is NaN where the forward met a non-finite token: the weight side sees it although dy is finite."""
    p = random_problem(33, M, N, K, micro=2)
    _, xq, sx = oracle.linear_forward(p.x, oracle.unpack(p.packed, (N, K)), p.scale)
    sx[m] = NAN
    check_no_vote(impl, p, p.dy, xq, sx)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_bad_gradient_in_the_last_chunk(isa: str, impl: Any) -> None:
    """Votes of the first 65,536 tokens must not be cast if a later token turns out bad."""
    m = _core.TOKENS_PER_VOTE + 1
    p = random_problem(34, m, 2, 3)
    _, xq, sx = oracle.linear_forward(p.x, oracle.unpack(p.packed, (2, 3)), p.scale)
    p.dy[-1, 1] = np.inf
    planes, want = copy_planes(p.planes), copy_planes(p.planes)
    want["control"][CONTROL["nonfinite"]] += 1
    want["control"][CONTROL["micro"]] += 2
    impl.vote(p.dy, xq, sx, p.packed, p.scale, 3, planes)
    assert_same_bits(planes, want, isa)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_overflow_of_a_finite_gradient(isa: str, impl: Any, dtype: Any) -> None:
    """dy is finite but dy * s and dy * sx are not."""
    p = random_problem(35, M, N, K, dtype=dtype)
    p.scale[...] = 100
    p.x[4] = 1e30
    p.dy[4, 7] = 3e38
    for problem in (p, random_problem(36, M, N, K, dtype=dtype)):
        assert_same_bits(outputs(impl, problem), outputs(Oracle, problem), isa)
    dx = impl.linear_backward_input(p.dy, p.packed, p.scale, K, p.planes["control"].copy())
    assert np.isnan(dx[4].astype(F32)).all() and not np.isnan(dx[5].astype(F32)).any()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_every_nan_is_the_canonical_one(isa: str, impl: Any, dtype: Any) -> None:
    """0 * inf, inf - inf and NaN of any sign and payload in scale, bias and tokens: all give one NaN."""
    p = random_problem(37, M, N, K, dtype=dtype, rows=True, bias=True)
    assert p.bias is not None
    for i, bits in enumerate(BAD.values()):
        p.scale[i::16] = p.bias[i + 1 :: 9] = number(bits)
        p.x = put(p.x, (i, 3 * i), bits)
    p.x[7] = 1e38  # with the scale below, sx * s overflows: 0 * inf where the product is 0
    p.scale[9] = 1e4
    got, want = forward(impl, p, p.x), forward(Oracle, p, p.x)
    assert_same_bits(got, want, isa)
    nans = np.isnan(want["y"].astype(F32))
    bits = got["y"][nans].view(np.uint32 if dtype is F32 else np.uint16)
    assert nans.sum() > 100 and set(bits.tolist()) == {0x7FC00000 if dtype is F32 else 0x7FC0}
    control = p.planes["control"]
    dx = impl.linear_backward_input(p.dy, p.packed, p.scale, K, control.copy())
    want_dx = Oracle.linear_backward_input(p.dy, p.packed, p.scale, K, control.copy())
    assert_same_bits({"dx": dx}, {"dx": want_dx}, isa)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("rule", RULES)
def test_vote_that_is_not_a_number(isa: str, impl: Any, rule: str) -> None:
    """0 * inf and inf * 0 in u: from a row whose R is tiny beside the others', and from a column whose C is zero."""
    p = random_problem(38, 40, N, K, rule=rule)
    p.dy *= F32(1e28)
    p.x[:, 5] = 0  # acc is 0 in this column
    p.planes["row_factor"][...] = 1
    p.planes["row_factor"][::3] = 1e-42
    p.planes["col_factor"][...] = 1
    p.planes["col_factor"][::4] = 0
    want = outputs(Oracle, p, votes=1)
    assert_same_bits(outputs(impl, p, votes=1), want, isa)
    if rule == "residual8":
        assert (want["voted residual"] == p.planes["residual"])[::3, [5, 8]].all()
        assert (want["voted residual"] != p.planes["residual"])[::3, [1, 2]].any()


def small_problems() -> Iterator[Problem]:
    """Zeros of both signs and subnormals wherever a kernel rounds, multiplies, divides or adds."""
    for i, (dtype, rule) in enumerate((d, r) for d in (F32, BF16) for r in RULES):
        p = random_problem(40 + i, M, N, K, dtype=dtype, rule=rule, rows=i % 2 == 0, bias=True)
        p.x[0], p.x[1], p.x[2, ::2] = 1e-40, -0.0, -0.0
        p.dy[0], p.dy[1], p.dy[:, 3], p.dy[2, ::2] = 1e-40, -0.0, 2.0**-120, -0.0
        yield p
        p = random_problem(50 + i, M, N, K, dtype=dtype, rule=rule, rows=i % 2 == 0, bias=True)
        p.scale *= F32(1e-37)  # y is subnormal
        assert p.bias is not None
        p.bias *= F32(1e-40)
        yield p
        p = random_problem(60 + i, M, N, K, dtype=dtype, rule=rule, rows=i % 2 == 0, bias=True)
        p.dy = (p.dy.astype(F32) * F32(2.0**-62)).astype(dtype)  # g^2 is subnormal
        for name in ("row_factor", "col_factor"):
            p.planes[name] *= F32(2.0**-120)
        yield p


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_small_numbers(isa: str, impl: Any) -> None:
    subnormal = 0
    for p in small_problems():
        want = outputs(Oracle, p)
        assert_same_bits(outputs(impl, p), want, f"{isa}, {p}")
        for array in want.values():
            if array.dtype in (F32, BF16):
                values = np.abs(array.astype(F32))
                subnormal += int(((values > 0) & (values < 2.0**-126)).sum())
    assert subnormal > 1000


@contextmanager
def float_environment(clear: int, set_: int) -> Iterator[None]:
    """Change bits of this thread's MXCSR (x86-64) or FPCR (aarch64) through fesetenv; restored afterwards."""
    word = 7 if platform.machine() in ("x86_64", "AMD64") else 0  # where fenv_t keeps it
    libm = ctypes.CDLL("libm.so.6")
    saved, changed = (ctypes.c_uint32 * 16)(), (ctypes.c_uint32 * 16)()
    libm.fegetenv(saved)
    ctypes.memmove(changed, saved, ctypes.sizeof(saved))
    changed[word] = (changed[word] & ~clear) | set_
    libm.fesetenv(changed)
    try:
        yield
        after = (ctypes.c_uint32 * 16)()
        libm.fegetenv(after)
        control_bits = 0xFFC0  # all but the sticky exception flags
        assert (after[word] ^ changed[word]) & control_bits == 0, "the call changed the environment"
    finally:
        libm.fesetenv(saved)


MODES = {
    "flush to zero": (0, 0x8040),  # FTZ and DAZ
    "toward zero": (0, 0x6000),
    "upward": (0x2000, 0x4000),
}


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="bits of MXCSR")
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_environment_of_the_caller(isa: str, mode: str, threads: int) -> None:
    """Flush-to-zero or another rounding in the caller neither changes our bits nor is changed by us."""
    clear, set_ = MODES[mode]
    _core.set_num_threads(threads)
    wanted = [(p, outputs(Oracle, p)) for p in small_problems()]
    rng = np.random.default_rng(3)
    w = (rng.normal(size=(N, K)) * 1e-5).astype(F32)
    packed, scale = oracle.pack(oracle.absmean(w)[0]), oracle.absmean(w)[1]
    with float_environment(clear, set_):
        _core.set_num_threads(threads + 1)  # a pool made under this mode must not inherit it
        got = [outputs(_core, p) for p, _ in wanted]
        means = _core.absmean(w)
    for out, (p, want) in zip(got, wanted, strict=True):
        assert_same_bits(out, want, f"{mode}, {isa}, {p}")
    means = dict(zip(("packed", "scale"), means, strict=True))
    assert_same_bits(means, {"packed": packed, "scale": scale}, mode)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="bits of MXCSR")
@pytest.mark.parametrize("mode", MODES)
def test_scale_step_under_the_environment_of_the_caller(mode: str) -> None:
    rng = np.random.default_rng(3)
    results = []
    for clear, set_ in ((0, 0), MODES[mode]):
        rng = np.random.default_rng(3)
        control = shapes.random_control(rng)
        state = [rng.uniform(0.01, 0.1, 50).astype(F32), *np.zeros((2, 50), F32)]
        grads = (rng.normal(size=(5, 50)) * 1e-19).astype(F32)
        with float_environment(clear, set_):
            for grad in grads:
                _core.scale_step(state[0], grad, state[1], state[2], control, 0.01)
        results.append(dict(zip(("s", "m", "v", "control"), (*state, control), strict=True)))
    assert_same_bits(results[1], results[0], mode)
