"""One training run of one arm on one task, as a record of plain JSON types."""

from __future__ import annotations

import math
import time
from typing import Any, Protocol

from torch import Tensor

from onebit_ext import _core

from .arms import BY_NAME, HYBRID, Arm
from .tasks import State, Task, Teaching

POINTS = 10  # of every curve


class Trainer(Protocol):
    """An arm on a task, a step at a time; engine.py has the contract of each method."""

    model: Any
    etas: list[float]

    def step(self, watched: bool) -> None: ...
    def progress(self) -> tuple[float, list[float]]: ...
    def evaluate(self, split: str) -> dict[str, float]: ...
    def persistent_bytes(self) -> int: ...
    def peak_bytes(self) -> int: ...
    def codes(self) -> list[Tensor]: ...
    def positions(self) -> list[Tensor] | None: ...


class Engine(Protocol):
    """What makes trainers: the C kernels (engine.py), their emulation on a GPU (gpu.py)."""

    name: str

    def refuses(self, arm: Arm, task: str) -> str: ...
    def trainer(self, arm: Arm, task: Task, seed: int, eta: float) -> Trainer: ...


def train_arm(arm: Arm, task: Task, seed: int, eta: float, engine: Engine, purpose: str = "final") -> dict[str, Any]:
    """Train and measure.  purpose: "tune" leaves `test` unseen, "final" reports it."""
    return Run(arm, task, seed, eta, engine).record(purpose)


class Run:
    """One training run, from point to point of its curve."""

    def __init__(self, arm: Arm, task: Task, seed: int, eta: float, engine: Engine) -> None:
        self.arm, self.task, self.seed, self.eta, self.engine = arm, task, seed, eta, engine
        self.trainer = engine.trainer(arm, task, seed, eta)
        points = max(1, min(POINTS, task.steps // 30))
        self.points = {round(task.steps * point / points) for point in range(1, points + 1)}
        self.codes = self.trainer.codes()
        self.weights = sum(codes.numel() for codes in self.codes)
        self.curve: dict[str, list[Any]] = {"steps": [], "losses": [], "train_losses": [], "flip_rates": []}
        self.bytes, self.peak, self.seconds = 0, 0, 0.0
        self.worst: float | None = None

    def record(self, purpose: str) -> dict[str, Any]:
        splits = ("val", "test") if purpose == "final" else ("val",)
        start = self.trainer.evaluate(splits[-1])
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
            self.train()
            record["figures"] = {split: self.trainer.evaluate(split) for split in splits}
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
        extras = self.task.finish(self.codes, self.trainer.codes(), self.trainer.positions())
        if isinstance(self.task, Teaching) and self.arm.quantum is not None:
            etas = [min(eta, _core.ETA_LIMIT) for eta in self.trainer.etas[1:]]  # the first step only measures
            extras |= self.task.law(self.arm.quantum, etas, self.arm.dead_zone)
        return extras

    def train(self) -> None:
        self.curve["steps"].append(0)
        self.curve["losses"].append(self.trainer.evaluate("val")["loss"])
        begun = time.perf_counter()
        for step in range(1, self.task.steps + 1):
            self.trainer.step(watched=step <= 2 or step in self.points)  # planes are made in the first steps
            if step in self.points:
                loss, flips = self.trainer.progress()  # waits for a device
                self.seconds += time.perf_counter() - begun
                self.measure(step, loss, flips)
                begun = time.perf_counter()

    def measure(self, step: int, loss: float, flips: list[float]) -> None:
        """A point of the curves: held-out loss now, training loss and flip rate since the last point."""
        self.curve["steps"].append(step)
        self.curve["losses"].append(self.trainer.evaluate("val")["loss"])
        self.curve["train_losses"].append(loss)
        self.curve["flip_rates"].append(sum(flips) / len(flips) if flips else None)
        if flips:
            self.worst = max(self.worst or 0.0, *flips)
        self.bytes, self.peak = self.trainer.persistent_bytes(), self.trainer.peak_bytes()


def _plain(value: Any) -> Any:
    """None for numbers that JSON has not."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def pretrain(task: Task, engine: Engine) -> tuple[State, dict[str, Any]]:
    """The one fixed recipe behind every fine-tuning task: a float32 shadow at the task's eta, seed 0.

    A shadow goes on from the float weights that come back, everything else from their codes.
    """
    run = Run(BY_NAME[HYBRID], task, 0, task.eta, engine)
    record = run.record("pretrain")
    state = run.trainer.model.state_dict()
    return {name: state[name].detach().float().cpu() for name in task.new_model(0).state_dict()}, record
