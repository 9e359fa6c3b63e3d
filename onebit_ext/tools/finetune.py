"""`onebit-ext finetune`: a ternary model learns the user's text, and is saved ready to run elsewhere."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from . import UserError
from .cli import integer
from .console import Console

HELP = "train a ternary checkpoint on your own text; saves it packed, and as GGUF"
DESCRIPTION = """\
Fine-tune a ternary language model on a CPU, without a float copy of its weights.

--model is a folder: Falcon-E or BitNet as downloaded, packed or bf16, or any float Llama (its linear layers become
ternary first, which costs quality that training must win back). --data is one of
  notes.txt     plain text
  data.jsonl    a JSON object a line: {"text": ...}, or {"messages": [{"role": ..., "content": ...}, ...]},
                or {"prompt": ..., "completion": ...} (the loss is then on the completion alone)
A twentieth of it is held out; its loss is reported before and after.

  hf download tiiuae/Falcon-E-1B-Base --local-dir falcon-e
  onebit-ext finetune --model falcon-e --data notes.txt --out mine --gguf
  llama-cli -m mine/mine-tq2_0.gguf -p "My notes say"

--dry-run reads everything and says what training would need. docs/finetune.md explains the settings.
"""
FIELDS = ("text", "messages", "prompt", "completion")
GGUF = ("tq2_0", "tq1_0")
PART = 4000  # characters of plain text that make one document


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", help="checkpoint folder to start from")
    parser.add_argument("--data", required=True, metavar="FILE", help=".txt or .jsonl to learn")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make: transformers' packed form")
    parser.add_argument("--gguf", nargs="?", const="tq2_0", choices=GGUF, help="also a GGUF file in it (tq2_0)")
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    parser.add_argument("--epochs", type=_positive, default=1.0, help="passes over the data (1)")
    parser.add_argument("--steps", type=integer(1, 10**9), help="optimizer steps, instead of epochs")
    parser.add_argument("--batch", type=integer(1, 4096), default=4, help="windows in memory at a time (4)")
    parser.add_argument("--accumulate", type=integer(1, 4096), default=1, help="such batches per step (1)")
    parser.add_argument("--length", type=integer(8, 1 << 20), default=512, help="tokens per window (512)")
    parser.add_argument("--lr", type=_positive, default=0.03, help="of the codes, in cells per step (0.03)")
    parser.add_argument("--float-lr", type=_positive, default=1e-4, help="of embeddings, norms, head (1e-4)")
    parser.add_argument("--scale-lr", type=_positive, default=2e-3, help="of the layers' scales, relative (2e-3)")
    parser.add_argument("--seed", type=integer(0, 2**32 - 1), default=0, help="of order and rounding (0)")
    parser.add_argument("--recompute", action="store_true", help="recompute activations: less memory, a third slower")
    parser.add_argument("--save-every", type=integer(1, 10**9), metavar="N", help="checkpoint each N steps")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint, to the same bits")
    parser.add_argument("--dry-run", action="store_true", help="check all, say steps and memory, train nothing")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, for machines")


def run(args: argparse.Namespace) -> int:
    console = Console(to_stderr=args.json)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        facts = finetune(args, console)
    except (ValueError, OSError, FloatingPointError) as error:
        raise UserError(" ".join(str(error).split())) from None
    except ImportError as error:
        raise UserError(f"{error}; pip install 'onebit_ext[hf]'") from None
    if args.json:
        print(json.dumps(facts, indent=2))
    return 0


def finetune(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Do it; what `--json` prints."""
    import torch

    from ..hf import export_gguf, from_pretrained
    from ..hf.folder import Folder

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("runs in one process; for several, see docs/distributed.md")
    out = Path(args.out).absolute()
    if out.exists() and not args.overwrite and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{args.out} exists already; name another folder or pass --overwrite")
    folder = Folder(args.model)
    tokenizer = _tokenizer(args.model)
    rows, held_out = split(read_rows(Path(args.data)))
    if "messages" in rows[0] and not tokenizer.chat_template:
        raise UserError(f"{args.model} has no chat template for 'messages'; give 'text' or 'prompt' and 'completion'")
    limit = folder.config.get("max_position_embeddings")
    length = min(args.length, int(limit)) if limit else args.length
    facts: dict[str, Any] = memory(folder, args.batch, length, args.recompute)
    facts |= {"rows": len(rows), "held_out": len(held_out)}
    console.say(
        f"{facts['codes'] / 1e6:,.1f} M ternary and {facts['floats'] / 1e6:,.1f} M float weights ({folder.form.kind}); "
        f"{len(rows)} documents to train on, {len(held_out)} held out"
    )
    state, extra = facts["state_bytes"] / 1e6, facts["activation_bytes"] / 1e6
    console.say(f"memory: {state:,.0f} MB for model and optimizer, about {extra:,.0f} MB more at work")
    if args.gguf:  # what GGUF cannot hold is to be known before training
        with tempfile.TemporaryDirectory(dir=_parent(out)) as scratch:
            export_gguf(args.model, Path(scratch) / "trial.gguf", f"gguf-{args.gguf}")
    if args.dry_run:
        return facts | {"trained": False}
    model = from_pretrained(args.model, dtype=torch.float32)
    trainer = make_trainer(args, console, model, tokenizer, rows, held_out, length)
    before, start = trainer.evaluate()["eval_loss"], time.perf_counter()
    console.say(f"held-out loss {before:.3f} nats per token before training")
    codes = _codes(model)
    work = Path(trainer.args.output_dir)
    trainer.train(resume_from_checkpoint=args.resume and any(work.glob("checkpoint-*")) or None)
    facts |= {"trained": True, "steps": trainer.state.global_step, "loss_before": before}
    facts |= {"loss_after": trainer.evaluate()["eval_loss"], "seconds": round(time.perf_counter() - start, 1)}
    facts["changed"] = _differing(codes, _codes(model)) / facts["codes"]
    console.say(
        f"held-out loss {before:.3f} -> {facts['loss_after']:.3f} after {facts['steps']} steps "
        f"({facts['seconds']:.0f} s); {100 * facts['changed']:.2f} % of the codes changed"
    )
    facts["files"] = save(args, model.to(folder.dtype), tokenizer, out)
    shutil.rmtree(work, ignore_errors=True)
    for file, size in facts["files"].items():
        console.say(f"{file} ({size / 1e6:,.1f} MB)")
    return facts


def save(args: argparse.Namespace, model: Any, tokenizer: Any, out: Path) -> dict[str, int]:
    """The packed folder and the GGUF file; what was written, with its size in bytes."""
    from ..hf import export_gguf, save_pretrained

    save_pretrained(model, out, tokenizer=tokenizer, overwrite=args.overwrite)
    written = [out / "model.safetensors" if (out / "model.safetensors").exists() else out]
    if args.gguf:
        written.append(out / f"{out.name}-{args.gguf}.gguf")
        export_gguf(out, written[-1], f"gguf-{args.gguf}", overwrite=True)
    return {str(path): path.stat().st_size for path in written}


def make_trainer(
    args: argparse.Namespace, console: Console, model: Any, tokenizer: Any, rows: Any, held_out: Any, length: int
) -> Any:
    """TRL's SFTTrainer, quiet, with the flip optimizer."""
    import datasets
    from transformers import PrinterCallback
    from transformers import logging as transformers_logging
    from trl import SFTConfig, SFTTrainer

    from ..hf.trainer import FlipFactory, StepReport

    datasets.disable_progress_bars()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    plain = "text" in rows[0]
    with warnings.catch_warnings():  # of TRL's own use of a deprecated name
        warnings.simplefilter("ignore", FutureWarning)
        config = SFTConfig(
            output_dir=f"{Path(args.out).absolute()}.checkpoints", max_length=length, packing=plain,
            packing_strategy="wrapped", eval_packing=plain,
            num_train_epochs=args.epochs, max_steps=args.steps or -1, per_device_train_batch_size=args.batch,
            per_device_eval_batch_size=args.batch, gradient_accumulation_steps=args.accumulate, warmup_steps=0.05,
            lr_scheduler_type="linear", gradient_checkpointing=args.recompute, bf16=False, seed=args.seed, use_cpu=True,
            logging_steps=1, save_strategy="steps" if args.save_every else "no", save_steps=args.save_every or 500,
            save_total_limit=2, report_to=[], disable_tqdm=True,
        )  # fmt: skip
    flips = {"lr": args.lr, "float_lr": args.float_lr, "scale_lr": args.scale_lr, "seed": args.seed}
    train, evaluate = (datasets.Dataset.from_list(part) for part in (rows, held_out))
    given = {"optimizer_cls_and_kwargs": (FlipFactory, flips), "processing_class": tokenizer}
    trainer = SFTTrainer(model, config, train_dataset=train, eval_dataset=evaluate, **given)
    trainer.remove_callback(PrinterCallback)

    def say(step: int, steps: int, loss: float, flips: float, left: float) -> None:
        console.say(f"  step {step:>5}/{steps}  loss {loss:.3f}  flips {100 * flips:.3f} %  {left:5.0f} s left")

    trainer.add_callback(StepReport(say))
    return trainer


# ------------------------------------------------------------------ what comes in
def _tokenizer(path: str) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # whatever a tokenizer's own code raises
        raise UserError(f"{path}: no tokenizer could be loaded ({' '.join(str(error).split())[:200]})") from None
    if tokenizer.eos_token is None:
        raise UserError(f"{path}: the tokenizer has no eos_token; set one in tokenizer_config.json")
    return tokenizer


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Documents of a .txt or .jsonl file, all with the same fields; UserError names the line that is wrong."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); iconv -t utf-8 converts it") from None
    if path.suffix not in (".txt", ".jsonl"):
        raise UserError(f"--data must be a .txt or .jsonl file, got {path.name}")
    rows = _documents(text) if path.suffix == ".txt" else _json_lines(path, text)
    if len(rows) < 2:
        raise UserError(f"{path} has {len(rows)} document(s); at least 2 are needed, one of them to be held out")
    return rows


def _documents(text: str) -> list[dict[str, Any]]:
    """Plain text cut at line ends into parts of about PART characters, at least 2."""
    size = max(1, min(PART, len(text) // 20))
    parts = [""]
    for line in text.splitlines(keepends=True):
        if len(parts[-1]) >= size:
            parts.append("")
        parts[-1] += line
    return [{"text": part} for part in parts if part.strip()]


def _json_lines(path: Path, text: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error})") from None
        fields = {key: row[key] for key in FIELDS if key in row} if isinstance(row, dict) else {}
        if set(fields) not in ({"text"}, {"messages"}, {"prompt", "completion"}):
            raise UserError(f"{path}, line {number}: must have 'text', 'messages', or 'prompt' and 'completion'")
        if rows and set(fields) != set(rows[0]):
            raise UserError(f"{path}, line {number}: has {sorted(fields)}, line 1 has {sorted(rows[0])}")
        rows.append(fields)
    return rows


def split(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """To train on, and every twentieth (at least one) held out."""
    held_out = set(range(len(rows) - 1, -1, -20))
    return [r for i, r in enumerate(rows) if i not in held_out], [rows[i] for i in sorted(held_out)]


def memory(folder: Any, batch: int, length: int, recompute: bool) -> dict[str, int]:
    """Weights, and bytes that training needs: exact for model and optimizer, an estimate for activations.

    A ternary weight has 2 bits and an 8-bit residual; a float weight 4 bytes, as many of gradient and twice as many of
    Adam.  Activations: per token and layer the int8 inputs, and about 14 float32 vectors of the hidden size and 4 of
    the inner one (recomputed: 1, and one layer's at a time); logits and their gradient.
    """
    weights = [folder.tensors[f"{name}.weight"] for name in folder.linears]
    shapes = [(w.shape[0] * (4 if w.dtype == "U8" else 1), w.shape[1]) for w in weights]  # U8: four codes a byte
    codes = sum(n * k for n, k in shapes)
    floats = sum(math.prod(folder.tensors[name].shape) for name in folder.others)
    state = codes * 10 // 8 + sum(12 * n + 8 * k for n, k in shapes) + 16 * floats
    config = folder.config
    hidden, inner = int(config.get("hidden_size", 0)), int(config.get("intermediate_size", 0))
    layers, tokens = int(config.get("num_hidden_layers", 1)), batch * length
    per_layer = 4 * (14 * hidden + 4 * inner) + sum(k for _, k in shapes) // max(layers, 1)
    kept = per_layer + 4 * hidden * layers if recompute else per_layer * layers
    return {
        "codes": codes, "floats": floats, "state_bytes": state,
        "activation_bytes": tokens * (kept + 3 * 4 * int(config.get("vocab_size", 0))),
    }  # fmt: skip


def _positive(text: str) -> float:
    """An argparse type: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def _codes(model: Any) -> list[Any]:
    """Packed codes of every ternary layer, copied: 2 bits a weight."""
    from ..hf.trainer import bit_linears

    return [layer.weight.detach().clone() for layer in bit_linears(model)]


def _differing(before: list[Any], after: list[Any]) -> int:
    """How many codes differ; padding never does."""
    different = [a ^ b for a, b in zip(before, after, strict=True)]
    return sum(int((plane >> shift & 3 != 0).sum()) for plane in different for shift in (0, 2, 4, 6))


def _parent(out: Path) -> Path:
    """The folder that will hold `out`, made."""
    out.parent.mkdir(parents=True, exist_ok=True)
    return out.parent
