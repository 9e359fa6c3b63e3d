"""The engine of the C kernels; another one has the same methods."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import BitLinear, ShadowLinear, prepare
from ..demo.train import live_bytes, state_bytes
from .arms import Arm
from .tasks import Task

Optimizer = torch.optim.Optimizer
WARMUP = 0.05  # of the steps


class Engine:
    """Turns float models into ternary ones with an optimizer and a schedule, and measures them.

    Nothing that is called at every step (the model, `flip_rate`) may wait for a device.
    """

    name, device = "c", "cpu"

    def prepare(
        self, model: Any, arm: Arm, eta: float, task: Task, seed: int
    ) -> tuple[Any, Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        """eta: the arm's dial.  The codes are the absmean codes of the float model."""
        options: dict[str, Any] = {"float_lr": task.float_lr, "scale_lr": task.scale_lr} | arm.options
        if "shadow_dtype" in options:
            options["shadow_dtype"] = getattr(torch, options["shadow_dtype"])
        options["scale_lr" if arm.dial == "scale" else "lr"] = rate(model, arm, eta)
        if "stripes" in options:
            options["stripe_steps"] = math.ceil(task.steps / options["stripes"])
        if options.get("method", "residual") not in ("shadow", "optimizer"):
            options["seed"] = seed
        model, optimizer = prepare(model, **options)
        return model, optimizer, self.schedule(optimizer, task.steps)

    def schedule(self, optimizer: Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
        warmup = max(1, round(WARMUP * steps))
        return torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps)),
        )

    def synchronize(self) -> None:
        """Wait until the device has done what was asked."""

    def flip_rate(self, optimizer: Optimizer) -> float | Tensor | None:
        """Share of the codes that the last step moved; None where codes follow a float weight."""
        return getattr(optimizer, "flip_rate", None)

    def persistent_bytes(self, model: Any, optimizer: Optimizer) -> int:
        """Of the ternary layers between two steps."""
        return state_bytes(model, optimizer)

    def training_bytes(self, model: Any, optimizer: Optimizer) -> int:
        """Of the whole training state now: parameters, gradients, optimizer; no activations."""
        return live_bytes(model, optimizer)

    def codes(self, model: Any) -> list[Tensor]:
        """The codes (N, K) of the ternary layers, on the CPU."""
        return [_codes(layer) for layer in model.linears()]

    def positions(self, model: Any, optimizer: Optimizer) -> list[Tensor] | None:
        """T + e (N, K) in cells, float, on the CPU; None for a rule whose planes are not read here."""
        return None

    def float_state(self, model: Any) -> dict[str, Tensor]:
        """state_dict of the float model from that of one trained with float weights ("shadow")."""
        return {name: value.detach().float().cpu() for name, value in model.state_dict().items()}


def rate(model: Any, arm: Arm, eta: float) -> float:
    """The learning rate that a dial at eta means for the float model."""
    if arm.dial != "hybrid":
        return eta
    weights = [layer.weight for layer in model.linears()]
    return eta * sum(float(w.detach().abs().sum()) for w in weights) / sum(w.numel() for w in weights)


def _codes(layer: Any) -> Tensor:
    if isinstance(layer, BitLinear):
        return layer.codes()
    assert isinstance(layer, ShadowLinear)
    weight = layer.weight.detach().float()
    return (weight / weight.abs().mean().clamp(min=1e-5)).round().clamp(-1, 1).to(torch.int8)
