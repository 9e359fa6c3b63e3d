"""The layers run on torch's OpenMP threads: as many, the same bits, none beside them, none of them in a fork's child.

In processes of their own: an OpenMP runtime, once asked for threads, keeps them.
"""

import os
import subprocess
import sys

import pytest
import torch

from onebit_ext import _core
from onebit_ext.torch.threads import openmp_of_torch

OPENMP = sys.platform == "linux" and torch.backends.openmp.is_available()
pytestmark = pytest.mark.skipif(not OPENMP, reason="torch does not use OpenMP here")

START = """
import os, signal, threading
import numpy as np, torch
import onebit_ext as ob
from onebit_ext import _core
from onebit_ext.torch.threads import openmp_of_torch

signal.alarm(60)
openmp = openmp_of_torch()
packed, scale = ob.random_codes(300, 200, 3), np.array([0.3], np.float32)
x = np.random.default_rng(1).standard_normal((70, 200), np.float32)

def forward():
    return ob.linear_forward(x, packed, scale, 300).tobytes()

def threads_of_process():
    return len(os.listdir("/proc/self/task"))
"""


def run(code: str, **environment: str) -> None:
    clean = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "ONEBIT_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-c", START + code], capture_output=True, text=True, timeout=120, env=clean | environment
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_torchs_runtime_is_found() -> None:
    path = openmp_of_torch()
    assert path is not None and os.path.exists(path)


def test_as_many_as_torch_has_unless_a_number_was_set() -> None:
    code = """
assert ob.num_threads() == torch.get_num_threads()
torch.set_num_threads(3)
assert ob.num_threads() == 3
ob.set_num_threads(2)
torch.set_num_threads(1)
assert ob.num_threads() == 2
"""
    run(code)
    run("torch.set_num_threads(1); assert ob.num_threads() == 3", ONEBIT_NUM_THREADS="3")
    run("assert ob.num_threads() == torch.get_num_threads() == 1", OMP_NUM_THREADS="1")


def test_the_same_bits_on_threads_of_either_kind() -> None:
    run("""
ob.set_num_threads(1)
expected = forward()
for threads in (2, 3, 7):
    torch.set_num_threads(threads)
    ob.set_num_threads(threads)
    _core.share_threads(openmp)
    shared = forward()
    _core.share_threads(None)
    assert shared == forward() == expected
""")


def test_no_threads_beside_torchs() -> None:
    run(
        """
torch.set_num_threads(3)
torch.rand(1 << 20).exp_()  # starts its threads
before = threads_of_process()
forward()
assert threads_of_process() == before
_core.share_threads(None)
ob.set_num_threads(3)
forward()
assert threads_of_process() == before + 2
""",
        OMP_NUM_THREADS="3",
    )


def test_the_child_of_a_fork_has_threads_of_its_own() -> None:
    run(
        """
torch.set_num_threads(3)
torch.rand(1 << 20).exp_()
expected = forward()
for _ in range(20):
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        os._exit(0 if forward() == expected and ob.num_threads() == 3 else 1)
    assert os.waitpid(child, 0)[1] == 0
assert forward() == expected
""",
        OMP_NUM_THREADS="3",
    )


def test_a_parent_that_computed_nothing_of_ours_may_fork() -> None:
    code = """
torch.set_num_threads(3)
torch.rand(1 << 20).exp_()
child = os.fork()
if child == 0:
    signal.alarm(20)
    os._exit(0 if len(forward()) == 70 * 300 * 4 else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    run(code, OMP_NUM_THREADS="3")


def test_another_number_than_torchs_ends_no_thread() -> None:
    code = """
torch.set_num_threads(5)
ob.set_num_threads(3)
def round():
    forward()
    torch.rand(1 << 20).exp_()
    return set(os.listdir("/proc/self/task"))
first = round()
assert all(round() == first for _ in range(10))
"""
    run(code, OMP_NUM_THREADS="5")


def test_callers_of_several_threads() -> None:
    run("""
torch.set_num_threads(3)
expected, got = forward(), []
def work():
    for _ in range(50):
        got.append(forward() == expected)
callers = [threading.Thread(target=work) for _ in range(4)]
for caller in callers:
    caller.start()
for caller in callers:
    caller.join()
assert len(got) == 200 and all(got)
""")


def test_only_a_loaded_runtime_lends_threads() -> None:
    before = _core.num_threads()
    for path in ("/nowhere/libgomp.so.1", "", torch.__file__):
        with pytest.raises(
            RuntimeError, match=r"share_threads\(\): 'openmp' must be the path of a loaded OpenMP runtime"
        ):
            _core.share_threads(path)
    assert _core.num_threads() == before
    with pytest.raises(TypeError):
        _core.share_threads(3)  # type: ignore[arg-type]
