"""The torch level is tested on one core: two threads on a busy two-core machine take 20 times as long."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

from onebit_ext import _core  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded_on_one_core() -> Iterator[None]:
    torch.manual_seed(7)
    _core.set_num_threads(1)
    yield
