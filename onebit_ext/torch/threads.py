"""One set of threads: our operations run on those of torch's OpenMP runtime, as many as torch.get_num_threads().

OpenMP's threads spin for milliseconds while they wait for torch's next operation; threads of our own would have to
share the cores with them.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from onebit_ext import _core

RUNTIME = re.compile(r"lib(gomp|iomp5|omp)\b[^/]*$")


def openmp_of_torch() -> str | None:
    """Path of the OpenMP runtime in torch's own folders, else of the only one that is loaded; None if unknown."""
    maps = Path("/proc/self/maps")
    if not maps.exists() or not torch.backends.openmp.is_available():
        return None
    files = {words[5] for line in maps.read_text().splitlines() if len(words := line.split(maxsplit=5)) == 6}
    loaded = sorted(path for path in files if RUNTIME.search(path))
    home = Path(torch.__file__).parent
    own = [path for path in loaded if path.startswith((f"{home}/", f"{home.parent}/torch.libs/"))]
    candidates = own or loaded
    return candidates[0] if len(candidates) == 1 else None


if (path := openmp_of_torch()) is not None:
    _core.share_threads(path)
