"""Fixtures of the whole suite: every test leaves the instruction set and the thread count as it found them."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

from onebit_ext import _core

SEED = int(os.environ.get("ONEBIT_TEST_SEED", "20261123"))

settings.register_profile("suite", deadline=None, max_examples=60, print_blob=True)
settings.load_profile("suite")


def pytest_report_header() -> str:
    kernels = ", ".join(i["name"] for i in _core.isas() if i["supported"])
    return f"onebit_ext: kernels {kernels}; ONEBIT_TEST_SEED={SEED}"


@pytest.fixture(autouse=True)
def _same_machine() -> Iterator[None]:
    isa, threads = _core.isa(), _core.num_threads()
    yield
    _core.force_isa(isa)
    _core.set_num_threads(threads)


@pytest.fixture(scope="session")
def seed() -> int:
    """The seed of everything that a test samples; printed in the header, set by ONEBIT_TEST_SEED."""
    return SEED


@pytest.fixture(params=[i["name"] for i in _core.isas() if i["supported"]])
def isa(request: pytest.FixtureRequest) -> str:
    """Each instruction set of this machine in turn, made the active one."""
    _core.force_isa(request.param)
    return str(request.param)
