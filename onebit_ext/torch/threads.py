"""One set of threads: our operations run on those of torch's OpenMP runtime, as many as torch.get_num_threads().

OpenMP's threads spin for milliseconds while they wait for torch's next operation; threads of our own would have to
share the cores with them.  They do if another number was set (set_num_threads, ONEBIT_NUM_THREADS), after
onebit_ext.share_threads(None), and in the children of a fork, where OpenMP would wait for ever.  As torch's do, each
Python thread that calls has OpenMP threads of its own.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import re
from pathlib import Path

import torch

import onebit_ext as ob

RUNTIME = re.compile(r"/lib(gomp|iomp5|omp)\b[^/]*(?<! \(deleted\))$")


def openmp_of_torch() -> str | None:
    """Path of the OpenMP runtime in torch's own folders, else of the only one that is loaded; None if unknown."""
    maps = Path("/proc/self/maps")
    if not maps.exists() or not torch.backends.openmp.is_available():
        return None
    lines = maps.read_text(errors="surrogateescape").splitlines()
    files = {words[5] for line in lines if len(words := line.split(maxsplit=5)) == 6}
    loaded = sorted(path for path in files if RUNTIME.search(path))
    home = Path(torch.__file__).parent
    own = [path for path in loaded if path.startswith((f"{home}/", f"{home.parent}/torch.libs/"))]
    candidates = own or loaded
    return candidates[0] if len(candidates) == 1 else None


def _forked() -> bool:
    return multiprocessing.parent_process() is not None and multiprocessing.get_start_method() == "fork"


torch.get_num_threads()  # the first call sets OpenMP's number
if (_path := openmp_of_torch()) is not None and not _forked():
    with contextlib.suppress(RuntimeError):  # a runtime without GOMP_parallel: own threads, as ever
        ob.share_threads(_path)
