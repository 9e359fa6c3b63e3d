"""`onebit-ext inspect`: what a checkpoint is, what is in its ternary layers, what loads it."""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import UserError
from .console import Console
from .convert import progress

HELP = "what a checkpoint holds: form, scales, share of -1/0/+1, what loads it"
DESCRIPTION = """\
Look into a checkpoint: a transformers folder, or a GGUF file with ternary tensors.

Tells the form and the scale convention, shapes, the share of -1, 0 and +1, the scales, and which programs load it
rightly. Every layer is read and checked: a torn or zero-filled download is named.

  onebit-ext inspect falcon-e-1b
  onebit-ext inspect model.gguf --layers
"""
SHARES = ("-1", "0", "+1")
BAR = 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="checkpoint folder, or .gguf file")
    parser.add_argument("--layers", action="store_true", help="one line for each layer, not for each kind of layer")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, for machines")


def run(args: argparse.Namespace) -> int:
    try:
        facts = collect(Path(args.path))
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from None
    except ImportError as error:
        raise UserError(f"{error}; pip install 'onebit_ext[hf]'") from None
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        report(facts, args.layers)
    return 0


def collect(path: Path) -> dict[str, Any]:
    """Everything `inspect` knows, as plain JSON types."""
    facts, linears = _gguf(path) if path.suffix == ".gguf" else _folder(path)
    layers = []
    for done, linear in enumerate(linears, 1):
        scale = linear.scale.tolist()
        layers.append(
            {
                "name": linear.name, "shape": list(linear.shape), "bias": linear.bias is not None,
                "scale": scale[0] if len(scale) == 1 else [min(scale), max(scale)],
                "shares": dict(zip(SHARES, linear.shares(), strict=True)),
            }
        )  # fmt: skip
        progress(done, facts["ternary_layers"], linear.name)
    sizes = [math.prod(layer["shape"]) for layer in layers]
    total = sum(sizes)
    mean = {
        key: sum(size * layer["shares"][key] for size, layer in zip(sizes, layers, strict=True)) / max(total, 1)
        for key in SHARES
    }
    return facts | {"ternary_weights": total, "shares": mean, "layers": layers}


def _folder(path: Path) -> tuple[dict[str, Any], Iterable[Any]]:
    from ..hf.config import DESCRIPTIONS
    from ..hf.folder import Folder, nbytes

    folder = Folder(path)
    model, activation = folder.config.get("model_type"), folder.config.get("hidden_act")
    facts = {
        "path": str(path), "form": folder.form.kind, "description": DESCRIPTIONS[folder.form.kind], "model": model,
        "activation": activation, "dtype": str(folder.dtype).removeprefix("torch."),
        "bytes": sum(map(nbytes, folder.tensors.values())), "tensors": len(folder.tensors),
        "ternary_layers": len(folder.linears), "use_rms_norm": folder.form.use_rms_norm,
        "loads": _loaders(folder.form.kind, model, activation),
    }  # fmt: skip
    return facts, map(folder.linear, folder.linears)


def _loaders(form: str, model: str | None, activation: str | None) -> dict[str, str]:
    """Program -> how it loads such a folder."""
    how = {
        "hf-packed": "yes, as BitLinear",
        "hf-packed-direct": "yes, as AutoBitLinear (5.23: in the dtype of the file only)",
        "bf16": "yes, quantises at every forward",
        "float": "yes, but as dense floats",
    }
    llama = model == "llama" and activation == "silu"
    gguf = "after: onebit-ext convert --to gguf-tq2_0"
    if not llama:
        gguf = f"no: it has no right graph for {model} with {activation}"
    i2s = llama or (model, activation) == ("bitnet", "relu2")
    return {
        "onebit_ext.hf.from_pretrained": "yes",
        "transformers": how[form],
        "onebitllms": "after: onebit-ext convert --to bf16" if form.startswith("hf-packed") else "yes",
        "llama.cpp": gguf,
        "bitnet.cpp": "after: onebit-ext convert --to i2_s" if i2s else "no",
    }


def _gguf(path: Path) -> tuple[dict[str, Any], Iterable[Any]]:
    from ..hf.gguf_read import TYPES, GGUFFile

    file = GGUFFile(path)
    kinds: dict[str, int] = {}
    for tensor in file.tensors:
        kind = TYPES.get(tensor.type, f"type {tensor.type}")
        kinds[kind] = kinds.get(kind, 0) + 1
    ternary = [tensor for tensor in file.tensors if TYPES.get(tensor.type) in ("TQ1_0", "TQ2_0", "I2_S")]
    architecture = file.keys.get("general.architecture")
    reader = "bitnet.cpp" if "I2_S" in kinds else "llama.cpp"
    facts = {
        "path": str(path), "form": "gguf", "description": ", ".join(f"{n} {kind}" for kind, n in kinds.items()),
        "model": architecture, "activation": None, "dtype": None, "bytes": path.stat().st_size,
        "tensors": len(file.tensors), "ternary_layers": len(ternary), "use_rms_norm": False,
        "loads": {reader: "yes" if ternary else "yes, no ternary tensors"},
    }  # fmt: skip
    return facts, (linear for linear in map(file.linear, ternary) if linear is not None)


# ------------------------------------------------------------------ text
def report(facts: dict[str, Any], every_layer: bool) -> None:
    """Print the facts for a person."""
    console = Console()
    console.say(f"{facts['path']}: {facts['description']}")
    about = [facts["model"], facts["activation"], facts["dtype"], "norms inside" if facts["use_rms_norm"] else None]
    console.say(f"{', '.join(filter(None, about))}; {facts['tensors']} tensors, {facts['bytes'] / 1e6:,.1f} MB")
    layers = facts["layers"]
    console.say(f"{len(layers)} ternary layers, {facts['ternary_weights']:,} weights\n")
    if layers:
        console.table(["layers", "shape", "s", *SHARES], _rows(layers, every_layer))
        console.say("\nshare of codes")
        _histogram(console, [(key, facts["shares"][key]) for key in SHARES])
        console.say("\nscales s")
        _histogram(console, _bins([value for layer in layers for value in _scales(layer)]))
    console.say("\nwhat loads it")
    for program, how in facts["loads"].items():
        console.say(f"  {program:<30} {how}")


def _scales(layer: dict[str, Any]) -> list[float]:
    return layer["scale"] if isinstance(layer["scale"], list) else [layer["scale"]]


def _rows(layers: list[dict[str, Any]], every_layer: bool) -> list[list[str]]:
    """One row per layer, or per (last part of the name, shape)."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for layer in layers:
        parts = [part for part in layer["name"].split(".") if part != "weight"]
        key = layer["name"] if every_layer else parts[-1]
        groups.setdefault((key, tuple(layer["shape"])), []).append(layer)
    rows = []
    for (name, shape), group in groups.items():
        scales = [value for layer in group for value in _scales(layer)]
        span = f"{min(scales):.3g}" if len(set(scales)) == 1 else f"{min(scales):.3g} .. {max(scales):.3g}"
        shares = [f"{100 * statistics.fmean(layer['shares'][key] for layer in group):.1f} %" for key in SHARES]
        label = name if len(group) == 1 else f"{len(group)} x {name}"
        rows.append([label, f"{shape[0]} x {shape[1]}", span, *shares])
    return rows


def _bins(values: list[float], count: int = 8) -> list[tuple[str, float]]:
    """Shares of the values in `count` equal bins."""
    low, high = min(values), max(values)
    if low == high:
        return [(f"{low:.3g}", 1.0)]
    width = (high - low) / count
    counts = [0] * count
    for value in values:
        counts[min(int((value - low) / width), count - 1)] += 1
    return [(f"{low + i * width:.3g} ..", n / len(values)) for i, n in enumerate(counts)]


def _histogram(console: Console, bars: list[tuple[str, float]]) -> None:
    for label, share in bars:
        console.say(f"  {label:>12} {100 * share:5.1f} %  {'#' * round(BAR * share)}")
