"""Train 20 = train 10, save, load in a new process, train 10: to the bit."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchkit
from torchkit import OPTIONS, loss_of, net, same, setup, snapshot, train

from onebit_ext.torch import FlipOptimizer


def test_a_new_process_continues_to_the_bit(tmp_path: Path) -> None:
    halves, ends = {}, {}
    for recipe in ("finetune", "pretrain", "frozen"):
        model, optimizer, scheduler = setup(recipe)
        train(model, optimizer, 0, 10, scheduler)
        parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
        halves[recipe] = copy.deepcopy(parts)
        train(model, optimizer, 10, 20, scheduler)
        ends[recipe] = snapshot(model, optimizer)
    torch.save(halves, tmp_path / "half.pt")
    command = [sys.executable, torchkit.__file__, tmp_path / "half.pt", tmp_path / "end.pt"]
    subprocess.run(command, check=True, timeout=120)
    resumed = torch.load(tmp_path / "end.pt", weights_only=True)
    assert all(same(end, resumed[recipe]) for recipe, end in ends.items())


def test_loaded_planes_are_linked_and_our_own() -> None:
    model, optimizer, _ = setup("pretrain")
    train(model, optimizer, 0, 3)
    saved = optimizer.state_dict()
    kept = {k: {n: t.clone() for n, t in state.items()} for k, state in saved["state"].items()}
    twin = net()
    other = FlipOptimizer(twin, recipe="pretrain", **OPTIONS)
    other.load_state_dict(saved)
    state = other.state[twin.up.weight]
    assert twin.up._planes is state and state["residual"].dtype == torch.int8
    assert state["control"].dtype == torch.float64 and state["momentum_scale"].dtype == torch.bfloat16
    train(twin, other, 3, 5)
    for key, values in kept.items():  # the checkpoint in memory is not written to
        assert all(torch.equal(value, saved["state"][key][name]) for name, value in values.items())


def test_pending_votes_are_saved() -> None:
    """accelerate loads an optimizer's own state before the first step; in the middle of a step it must do no harm."""
    results = []
    for reload in (False, True):
        model, optimizer, _ = setup("finetune")
        train(model, optimizer, 0, 4)
        loss_of(model, 4).backward()
        if reload:
            optimizer.load_state_dict(optimizer.state_dict())
        loss_of(model, 5).backward()
        optimizer.step()
        results.append(snapshot(model, optimizer))
    assert same(*results)


def test_a_state_that_does_not_fit_is_refused() -> None:
    model, optimizer, _ = setup("pretrain")
    before = snapshot(model, optimizer)
    bad = FlipOptimizer(net(), recipe="finetune", **OPTIONS).state_dict()
    with pytest.raises(ValueError, match="state of 'up' must hold the planes of residual8_momentum4"):
        optimizer.load_state_dict(bad)
    saved = optimizer.state_dict()
    for name, value, text in (
        ("residual", torch.zeros(72, 21, dtype=torch.int8), r"'residual' must be torch.int8 \(72, 20\)"),
        ("residual", torch.zeros(72, 20), "got torch.float32"),
        ("control", torch.zeros(3, dtype=torch.float64), "'control'"),
        ("control", "text", "got str"),
    ):
        state = {0: saved["state"][0] | {name: value}, **{k: v for k, v in saved["state"].items() if k}}
        with pytest.raises(ValueError, match=text):
            optimizer.load_state_dict(saved | {"state": state})
    with pytest.raises(ValueError, match="param groups"):
        optimizer.load_state_dict(saved | {"param_groups": saved["param_groups"][::-1]})
    assert same(before, snapshot(model, optimizer))
