"""FlipOptimizer: parameters, groups, steps that must not happen, layers that come and go."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torchkit import OPTIONS, Net, loss_of, net, same, snapshot, train

import onebit_ext.torch as ot
from onebit_ext.torch import BitLinear, FlipOptimizer, ops

C = ops.CONTROL


def kinds(optimizer: FlipOptimizer) -> list[tuple[str, int]]:
    return [(group["kind"], len(group["params"])) for group in optimizer.param_groups]


def test_groups() -> None:
    model = net()
    plain = FlipOptimizer(model, lr=0.05, float_lr=2e-3, scale_lr=3e-4)
    assert kinds(plain) == [("codes", 2), ("scales", 2), ("floats", 4)]
    assert [group["lr"] for group in plain.param_groups] == [0.05, 3e-4, 2e-3]
    decayed = FlipOptimizer(model, weight_decay=0.1)
    assert kinds(decayed) == [("codes", 2), ("scales", 2), ("floats", 2), ("floats", 2)]
    assert [group["weight_decay"] for group in decayed.param_groups] == [0, 0, 0.1, 0]
    assert {p.ndim for p in decayed.param_groups[2]["params"]} == {2}


def test_any_form_of_parameters_finds_the_codes() -> None:
    """Also the idiom that keeps only what requires grad, and named parameters; all train alike."""
    forms: list[Any] = [
        lambda m: m,
        lambda m: m.parameters(),
        lambda m: [p for p in m.parameters() if p.requires_grad],
        lambda m: m.named_parameters(),
        lambda m: (
            [{"params": m.up.parameters()}, {"params": [*m.down.parameters(), *m.lm_head.parameters()]}]
            + [{"params": m.embedding.weight, "lr": 1e-3}]
        ),
    ]
    results = []
    for form in forms:
        model = net()
        optimizer = FlipOptimizer(form(model), lr=0.1, seed=4)
        train(model, optimizer, 0, 4)
        results.append(snapshot(model))
    assert all(same(results[0], other) for other in results[1:])


def test_adding_a_layer_later() -> None:
    model = net()
    optimizer = FlipOptimizer([*model.embedding.parameters(), *model.up.parameters()], lr=0.2)
    assert kinds(optimizer)[0] == ("codes", 1)
    optimizer.add_param_group({"params": model.down.parameters(), "weight_decay": 0.5})
    assert kinds(optimizer)[3:] == [("codes", 1), ("scales", 1)]
    before = model.down.codes()
    train(model, optimizer, 0, 6)
    assert not torch.equal(before, model.down.codes())


def test_everything_moves_and_the_loss_falls() -> None:
    model = net()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = FlipOptimizer(model, **OPTIONS)
    losses = train(model, optimizer, 0, 60)
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters())
    assert 0 < optimizer.flip_rate < 0.2
    assert all(torch.equal(1 / (1 / layer.scale), layer.scale) for layer in (model.up, model.down))


def test_the_first_step_only_measures() -> None:
    model = net()
    optimizer = FlipOptimizer(model, lr=1.0)
    before = model.up.codes()
    train(model, optimizer, 0, 1)
    state = optimizer.state[model.up.weight]
    assert torch.equal(before, model.up.codes()) and not state["residual"].any() and state["row_factor"].all()
    train(model, optimizer, 1, 2)
    assert state["residual"].any()


def test_frozen_recipe_trains_scales_and_floats_alone() -> None:
    model = net()
    optimizer = FlipOptimizer(model, recipe="frozen", scale_lr=1e-2)
    codes, scale = model.up.codes(), model.up.scale.detach().clone()
    losses = train(model, optimizer, 0, 40)
    assert losses[-1] < losses[0] and torch.equal(codes, model.up.codes()) and not torch.equal(scale, model.up.scale)
    assert "residual" not in optimizer.state[model.up.weight]


def test_codes_only() -> None:
    """scale_lr = 0 and frozen floats: every other tensor keeps its bits."""
    model = net()
    for module in (model.embedding, model.lm_head):
        module.requires_grad_(False)
    assert model.up.bias is not None
    model.up.bias.requires_grad_(False)
    before = snapshot(model)
    losses = train(model, FlipOptimizer(model, lr=0.1, scale_lr=0.0), 0, 40)
    after = snapshot(model)
    assert losses[-1] < losses[0]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"model.up.weight", "model.down.weight"}


def test_scales_have_their_own_betas() -> None:
    model = net()
    optimizer = FlipOptimizer(model, betas=(0.8, 0.9))
    optimizer.param_groups[1]["betas"] = (0.5, 0.75)
    train(model, optimizer, 0, 2)
    control = optimizer.state[model.up.weight]["control"]
    assert [control[C[name]] for name in ("beta1_power", "beta2_power")] == [0.25, 0.5625]
    assert [control[C[name]] for name in ("beta1", "beta2")] == [0.8, 0.9]


def test_a_scale_round_trips_before_its_first_step() -> None:
    layer = BitLinear.from_float(torch.randn(16, 16))
    assert torch.equal(1 / (1 / layer.scale), layer.scale)


@pytest.mark.parametrize("zero", [lambda m, o: m.zero_grad(), lambda m, o: o.zero_grad()])
def test_zero_grad_leaves_votes(zero: Any) -> None:
    model = net()
    optimizer = FlipOptimizer(model)
    train(model, optimizer, 0, 2)
    loss_of(model, 2).backward()
    state = optimizer.state[model.up.weight]
    residual, sums = state["residual"].clone(), state["row_sum"].clone()
    zero(model, optimizer)
    assert torch.equal(state["residual"], residual) and torch.equal(state["row_sum"], sums) and sums.any()
    assert model.up.scale.grad is None


def test_unused_layer_is_untouched() -> None:
    model = net()
    optimizer = FlipOptimizer(model, lr=0.5, flip_rate_cap=0)
    train(model, optimizer, 0, 3)
    assert optimizer.state[model.down.weight]["control"][C["moved"]] > 0
    before = snapshot(model, optimizer)
    model.up(torch.randn(3, 20)).sum().backward()
    optimizer.step()
    after = snapshot(model, optimizer)
    index = 1  # the codes of `down`
    assert optimizer.param_groups[0]["params"][index] is model.down.weight
    for name in before:
        if name.startswith((f"state.{index}.", "model.down.")) and not name.endswith("control"):
            assert torch.equal(before[name], after[name]), name
    assert not torch.equal(before["state.0.row_factor"], after["state.0.row_factor"])
    assert optimizer.state[model.down.weight]["control"][C["moved"]] == 0


def test_a_layer_used_twice_votes_twice() -> None:
    layer = BitLinear(24, 24)
    optimizer = FlipOptimizer(layer, lr=0.2)
    before = layer.codes()
    for _ in range(6):
        x = torch.randn(9, 24)
        layer(layer(x)).square().mean().backward()
        assert optimizer.state[layer.weight]["control"][C["micro"]] == 2
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(before, layer.codes())


def test_freezing_and_thawing() -> None:
    model = net()
    model.up.scale.requires_grad_(False)
    optimizer = FlipOptimizer(model, lr=0.2)
    up, down = model.up.codes(), model.down.codes()
    train(model, optimizer, 0, 5)
    assert torch.equal(up, model.up.codes()) and not torch.equal(down, model.down.codes())
    model.up.scale.requires_grad_(True)
    model.down.scale.requires_grad_(False)
    down = model.down.codes()
    train(model, optimizer, 5, 6)
    optimizer.param_groups[0]["lr"] = 0.21
    assert optimizer.state[model.up.weight]["control"][C["eta"]] == 0.21
    train(model, optimizer, 6, 10)
    assert not torch.equal(up, model.up.codes()) and torch.equal(down, model.down.codes())


def poison(model: Net, optimizer: FlipOptimizer) -> None:
    """One backward whose gradient is infinite from the output of `up` down."""
    handle = model.down.register_full_backward_hook(lambda m, gi, go: (gi[0] * float("inf"),))
    loss_of(model, 3).backward()
    handle.remove()


def test_a_non_finite_gradient_raises_before_any_write() -> None:
    model = net()
    optimizer = FlipOptimizer(model)
    train(model, optimizer, 0, 3)
    poison(model, optimizer)
    before = snapshot(model, optimizer)
    assert model.up.scale.grad is not None and bool(model.up.scale.grad.isnan().all())
    assert bool(model.embedding.weight.grad.isnan().any())
    with pytest.raises(FloatingPointError, match="'up'"):
        optimizer.step()
    assert same(before, snapshot(model, optimizer))
    optimizer.discard()  # and life goes on
    optimizer.zero_grad()
    train(model, optimizer, 4, 6)


def test_a_non_finite_gradient_can_be_skipped() -> None:
    model = net()
    optimizer = FlipOptimizer(model, on_nonfinite="skip", lr=0.5)
    train(model, optimizer, 0, 3)
    up, embedding, scale = model.up.codes(), model.embedding.weight.detach().clone(), model.up.scale.detach().clone()
    poison(model, optimizer)
    optimizer.step()
    optimizer.zero_grad()
    assert torch.equal(up, model.up.codes()) and torch.equal(embedding, model.embedding.weight)
    assert torch.equal(scale, model.up.scale) and optimizer.nonfinite_skipped == 1
    assert optimizer.state[model.down.weight]["control"][C["moved"]] > 0
    losses = train(model, optimizer, 4, 30)
    assert losses[-1] < losses[0]


def test_a_frozen_codes_layer_is_protected_too() -> None:
    model = net()
    optimizer = FlipOptimizer(model, recipe="frozen")
    poison(model, optimizer)
    with pytest.raises(FloatingPointError, match="'up'"):
        optimizer.step()


def test_gradient_accumulation_is_one_step() -> None:
    model = net()
    optimizer = FlipOptimizer(model)
    for step in range(8):
        loss_of(model, step).backward()
    control = optimizer.state[model.up.weight]["control"]
    assert control[C["micro"]] == 8
    optimizer.step()
    assert control[C["micro"]] == 0 and control[C["step"]] == 1


def test_closure() -> None:
    model = net()
    optimizer = FlipOptimizer(model)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert first.item() == pytest.approx(loss_of(net(), 0).item())
    assert optimizer.state[model.up.weight]["control"][C["step"]] == 1


def test_a_layer_has_one_optimizer() -> None:
    model = net()
    first = FlipOptimizer(model)
    FlipOptimizer(model)
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match="another optimizer took the layer"):
        first.step()


def test_replaced_codes_are_noticed() -> None:
    model = net()
    optimizer = FlipOptimizer(model)
    model.load_state_dict(net(4).state_dict(), assign=True)
    with pytest.raises(RuntimeError, match="'up' is no longer this optimizer's"):
        optimizer.step()


def test_scales_without_anything_that_flips_are_refused() -> None:
    model = net()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="SGD steps the scales of BitLinear layers, but nothing flips"):
        train(model, optimizer, 0, 1)
    assert same(before, snapshot(model))
    train(model, torch.optim.SGD(model.lm_head.parameters(), lr=0.01), 0, 1)  # scales not in it: not its business


def test_without_an_optimizer_there_are_gradients_and_no_votes() -> None:
    """The same bits as with one, where the random position is the same; nothing else is kept."""
    plain, trained = net(), net()
    optimizer = FlipOptimizer(trained)
    for layer, other in ((plain.up, trained.up), (plain.down, trained.down)):
        layer.control[C["layer"]] = optimizer.state[other.weight]["control"][C["layer"]]
    for model in (plain, trained):
        loss_of(model, 0).backward()
    for (name, a), b in zip(plain.named_parameters(), trained.parameters(), strict=True):
        assert (a.grad is None and not a.is_floating_point()) or torch.equal(a.grad, b.grad), name
    assert plain.up.scale.grad is not None and plain.up._planes is None and plain.up.control[C["micro"]] == 1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lr": -1.0}, "'lr'"),
        ({"lr": float("nan")}, "'lr'"),
        ({"float_lr": -1.0}, "'float_lr'"),
        ({"scale_lr": float("inf")}, "'scale_lr'"),
        ({"weight_decay": -0.1}, "'weight_decay'"),
        ({"flip_rate_cap": -0.1}, "'flip_rate_cap'"),
        ({"betas": (0.9, 1.0)}, "'betas'"),
        ({"betas": (0.9,)}, "'betas'"),
        ({"recipe": "other"}, "'recipe'"),
        ({"residual_bits": 3}, "residual_bits=3"),
        ({"momentum_bits": 5}, "momentum_bits=5"),
        ({"seed": -1}, "'seed'"),
        ({"seed": 2**53}, "'seed'"),
        ({"on_nonfinite": "ignore"}, "'on_nonfinite'"),
    ],
)
def test_arguments(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        FlipOptimizer(net(), **options)


def test_no_parameters() -> None:
    with pytest.raises(ValueError, match="no parameters"):
        FlipOptimizer([])


@pytest.mark.parametrize(("bits", "rule"), [((None, None), "residual8"), ((8, 4), "residual8_momentum4")])
def test_rules(bits: tuple[int | None, int | None], rule: str) -> None:
    optimizer = FlipOptimizer(net(), residual_bits=bits[0], momentum_bits=bits[1])
    assert optimizer.rule == rule
    assert FlipOptimizer(net(), recipe="pretrain").rule == "residual8_momentum4"
    assert FlipOptimizer(net(), recipe="pretrain", momentum_bits=0).rule == "residual8"


def test_global_gradient_clipping_sees_floats_alone() -> None:
    model = net()
    ot.FlipOptimizer(model)
    loss_of(model, 0).backward()
    assert nn.utils.clip_grad_norm_(model.parameters(), 0.1) > 0
