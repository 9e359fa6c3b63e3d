"""Forked and spawned processes compute, and compute the same bits. Rows 15 and 16 of the reliability table."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from onebit_ext import _core

M, N, K = 23, 192, 130
SHAPE = np.random.default_rng(5)
X = SHAPE.standard_normal((M, K)).astype(np.float32)
PACKED = _core.pack(SHAPE.integers(-1, 2, (N, K)).astype(np.int8))
SCALE = np.array([0.3], np.float32)


def forward(_: int = 0) -> bytes:
    return _core.linear_forward(X, PACKED, SCALE, N).tobytes()


def in_children(count: int, expected: bytes) -> list[int]:
    """Fork `count` children one by one; each computes under a ten-second alarm. Returns the bad exit statuses."""
    bad = []
    for _ in range(count):
        child = os.fork()
        if child == 0:
            signal.alarm(10)
            os._exit(0 if forward() == expected else 1)
        status = os.waitpid(child, 0)[1]
        if status:
            bad.append(status)
    return bad


def test_a_hundred_children_of_a_parent_that_used_the_pool() -> None:
    _core.set_num_threads(4)
    expected = forward()
    assert in_children(100, expected) == []
    assert forward() == expected


def test_fork_while_another_thread_computes() -> None:
    _core.set_num_threads(4)
    expected, stop = forward(), threading.Event()
    wrong: list[int] = []

    def busy() -> None:
        while not stop.is_set():
            if forward() != expected:
                wrong.append(1)

    workers = [threading.Thread(target=busy) for _ in range(2)]
    for worker in workers:
        worker.start()
    try:
        assert in_children(100, expected) == []
    finally:
        stop.set()
        for worker in workers:
            worker.join()
    assert not wrong


def test_a_grandchild_computes() -> None:
    _core.set_num_threads(3)
    expected = forward()
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        os._exit(0 if forward() == expected and in_children(3, expected) == [] else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_killed_child_leaves_the_parent_whole() -> None:
    _core.set_num_threads(4)
    expected = forward()
    child = os.fork()
    if child == 0:
        while True:
            forward()
    time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert forward() == expected


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_worker_processes_agree_with_the_parent(method: str) -> None:
    """As a DataLoader does: workers compute while the parent computes too."""
    _core.set_num_threads(2)
    expected = forward()
    with multiprocessing.get_context(method).Pool(2) as pool:
        pending = pool.map_async(forward, range(20))
        own: list[bytes] = [forward() for _ in range(20)]
        results = pending.get(timeout=60)
    assert set(results) | set(own) == {expected}


def at_threads(count: int, work: Callable[[], bytes]) -> bytes:
    _core.set_num_threads(count)
    return work()


def test_thread_count_changes_while_others_compute() -> None:
    expected, wrong = at_threads(1, forward), []

    def busy() -> None:
        for _ in range(200):
            if forward() != expected:
                wrong.append(1)

    workers = [threading.Thread(target=busy) for _ in range(3)]
    for worker in workers:
        worker.start()
    for i in range(60):
        assert at_threads((1, 2, 3, 5, 8)[i % 5], forward) == expected
    for worker in workers:
        worker.join()
    assert not wrong
