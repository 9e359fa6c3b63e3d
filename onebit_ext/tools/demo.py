"""`onebit-ext demo`: text, then the stages of onebit_ext.torch.demo, then the report."""

from __future__ import annotations

import argparse
import json
import os
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from . import UserError, text
from .cli import integer
from .console import Console
from .demo_report import report

HELP = "a ternary transformer learns real text"
STEPS = 1000
DESCRIPTION = """\
Trains a byte-level ternary transformer on text that every Python installation carries.

Stage 1 pre-trains on the standard library's source code. Stage 2 fine-tunes to its English
documentation (or to your own text) by moving codes alone, and compares: nothing trained, the same
rule on the wrong text, the rule at 10 bits per weight, and a float32 shadow with AdamW. Files and
topics are held out; all losses are held-out ones.

Exit code 0: every bar held. 1: a bar was missed. 2: it could not run.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="your own text for stage 2 instead of the documentation",
    )
    parser.add_argument(
        "--steps",
        type=integer(1, 10**6),
        metavar="N",
        help=f"steps of stage 1, each arm of stage 2 takes 3/5 of it (default {STEPS}); or of --numpy (default 700)",
    )
    parser.add_argument(
        "--seed",
        type=integer(0, 2**31 - 1),
        default=0,
        help="of everything random (default %(default)s)",
    )
    parser.add_argument(
        "--threads",
        type=integer(1, 256),
        default=min(4, len(os.sched_getaffinity(0))),
        help="of our kernels and of torch (default: the CPUs, at most 4; here %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out"),
        metavar="FOLDER",
        help="checkpoints, picture and figures go here (default %(default)s)",
    )
    parser.add_argument("--numpy", action="store_true", help="a smaller model in half a minute, without torch")
    parser.add_argument(
        "--json",
        action="store_true",
        help="one JSON object on stdout; what you watch goes to stderr",
    )


def run(args: argparse.Namespace) -> int:
    import onebit_ext as ob

    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(args.out, error) from None
    console = Console(to_stderr=args.json)
    ob.set_num_threads(args.threads)
    console.say(f"onebit-ext {ob.__version__} on {ob.isa()}, {args.threads} threads, seed {args.seed}")
    if args.numpy:
        from . import demo_numpy

        return demo_numpy.run(args, console)
    if find_spec("torch") is None:
        raise UserError("torch is missing: pip install 'onebit-ext[torch]', or take --numpy")
    start = time.perf_counter()
    console.heading("Text")
    target = text.user_text(args.text) if args.text else text.documentation()
    code = text.standard_library()
    described = describe(console, code, "the standard library's source")
    source = str(args.text or "its English documentation, pydoc_data.topics")
    result = {"version": ob.__version__, "isa": ob.isa(), "threads": args.threads, "seed": args.seed}
    result |= {"code": described, "target": describe(console, target, source)}
    try:
        result |= train(args, console, code, target)
    except OSError as error:
        raise cannot_write(args.out, error) from None
    result |= {"seconds": time.perf_counter() - start, "processor_seconds": time.process_time()}
    judged = args.text is None and args.steps in (None, STEPS)
    passed = report(console, result, judged, args.out)
    (args.out / "demo.json").write_text(json.dumps(result, indent=2))
    if args.json:
        print(json.dumps(result))
    return 0 if passed else 1


def train(args: argparse.Namespace, console: Console, code: text.Corpus, target: text.Corpus) -> dict[str, Any]:
    """Both stages; imports torch."""
    # between small operations, threads that spin take a busy machine's cores from those that work
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    import torch

    from onebit_ext.torch.demo.stages import Side, Stages

    torch.set_num_threads(args.threads)
    source, aim = (Side(corpus.train, corpus.held_out) for corpus in (code, target))
    stages = Stages(console, source, aim, args.steps or STEPS, args.seed, args.out)
    stages.pretrain()
    stages.finetune()
    return stages.result


def describe(console: Console, corpus: text.Corpus, source: str) -> dict[str, Any]:
    """Print a text and its baselines; the same as plain JSON types."""
    losses = "  ".join(f"{name} {loss:.3f}" for name, loss in corpus.baselines.items())
    console.say(
        f"  {corpus.name}: {source}\n    {len(corpus.train):,} bytes to train on, "
        f"{len(corpus.held_out):,} held out ({corpus.cut:,} more cut: seen in training)\n"
        f"    nats/byte: {losses}"
    )
    return {
        "name": corpus.name,
        "train_bytes": len(corpus.train),
        "held_out_bytes": len(corpus.held_out),
        "cut_bytes": corpus.cut,
        "baselines": corpus.baselines,
    }


def cannot_write(folder: Path, error: OSError) -> UserError:
    return UserError(f"cannot write to {folder}: {error.strerror}; choose another folder with --out")
