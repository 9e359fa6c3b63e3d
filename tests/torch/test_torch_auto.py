"""replace_linear(auto=True): codes flip under an optimizer that knows nothing of them."""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torchkit import Net, loss_of, net, same, scheduled, snapshot, train

from onebit_ext.torch import AutoFlip, FlipOptimizer, auto, ops, replace_linear

C = ops.CONTROL
LOAD = torch.optim.Optimizer.load_state_dict


@pytest.fixture(autouse=True)
def _hooks_are_removed() -> Iterator[None]:
    yield
    for handle in [*auto._hooks.active]:
        handle.remove()
    auto._hooks.uninstall()
    assert torch.optim.Optimizer.load_state_dict is LOAD


def automatic(start: int = 3, **options: Any) -> tuple[Net, AutoFlip]:
    model = net(start)
    replace_linear(model, auto=True, **({"flip_lr": 0.1, "scale_lr": 3e-3, "seed": 5} | options))
    handle = AutoFlip.of(model)
    assert handle is not None
    return model, handle


def floats(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.3),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.03, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "foreach": lambda p: torch.optim.AdamW(p, lr=3e-3, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=3e-3, fused=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_flips_the_codes(name: str) -> None:
    model, handle = automatic()
    optimizer = OPTIMIZERS[name](floats(model))
    codes, scale = model.up.codes(), model.up.scale.item()
    losses = train(model, optimizer, 0, 60)
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert 0.01 < (codes != model.up.codes()).float().mean() < 0.6 and 0 < handle.flip_rate < 0.3
    assert 0.5 * scale < model.up.scale.item() < 2 * scale  # our Adam steps it, not decay and not a rate of .1
    assert torch.equal(1 / (1 / model.up.scale), model.up.scale)


def test_the_same_flips_as_with_our_optimizer() -> None:
    """Floats of rate zero: then both ways are one and the same, from the second step on."""
    model, _ = automatic(flip_lr=0.07, scale_lr=2e-3, seed=8, flip_rate_cap=0.05, betas=(0.8, 0.9))
    plain = torch.optim.SGD(floats(model), lr=0.0)
    train(model, plain, 0, 1)  # its backward came before there were planes
    twin = net()
    twin.load_state_dict(model.state_dict())
    ours = FlipOptimizer(twin, lr=0.07, float_lr=0.0, scale_lr=2e-3, seed=8, flip_rate_cap=0.05, betas=(0.8, 0.9))
    plain.param_groups[0]["initial_lr"] = plain.param_groups[0]["lr"] = 1.0
    for p in floats(model):
        if p is not model.up.scale and p is not model.down.scale:
            p.register_hook(torch.zeros_like)
    for layer, other in ((model.up, twin.up), (model.down, twin.down)):  # Adam has made a step already
        assert layer._planes is not None and other._planes is not None
        ours.state[other.scale].update({name: layer._planes[name].clone() for name in ("exp_avg", "exp_avg_sq")})
        for field in ("beta1_power", "beta2_power"):
            other._planes["control"][C[field]] = layer._planes["control"][C[field]]
    codes = model.up.codes()
    train(model, plain, 1, 12)
    train(twin, ours, 1, 12)
    assert same(snapshot(model), snapshot(twin)) and not torch.equal(model.up.codes(), codes)


def test_the_rate_follows_the_schedule_of_the_step() -> None:
    model, _ = automatic()
    optimizer = torch.optim.AdamW(floats(model), lr=1e-3)
    scheduler = scheduled(optimizer)
    train(model, optimizer, 0, 2, scheduler)
    loss_of(model, 2).backward()
    assert model.up._planes is not None
    control = model.up._planes["control"]
    assert control[C["eta"]].item() == pytest.approx(0.1 * (1 - 2 / 40)) and control[C["eta_peak"]] == 0.1


def halves(recipe: str, name: str, split: bool) -> dict[str, torch.Tensor]:
    model, handle = automatic(recipe=recipe)
    optimizer = OPTIMIZERS[name](floats(model))
    scheduler = scheduled(optimizer)
    train(model, optimizer, 0, 10, scheduler)
    if split:
        buffer = io.BytesIO()
        torch.save([model.state_dict(), optimizer.state_dict(), scheduler.state_dict()], buffer)
        handle.remove()
        buffer.seek(0)
        saved = torch.load(buffer, weights_only=True)
        model, handle = automatic(start=99, recipe=recipe)
        optimizer = OPTIMIZERS[name](floats(model))
        scheduler = scheduled(optimizer)
        model.load_state_dict(saved[0])
        scheduler.load_state_dict(saved[2])
        optimizer.load_state_dict(saved[1])
        assert model.up._planes is not None and model.up._planes["residual"].dtype == torch.int8
    train(model, optimizer, 10, 20, scheduler)
    return snapshot(model, optimizer)


@pytest.mark.parametrize("recipe", ["finetune", "pretrain"])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_resume_is_exact(recipe: str, name: str) -> None:
    assert same(halves(recipe, name, False), halves(recipe, name, True))


def test_a_state_of_another_shape_is_refused() -> None:
    model, _ = automatic()
    optimizer = torch.optim.SGD(floats(model), lr=0.1)
    train(model, optimizer, 0, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        if "onebit_residual" in state:
            state["onebit_residual"] = state["onebit_residual"][:, :-1]
    with pytest.raises(ValueError, match="state of 'up': 'residual' must be"):
        optimizer.load_state_dict(saved)


def test_an_optimizer_without_our_scales_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "FOREIGN_LIMIT", 5)
    model, _ = automatic()
    optimizer = torch.optim.SGD(model.lm_head.parameters(), lr=0.1)
    train(model, optimizer, 0, 4)
    with pytest.raises(RuntimeError, match="no code flips"):
        train(model, optimizer, 4, 5)


def test_other_optimizers_and_accumulation_do_not_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "FOREIGN_LIMIT", 5)
    model, _ = automatic()
    head = torch.optim.SGD(model.lm_head.parameters(), lr=0.1)
    rest = torch.optim.SGD([p for n, p in model.named_parameters() if p.requires_grad and "lm_head" not in n], lr=0.1)
    stranger = nn.Linear(2, 2)
    elsewhere = torch.optim.SGD(stranger.parameters(), lr=0.1)
    for step in range(12):
        loss_of(model, step).backward()
        for _ in range(4):
            head.step()
        if step % 4 == 3:
            rest.step()
            model.zero_grad()
            for _ in range(6):
                elsewhere.step()
        elif step == 0:
            head._optimizer_step_post_hooks.clear()
        if step % 4 != 3:
            rest.step()
    assert model.up._planes is not None


def test_a_non_finite_gradient_raises_before_the_step() -> None:
    model, _ = automatic()
    optimizer = torch.optim.AdamW(floats(model), lr=1e-3)
    train(model, optimizer, 0, 3)
    (loss_of(model, 3) * float("nan")).backward()
    before = snapshot(model, optimizer)
    with pytest.raises(FloatingPointError, match="'up', 'down'"):
        optimizer.step()
    assert same(before, snapshot(model, optimizer))


def test_a_step_that_a_scaler_skipped() -> None:
    model, _ = automatic()
    optimizer = torch.optim.AdamW(floats(model), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for step in range(8):
        codes = model.up.codes()
        factor = float("inf") if step == 4 else 1.0
        scaler.scale(loss_of(model, step) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert step != 4 or torch.equal(codes, model.up.codes())
    assert torch.isfinite(model.up.scale).all()


def test_our_optimizer_is_left_alone() -> None:
    model, _ = automatic()
    optimizer = FlipOptimizer(model, lr=0.05, seed=1)
    twin = net()
    train(twin, FlipOptimizer(twin, lr=0.05, seed=1), 0, 6)
    train(model, optimizer, 0, 6)
    assert same(snapshot(model), snapshot(twin))


def test_removed_hooks_flip_nothing() -> None:
    model, handle = automatic()
    optimizer = torch.optim.SGD(floats(model), lr=0.1)
    train(model, optimizer, 0, 3)
    handle.remove()
    codes = model.up.codes()
    train(model, optimizer, 3, 8)
    assert torch.equal(codes, model.up.codes()) and AutoFlip.of(model) is None
    assert torch.optim.Optimizer.load_state_dict is LOAD


def test_a_model_that_is_gone_takes_its_hooks_along() -> None:
    model, _ = automatic()
    assert copy.deepcopy(model).up._auto is None
    other = nn.Linear(2, 2)
    del model, _
    gc.collect()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    assert not auto._hooks.active
