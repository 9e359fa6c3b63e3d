"""The demo's two stages and their arms. Losses are nats per byte on held-out text."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .. import FlipOptimizer, prepare, replace_linear
from .model import CONTEXT, ByteTransformer
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
HYBRID_LR = 5e-3  # the best of 1.5e-3, 3e-3, 5e-3, 8e-3: 1.649, 1.615, 1.596, 1.613
PROMPT, SAMPLE_BYTES, TEMPERATURE = b"The ", 160, 0.5
State = dict[str, Tensor]


class Progress(Protocol):
    """Of one run."""

    def update(self, step: int, loss: float, flip_rate: float | None) -> None: ...


class Screen(Protocol):
    """Where the demo speaks."""

    def say(self, text: str = ..., style: str = ...) -> None: ...
    def heading(self, text: str) -> None: ...
    def track(self, label: str, total: int) -> AbstractContextManager[Progress]: ...


class Side:
    """One text: train (bytes,) uint8, held_out (WINDOWS, T + 1) int64."""

    def __init__(self, train: NDArray[np.uint8], held_out: NDArray[np.uint8]) -> None:
        self.train = torch.from_numpy(train.copy())
        self.held_out = windows(torch.from_numpy(held_out.copy()), WINDOWS, CONTEXT)


class Stages:
    """Both stages: speak on `screen`, write into `out`, collect `result` (plain JSON types)."""

    def __init__(self, screen: Screen, code: Side, target: Side, steps: int, seed: int, out: Path) -> None:
        self.screen, self.code, self.target, self.seed, self.out = screen, code, target, seed, out
        self.steps = steps, max(1, steps * 3 // 5)
        self.result: dict[str, Any] = {"torch": torch.__version__, "steps": list(self.steps)}

    def new_model(self, state: State | None = None) -> ByteTransformer:
        """A model with ternary blocks: random, or from a checkpoint."""
        torch.manual_seed(self.seed)
        model = ByteTransformer()
        replace_linear(model, skip=("lm_head",))
        if state is not None:
            model.load_state_dict(state)
        return model

    def fit(self, label: str, model: ByteTransformer, optimizer: torch.optim.Optimizer, plan: Plan) -> Run:
        with self.screen.track(label, plan.steps) as track:
            return train(model, optimizer, plan, track.update)

    def pretrain(self) -> None:
        model, steps = self.new_model(), self.steps[0]
        self.weights = weight_count(model)
        self.screen.heading(f"Stage 1: pre-train on code; {self.weights:,} ternary weights, no float copy")
        optimizer = FlipOptimizer(model, lr=ETA_PRETRAIN, float_lr=FLOAT_LR, scale_lr=SCALE_LR, seed=self.seed)
        plan = Plan(
            self.code.train,
            self.code.held_out,
            steps,
            warmup=max(1, steps * 6 // 100),
            seed=self.seed + 1,
            clip=model.float_parameters(),
        )
        run = self.fit("1 code", model, optimizer, plan)
        self.screen.say(
            f"  held-out {run.losses[0]:.3f} -> {run.losses[-1]:.3f} nats/byte, "
            f"{run.seconds:.0f} s; {8 * run.state_bytes_per_weight:.2f} bits per weight, measured"
        )
        self.pretrained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        save(self.pretrained, self.out / "stage1.safetensors")
        untrained = self.new_model(self.pretrained)
        self.result |= {
            "weights": self.weights,
            "stage1": asdict(run),
            "nothing_loss": held_out_loss(untrained, self.target.held_out),
            "nothing_bytes_per_weight": state_bytes(untrained, None) / self.weights,
            "sample_before": self.sample(untrained),
        }

    def finetune(self) -> None:
        self.screen.heading("Stage 2: fine-tune by moving codes alone; embedding, head, norms and scales stay")
        wrong, _ = self.flip_arm("2a wrong text", self.code.train)
        flip, model = self.flip_arm("2b ours, 10 bits", self.target.train)
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
            "code_loss_after": held_out_loss(model, self.code.held_out),
            "sample_after": self.sample(model),
            "checkpoint": str(path),
            "checkpoint_bytes": path.stat().st_size,
            "reloaded_loss": held_out_loss(reloaded, self.target.held_out),
        }

    def plan(self, train_text: Tensor, clip: list[nn.Parameter]) -> Plan:
        steps = self.steps[1]
        warmup = max(1, steps * 40 // 600)
        return Plan(train_text, self.target.held_out, steps, warmup, self.seed + 2, clip)

    def flip_arm(self, label: str, train_text: Tensor) -> tuple[Run, ByteTransformer]:
        model = self.new_model(self.pretrained)
        freeze(model.float_parameters())
        # scale_lr = 0: the scales stay, they only carry the gradient
        optimizer = FlipOptimizer(model, lr=ETA_FINETUNE, scale_lr=0.0, seed=self.seed)
        return self.fit(label, model, optimizer, self.plan(train_text, [])), model

    def hybrid_arm(self, label: str) -> Run:
        """To compare with: a float32 shadow, quantised every step, and AdamW (BitNet b1.58)."""
        model = self.new_model(self.pretrained)  # the shadow starts where absmean gives the same codes
        freeze(model.float_parameters())
        _, optimizer = prepare(model, method="shadow", lr=HYBRID_LR, skip=("lm_head",))
        clip = [p for p in model.parameters() if p.requires_grad]
        return self.fit(label, model, optimizer, self.plan(self.target.train, clip))

    def sample(self, model: ByteTransformer) -> str:
        return model.sample(PROMPT, SAMPLE_BYTES, TEMPERATURE, self.seed).decode("utf-8", "replace")


def freeze(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.requires_grad_(False)


def save(state: State, path: Path) -> None:
    """All or nothing: written aside, then renamed."""
    aside = path.with_suffix(".tmp")
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, aside)
    aside.replace(path)
