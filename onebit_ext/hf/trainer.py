"""For transformers' Trainer and TRL's: the optimizer in its explicit form, and flip statistics in the logs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import TrainerCallback

from onebit_ext.torch import BitLinear, FlipOptimizer
from onebit_ext.torch.planes import control_of, field


class FlipFactory:
    """`Trainer(optimizer_cls_and_kwargs=(FlipFactory, {"lr": 0.03, ...}))`; the arguments are FlipOptimizer's.

    Not an Optimizer class: the Trainer then calls FlipFactory()(model, **kwargs) and leaves the dict as it was.  The
    learning rate and weight decay of TrainingArguments do not arrive here; the scheduler does drive every group.
    """

    def __call__(self, model: nn.Module, **options: Any) -> FlipOptimizer:
        """The optimizer of a model with BitLinear layers; ValueError if it has none."""
        if not bit_linears(model):
            raise ValueError("FlipFactory: the model has no BitLinear; swap its layers with replace_linear first")
        return FlipOptimizer(model, **options)


class FlipLogger(TrainerCallback):
    """`Trainer(callbacks=[FlipLogger()])` adds to every training log, and to `trainer.state.log_history`:

    flip_rate    share of all codes that moved, per step, mean since the last log
    flip_guard   smallest guard factor of any layer: below 1 the learning rate of its codes was held back
    flips        codes moved since training began or was resumed, as a share of all (a code may move twice)
    """

    def __init__(self) -> None:
        self.steps = 0
        self.since_log = self.total = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start counting."""
        self.__init__()  # type: ignore[misc]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count this step's flips."""
        rate = flip_rate(kwargs["model"])
        self.steps += 1
        self.since_log += rate
        self.total += rate

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add the statistics to a log of training."""
        if logs is None or "loss" not in logs or not self.steps:
            return
        guards = [field(control_of(layer), "guard") for layer in bit_linears(kwargs["model"])]
        found = {"flip_rate": self.since_log / self.steps, "flip_guard": min(guards, default=1.0), "flips": self.total}
        self.steps, self.since_log = 0, 0.0
        logs.update(found)
        if state.log_history:
            state.log_history[-1].update(found)


def flip_rate(model: nn.Module) -> float:
    """Share of all codes of the model that the last optimizer step moved."""
    layers = bit_linears(model)
    codes = sum(layer.in_features * layer.out_features for layer in layers)
    return sum(field(control_of(layer), "moved") for layer in layers) / max(codes, 1)


def bit_linears(model: nn.Module) -> list[BitLinear]:
    """The ternary layers of a model, wrapped (DDP, torch.compile) or not."""
    return [module for module in model.modules() if isinstance(module, BitLinear)]


class StepReport(TrainerCallback):
    """Calls say(step, steps, loss, flip_rate, seconds left) about `times` times during training."""

    def __init__(self, say: Callable[[int, int, float, float, float], None], times: int = 10) -> None:
        self.say, self.times, self.start = say, times, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.start, self.first = time.perf_counter(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """A line, if it is time for one."""
        step, steps = state.global_step, state.max_steps
        if logs is None or "loss" not in logs or step % max(1, steps // self.times) and step not in (1, steps):
            return
        left = (time.perf_counter() - self.start) / max(step - self.first, 1) * (steps - step)
        self.say(step, steps, float(logs["loss"]), flip_rate(kwargs["model"]), left)
