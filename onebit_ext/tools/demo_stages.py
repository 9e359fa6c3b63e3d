"""The demo's two stages and their arms; torch. Losses are nats per byte on held-out text."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from onebit_ext.torch import FlipOptimizer, prepare, replace_linear
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import onebit_ext as ob

from . import UserError, text
from .console import Console
from .demo_report import report
from .model import ByteTransformer
from .train import (
    Plan,
    Run,
    codes,
    codes_changed,
    fingerprints,
    held_out_loss,
    state_bytes,
    train,
    weight_count,
    windows,
)

WINDOWS = 256  # held-out windows of 128 bytes behind every loss
FLOAT_LR, SCALE_LR = 4e-3, 6e-3  # stage 1; the scale's is relative to its first value
ETA_PRETRAIN, ETA_FINETUNE = 0.03, 0.05  # cells per step
HYBRID_LR = 3e-3  # the best of a search in steps of about 1.5
PROMPT, SAMPLE_BYTES, TEMPERATURE = b"The ", 160, 0.5
State = dict[str, Tensor]


@dataclass
class Texts:
    """Each side as tensors: train (bytes,) uint8, held (WINDOWS, T + 1) int64."""

    code: text.Corpus
    target: text.Corpus
    code_train: Tensor
    target_train: Tensor
    code_held: Tensor
    target_held: Tensor


class Demo:
    """One run of the demo: prints while it works, collects `result`."""

    def __init__(self, console: Console, args: argparse.Namespace) -> None:
        self.console, self.args, self.out, self.seed = console, args, Path(args.out), args.seed
        self.steps = args.steps, max(1, args.steps * 3 // 5)
        self.result: dict[str, Any] = {
            "version": ob.__version__,
            "isa": ob.isa(),
            "threads": args.threads,
            "seed": args.seed,
            "torch": torch.__version__,
            "steps": self.steps,
        }
        self.start = time.perf_counter()

    def read(self) -> None:
        self.console.heading("Text")
        code = text.standard_library()
        self.describe(code, "the standard library's source")
        target = text.user_text(self.args.text) if self.args.text else text.documentation()
        self.describe(target, str(self.args.text or "its English documentation, pydoc_data.topics"))
        context, tensor = (
            ByteTransformer().context,
            lambda content: torch.from_numpy(content.copy()),
        )
        self.texts = Texts(
            code,
            target,
            tensor(code.train),
            tensor(target.train),
            windows(tensor(code.held_out), WINDOWS, context),
            windows(tensor(target.held_out), WINDOWS, context),
        )

    def describe(self, corpus: text.Corpus, what: str) -> None:
        losses = "  ".join(f"{name} {loss:.3f}" for name, loss in corpus.baselines.items())
        self.console.say(
            f"  {corpus.name}: {what}\n    {len(corpus.train):,} bytes to train on, "
            f"{len(corpus.held_out):,} held out ({corpus.cut:,} more cut: seen in training)\n"
            f"    nats/byte: {losses}"
        )
        key = "code" if corpus.name == "code" else "target"
        self.result[key] = {
            "name": corpus.name,
            "train_bytes": len(corpus.train),
            "held_out_bytes": len(corpus.held_out),
            "cut_bytes": corpus.cut,
            "baselines": corpus.baselines,
        }

    def new_model(self, state: State | None = None) -> ByteTransformer:
        """A model with ternary blocks: random, or from a checkpoint."""
        torch.manual_seed(self.seed)
        model = ByteTransformer()
        replace_linear(model, skip=("lm_head",))
        if state is not None:
            model.load_state_dict(state)
        return model

    def fit(
        self, label: str, model: ByteTransformer, optimizer: torch.optim.Optimizer, plan: Plan
    ) -> Run:
        with self.console.track(label, plan.steps) as track:
            return train(model, optimizer, plan, track.update)

    def pretrain(self) -> None:
        model, steps = self.new_model(), self.steps[0]
        self.weights = weight_count(model)
        self.console.heading(
            f"Stage 1: pre-train on code; {self.weights:,} ternary weights, no float copy"
        )
        optimizer = FlipOptimizer(
            model, lr=ETA_PRETRAIN, float_lr=FLOAT_LR, scale_lr=SCALE_LR, seed=self.seed
        )
        plan = Plan(
            self.texts.code_train,
            self.texts.code_held,
            steps,
            warmup=max(1, steps * 6 // 100),
            seed=self.seed + 1,
            clip=model.float_parameters(),
        )
        run = self.fit("1 code", model, optimizer, plan)
        self.console.say(
            f"  held-out {run.losses[0]:.3f} -> {run.losses[-1]:.3f} nats/byte, "
            f"{run.seconds:.0f} s; {8 * run.state_bytes_per_weight:.2f} bits per weight, measured"
        )
        self.pretrained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        save(self.pretrained, self.out / "stage1.safetensors")
        untrained = self.new_model(self.pretrained)
        self.result |= {
            "weights": self.weights,
            "stage1": asdict(run),
            "nothing_loss": held_out_loss(untrained, self.texts.target_held),
            "nothing_bytes_per_weight": state_bytes(untrained, None) / self.weights,
            "sample_before": self.sample(untrained),
        }

    def finetune(self) -> None:
        self.console.heading(
            f"Stage 2: fine-tune to '{self.texts.target.name}' by moving codes alone"
        )
        wrong, _ = self.flip_arm("2a wrong text", self.texts.code_train)
        flip, model = self.flip_arm("2b ours, 10 bits", self.texts.target_train)
        hybrid = self.hybrid_arm("2c hybrid float32")
        path, untrained = self.out / "stage2.safetensors", self.new_model(self.pretrained)
        save(model.state_dict(), path)
        reloaded = self.new_model(load_file(path))
        kept = fingerprints(untrained)
        self.result |= {
            "arms": {"wrong": asdict(wrong), "flip": asdict(flip), "hybrid": asdict(hybrid)},
            "codes_changed": codes_changed(codes(untrained), codes(model)),
            "other_tensors": len(kept),
            "other_tensors_equal": kept == fingerprints(model),
            "code_loss_after": held_out_loss(model, self.texts.code_held),
            "sample_after": self.sample(model),
            "checkpoint": str(path),
            "checkpoint_bytes": path.stat().st_size,
            "reloaded_loss": held_out_loss(reloaded, self.texts.target_held),
        }

    def plan(self, train_text: Tensor, clip: list[nn.Parameter]) -> Plan:
        steps = self.steps[1]
        warmup = max(1, steps * 40 // 600)
        return Plan(train_text, self.texts.target_held, steps, warmup, self.seed + 2, clip)

    def flip_arm(self, label: str, train_text: Tensor) -> tuple[Run, ByteTransformer]:
        model = self.new_model(self.pretrained)
        freeze(model.float_parameters())
        # scale_lr = 0: the scales stay, they only carry the gradient
        optimizer = FlipOptimizer(model, lr=ETA_FINETUNE, scale_lr=0.0, seed=self.seed)
        return self.fit(label, model, optimizer, self.plan(train_text, [])), model

    def hybrid_arm(self, label: str) -> Run:
        """To compare with: a float32 shadow, quantised every step, and AdamW (BitNet b1.58)."""
        model = ByteTransformer()
        model.load_state_dict(dense_state(self.new_model(self.pretrained)))
        freeze(model.float_parameters())
        model, optimizer = prepare(model, method="shadow", lr=HYBRID_LR, skip=("lm_head",))
        clip = [p for p in model.parameters() if p.requires_grad]
        return self.fit(label, model, optimizer, self.plan(self.texts.target_train, clip))

    def sample(self, model: ByteTransformer) -> str:
        return text.as_text(model.sample(PROMPT, SAMPLE_BYTES, TEMPERATURE, self.seed))


def freeze(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.requires_grad_(False)


def dense_state(model: ByteTransformer) -> State:
    """Float weights that absmean quantises back to the same codes and scales: s T / mean|T|."""
    state = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if "blocks" not in name or "norm" in name
    }
    names = {id(module): name for name, module in model.named_modules()}
    for layer in model.linears():
        ternary = layer.codes().float()
        state[f"{names[id(layer)]}.weight"] = ternary * (
            layer.scale.detach() / ternary.abs().mean()
        )
    return state


def save(state: State, path: Path) -> None:
    """All or nothing: written aside, then renamed."""
    aside = path.with_suffix(".tmp")
    try:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, aside)
        aside.replace(path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}; choose another folder with --out"
        ) from None


def run(args: argparse.Namespace) -> int:
    console = Console(to_stderr=args.json)
    ob.set_num_threads(args.threads)
    torch.set_num_threads(args.threads)
    console.say(
        f"onebit-ext {ob.__version__} on {ob.isa()}, {args.threads} threads, "
        f"torch {torch.__version__}, seed {args.seed}"
    )
    demo = Demo(console, args)
    demo.read()
    demo.pretrain()
    demo.finetune()
    demo.result["seconds"] = time.perf_counter() - demo.start
    passed = report(
        console, demo.result, judged=args.text is None and args.steps == 1000, out=demo.out
    )
    (demo.out / "demo.json").write_text(json.dumps(demo.result, indent=2))
    if args.json:
        print(json.dumps(demo.result))
    return 0 if passed else 1
