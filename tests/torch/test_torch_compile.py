"""torch.compile: one graph, the same bits as eager, flips and schedules seen by compiled code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torchkit import net, same, scheduled, snapshot, train

from onebit_ext.torch import FlipOptimizer


def run(recipe: str, compiled: bool) -> dict[str, Any]:
    torch.compiler.reset()
    counters.clear()
    model = net()
    optimizer = FlipOptimizer(model, lr=0.1, recipe=recipe)
    scheduler = scheduled(optimizer)
    trained = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    train(trained, optimizer, 0, 6, scheduler)
    return snapshot(model, optimizer)


@pytest.mark.parametrize("recipe", ["finetune", "pretrain", "frozen"])
def test_compiled_training_is_eager_training(recipe: str) -> None:
    eager = run(recipe, False)
    compiled = run(recipe, True)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert same(eager, compiled)


def test_a_compiled_frozen_layer_still_draws_anew() -> None:
    model = net()
    model.up.scale.requires_grad_(False)
    before = model.up.control.clone()
    torch.compiler.reset()
    step = torch.compile(model.up, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        step(torch.randn(4, 20, requires_grad=True)).sum().backward()
    assert (model.up.control - before).sum() == 3
