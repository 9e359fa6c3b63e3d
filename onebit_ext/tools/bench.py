"""`onebit-ext bench`: every operation beside its rivals and the machine's limits, in alternation."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from . import UserError
from .bench_report import growth_facts, introduce, report, row_facts
from .bench_timing import MIN_REPETITIONS
from .console import Console

HELP = "speed of every operation beside torch and the machine's own limits"
DESCRIPTION = """\
Times every operation and the whole layer step through the public Python calls, in turns with torch float32,
bfloat16 and dynamic int8 (if torch is installed) and with what this machine can do at best: its int8 multiply-add
peak and plain memory traffic, on the same threads.  A ratio is the median over the turns of one alternated run,
[quartiles] beside it; other ratios cannot be made.  Absolute figures wander with the machine's load, ratios less.

  onebit-ext bench --quick            one shape, one thread, under a minute
  onebit-ext bench                    layers of Falcon-E-1B and BitNet-2B-4T, 1 and 2 threads
  onebit-ext bench --full             all shapes of onebit_ext/tools/shapes.txt
  onebit-ext bench --plot DIR         also roofline.png and growth.png (time against M, N, K, threads)

Exit code 1: a bar was missed.
"""
TOKENS = (1, 8, 32, 128, 512, 2048)
MAIN = (2560, 2560)  # the shape of the rows that need no other
Task = tuple[str, Callable[[], Any]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="one shape, one thread, a small model: under a minute")
    size.add_argument("--full", action="store_true", help="every shape and token count")
    parser.add_argument("--threads", type=_numbers, help="thread counts, e.g. 1,2 (default: both; --quick: 1)")
    parser.add_argument("--tokens", type=_numbers, help="M of the forward rows, e.g. 1,8,512")
    parser.add_argument("--shape", type=_shape, action="append", help="NxK instead of the table's; may be repeated")
    parser.add_argument("--repetitions", type=int, help="turns per row, at least 7 (default 9; --quick: 7)")
    parser.add_argument("--memory", type=float, default=4.0, help="gigabytes for the whole-model row (default 4)")
    parser.add_argument("--cpu-time", action="store_true", help="time this thread alone: for a busy machine, 1 thread")
    parser.add_argument("--no-torch", action="store_true", help="leave torch out, as if it were not installed")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw roofline.png and growth.png into DIR")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, for machines")


def _numbers(text: str, separator: str = ",") -> list[int]:
    """An argparse type: positive integers."""
    words = text.split(separator)
    if not all(word.isdecimal() and 1 <= int(word) <= 65536 for word in words):
        raise argparse.ArgumentTypeError(f"must be integers in 1..65536 with '{separator}' between, got {text!r}")
    return [int(word) for word in words]


def _shape(text: str) -> tuple[int, int]:
    sizes = _numbers(text, "x")
    if len(sizes) != 2:
        raise argparse.ArgumentTypeError(f"must be NxK, e.g. 2560x6912, got {text!r}")
    return sizes[0], sizes[1]


def _check(args: argparse.Namespace) -> None:
    if args.repetitions is not None and not MIN_REPETITIONS <= args.repetitions <= 1001:
        raise UserError(f"--repetitions must be in {MIN_REPETITIONS}..1001, got {args.repetitions}")
    if not 0.1 <= args.memory <= 10000:
        raise UserError(f"--memory must be in 0.1..10000 gigabytes, got {args.memory}")
    if args.threads and max(args.threads) > 256:
        raise UserError(f"--threads must be in 1..256, got {max(args.threads)}")
    if args.cpu_time and args.threads not in (None, [1]):
        raise UserError("--cpu-time sees one thread only: leave --threads out")
    if args.plot:
        _writable(args.plot)


def run(args: argparse.Namespace) -> int:
    console = Console(to_stderr=args.json)
    _check(args)
    facts = machine(not args.no_torch)
    introduce(console, facts)
    start = time.perf_counter()
    rows, model, curves = _measure(args, console, facts)
    facts["clock"] = "this thread's CPU time" if args.cpu_time else "wall"
    facts["seconds"] = round(time.perf_counter() - start, 1)
    result = {"machine": facts, "rows": [row_facts(row) for row in rows], "model": model}
    result["growth"] = [growth_facts(curve) for curve in curves]
    if args.plot:
        result["plots"] = _draw(args.plot, rows, curves)
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        report(console, result)
    missed = sum(bar["verdict"] == "MISS" for row in result["rows"] for bar in row["bars"])
    return 1 if missed else 0


# ------------------------------------------------------------------ measuring
def _measure(args: argparse.Namespace, console: Console, facts: dict[str, Any]) -> tuple[list[Any], Any, list[Any]]:
    import onebit_ext as ob

    from . import bench_growth, bench_ops

    rivals = _rivals() if facts["torch"] else None
    before = ob.num_threads()
    repetitions = args.repetitions or (7 if args.quick else 9)
    threads = args.threads or [1, 2][: 1 if args.quick or args.cpu_time else facts["cpus"]]
    clock = time.thread_time if args.cpu_time else None
    rows: list[Any] = []
    model, curves = None, []
    try:
        for count in threads:
            ob.set_num_threads(count)
            if rivals:
                rivals.set_threads(count)
            setting = bench_ops.Setting(count, repetitions, rivals, "AMD" in facts["vendor"], clock)
            tasks = list(_plan(args, setting))
            for i, (label, measure) in enumerate(tasks, 1):
                begun = time.perf_counter()
                rows.append(measure())
                spent = time.perf_counter() - begun
                console.say(f"  {i:>3}/{len(tasks)}  {count} thread{'s' * (count > 1):<1}  {label:<44} {spent:5.1f} s")
        if rivals:
            model_row, model = _model(args, setting, facts)
            rows.append(model_row)
        if args.plot:
            console.say("  time against M, N, K and threads")
            ob.set_num_threads(1)
            curves = bench_growth.measure(bench_ops.Setting(1, 7, clock=clock), 1 if clock else facts["cpus"])
    finally:
        ob.set_num_threads(before)
    return rows, model, curves


def _plan(args: argparse.Namespace, setting: Any) -> Iterator[Task]:
    """Every row for one thread count, as (label, thunk)."""
    from . import bench_ops as ops

    table = [(shape.n, shape.k) for shape in ops.read_shapes() if args.full or shape.default]
    shapes = args.shape or ([MAIN] if args.quick else list(dict.fromkeys(table)))
    for n, k in shapes:
        for m in args.tokens or TOKENS[: -1 if args.quick else None]:
            yield f"forward M={m} {n}x{k}", partial(ops.forward, setting, n, k, m)
        if 1 in (args.tokens or TOKENS):
            yield f"GEMV, 1.6 bits {n}x{k}", partial(ops.trits, setting, n, k)
        for m in (128, 512, 2048) if args.full else (512,):
            yield f"dX M={m} {n}x{k}", partial(ops.backward_input, setting, n, k, m)
            yield f"dW and vote M={m} {n}x{k}", partial(ops.vote, setting, n, k, m)
            yield f"layer step M={m} {n}x{k}", partial(ops.whole_step, setting, n, k, m)
    for share in (0.001, 0.01):
        yield f"flip {share:.1%}", partial(ops.flip, setting, *MAIN, share)
    yield "absmean", partial(ops.absmean, setting, *MAIN)
    if setting.threads == 1:
        yield from _other_rows(args, setting)


def _other_rows(args: argparse.Namespace, setting: Any) -> Iterator[Task]:
    """Thread scaling, other instruction sets, BitLinear."""
    import onebit_ext as ob

    from . import bench_ops as ops

    if len(os.sched_getaffinity(0)) > 1 and not args.cpu_time:
        for m, product in ((128, "forward"), (512, "forward"), (512, "layer step")):
            yield f"{product} M={m}, 2 threads", partial(ops.thread_scaling, setting, *MAIN, m, product)
    for entry in ob.isas():
        name, m = entry["name"], 32 if entry["name"] == "scalar" else 128
        if entry["supported"] and not entry["active"] and (name == "avx2" or not args.quick):
            yield f"forward M={m}, {name} forced", partial(ops.forced_isa, setting, name, *MAIN, m)
    if setting.rivals:
        for m, training in ((1, False), (512, False), (512, True)):
            label = f"BitLinear {'training' if training else 'inference'} M={m}"
            yield label, partial(ops.overhead, setting, *MAIN, m, training)


def _model(args: argparse.Namespace, setting: Any, facts: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The whole-model row: tokens per second alternated in this process, peak memory in one process per method."""
    from onebit_ext.torch.bench import stack

    from . import bench_ops as ops
    from .bench_timing import Contender

    layers = 1 if args.quick else stack.layers_that_fit(args.memory)
    tokens = 128 if args.quick else 512
    contenders: list[Contender | None] = [
        Contender(name, stack.training_step(name, layers, tokens), {"token": float(tokens)}) for name in stack.METHODS
    ]
    name = f"training step, {layers} Falcon-E-1B block{'s' * (layers > 1)}"
    alternation = setting.alternate(contenders)
    row = ops.Row(name, f"{stack.WIDTH}x{stack.HIDDEN}", tokens, setting.threads, alternation, "token")
    for rival in list(stack.METHODS)[1:]:
        row.hold(f"x {rival} with AdamW", "ours", rival)
    with ThreadPoolExecutor(min(facts["cpus"], len(stack.METHODS))) as pool:
        peaks = list(pool.map(lambda name: stack.peak_bytes(name, layers, tokens, setting.threads), stack.METHODS))
    return row, {
        "layers": layers,
        "tokens": tokens,
        "weights": stack.weights(layers),
        "peak_bytes": dict(zip(stack.METHODS, peaks, strict=True)),
    }


def _rivals() -> Any:
    from onebit_ext.torch.bench.rivals import Rivals

    return Rivals()


# ------------------------------------------------------------------ facts
def machine(with_torch: bool) -> dict[str, Any]:
    """Where and what: goes into the JSON and the head of the report."""
    import numpy as np

    import onebit_ext as ob

    cpu = {"vendor_id": "", "model name": platform.processor()}
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in reversed(lines):
        key, _, value = line.partition(":")
        cpu[key.strip()] = value.strip()
    torch_version = None
    if with_torch:
        try:
            import torch

            torch_version = torch.__version__
        except ImportError:
            pass
    return {
        "onebit_ext": ob.__version__,
        "isa": ob.isa(),
        "vendor": cpu["vendor_id"],
        "cpu": cpu["model name"],
        "cpus": len(os.sched_getaffinity(0)),
        "numpy": np.__version__,
        "torch": torch_version,
        "load": os.getloadavg()[0],
    }


# ------------------------------------------------------------------ pictures
def _writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        import matplotlib  # noqa: F401
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from None
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install onebit_ext[study]") from None


def _draw(folder: Path, rows: list[Any], curves: list[Any]) -> list[str]:
    from . import bench_plot

    drawn = []
    for threads in dict.fromkeys(row.threads for row in rows):
        path = folder / ("roofline.png" if threads == 1 else f"roofline_{threads}_threads.png")
        if bench_plot.roofline(rows, threads, path):
            drawn.append(str(path))
    bench_plot.growth(curves, folder / "growth.png")
    return [*drawn, str(folder / "growth.png")]
