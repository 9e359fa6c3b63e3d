"""GradScaler: a skipped step moves no code, and the loss scale leaves no trace in the rule."""

from __future__ import annotations

import pytest
import torch
from torchkit import Net, loss_of, net, same, snapshot

from onebit_ext.torch import FlipOptimizer, ops

C = ops.CONTROL


def run(scale: float, unscale: bool, steps: int = 5, change_at: int = -1) -> tuple[Net, FlipOptimizer]:
    model = net()
    optimizer = FlipOptimizer(model, lr=0.1, scale_lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6)
    if unscale:
        optimizer.grad_scaler = scaler
    for step in range(steps):
        if step == change_at:
            scaler.update(scale * 16)
        scaler.scale(loss_of(model, step)).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return model, optimizer


@pytest.mark.parametrize("unscale", [False, True])
def test_a_power_of_two_leaves_no_trace(unscale: bool) -> None:
    """The first votes come with a scale already known, so every bit is that of scale 1 (all factors are exact)."""
    plain = snapshot(*run(1.0, unscale))
    scaled = snapshot(*run(2.0**12, unscale))
    for name in plain:
        if name.endswith("control"):
            scaled[name][C["grad_scale"]] = 1.0
    assert same(plain, scaled)


def test_factors_are_free_of_a_scale_that_changed() -> None:
    """Whatever scale the votes were cast with, the step knows the right one: R and C as if it had never changed."""
    _, plain = run(1.0, False, steps=3)
    _, changed = run(2.0**8, False, steps=3, change_at=2)
    for a, b in zip(plain.param_groups[0]["params"], changed.param_groups[0]["params"], strict=True):
        for name in ("row_factor", "col_factor"):
            assert torch.equal(plain.state[a][name], changed.state[b][name])


def test_a_skipped_step_moves_no_code() -> None:
    model = net()
    optimizer = FlipOptimizer(model, lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for step in range(3):
        scaler.scale(loss_of(model, step)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    before = snapshot(model)
    steps = optimizer.state[model.up.weight]["control"][C["step"]].item()
    scaler.scale(loss_of(model, 3) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    assert same(before, snapshot(model))
    state = optimizer.state[model.up.weight]
    assert state["control"][C["step"]] == steps and state["control"][C["nonfinite"]] == 0
    assert not state["row_sum"].any() and not state["sketch"].any()
    scaler.scale(loss_of(model, 4)).backward()
    scaler.step(optimizer)
    assert not same(before, snapshot(model)) and scaler.get_scale() == 1.0


def test_a_hidden_loss_scale_is_refused() -> None:
    model = net()
    optimizer = FlipOptimizer(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(loss_of(model, 0)).backward()
    scaler.unscale_(optimizer)
    before = snapshot(model, optimizer)
    with pytest.raises(RuntimeError, match="grad_scaler = scaler"):
        scaler.step(optimizer)
    assert same(before, snapshot(model, optimizer))


def test_bfloat16_autocast_trains() -> None:
    model = net()
    optimizer = FlipOptimizer(model, lr=0.1)
    losses = []
    for step in range(40):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
