"""`onebit-ext convert`: a checkpoint folder into another form."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from . import UserError

HELP = "a checkpoint into another form: transformers packed, bf16, GGUF"
DESCRIPTION = """\
Convert a transformers checkpoint folder whose linear layers are ternary (or become so by absmean).

  hf-packed         2-bit codes, weight_scale = 1/s: Falcon-E, Llama; what most tools expect
  hf-packed-direct  2-bit codes, weight_scale = s: the form of BitNet 2B-4T (autobitlinear)
  bf16              floats that every absmean quantiser turns back into the same codes
  gguf-tq2_0        one file for llama.cpp, 2.06 bits a weight; Llama architecture
  gguf-tq1_0        the same, 1.69 bits a weight, slower to run
  i2_s              one file for bitnet.cpp, 2 bits a weight; Llama and BitNet 2B-4T

IN may be any of the first three, or a float model: onebit-ext inspect IN tells.

  onebit-ext convert falcon-e-1b falcon-e-1b.gguf --to gguf-tq2_0
"""
KINDS = ("hf-packed", "hf-packed-direct", "bf16", "gguf-tq2_0", "gguf-tq1_0", "i2_s")
BITS = {"bf16": 16.0, "gguf-tq2_0": 66 / 32, "gguf-tq1_0": 54 / 32}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="IN", help="checkpoint folder (config.json, safetensors)")
    parser.add_argument("output", metavar="OUT", help="folder, or file for GGUF, to make")
    parser.add_argument("--to", required=True, choices=KINDS, help="the form to make")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--skip", action="append", metavar="NAME", help="linear layer that stays floats (lm_head)")
    parser.add_argument("--tokenizer-pre", metavar="NAME", help="llama.cpp's name of the pre-tokenizer (recognised)")
    parser.add_argument("--dry-run", action="store_true", help="check every layer, say the size, write nothing")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, for machines")


def run(args: argparse.Namespace) -> int:
    try:
        facts = convert(args)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from None
    except ImportError as error:
        raise UserError(f"{error}; pip install 'onebit_ext[hf]'") from None
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    size, what = f"{facts['bytes'] / 1e6:,.1f} MB", f"{facts['layers']} ternary layers from {facts['found']}"
    done = "would be about" if args.dry_run else "is"
    print(f"{what}; {args.output} {done} {size} as {args.to} ({facts['seconds']:.1f} s)")
    return 0


def convert(args: argparse.Namespace) -> dict[str, Any]:
    """Do it; what `--json` prints."""
    from ..hf.folder import Folder
    from ..hf.gguf import KINDS as GGUF_KINDS
    from ..hf.gguf import write_gguf
    from ..hf.save import write_folder

    start = time.perf_counter()
    folder, out = Folder(args.input, args.skip), Path(args.output)
    if args.dry_run:
        size = _dry_run(folder, args.to)
    elif args.to in GGUF_KINDS:
        write_gguf(folder, folder.path, out, args.to, args.overwrite, args.tokenizer_pre, progress)
        size = out.stat().st_size
    else:
        write_folder(folder, out, args.to, args.overwrite, progress)
        size = sum(path.stat().st_size for path in out.iterdir())
    return {
        "input": args.input, "output": args.output, "to": args.to, "found": folder.form.kind,
        "layers": len(folder.linears), "bytes": size, "written": not args.dry_run,
        "seconds": round(time.perf_counter() - start, 3),
    }  # fmt: skip


def _dry_run(folder: Any, to: str) -> int:
    """Read and check every layer; the bytes its tensors would take."""
    from ..hf.folder import nbytes

    size = sum(nbytes(folder.tensors[name]) for name in folder.others)
    for done, name in enumerate(folder.linears, 1):
        n, k = folder.linear(name).shape
        size += int(n * k * BITS.get(to, 2.0) / 8)
        progress(done, len(folder.linears), name)
    return size


def progress(done: int, total: int, name: str) -> None:
    """A line on the terminal's stderr, rewritten."""
    if sys.stderr.isatty():
        end = "\r\033[K" if done == total else ""
        print(f"\r\033[K  {done}/{total}  {name}{end}", end="", file=sys.stderr, flush=True)
