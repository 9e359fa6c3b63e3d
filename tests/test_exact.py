"""Every kernel gives the bits of the naive reference: instruction sets x threads x shapes around every tile edge."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import shapes
from hypothesis import given
from hypothesis import strategies as st
from oracle import BF16, F32, Array
from shapes import EDGES, RULES, Oracle, Problem, assert_same_bits, outputs, random_problem

import onebit_ext
from onebit_ext import _core

ISAS = [i["name"] for i in _core.isas() if i["supported"]]
THREADS = (1, 2, 3, 5, 8)
GOLDEN = Path(__file__).parent / "golden" / "signature.json"
compared = {"outputs": 0}

Case = tuple[Problem, dict[str, Array]]


@pytest.fixture(scope="module")
def cases(seed: int) -> list[Case]:
    """Sampled problems with what the reference makes of them, itself checked against the oracle."""
    made = []
    for problem in shapes.sample_problems(seed, 4 * len(EDGES)):
        want = outputs(_core.reference, problem)
        assert_same_bits(outputs(Oracle, problem), want, f"oracle, {problem}")
        made.append((problem, want))
    return made


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("name", ISAS)
def test_training_step(name: str, threads: int, cases: list[Case]) -> None:
    _core.force_isa(name)
    _core.set_num_threads(threads)
    assert (_core.isa(), _core.num_threads()) == (name, threads)
    for problem, want in cases:
        what = f"{name}, {threads} threads, {problem}"
        compared["outputs"] += assert_same_bits(outputs(_core, problem), want, what)


def test_a_million_outputs_were_compared() -> None:
    assert compared["outputs"] >= 10**6
    print(f"{compared['outputs']:,} outputs compared, none differs")


@given(
    m=st.integers(0, 70),
    n=st.integers(0, 140),
    k=st.integers(0, 200),
    seed=st.integers(0, 2**32),
    dtype=st.sampled_from([F32, BF16]),
    rows=st.booleans(),
    bias=st.booleans(),
    rule=st.sampled_from(RULES),
    step=st.sampled_from([0, 1, 99]),
    votes=st.integers(0, 3),
    stripes=st.sampled_from([1, 1, 2, 3, 7]),
    held=st.booleans(),
    name=st.sampled_from(ISAS),
    threads=st.sampled_from(THREADS),
)
def test_any_shape(
    m: int,
    n: int,
    k: int,
    seed: int,
    dtype: type,
    rows: bool,
    bias: bool,
    rule: str,
    step: int,
    votes: int,
    stripes: int,
    held: bool,
    name: str,
    threads: int,
) -> None:
    p = random_problem(
        seed, m, n, k, dtype=dtype, rows=rows, bias=bias, rule=rule, step=step, stripes=stripes, held=held
    )
    _core.force_isa(name)
    _core.set_num_threads(threads)
    got = outputs(_core, p, votes)
    assert_same_bits(got, outputs(_core.reference, p, votes), p)
    assert_same_bits(got, outputs(Oracle, p, votes), p)


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("stripes", [1, 3])
@pytest.mark.parametrize("rule", RULES)
def test_every_rule(isa: str, rule: str, stripes: int, held: bool) -> None:
    """More rows than a block of column sums has, whole strips and a tail; every one moves codes."""
    for i, (m, n, k) in enumerate([(21, 33, 70), (5, 130, 200), (9, 600 * stripes, 65), (3, 2, 5), (0, 4, 7)]):
        p = random_problem(i, m, n, k, rule=rule, rows=i % 2 == 0, bias=True, stripes=stripes, held=held)
        if i == 1:
            p.planes["control"][_core.CONTROL["eta"]] *= 100
            p.planes["control"][_core.CONTROL["clip"]] = 9  # votes beyond the dead zones
        want = outputs(Oracle, p)
        assert_same_bits(outputs(_core.reference, p), want, p)
        assert_same_bits(outputs(_core, p), want, f"{isa}, {p}")
        assert i != 1 or (want["moved"] > 60 and (want["packed"] != p.packed).any())


@pytest.mark.parametrize(("stripes", "held"), [(1, False), (2, False), (1, True)])
@pytest.mark.parametrize("rule", RULES)
def test_long_batch_is_cut_into_micro_batches(isa: str, rule: str, stripes: int, held: bool) -> None:
    m = 2 * _core.TOKENS_PER_VOTE + 3
    problem = random_problem(5, m, 3, 5, rows=True, rule=rule, stripes=stripes, held=held)
    want = outputs(Oracle, problem, votes=1)
    assert want["voted control"][_core.CONTROL["micro"]] == 3
    assert_same_bits(outputs(_core.reference, problem, votes=1), want, problem)
    assert_same_bits(outputs(_core, problem, votes=1), want, f"{isa}, {problem}")


@pytest.mark.parametrize("rule", RULES)
def test_saturated_products(isa: str, rule: str) -> None:
    """All codes at the ends of their range: the largest sums that int8 x int8 can make."""
    m, n, k = 70, 66, 300
    problem = random_problem(6, m, n, k, rule=rule)
    for low, high in ((127, 127), (-127, 127), (-127, -127)):
        signs = np.where(np.arange(m)[:, None] % 2, low, high).astype(F32)
        problem.x = np.broadcast_to(signs, (m, k)).copy()
        problem.dy = np.broadcast_to(signs * F32(1e-3), (m, n)).copy()
        for code in (-1, 1):
            problem.packed = shapes.pack(np.full((n, k), code, np.int8))
            want = outputs(Oracle, problem)
            assert_same_bits(outputs(_core.reference, problem), want, problem)
            assert_same_bits(outputs(_core, problem), want, f"{isa}, {problem}")


@pytest.mark.parametrize("k", [262_128, 262_144, 262_160])
@pytest.mark.parametrize("m", [1, 2, 3])
def test_long_rows(isa: str, m: int, k: int) -> None:
    """The largest forward sums there are, around the K at which a kernel changes its accumulators."""
    for code, x in ((1, 127), (-1, 127), (1, -127), (-1, -127)):
        packed = shapes.aligned(np.full((1, k // 16, 4, 16, 4), 0x55 * (code + 1), np.uint8))
        y = _core.linear_forward(np.full((m, k), x, F32), packed, np.ones(1, F32), 3)
        assert (y == F32(code * x * k)).all()


def test_full_micro_batch(isa: str) -> None:
    """The largest sums of the weight side: 65,536 tokens at +-127 on both sides."""
    problem = random_problem(5, _core.TOKENS_PER_VOTE, 5, 3)
    problem.x[...], problem.dy[...] = 1, 1
    problem.x[:, 1] = problem.dy[:, 1] = -1
    assert_same_bits(outputs(_core, problem, 1), outputs(Oracle, problem, 1), isa)


@pytest.mark.parametrize("m", [2048, 2049, 4096])
def test_largest_sums_of_a_strip(isa: str, m: int) -> None:
    """All 64 products of a row and a code of 1 add up, around the tokens at which that leaves 32 bits."""
    problem = random_problem(8, m, 3, 128, rows=True)
    problem.x[...], problem.dy[...] = 1, 1
    problem.packed = shapes.pack(np.ones((3, 128), np.int8))
    assert_same_bits(outputs(_core, problem, 1), outputs(Oracle, problem, 1), isa)


@pytest.mark.parametrize("vote_plane", [False, True])
@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("name", ISAS)
def test_signature(name: str, threads: int, vote_plane: bool) -> None:
    """200 steps of a fixed tiny model end in the same bits on every machine."""
    _core.force_isa(name)
    _core.set_num_threads(threads)
    golden = json.loads(GOLDEN.read_text())["signature with vote plane" if vote_plane else "signature"]
    assert onebit_ext.signature(vote_plane) == golden
