"""The engine of the C kernels; another one has the same methods."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import BitLinear, ShadowLinear, cosine_schedule, prepare, state_bytes
from ..memory import training_bytes
from .arms import Arm
from .tasks import Task

Optimizer = torch.optim.Optimizer
UNITS = {"residual16": 16384, "residual8": 128, "residual4": 15, "residual2": 3, "byte": 85}  # to a cell


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
        if options.get("method") == "shadow":
            del options["scale_lr"]
        else:
            options["seed"] = seed
        model, optimizer = prepare(model, **options)
        return model, optimizer, cosine_schedule(optimizer, task.steps)

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
        return training_bytes(model, optimizer)

    def codes(self, model: Any) -> list[Tensor]:
        """The codes (N, K) of the ternary layers, on the CPU."""
        return [_codes(layer) for layer in model.linears()]

    def positions(self, model: Any, optimizer: Optimizer) -> list[Tensor] | None:
        """The weights that learn, T + e or W / mean |W| (N, K) in cells, on the CPU; None where they are not kept."""
        found = [_position(layer, optimizer) for layer in model.linears()]
        kept = [position for position in found if position is not None]
        return kept if len(kept) == len(found) else None

    def float_state(self, model: Any) -> dict[str, Tensor]:
        """state_dict of the float model from that of one trained with float weights ("shadow")."""
        return {name: value.detach().float().cpu() for name, value in model.state_dict().items()}


def rate(model: Any, arm: Arm, eta: float) -> float:
    """The learning rate that a dial at eta means for the float model."""
    if arm.dial != "hybrid":
        return eta
    weights = [layer.weight for layer in model.linears()]
    return eta * sum(float(w.detach().abs().sum()) for w in weights) / sum(w.numel() for w in weights)


def _position(layer: Any, optimizer: Optimizer) -> Tensor | None:
    if isinstance(layer, ShadowLinear):
        weight = layer.weight.detach().float()
        return weight / weight.abs().mean()
    rule, state = getattr(optimizer, "rule", None), optimizer.state[layer.weight]
    codes = layer.codes().float()
    if rule in (None, "stochastic"):
        return codes
    if rule == "optimizer":
        return codes + state["residual"].float()
    units = UNITS.get(rule.partition("_")[0])
    if units is None or len(state["row_factor"]) != layer.out_features:  # Bop; a stripe
        return None
    residual = state["residual"]
    if residual.dtype == torch.uint8:  # fields in blocks of 64 columns, low bits first
        bits = 4 if units == 15 else 2
        fields = residual.numpy()[:, :, None] >> np.arange(0, 8, bits)[:, None] & (1 << bits) - 1
        signed = ((fields.astype(np.int16) + (1 << bits - 1)) % (1 << bits)) - (1 << bits - 1)
        residual = torch.from_numpy(signed.reshape(layer.out_features, -1)[:, : layer.in_features].copy())
    return residual.float() / units + (codes if units != 85 else 0)


def _codes(layer: Any) -> Tensor:
    if isinstance(layer, BitLinear):
        return layer.codes()
    assert isinstance(layer, ShadowLinear)
    weight = layer.weight.detach().float()
    return (weight / weight.abs().mean().clamp(min=1e-5)).round().clamp(-1, 1).to(torch.int8)
