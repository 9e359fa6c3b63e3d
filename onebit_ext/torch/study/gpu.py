"""One training run on a GPU as a CUDA graph: batches, schedule, losses and flip rates never leave the device."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from onebit_ext import _core

from .emulation import (
    CONTROL,
    CONTROL_LEN,
    TOKENS,
    EmulatedLinear,
    Rule,
    Rules,
    absmax,
    launch,
    multiply,
    scaled,
    tokens_of,
)

EAGER = 3  # steps before the graph is captured: AdamW makes its state


class Shadow(nn.Module):
    """The hybrid baseline: absmean codes of a float weight in every forward, integer products, a float dW."""

    def __init__(self, weight: Tensor, layer: int, seed: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        control = np.zeros(CONTROL_LEN)
        control[: len(CONTROL)] = _core.new_control(layer=layer, seed=seed)
        self.control = torch.from_numpy(control).to(weight.device)
        self.out_features, self.in_features = weight.shape
        launch("begin", 1, [self.control])

    def forward(self, x: Tensor) -> Tensor:
        flat = tokens_of(x)
        return _Shadow.apply(flat, self.weight, self).view(*x.shape[:-1], self.out_features)

    def advance(self) -> None:
        """A new step: other random numbers."""
        self.control[CONTROL["step"]] += 1
        launch("begin", 1, [self.control])


class _Shadow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: Shadow) -> Tensor:
        scale = weight.float().abs().mean().clamp(min=1e-5).view(1)
        codes = (weight.float() / scale).round_().clamp_(-1, 1).to(torch.int8)
        xq, sx = torch.empty_like(x, dtype=torch.int8), x.new_empty((len(x),), dtype=torch.float32)
        m, k = x.shape
        launch("quantize_tokens", k * m // TOKENS, [x, absmax(x), xq, None, sx], [m, k, x.dtype == torch.bfloat16])
        ctx.save_for_backward(codes.t().contiguous(), scale, xq, sx)
        ctx.layer, ctx.dtype = layer, weight.dtype
        return scaled(multiply(xq, codes), sx, scale, x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        turned, scale, xq, sx = ctx.saved_tensors
        dy = dy.contiguous()
        (m, n), bf16 = dy.shape, dy.dtype == torch.bfloat16
        codes, d = torch.empty_like(dy, dtype=torch.int8), torch.empty_like(sx)
        launch("round_tokens", m * n // 8, [dy, absmax(dy), scale, codes, d, ctx.layer.control], [n, bf16])
        dx = scaled(multiply(codes, turned), d, None, dy.dtype)
        dw = (dy.float() * sx[:, None]).t() @ xq.float()  # TF32
        return dx, dw.to(ctx.dtype), None


def cosine(steps: int, warmup: int) -> np.ndarray[Any, Any]:
    """Factors of the learning rate by step, and 0 after the last."""
    step = np.arange(steps)
    factor = np.minimum(1, (step + 1) / warmup) * 0.5 * (1 + np.cos(np.pi * step / steps))
    return np.append(factor, 0.0)


class Trainer:
    """One run: `model` (B, T) bytes -> logits with `loss(window)`, its linear layers already emulated."""

    def __init__(self, model: Any, plan: dict[str, Any]) -> None:
        self.model, self.plan = model, plan
        device = next(model.parameters()).device
        self.emulated = [layer for layer in model.modules() if isinstance(layer, EmulatedLinear)]
        self.shadows = [layer for layer in model.modules() if isinstance(layer, Shadow)]
        steps, batch = plan["steps"], plan["batch"]
        generator = torch.Generator().manual_seed(plan["seed"] + 1)
        text = plan["text"]
        first = torch.randint(len(text) - model.context, (steps, batch), generator=generator)
        self.text, self.first = text, first.to(device)
        self.offsets = torch.arange(model.context + 1, device=device)
        self.index = torch.zeros(1, dtype=torch.int64, device=device)
        self.losses, self.flips = torch.zeros(steps + 1, device=device), torch.zeros(steps + 1, device=device)
        self._schedules(steps, device)
        self._optimizer()

    def _schedules(self, steps: int, device: torch.device) -> None:
        plan = self.plan
        whole = cosine(steps, max(1, round(plan["warmup"] * steps)))
        self.stripes = self.emulated[0].rule.stripes if self.emulated else 1
        each = steps // self.stripes
        cycle = cosine(each, max(1, round(plan["warmup"] * each)))[:-1]
        cycles = np.append(np.tile(cycle, self.stripes + 1)[:steps], 0.0)
        self.stripe_steps = each if self.stripes > 1 else 0
        eta = plan["eta"] * (cycles if self.stripes > 1 else whole)
        self.eta = eta
        self.rates = torch.tensor(np.stack([np.append(eta[1:], 0.0), plan["scale_lr"] * whole], 1), device=device)
        self.float_rates = torch.tensor(plan["float_lr"] * whole, dtype=torch.float32, device=device)
        self.shadow_rates = torch.tensor(plan["eta"] * whole, dtype=torch.float32, device=device)

    def _optimizer(self) -> None:
        device = self.index.device
        ours = {id(p) for layer in [*self.emulated, *self.shadows] for p in layer.parameters()}
        self.floats = [p for p in self.model.parameters() if id(p) not in ours]
        self.weights = [layer.weight for layer in self.shadows]
        self.float_lr, self.shadow_lr = torch.zeros((), device=device), torch.zeros((), device=device)
        options: dict[str, Any] = {"betas": (0.9, 0.95), "weight_decay": 0.0, "capturable": device.type == "cuda"}
        self.adamw = [torch.optim.AdamW(self.floats, lr=self.float_lr, **options)]
        if self.weights:
            self.adamw.append(torch.optim.AdamW(self.weights, lr=self.shadow_lr, **options))
        self.rules = Rules(self.emulated) if self.emulated else None
        if self.rules is not None:
            self.rules.set_eta(float(self.eta[0]))

    def step(self) -> None:
        """Everything of one step, on the device."""
        window = self.text[self.first.index_select(0, self.index)[0][:, None] + self.offsets].long()
        with torch.autocast(window.device.type, torch.bfloat16):
            loss = self.model.loss(window)
        loss.backward()
        nn.utils.clip_grad_norm_(self.floats + self.weights, 1.0, foreach=True)
        self.float_lr.copy_(self.float_rates.index_select(0, self.index)[0])
        self.shadow_lr.copy_(self.shadow_rates.index_select(0, self.index)[0])
        for optimizer in self.adamw:
            optimizer.step()
        if self.rules is not None:
            self.rules.rates.copy_(self.rates.index_select(0, self.index)[0])
            self.rules.step()
            self.flips.index_copy_(0, self.index, self.rules.flip_rate().float().view(1))
        for layer in self.shadows:
            layer.advance()
        self.losses.index_copy_(0, self.index, loss.detach().float().view(1))
        self.index.add_(1)
        for parameter in self.model.parameters():
            parameter.grad = None

    @torch.no_grad()
    def held_out(self, windows: Tensor) -> float:
        """Mean nats per byte over windows (W, T + 1) uint8."""
        total = torch.zeros((), device=windows.device)
        with torch.autocast(windows.device.type, torch.bfloat16):
            for part in windows.split(64):
                total += self.model.loss(part.long()).float() * len(part)
        return float(total) / len(windows)

    def rotates(self, step: int) -> bool:
        """Whether the next stripe of a block-cyclic arm begins."""
        if not self.stripe_steps or not step or step % self.stripe_steps:
            return False
        return step // self.stripe_steps < self.stripes

    def run(self, points: int = 10) -> dict[str, Any]:
        """Train; a record of losses at `points`, flip rates, seconds, bytes."""
        steps, val = self.plan["steps"], self.plan["val"]
        measured = {round(steps * point / points) for point in range(points + 1)}
        at, losses, graph, begun = [], [], None, time.perf_counter()
        for step in range(steps + 1):
            if step in measured:
                at.append(step)
                losses.append(self.held_out(val))
                if not math.isfinite(losses[-1]):
                    break
            if step == steps:
                break
            if self.rotates(step):
                assert self.rules is not None
                self.rules.rotate()
            if step < EAGER or not self.index.is_cuda:
                self.step()
            else:
                if graph is None:
                    torch.cuda.synchronize()
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph):
                        self.step()
                graph.replay()
        if self.index.is_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begun
        block = max(1, steps // 100)
        flips = self.flips[:steps].cpu()[: steps // block * block].view(-1, block).mean(1).tolist()
        train = self.losses[:steps].cpu()[: steps // block * block].view(-1, block).mean(1).tolist()
        return {
            "steps": at,
            "losses": losses,
            "val": losses[-1],
            "test": self.held_out(self.plan["test"]),
            "start": losses[0],
            "flip_rates": [round(rate, 6) for rate in flips],
            "worst_flip_rate": float(self.flips.max()),
            "train_losses": [round(loss, 4) for loss in train],
            "seconds": seconds,
        }


def emulate(model: Any, state: dict[str, Any] | None, arm: dict[str, Any], seed: int) -> None:
    """Replace the layers of `model.linears()`, on the model's device, by what `arm` trains.

    state: `codes_and_floats` of a checkpoint; None: random weights.
    """
    for index, (parent, name) in enumerate(_places(model)):
        old = getattr(parent, name)
        weight = old.weight.detach().float() if state is None else state["weights"][index].float()
        if arm["method"] == "shadow":
            setattr(parent, name, Shadow(weight.to(arm.get("dtype", torch.float32)).clone(), index, seed))
            continue
        scale = weight.abs().mean().clamp(min=1e-5)
        codes = (weight / scale).round().clamp(-1, 1)
        rule = Rule(arm["rule"], arm.get("stripes", 1), arm.get("lag", 0))
        setattr(parent, name, EmulatedLinear(codes, float(1 / (1 / scale)), rule, index, seed=seed))


def _places(model: Any) -> list[tuple[nn.Module, str]]:
    names = ("qkv", "out", "gate_up", "down")
    return [(block, name) for block in model.blocks for name in names]


def codes_and_floats(model: Any) -> dict[str, Any]:
    """A checkpoint of a hybrid run: float shadows, and the float parameters."""
    shadows = [layer.weight.detach().float().clone() for layer in model.modules() if isinstance(layer, Shadow)]
    inside = {id(layer.weight) for layer in model.modules() if isinstance(layer, Shadow)}
    floats = {name: p.detach().clone() for name, p in model.named_parameters() if id(p) not in inside}
    return {"weights": shadows, "floats": floats}
