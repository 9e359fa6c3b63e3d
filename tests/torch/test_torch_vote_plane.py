"""The vote plane at the torch level: layers used twice, saving between micro-batches, loss scales, what is refused."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from oracle import CONTROL
from torch._dynamo.utils import counters
from torchkit import OPTIONS, loss_of, net, same, scheduled, snapshot, train

from onebit_ext.torch import AutoFlip, BitLinear, FlipOptimizer, prepare, replace_linear
from onebit_ext.torch.planes import rescale_votes

RULES = ("residual8", "residual4", "residual2", "stochastic", "residual8_momentum4")


@pytest.mark.parametrize("rule", RULES)
def test_a_layer_may_be_used_twice_by_any_rule(rule: str) -> None:
    torch.manual_seed(1)
    layer = BitLinear(24, 24)
    optimizer = FlipOptimizer(layer, lr=3.0, rule=rule, vote_plane=True, flip_rate_cap=0)
    moved = 0.0
    for _ in range(6):
        codes = layer.codes()
        layer(layer(torch.randn(9, 24))).square().mean().backward()
        assert torch.equal(layer.codes(), codes)
        optimizer.step()
        moved += optimizer.flip_rate
    assert moved > 0.1


@pytest.mark.parametrize("rule", ["residual8", "stochastic", "residual8_momentum4"])
def test_compiled_training_is_eager_training(rule: str) -> None:
    ends = []
    for compiled in (False, True):
        torch.compiler.reset()
        counters.clear()
        model = net()
        optimizer = FlipOptimizer(model, lr=0.1, rule=rule, vote_plane=True)
        trained = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        train(trained, optimizer, 0, 6, scheduled(optimizer))
        ends.append(snapshot(model, optimizer))
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert same(*ends)


# ------------------------------------------------------------------ saving
def test_a_state_holds_votes_between_micro_batches_only() -> None:
    model = net()
    optimizer = FlipOptimizer(model, **OPTIONS, vote_plane=True)
    train(model, optimizer, 0, 3)
    between_steps = copy.deepcopy(optimizer.state_dict())
    assert not any("votes" in state for state in between_steps["state"].values())
    loss_of(model, 5).backward()
    between = copy.deepcopy(optimizer.state_dict())
    assert sum("votes" in state for state in between["state"].values()) == 2
    optimizer.load_state_dict(between_steps)
    votes = optimizer.state[model.up.weight]["votes"]
    assert votes.dtype == torch.int16 and votes.shape == (72, 20) and not votes.any()
    plain = FlipOptimizer(net(), **OPTIONS)
    with pytest.raises(ValueError, match="must hold the planes of residual8"):
        plain.load_state_dict(between)
    plain.load_state_dict(between_steps)
    optimizer = FlipOptimizer(net(), **OPTIONS, vote_plane=True)
    for state in between["state"].values():
        state.pop("votes", None)
    with pytest.raises(ValueError, match="saved between micro-batches without the votes"):
        optimizer.load_state_dict(between)


def test_automatic_flips_refuse_a_state_between_micro_batches() -> None:
    model = replace_linear(net(), auto=True, vote_plane=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    train(model, optimizer, 0, 3)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 3, 4)
    loss_of(model, 5).backward()
    assert model.up._planes["votes"].any()
    with pytest.raises(ValueError, match="saved between micro-batches"):
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    AutoFlip.of(model).remove()  # type: ignore[union-attr]


# ------------------------------------------------------------------ steps that are given up, loss scales
def test_a_step_that_is_given_up_leaves_no_votes() -> None:
    model = net()
    optimizer = FlipOptimizer(model, **OPTIONS, vote_plane=True)
    train(model, optimizer, 0, 2)
    loss_of(model, 5).backward()
    state = optimizer.state[model.up.weight]
    assert state["votes"].any()
    optimizer.discard()
    assert not state["votes"].any() and not state["row_sum"].any()


def test_a_new_loss_scale_rescales_what_is_held() -> None:
    ends = []
    for scale in (1.0, 4.0):
        torch.manual_seed(3)
        layer = BitLinear(40, 70)
        optimizer = FlipOptimizer(layer, lr=0.4, scale_lr=0.0, vote_plane=True)
        for step in range(3):
            loss = layer(torch.randn(9, 40, generator=torch.Generator().manual_seed(step))).square().mean()
            (loss * (scale if step == 2 else 1.0)).backward()
            if step == 2:  # as GradScaler says it
                optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(0.0)
            optimizer.step()
            optimizer.zero_grad()
        ends.append({name: value.clone() for name, value in optimizer.state[layer.weight].items()})
    one, four = ends
    assert (one["residual"].int() - four["residual"].int()).abs().max() <= 1
    for name in ("row_factor", "col_factor"):
        torch.testing.assert_close(one[name], four[name], rtol=1e-2, atol=0)


def test_rescaling_is_to_the_nearest() -> None:
    votes = torch.arange(-32767, 32768, dtype=torch.int32).to(torch.int16).reshape(-1, 5)
    for ratio in (0.5, 1 / 3, 4.0):
        got = votes.clone()
        rescale_votes(got, ratio)
        wanted = np.clip(np.rint(votes.numpy().astype(np.float64) * ratio), -32767, 32767)
        assert np.array_equal(got.numpy(), wanted)


@pytest.mark.parametrize("method", ["residual", "stochastic"])
def test_prepare_passes_it_on(method: str) -> None:
    model, optimizer = prepare(torch.nn.Sequential(torch.nn.Linear(20, 12)), method, vote_plane=True)
    assert "votes" in optimizer.state[model[0].weight]
    state: dict[str, Any] = optimizer.state[model[0].weight]
    assert state["control"][CONTROL["clip"]] == 3
