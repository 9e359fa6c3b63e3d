"""Any thread count gives the same bits, also oversubscribed, again and again, and under concurrent callers."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import shapes
from oracle import BF16, F32, Array
from shapes import RULES, assert_same_bits, outputs, random_problem

from onebit_ext import _core


@pytest.fixture(
    scope="module", params=[("residual8", 1), ("residual8_momentum4", 3), ("residual2", 1), ("stochastic", 2)]
)
def case(request: pytest.FixtureRequest) -> tuple[shapes.Problem, dict[str, Array]]:
    """Large enough that every operation is cut into many tasks."""
    rule, stripes = request.param
    dtype = BF16 if rule == "residual8" else F32
    problem = random_problem(7, 151, 600, 330, dtype=dtype, rows=True, bias=True, rule=rule, stripes=stripes)
    return problem, outputs(_core.reference, problem)


@pytest.mark.parametrize("threads", [1, 2, 3, 4, 5, 7, 8, 16, 64, 256])
def test_any_number_of_threads(isa: str, threads: int, case: Any) -> None:
    problem, want = case
    _core.set_num_threads(threads)
    for _ in range(5 if threads <= 8 else 1):
        assert_same_bits(outputs(_core, problem), want, f"{isa}, {threads} threads")


def test_changing_the_number_again_and_again(case: Any) -> None:
    problem, want = case
    rng = np.random.default_rng(0)
    for threads in rng.integers(1, 9, 30):
        _core.set_num_threads(int(threads))
        assert_same_bits(outputs(_core, problem), want, f"{threads} threads")


@pytest.mark.parametrize("threads", [1, 3])
def test_concurrent_callers(isa: str, threads: int) -> None:
    """Eight Python threads train eight layers at once; one of them keeps changing nothing but its own."""
    _core.set_num_threads(threads)
    problems = [random_problem(s, 33, 70 + s, 90 - s, rule=RULES[s]) for s in range(8)]
    wanted = [outputs(_core.reference, p) for p in problems]
    start = threading.Barrier(8)

    def train(i: int) -> None:
        start.wait()
        for _ in range(20):
            assert_same_bits(outputs(_core, problems[i]), wanted[i], f"{isa}, caller {i}")

    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(train, i) for i in range(8)]:
            future.result()


def test_thread_count_changes_under_callers() -> None:
    problem = random_problem(3, 40, 200, 130)
    want = outputs(_core.reference, problem)
    stop = threading.Event()

    def change() -> None:
        rng = np.random.default_rng(1)
        while not stop.is_set():
            _core.set_num_threads(int(rng.integers(1, 6)))

    changer = threading.Thread(target=change)
    changer.start()
    try:
        for _ in range(100):
            assert_same_bits(outputs(_core, problem), want, "threads changing")
    finally:
        stop.set()
        changer.join()


@pytest.mark.parametrize("threads", [0, -1, 257, 2**70])
def test_refused(threads: int) -> None:
    before = _core.num_threads()
    with pytest.raises(ValueError, match=r"set_num_threads\(\)"):
        _core.set_num_threads(threads)
    assert _core.num_threads() == before
