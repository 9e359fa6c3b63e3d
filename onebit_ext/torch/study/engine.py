"""The engine of the C kernels: what trains an arm on a task, a step at a time, and measures it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from onebit_ext import _core

from .. import BitLinear, ShadowLinear, prepare, state_bytes
from ..demo.train import training
from ..memory import training_bytes
from ..schedule import scheduled
from .arms import Arm
from .tasks import Task, absmean


class Engine:
    """Ternary layers of the C kernels on a CPU, an optimizer and a schedule, as a user has them."""

    name = "c"

    def refuses(self, arm: Arm, task: str) -> str:
        """Why it cannot train an arm on a task, or nothing."""
        return ""

    def trainer(self, arm: Arm, task: Task, seed: int, eta: float) -> Trainer:
        """eta: the arm's dial.  The codes are the absmean codes of the float model."""
        return Trainer(arm, task, seed, eta)


class Trainer:
    """One arm on one task."""

    def __init__(self, arm: Arm, task: Task, seed: int, eta: float) -> None:
        self.task, self.stream = task, task.stream(seed)
        model = task.new_model(seed)
        options: dict[str, Any] = {"float_lr": task.float_lr, "scale_lr": task.scale_lr} | arm.options
        if "shadow_dtype" in options:
            options["shadow_dtype"] = getattr(torch, options["shadow_dtype"])
        options["scale_lr" if arm.dial == "scale" else "lr"] = arm.rate(model, eta)
        if options.get("method") == "shadow":
            del options["scale_lr"]
        else:
            options["seed"] = seed
        self.model: Any
        self.model, self.optimizer = prepare(model, **options)
        self.etas: list[float] = []  # of the codes, by step
        self.peak = 0
        self._losses: list[Tensor] = []
        self._flips: list[float] = []
        self._watched = False
        schedule = scheduled(arm.schedule or task.schedule, self.optimizer, task.steps)
        clip = [*self.model.float_parameters()]
        clip += [layer.weight for layer in self.model.linears() if layer.weight.requires_grad]
        clip = [p for p in clip if p.requires_grad]
        self._steps = training(self._loss, self.optimizer, schedule, task.steps, clip, self._after_backward)

    def step(self, watched: bool) -> None:
        """watched: the bytes behind the backward count for `peak_bytes`."""
        self._watched = watched
        _, loss = next(self._steps)
        self._losses.append(loss)
        rate = getattr(self.optimizer, "flip_rate", None)
        if rate is not None:
            self._flips.append(rate)

    def _loss(self, step: int) -> Tensor:
        self.etas.append(float(self.optimizer.param_groups[0]["lr"]))
        return self.task.loss(self.model, self.stream[step])

    def _after_backward(self, step: int) -> None:
        if self._watched:
            self.peak = max(self.peak, training_bytes(self.model, self.optimizer))

    def progress(self) -> tuple[float, list[float]]:
        """Since the last call: mean training loss, flip rates of the steps, none where codes follow a float weight."""
        loss, flips = torch.stack(self._losses).mean().item(), self._flips
        self._losses, self._flips = [], []
        return loss, flips

    def evaluate(self, split: str) -> dict[str, float]:
        """The task's figures."""
        return self.task.evaluate(self.model, split)

    def persistent_bytes(self) -> int:
        """Of the ternary layers between two steps."""
        return state_bytes(self.model, self.optimizer)

    def peak_bytes(self) -> int:
        """Of the whole training state: parameters, gradients, optimizer; no activations."""
        return max(self.peak, training_bytes(self.model, self.optimizer))

    def codes(self) -> list[Tensor]:
        """The codes (N, K) of the ternary layers."""
        return [_codes(layer) for layer in self.model.linears()]

    def positions(self) -> list[Tensor] | None:
        """The weights that learn, T + e or W / mean |W| (N, K) in cells; None where they are not kept."""
        found = [_position(layer, self.optimizer) for layer in self.model.linears()]
        kept = [position for position in found if position is not None]
        return kept if len(kept) == len(found) else None


def _position(layer: Any, optimizer: torch.optim.Optimizer) -> Tensor | None:
    if isinstance(layer, ShadowLinear):
        weight = layer.weight.detach().float()
        return weight / weight.abs().mean()
    rule, state = getattr(optimizer, "rule", None), optimizer.state[layer.weight]
    codes = layer.codes().float()
    if rule in (None, "stochastic"):
        return codes
    if rule == "optimizer":
        return codes + state["residual"].float()
    if rule not in _core.RULES or len(state["row_factor"]) != layer.out_features:  # Bop; a stripe
        return None
    spec, residual = _core.rule_spec(rule), state["residual"]
    bits = spec["residual_bits"]
    if bits < 8:  # fields in blocks of 64 columns, low bits first
        fields = residual.numpy()[:, :, None] >> np.arange(0, 8, bits)[:, None] & (1 << bits) - 1
        signed = ((fields.astype(np.int16) + (1 << bits - 1)) % (1 << bits)) - (1 << bits - 1)
        residual = torch.from_numpy(signed.reshape(layer.out_features, -1)[:, : layer.in_features].copy())
    return residual.float() / spec["units"] + (codes if rule != "byte" else 0)


def _codes(layer: Any) -> Tensor:
    if isinstance(layer, BitLinear):
        return layer.codes()
    assert isinstance(layer, ShadowLinear)
    return absmean(layer.weight)[0].to(torch.int8)
