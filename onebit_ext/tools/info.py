"""`onebit-ext info`: which kernels run here."""

from __future__ import annotations

import argparse
import json
import os
import platform
from typing import Any

from .console import Console

HELP = "version, instruction set, kernels, threads, memory"
DESCRIPTION = """\
What this installation runs on this machine.

ONEBIT_ISA=scalar|avx2|avx512vnni|amxint8 forces an instruction set; every one of them gives the same bits.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, for machines")


def collect() -> dict[str, Any]:
    """Everything `info` knows, as plain JSON types."""
    import numpy as np

    import onebit_ext as ob

    return {
        "version": ob.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "machine": platform.machine(),
        "isa": ob.isa(),
        "isas": [dict(entry) for entry in ob.isas()],
        "kernels": ob.kernels(),
        "threads": ob.num_threads(),
        "cpus": len(os.sched_getaffinity(0)),
        "rules": list(ob.RULES),
        "formats": list(ob.FORMATS),
        "memory": dict(ob.memory()),
    }


def run(args: argparse.Namespace) -> int:
    facts = collect()
    if args.json:
        print(json.dumps(facts, indent=2, default=str))
        return 0
    console = Console()
    console.say(f"onebit-ext {facts['version']}, Python {facts['python']}, numpy {facts['numpy']}, {facts['machine']}")
    console.say(f"instruction set: {facts['isa']}; threads: {facts['threads']} on {facts['cpus']} CPUs\n")
    rows = []
    for entry in reversed(facts["isas"]):
        state = "in use" if entry["active"] else "available" if entry["supported"] else "not on this machine"
        rows.append([entry["name"], state, _tiles(entry["tiles"])])
    console.table(["instruction set", "state", "tile rows: forward, dX, dW"], rows)
    console.say(f"\npackings:   {', '.join(facts['formats'])}")
    console.say(f"flip rules: {', '.join(facts['rules'])}")
    memory = facts["memory"]
    console.say(f"memory:     {memory['live']:,} bytes live in the C allocator, peak {memory['peak']:,}")
    return 0


def _tiles(tiles: Any) -> str:
    return ", ".join(str(n) for n in (tiles.values() if isinstance(tiles, dict) else tiles))
