"""One training run of one arm on one task, as a record of plain JSON types."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..demo.train import training
from .arms import BY_NAME, HYBRID, Arm
from .engine import Engine
from .tasks import State, Task, Teaching

POINTS = 10  # of every curve
Watch = Callable[[int, float, float | None], None]  # step, training loss, flip rate: at the points of the curve


def train_arm(
    arm: Arm, task: Task, seed: int, eta: float, engine: Engine, purpose: str = "final", watch: Watch | None = None
) -> dict[str, Any]:
    """Train and measure.  purpose: "tune" leaves `test` unseen, "final" reports it."""
    return Run(arm, task, seed, eta, engine).record(purpose, watch)


class Run:
    """One training run, step by step."""

    def __init__(self, arm: Arm, task: Task, seed: int, eta: float, engine: Engine) -> None:
        self.arm, self.task, self.seed, self.eta, self.engine = arm, task, seed, eta, engine
        model = task.new_model(seed).to(engine.device)
        self.model, self.optimizer, self.schedule = engine.prepare(model, arm, eta, task, seed)
        self.stream = task.stream(seed).to(engine.device)
        points = max(1, min(POINTS, task.steps // 30))
        self.points = {round(task.steps * point / points) for point in range(points + 1)}
        self.codes = engine.codes(self.model)
        self.weights = sum(codes.numel() for codes in self.codes)
        self.curve: dict[str, list[Any]] = {"steps": [], "losses": [], "train_losses": [], "flip_rates": []}
        self.bytes, self.peak, self.seconds = 0, 0, 0.0
        self.etas: list[float] = []
        self.worst: float | None = None

    def record(self, purpose: str, watch: Watch | None) -> dict[str, Any]:
        splits = ("val", "test") if purpose == "final" else ("val",)
        self.measure(0, [], [])
        start = self.task.evaluate(self.model, splits[-1])
        record: dict[str, Any] = {
            "task": self.task.name,
            "arm": self.arm.name,
            "purpose": purpose,
            "seed": self.seed,
            "eta": self.eta,
            "start": start["loss"],
            "val": None,
            "test": None,
            "figures": {},  # all that the task measures, by split
        }
        try:
            self.train(watch)
            record["figures"] = {split: self.task.evaluate(self.model, split) for split in splits}
            record |= {split: figures["loss"] for split, figures in record["figures"].items()}
            record |= self.finish()
        except FloatingPointError as error:  # losses stay None
            record["diverged"] = str(error)
        record |= {
            **self.curve,
            "worst_flip_rate": self.worst,
            "weights": self.weights,
            "bits": 8 * self.bytes / self.weights,
            "peak_bytes": self.peak,
            "seconds": self.seconds,
            "engine": self.engine.name,
        }
        return _plain(record)

    def finish(self) -> dict[str, Any]:
        positions = self.engine.positions(self.model, self.optimizer)
        extras = self.task.finish(self.codes, self.engine.codes(self.model), positions)
        if isinstance(self.task, Teaching) and self.arm.quantum is not None:
            extras |= self.task.law(self.arm.quantum, self.etas[1:])  # the first step only measures
        return extras

    def train(self, watch: Watch | None) -> None:
        """The engine's device is waited for at the points of the curve alone."""
        clip = [*self.model.float_parameters()]
        clip += [layer.weight for layer in self.model.linears() if layer.weight.requires_grad]
        clip = [p for p in clip if p.requires_grad]
        losses: list[Tensor] = []
        rates: list[Any] = []
        steps = self.task.steps
        self.engine.synchronize()
        begun = time.perf_counter()
        for step, loss in training(self.loss_of, self.optimizer, self.schedule, steps, clip, self.after_backward):
            losses.append(loss)
            rates.append(self.engine.flip_rate(self.optimizer))
            if step in self.points:
                self.engine.synchronize()
                self.seconds += time.perf_counter() - begun
                self.measure(step, losses, rates)
                if watch:
                    watch(step, self.curve["train_losses"][-1], self.curve["flip_rates"][-1])
                losses, rates = [], []
                begun = time.perf_counter()

    def loss_of(self, step: int) -> Tensor:
        self.etas.append(float(self.optimizer.param_groups[0]["lr"]))  # of the codes
        return self.task.loss(self.model, self.stream[step])

    def after_backward(self, step: int) -> None:
        if step in (0, 1) or step in self.points:  # planes are made in the first steps
            self.peak = max(self.peak, self.engine.training_bytes(self.model, self.optimizer))

    def measure(self, step: int, losses: list[Tensor], rates: list[Any]) -> None:
        """A point of the curve: held-out loss, means of training loss and flip rate since the last point."""
        self.curve["steps"].append(step)
        self.curve["losses"].append(self.task.evaluate(self.model, "val")["loss"])
        if step == 0:
            return
        self.curve["train_losses"].append(torch.stack(losses).mean().item())
        rate = None
        if rates[0] is not None:
            values = torch.stack([torch.as_tensor(value, dtype=torch.float32) for value in rates])
            rate, self.worst = values.mean().item(), max(self.worst or 0.0, values.max().item())
        self.curve["flip_rates"].append(rate)
        self.bytes = self.engine.persistent_bytes(self.model, self.optimizer)
        self.peak = max(self.peak, self.engine.training_bytes(self.model, self.optimizer))


def _plain(value: Any) -> Any:
    """None for numbers that JSON has not."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def pretrain(task: Task, engine: Engine, watch: Watch) -> tuple[State, dict[str, Any]]:
    """The one fixed recipe behind every fine-tuning task: a float32 shadow at the task's eta, seed 0, then its codes.

    The float model that comes back holds nothing but its codes, a scale per layer and the float parameters.
    """
    arm = BY_NAME[HYBRID]
    run = Run(arm, task, 0, task.eta, engine)
    record = run.record("pretrain", watch)
    return _only_codes(engine.float_state(run.model), task.new_model(0)), record


def _only_codes(state: State, model: Any) -> State:
    """Weights c * T whose absmean gives T and the scale back: no method starts from more than the others."""
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    for layer in model.linears():
        weight = layer.weight.data
        scale = weight.abs().mean().clamp(min=1e-5)
        codes = (weight / scale).round().clamp(-1, 1)
        layer.weight.data = codes * (scale / codes.abs().mean())
    return {name: value.clone() for name, value in model.state_dict().items()}
