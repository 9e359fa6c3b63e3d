"""The import: numpy only, fast, one state per module, instruction set by environment."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import onebit_ext as ob

ROOT = Path(__file__).resolve().parent.parent


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)


def test_the_import_needs_numpy_only() -> None:
    code = """
import sys
class Wall:
    def find_spec(self, name, path=None, target=None):
        root = name.split('.')[0]
        if root not in sys.stdlib_module_names and root not in ('numpy', 'onebit_ext'):
            raise ImportError(f'{name} is behind the wall')
sys.meta_path.insert(0, Wall())
import numpy as np, onebit_ext as ob
layer = ob.TernaryLinear(8, 4)
layer.forward(np.ones((2, 8), np.float32))
assert len(ob.signature()) == 64
print(sorted(name for name in ('torch', 'safetensors', 'ml_dtypes', 'json.tool') if name in sys.modules))
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_the_import_takes_less_than_50_ms_beyond_numpy() -> None:
    code = """
import time, numpy
start = time.perf_counter()
import onebit_ext
print(time.perf_counter() - start)
"""
    python(code)  # writes the byte code
    assert min(float(python(code).stdout) for _ in range(5)) < 0.050


def test_what_is_exported() -> None:
    assert [name for name in ob.__all__ if not hasattr(ob, name)] == []
    assert ob.__all__ == sorted(ob.__all__, key=lambda name: (not name.isupper(), name.lower() == name, name))
    tree = ast.parse((ROOT / "onebit_ext" / "__init__.py").read_text())
    imported = {a.name for node in tree.body if isinstance(node, ast.ImportFrom) for a in node.names}
    assert imported == set(ob.__all__)
    assert f'version = "{ob.__version__}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("name", sorted(ob.__all__))
def test_everything_is_documented(name: str) -> None:
    value = getattr(ob, name)
    if callable(value):
        assert value.__doc__ and len(value.__doc__) > 30, name
        for key, member in vars(value).items() if isinstance(value, type) else ():
            assert key.startswith("_") or not callable(member) or member.__doc__, f"{name}.{key}"


def test_two_modules_have_two_states() -> None:
    code = """
import importlib.util, sys
import numpy as np
from onebit_ext import _core as first
spec = importlib.util.spec_from_file_location('onebit_ext._core', first.__file__)
second = importlib.util.module_from_spec(spec)
spec.loader.exec_module(second)
assert second is not first and second.TernaryLinear is not first.TernaryLinear
layer = second.TernaryLinear(8, 4)
second.FlipOptimizer([layer])
try:
    first.FlipOptimizer([second.TernaryLinear(8, 4)])
except TypeError as error:
    assert "'layers' must hold TernaryLinear" in str(error)
else:
    raise AssertionError
del second, layer, spec, sys.modules['onebit_ext._core']
import gc
gc.collect()
first.TernaryLinear(8, 4).forward(np.ones(8, np.float32))
print('fine')
"""
    done = python(code)
    assert done.stdout.strip() == "fine", done.stderr


@pytest.mark.parametrize("name", [entry["name"] for entry in ob.isas() if entry["supported"]])
def test_the_environment_picks_the_instruction_set(name: str) -> None:
    done = python("import onebit_ext; print(onebit_ext.isa())", ONEBIT_ISA=name)
    assert done.stdout.strip() == name, done.stderr


def test_an_unknown_instruction_set_is_an_import_error() -> None:
    done = python("import onebit_ext", ONEBIT_ISA="avx9000")
    assert done.returncode != 0
    assert "ImportError" in done.stderr and "avx9000" in done.stderr
