"""The engine of a GPU: the rule of emulation.cu, a step as one CUDA graph.

Batches, schedule, losses and flip rates never leave the device.  Activations are bfloat16 (autocast).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from onebit_ext import _core

from ..schedule import SHAPES, WARMUP, Shape
from .arms import Arm
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
from .tasks import Task, absmean

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
        ternary, mean = absmean(weight)
        codes, scale = ternary.to(torch.int8), mean.view(1)
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


def _factors(shape: Shape, steps: int) -> np.ndarray[Any, Any]:
    """Of a learning rate, by step."""
    return np.array([shape(step, steps, WARMUP) for step in range(steps)])


class Engine:
    """Emulated layers on a device of torch's, "cuda", or "cpu" where a test compares it."""

    name = "emulation"

    def __init__(self, device: str = "cuda") -> None:
        self.device = device

    def refuses(self, arm: Arm, task: str) -> str:
        """Why it cannot train an arm on a task, or nothing."""
        if arm.options.get("method") in ("optimizer", "bop"):
            return f"arm {arm.name!r} runs on the C kernels only (--device cpu)"
        return "task 'teacher' runs on the C kernels only (--device cpu)" if task == "teacher" else ""

    def trainer(self, arm: Arm, task: Task, seed: int, eta: float) -> Trainer:
        """eta: the arm's dial.  The codes are the absmean codes of the float model."""
        return Trainer(arm, task, seed, eta, self.device)


class Trainer:
    """One arm on one task; the contract of each method is that of engine.py."""

    def __init__(self, arm: Arm, task: Task, seed: int, eta: float, device: str) -> None:
        self.arm, self.task, self.device = arm, task, device
        self.model: Any = task.new_model(seed).to(device)
        self.rate = arm.rate(self.model, eta)
        emulate(self.model, arm, seed)
        self.emulated = [layer for layer in self.model.linears() if isinstance(layer, EmulatedLinear)]
        self.shadows = [layer for layer in self.model.linears() if isinstance(layer, Shadow)]
        self.stream = task.stream(seed).to(device)
        self.done, self.told = 0, 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.index = torch.zeros(1, dtype=torch.int64, device=device)
        self.losses, self.flips = torch.zeros(task.steps + 1, device=device), torch.zeros(task.steps + 1, device=device)
        self._schedules()
        self._optimizer()

    def _schedules(self) -> None:
        task, steps = self.task, self.task.steps
        shape, others = SHAPES[self.arm.schedule or task.schedule]
        whole = _factors(others, steps)
        stripes = self.emulated[0].rule.stripes if self.emulated else 1
        each = -(-steps // stripes)
        self.stripe_steps = each if stripes > 1 else 0
        eta = np.tile(_factors(shape, each), stripes)[:steps] * (0.0 if self.arm.dial == "scale" else self.rate)
        scale_lr = self.rate if self.arm.dial == "scale" else task.scale_lr
        rates = np.stack([np.append(eta[1:], 0.0), scale_lr * whole], 1)
        self.etas = eta.tolist()
        self.rates = torch.tensor(rates, device=self.device)
        self.float_rates = torch.tensor(task.float_lr * whole, dtype=torch.float32, device=self.device)
        self.shadow_rates = torch.tensor(eta, dtype=torch.float32, device=self.device)

    def _optimizer(self) -> None:
        self.floats = self.model.float_parameters()
        self.weights = [layer.weight for layer in self.shadows]
        self.float_lr, self.shadow_lr = (torch.zeros((), device=self.device) for _ in range(2))
        options: dict[str, Any] = {"betas": (0.9, 0.95), "weight_decay": 0.0, "capturable": self.index.is_cuda}
        self.adamw = [torch.optim.AdamW(self.floats, lr=self.float_lr, **options)]
        if self.weights:
            self.adamw.append(torch.optim.AdamW(self.weights, lr=self.shadow_lr, **options))
        self.rules = Rules(self.emulated) if self.emulated else None
        if self.rules is not None:
            self.rules.set_eta(self.etas[0])

    def step(self, watched: bool) -> None:
        """On the device; nothing is waited for."""
        if self.stripe_steps and self.done and self.done % self.stripe_steps == 0:
            assert self.rules is not None
            self.rules.rotate()
        if self.done < EAGER or not self.index.is_cuda:
            self._step()
        else:
            if self.graph is None:
                torch.cuda.synchronize()
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph):
                    self._step()
            self.graph.replay()
        self.done += 1

    def _step(self) -> None:
        with torch.autocast(self.device, torch.bfloat16):
            loss = self.task.loss(self.model, self.stream.index_select(0, self.index)[0])
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

    def progress(self) -> tuple[float, list[float]]:
        since, self.told = slice(self.told, self.done), self.done
        return self.losses[since].mean().item(), self.flips[since].tolist() if self.emulated else []

    def evaluate(self, split: str) -> dict[str, float]:
        with torch.autocast(self.device, torch.bfloat16):
            return self.task.evaluate(self.model, split)

    def persistent_bytes(self) -> int:
        """Counted on the C core's planes: the emulation's own are not packed."""
        total = sum(3 * weight.numel() * weight.element_size() for weight in self.weights)
        for layer in self.emulated:
            n, k, rule = layer.out_features, layer.in_features, layer.rule
            total += n * k // 4 + 4 + 8 * len(CONTROL)  # codes, scale
            if rule.name is not None:
                specs = _core.plane_specs(n, k, rule.name, stripes=rule.stripes)
                total += sum(int(np.prod(shape)) * np.dtype(kind).itemsize for shape, kind in specs.values())
        return total

    def peak_bytes(self) -> int:
        """Float parameters and float weights also have a gradient, the former two moments of float32."""
        gradients = sum(weight.numel() * weight.element_size() for weight in self.weights)
        return self.persistent_bytes() + gradients + sum(16 * parameter.numel() for parameter in self.floats)

    def codes(self) -> list[Tensor]:
        return [_codes(layer).clone().cpu() for layer in self.model.linears()]

    def positions(self) -> list[Tensor] | None:
        return None


def _codes(layer: Any) -> Tensor:
    return layer.codes if isinstance(layer, EmulatedLinear) else absmean(layer.weight)[0].to(torch.int8)


def emulate(model: Any, arm: Arm, seed: int) -> None:
    """Replace the layers of `model.linears()`, on the model's device, by what `arm` trains."""
    ours = {id(layer): index for index, layer in enumerate(model.linears())}
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if id(child) in ours
    ]
    options = arm.options
    for parent, name, old in places:
        index = ours[id(old)]
        if options.get("method") == "shadow":
            dtype = getattr(torch, options.get("shadow_dtype", "float32"))
            setattr(parent, name, Shadow(old.weight.detach().to(dtype).clone(), index, seed))
            continue
        codes, scale = absmean(old.weight)
        rule = {"frozen": None, "stochastic": "stochastic"}.get(options.get("method", ""), options.get("rule"))
        emulated = EmulatedLinear(
            codes, float(1 / (1 / scale)), Rule(rule, options.get("stripes", 1)), index, seed=seed
        )
        setattr(parent, name, emulated)
