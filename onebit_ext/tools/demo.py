"""`onebit-ext demo`: the arguments; the work is in demo_stages.py (torch) and demo_numpy.py."""

from __future__ import annotations

import argparse
import os
from importlib.util import find_spec
from pathlib import Path

from . import UserError
from .cli import integer

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
        default=STEPS,
        metavar="N",
        help="steps of stage 1; each arm of stage 2 takes 3/5 of it (default %(default)s)",
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
    parser.add_argument(
        "--numpy", action="store_true", help="a smaller model in half a minute, without torch"
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="one JSON object on stdout; what you watch goes to stderr",
    )


def run(args: argparse.Namespace) -> int:
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the folder {args.out}: {error.strerror}; choose another with --out"
        ) from None
    if args.numpy:
        from . import demo_numpy

        return demo_numpy.run(args)
    if find_spec("torch") is None:
        raise UserError("torch is missing: pip install 'onebit-ext[torch]', or take --numpy")
    os.environ.setdefault(
        "OMP_WAIT_POLICY", "passive"
    )  # torch's idle threads must not spin against ours
    from . import demo_stages

    return demo_stages.run(args)
