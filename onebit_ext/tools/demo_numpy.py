"""`onebit-ext demo --numpy`: two ternary layers learn the next byte of source code; no torch.

The model sees the last CONTEXT bytes, each as a fixed random sign vector, so that everything that
learns is ternary: logits = T2 . rms(relu(T1 . signs)). The layers give dX and vote in backward.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

import onebit_ext as ob

from . import text
from .console import Console, Track

CONTEXT, SIGNS, HIDDEN = 6, 64, 768
BATCH, STEPS = 1024, 700
ETA, SCALE_LR = 0.03, 1e-2
Array = NDArray[Any]


class ByteModel:
    """contexts (M, CONTEXT) uint8 -> logits (M, 256) float32."""

    def __init__(self, seed: int) -> None:
        generator = np.random.default_rng(seed)
        self.signs = generator.choice(np.array([-1, 1], np.float32), (CONTEXT, 256, SIGNS))
        self.first = ob.TernaryLinear(CONTEXT * SIGNS, HIDDEN, seed=seed)
        self.second = ob.TernaryLinear(HIDDEN, 256, seed=seed + 1)
        self.layers = [self.first, self.second]

    def forward(self, contexts: Array, keep: bool = True) -> Array:
        x = self.signs[np.arange(CONTEXT), contexts].reshape(len(contexts), -1)
        hidden = np.maximum(self.first.forward(x, keep=keep), 0)
        self.inverse = 1 / np.sqrt(np.mean(hidden**2, axis=1, keepdims=True) + 1e-6)
        self.normal = hidden * self.inverse
        return self.second.forward(self.normal, keep=keep)

    def backward(self, dlogits: Array) -> None:
        d = self.second.backward(dlogits)
        d = self.inverse * (d - self.normal * np.mean(d * self.normal, axis=1, keepdims=True))
        self.first.backward(d * (self.normal > 0))


def cross_entropy(logits: Array, targets: Array) -> tuple[float, Array]:
    """logits (M, 256), targets (M,) -> mean nats per byte and its gradient (M, 256) float32."""
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    rows = np.arange(len(targets))
    loss = float(-np.log(np.maximum(p[rows, targets], 1e-30)).mean())
    p[rows, targets] -= 1
    return loss, p / np.float32(len(targets))


def batch(content: Array, ends: Array) -> tuple[Array, Array]:
    """Contexts (M, CONTEXT) and next bytes (M,) at positions ends (M,) of content."""
    return content[ends[:, None] + np.arange(-CONTEXT, 0)], content[ends]


def run(args: argparse.Namespace, console: Console) -> int:
    start, steps = time.perf_counter(), args.steps or STEPS
    corpus = text.user_text(args.text) if args.text else text.standard_library()
    console.say(f"'{corpus.name}': {len(corpus.train):,} bytes to train on, {len(corpus.held_out):,} held out")
    model = ByteModel(args.seed)
    before = [layer.codes() for layer in model.layers]
    with console.track(corpus.name, steps) as track:
        losses = train(model, corpus, steps, args.seed, track)
    changed = sum(int((a != layer.codes()).sum()) for a, layer in zip(before, model.layers, strict=True))
    weights = sum(a.size for a in before)
    named = {f"step {step}": loss for step, loss in losses.items()} | corpus.baselines
    rows = [[name, f"{loss:.3f}", f"{loss / math.log(2):.3f}"] for name, loss in named.items()]
    console.table(["held-out", "nats/byte", "bits/byte"], rows)
    console.say(f"{changed:,} of {weights:,} codes differ from the start; {time.perf_counter() - start:.0f} s in all")
    judged, passed = not args.text and steps == STEPS, losses[steps] < corpus.baselines["trigram"]
    if judged:
        console.say(f"{'PASS' if passed else 'FAIL'}  below a trigram model")
    if args.json:
        result = {"losses": losses, "baselines": corpus.baselines, "changed": changed, "weights": weights}
        print(json.dumps(result | {"passed": passed, "judged": judged}))
    return 1 if judged and not passed else 0


def train(model: ByteModel, corpus: text.Corpus, steps: int, seed: int, track: Track) -> dict[int, float]:
    """Warmup and cosine; held-out loss by step, six times."""
    generator = np.random.default_rng(seed)
    optimizer = ob.FlipOptimizer(model.layers, lr=ETA, scale_lr=SCALE_LR, recipe="pretrain", seed=seed)
    held = batch(corpus.held_out, np.linspace(CONTEXT, len(corpus.held_out) - 1, 8192).astype(np.int64))
    losses: dict[int, float] = {}
    for step in range(steps + 1):
        if step % max(1, steps // 5) == 0 or step == steps:
            losses[step] = cross_entropy(model.forward(held[0], keep=False), held[1])[0]
        if step == steps:
            break
        factor = min(1.0, (step + 1) / max(1, steps // 20)) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.lr, optimizer.scale_lr = ETA * factor, SCALE_LR * factor
        contexts, targets = batch(corpus.train, generator.integers(CONTEXT, len(corpus.train), BATCH))
        loss, dlogits = cross_entropy(model.forward(contexts), targets)
        model.backward(dlogits)
        optimizer.step()
        optimizer.zero_grad()
        track.update(step + 1, loss, optimizer.flip_rate)
    return losses
