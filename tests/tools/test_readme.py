"""The README's examples run and do what they say."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.M | re.S)


def output(block: str) -> str:
    done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_is_one_example_per_level() -> None:
    assert ["onebit_ext.torch" in block for block in BLOCKS] == [True, False]
    assert all(len(block.splitlines()) <= 18 for block in BLOCKS)


def test_torch_example_learns() -> None:
    pytest.importorskip("torch")
    assert float(output(BLOCKS[0]).split()[-1]) < 0.2


def test_numpy_example_learns() -> None:
    assert int(output(BLOCKS[1]).split()[-1].rstrip("%\n")) >= 99


def test_what_the_readme_points_to_exists() -> None:
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target
