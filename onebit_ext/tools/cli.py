"""`onebit-ext`, also `python -m onebit_ext`: finds the subcommand, prints errors in one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from . import UserError

SUBCOMMANDS = (
    "info",
    "demo",
    "finetune",
    "convert",
    "inspect",
    "bench",
    "study",
)  # a module each, with HELP, DESCRIPTION, add_arguments(parser) and run(args) -> exit code

DESCRIPTION = """\
Train ternary (BitNet b1.58) layers without a float copy of the weights.

Start here:
  onebit-ext info            which kernels this machine runs
  onebit-ext demo --numpy    a byte model in half a minute, numpy only
  onebit-ext demo            a ternary transformer learns real text, minutes, with torch
  onebit-ext finetune        a checkpoint learns your text: packed model and GGUF out
"""


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    from .. import __version__

    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(
        "onebit-ext",
        description=DESCRIPTION,
        formatter_class=raw,
        epilog="onebit-ext SUBCOMMAND --help explains each of them.",
    )
    top.add_argument("--version", action="version", version=f"onebit-ext {__version__}")
    commands = top.add_subparsers(title="subcommands", metavar="SUBCOMMAND", required=True)
    for name in SUBCOMMANDS:
        module = import_module(f".{name}", __package__)
        command = commands.add_parser(name, help=module.HELP, description=module.DESCRIPTION, formatter_class=raw)
        module.add_arguments(command)
        command.set_defaults(run=module.run, command=name)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; exit code 0: done, 1: a bar was missed, 2: a mistake, 130: interrupted."""
    args = parser().parse_args(arguments)
    try:
        return int(args.run(args))
    except UserError as error:
        print(f"onebit-ext {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nonebit-ext {args.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `onebit-ext info | head`
        sys.stderr.close()
        return 0


def integer(low: int, high: int) -> Callable[[str], int]:
    """An argparse type: an integer in [low, high]."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be an integer in {low}..{high}, got {text!r}")
        return value

    return parse
