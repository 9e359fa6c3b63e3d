"""The learning rate that votes is the one the scheduler has set, however it sets it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler
from torchkit import loss_of, net

from onebit_ext.torch import FlipOptimizer, ops

C = ops.CONTROL


def by_hand(optimizer: FlipOptimizer) -> Any:
    class Hand:
        steps = 0

        def step(self) -> None:
            self.steps += 1
            optimizer.param_groups[0]["lr"] = 0.01 * self.steps
            optimizer.param_groups[1].update(lr=0.0)

    return Hand()


SCHEDULERS: dict[str, Callable[[FlipOptimizer], Any]] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: min(1, step / 4) * (1 - step / 20)),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=8),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=[0.1, 1e-4, 1e-3], total_steps=9),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.7)], [3]
    ),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5),
    "by hand": by_hand,
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_vote_uses_the_rate_of_its_step(name: str) -> None:
    model = net()
    optimizer = FlipOptimizer(model, lr=0.06, betas=(0.9, 0.9))
    scheduler = SCHEDULERS[name](optimizer)
    controls = [optimizer.state[layer.weight]["control"] for layer in (model.up, model.down)]
    rates = []
    for step in range(8):
        rate, betas = optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"]
        rates.append(rate)
        for control in controls:
            assert control[C["eta"]] == rate and (control[C["beta1"]], control[C["beta2"]]) == betas
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step(*([1.0] if name == "plateau" else []))
    assert len(set(rates)) > 3
    assert controls[0][C["eta_peak"]] == max(0.06 if name != "one cycle" else 0.06, *rates)


def test_options_set_by_hand_reach_the_layers() -> None:
    model = net()
    optimizer = FlipOptimizer(model, flip_rate_cap=0.05)
    control = optimizer.state[model.up.weight]["control"]
    assert control[C["cap"]] == 0.05
    optimizer.param_groups[0]["flip_rate_cap"] = 0.0
    optimizer.param_groups[0].update({"lr": torch.tensor(0.25), "betas": (0.5, 0.75)})
    assert [control[C[name]] for name in ("cap", "eta", "beta1", "beta2")] == [0.0, 0.25, 0.5, 0.75]


def test_a_rate_of_zero_moves_nothing() -> None:
    model = net()
    optimizer = FlipOptimizer(model, lr=0.0)
    codes = model.up.codes()
    for step in range(4):
        loss_of(model, step).backward()
        optimizer.step()
    assert torch.equal(codes, model.up.codes()) and not optimizer.state[model.up.weight]["residual"].any()
