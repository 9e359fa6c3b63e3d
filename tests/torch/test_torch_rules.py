"""Every flip rule through BitLinear and FlipOptimizer: the oracle's bits, stripes, resuming, memory, refusals."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from oracle import CONTROL
from shapes import assert_same_bits
from torch._dynamo.utils import counters
from torchkit import OPTIONS, loss_of, net, same, scheduled, snapshot, train

from onebit_ext import _core
from onebit_ext.torch import AutoFlip, BitLinear, FlipOptimizer, bits_per_weight, ops, replace_linear
from onebit_ext.torch.nn import plane_list

F32 = np.float32
N, K, M = 83, 70, 5
RULES = _core.RULES
STRIPED: list[dict[str, Any]] = [
    {"rule": rule, "stripes": 3, "stripe_steps": 4}
    for rule in ("residual8", "residual8_momentum8", "byte", "residual4", "stochastic")
]
HELD: list[dict[str, Any]] = [{"rule": rule, "vote_plane": True} for rule in RULES] + [
    STRIPED[3] | {"vote_plane": True}
]
CASES: list[dict[str, Any]] = [*({"rule": rule} for rule in RULES), *STRIPED, *HELD]


def arrays(layer: BitLinear) -> dict[str, Any]:
    assert layer._planes is not None
    return {k: v.copy() for k, v in ops.plane_arrays(layer._planes["control"], plane_list(layer._planes)).items()}


@pytest.mark.parametrize("options", CASES, ids=str)
def test_training_is_the_oracles(options: dict[str, Any]) -> None:
    torch.manual_seed(9)
    layer = BitLinear(K, N, bias=True, scale="row")
    settings: dict[str, Any] = {"lr": 0.4, "scale_lr": 0.0, "float_lr": 0.0, "betas": (0.6, 0.85)}
    opt = FlipOptimizer(layer, flip_rate_cap=0 if "stripes" in options else 0.02, seed=5, **settings, **options)
    codes, scale, moved = layer.codes().numpy(), layer.scale.detach().numpy(), 0
    bias = ops.array(layer.bias)  # type: ignore[arg-type]
    for step in range(16):
        fresh = arrays(layer)
        assert fresh["control"][CONTROL["stripe"]] == step // 4 % opt.stripes
        if step == 0 or (opt.stripes > 1 and step % 4 == 0):
            assert fresh["control"][CONTROL["step"]] == fresh["control"][CONTROL["moved"]] == 0
            planes = {name: value.copy() for name, value in fresh.items()}
            oracle.start_residual(codes, planes)
            for name in set(planes) - {"residual", "control"}:
                planes[name][:] = 0
            assert_same_bits(fresh, planes, options)
        ds, db = np.zeros(N, F32), np.zeros(N, F32)
        for _ in range(1 + step % 2):
            x, dy = torch.randn(M, K, requires_grad=True), torch.randn(M, N)
            y, xq, sx = oracle.linear_forward(x.detach().numpy(), codes, scale, bias)
            out = layer(x)
            assert np.array_equal(out.detach().numpy(), y)
            dx, _ = oracle.linear_backward_input(dy.numpy(), codes, scale, planes["control"])
            out.backward(dy)
            assert x.grad is not None and np.array_equal(x.grad.numpy(), dx)
            oracle.vote(dy.numpy(), xq, sx, codes, scale, planes, ds=ds, db=db)
        if step % 2 == 0:  # torch adds two micro-batches up in an order of its own
            assert np.array_equal(layer.scale.grad.numpy(), ds) and np.array_equal(layer.bias.grad.numpy(), db)
        opt.step()
        opt.zero_grad()
        moved += oracle.flip(codes, planes)
        assert np.array_equal(layer.codes().numpy(), codes)
        if opt.stripes == 1 or step % 4 != 3:
            powers = [CONTROL["beta1_power"], CONTROL["beta2_power"]]
            got = arrays(layer)
            planes["control"][powers] = got["control"][powers]  # the scale's
            assert_same_bits(got, planes, options)
            (stats,) = opt.stats()
            assert stats["saturated"] == oracle.saturated(codes, planes) / (len(planes["row_factor"]) * K)
            assert stats["flip_rate"] == opt.flip_rate and stats["zero_fraction"] == (codes == 0).mean()
    assert moved > N * K / 50


# ------------------------------------------------------------------ resuming
def start(seed: int, **options: Any) -> tuple[Any, FlipOptimizer, Any]:
    model = net(seed)
    optimizer = FlipOptimizer(model, **OPTIONS, **options)
    return model, optimizer, scheduled(optimizer)


@pytest.mark.parametrize("options", [*CASES, {"rule": "residual8", "stripes": 7, "stripe_steps": 3}], ids=str)
def test_resuming_is_never_having_stopped(options: dict[str, Any]) -> None:
    """At step 9 with a stripe of fewer rows than the first, and votes that wait."""
    model, optimizer, scheduler = start(3, **options)
    train(model, optimizer, 0, 9, scheduler)
    loss_of(model, 90).backward()
    model.zero_grad()
    buffer = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), scheduler.state_dict()], buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    twin, other, schedule = start(99, **options)
    twin.load_state_dict(saved[0])
    schedule.load_state_dict(saved[2])
    other.load_state_dict(saved[1])
    train(model, optimizer, 9, 24, scheduler)
    train(twin, other, 9, 24, schedule)
    assert same(snapshot(model, optimizer), snapshot(twin, other))


@pytest.mark.parametrize("options", [*CASES[1:], {"rule": "residual16"}], ids=str)
def test_automatic_flips_resume(options: dict[str, Any]) -> None:
    ends = []
    for split in (False, True):
        handles, saved = [], None
        for first, last in ((0, 9), (9, 20)) if split else ((0, 20),):
            model = replace_linear(
                net(7 if saved is None else 8), auto=True, flip_lr=0.9, seed=5, flip_rate_cap=0, **options
            )
            handles.append(AutoFlip.of(model))
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.5)
            if saved is not None:
                model.load_state_dict(saved[0])
                optimizer.load_state_dict(saved[1])
            codes = model.up.codes()
            train(model, optimizer, first, last)
            assert not torch.equal(codes, model.up.codes())
            saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
        ends.append(snapshot(model, optimizer))
        for handle in handles:
            handle.remove()  # type: ignore[union-attr]
    assert same(*ends)


def test_a_state_of_another_rule_or_stripe_is_refused() -> None:
    model, optimizer, _ = start(3, stripes=3, stripe_steps=2)
    train(model, optimizer, 0, 3)
    saved = optimizer.state_dict()
    for options, text in (
        ({}, "planes of residual8 with 1 stripe.s., got residual8 with 3"),
        ({"stripes": 2, "stripe_steps": 2}, "with 2 stripe.s., got residual8 with 3"),
        ({"rule": "byte", "stripes": 3, "stripe_steps": 2}, "planes of byte with 3 .* got residual8"),
    ):
        other = start(3, **options)[1]
        with pytest.raises(ValueError, match=text):
            other.load_state_dict(saved)
    for field, value in (("stripe", 3.0), ("stripe", 0.5), ("stripe", float("nan")), ("rule", 99.0)):
        bad = copy.deepcopy(saved)
        bad["state"][0]["control"][CONTROL[field]] = value
        with pytest.raises(ValueError, match="stripe|rule number"):
            optimizer.load_state_dict(bad)


# ------------------------------------------------------------------ stripes
def test_stripes_share_one_pool_and_train_their_rows_alone() -> None:
    layer = BitLinear(20, 70)
    optimizer = FlipOptimizer(layer, lr=0.5, stripes=3, stripe_steps=5)
    state = optimizer.state[layer.weight]
    pool = state["residual"].data_ptr()
    for stripe in range(7):
        before = layer.codes()
        for _ in range(5):
            layer(torch.randn(9, 20)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        changed = (layer.codes() != before).any(1)
        rows = torch.arange(70) % 3 == stripe % 3
        assert changed[rows].any() and not changed[~rows].any()
        assert state["residual"].data_ptr() == pool and not state["residual"].any()


def test_stripes_need_their_length() -> None:
    model, optimizer, _ = start(3, stripes=2)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="stripes=2 needs stripe_steps"):
        train(model, optimizer, 0, 1)
    assert same(before, snapshot(model))
    for options in ({"stripes": 0}, {"stripes": 2, "stripe_steps": 0}):
        with pytest.raises(ValueError, match="'stripes' and 'stripe_steps'"):
            start(3, **options)
    with pytest.raises(ValueError, match="AutoFlip: stripes=2"):
        replace_linear(net(), auto=True, stripes=2)


# ------------------------------------------------------------------ rules that move codes in votes
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rule", ["residual8", "residual4", "residual2", "stochastic"])
def test_a_layer_used_twice(rule: str, compiled: bool) -> None:
    layer = BitLinear(24, 24)
    optimizer = FlipOptimizer(layer, lr=0.2, rule=rule)
    torch.compiler.reset()
    call = torch.compile(lambda x: layer(layer(x)), backend="aot_eager") if compiled else lambda x: layer(layer(x))
    loss = call(torch.randn(9, 24)).square().mean()
    if rule == "residual8":
        loss.backward()
        optimizer.step()
    else:
        with pytest.raises(RuntimeError, match=f"rule '{rule}' moves codes in the backward.*use such a layer once"):
            loss.backward()


def test_another_backward_between_forward_and_backward_is_refused() -> None:
    layer = BitLinear(24, 24)
    FlipOptimizer(layer, rule="residual4")
    first, second = (layer(torch.randn(9, 24)).sum() for _ in range(2))
    first.backward()
    with pytest.raises(RuntimeError, match="between this forward and its backward"):
        second.backward()


@pytest.mark.parametrize("rule", ["residual4", "stochastic", "byte", "residual16"])
def test_compiled_training_is_eager_training(rule: str) -> None:
    ends = []
    for compiled in (False, True):
        torch.compiler.reset()
        counters.clear()
        model = net()
        optimizer = FlipOptimizer(model, lr=0.1, rule=rule)
        trained = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        train(trained, optimizer, 0, 6, scheduled(optimizer))
        ends.append(snapshot(model, optimizer))
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert same(*ends)


# ------------------------------------------------------------------ memory
LABELS = [
    ({"rule": "residual16"}, 18, 0.05),
    ({"rule": "residual8_momentum8"}, 18, 0.05),
    ({"rule": "residual8_momentum4"}, 14, 0.05),
    ({"rule": "residual8"}, 10, 0.05),
    ({"rule": "byte"}, 10, 0.05),  # 8 of them would do: the forward wants its codes packed
    ({"rule": "residual4_momentum4"}, 10, 0.05),
    ({"rule": "residual4"}, 6, 0.05),
    ({"rule": "residual2"}, 4, 0.1),
    ({"rule": "stochastic"}, 2, 0.1),
    ({"rule": "residual4", "vote_plane": True}, 6, 0.05),  # and 16 while a step is under way
    ({"stripes": 2, "stripe_steps": 2}, 6, 0.05),
    ({"stripes": 4, "stripe_steps": 1}, 4, 0.05),
]


@pytest.mark.parametrize(("options", "bits", "margin"), LABELS, ids=str)
def test_live_bits_are_the_label(options: dict[str, Any], bits: float, margin: float) -> None:
    layer = BitLinear(1024, 1024)
    optimizer = FlipOptimizer(layer, **options)
    for _ in range(3):
        layer(torch.randn(3, 1024)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert bits < bits_per_weight(layer, optimizer) <= bits * (1 + margin)


# ------------------------------------------------------------------ choosing
def test_choosing_a_rule() -> None:
    for options, rule in (
        ({"residual_bits": 16}, "residual16"),
        ({"residual_bits": 4, "momentum_bits": 4}, "residual4_momentum4"),
        ({"recipe": "pretrain", "residual_bits": 4}, "residual4_momentum4"),
        ({"momentum_bits": 8}, "residual8_momentum8"),
        ({"residual_bits": 2}, "residual2"),
        ({"rule": "byte", "recipe": "pretrain"}, "byte"),
    ):
        assert FlipOptimizer(net(), **options).rule == rule
    with pytest.raises(ValueError, match="'rule' says the bits too"):
        FlipOptimizer(net(), rule="byte", residual_bits=8)
    with pytest.raises(ValueError, match="no flip rule with rule='other'; there are residual8, "):
        FlipOptimizer(net(), rule="other")


@pytest.mark.parametrize("rule", ["residual8_momentum8", "residual16"])
def test_a_residual_begins_at_its_shadow(rule: str) -> None:
    linear = torch.nn.Linear(20, 12)
    layer = replace_linear(torch.nn.Sequential(linear), shadow=True)[0]
    start = layer._start.clone()
    unit = 128 if rule == "residual16" else 1
    assert torch.equal(FlipOptimizer(layer, rule=rule).state[layer.weight]["residual"], start.to(torch.int32) * unit)
    for options in ({"rule": "residual4"}, {"rule": "byte"}, {"stripes": 2, "stripe_steps": 3}):
        layer = replace_linear(torch.nn.Sequential(torch.nn.Linear(20, 12)), shadow=True)[0]
        with pytest.raises(ValueError, match="begins at its shadow"):
            FlipOptimizer(layer, **options)
