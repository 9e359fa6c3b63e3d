"""The methods with a dense gradient against their formulas in float64; schedules; memory as it is."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from torch import nn
from torchkit import OPTIONS, loss_of, net, same, snapshot, train
from transformers import get_linear_schedule_with_warmup

from onebit_ext.torch import (
    BitLinear,
    Bop,
    FlipOptimizer,
    LatentAdam,
    bits_per_weight,
    cosine_schedule,
    eta_from_hybrid,
    linear_schedule,
    prepare,
    state_bytes,
    wsd_schedule,
)
from onebit_ext.torch.memory import gradient_bytes

N, K, M = 70, 37, 9
F64 = np.float64


def dense_gradient(layer: BitLinear, x: torch.Tensor, dy: torch.Tensor) -> Any:
    xq, sx = oracle.quantize_tokens(x.detach().numpy())
    return (dy.numpy().astype(F64) * sx[:, None]).T @ xq[:, :K].astype(F64)


def run(optimizer: FlipOptimizer, layer: BitLinear, step: Any, steps: int = 12) -> int:
    """Train on noise; after each step the codes must be what `step(codes, gradient)` says."""
    moved = 0
    for _ in range(steps):
        codes = layer.codes().numpy().astype(F64)
        gradient = np.zeros((N, K))
        for _ in range(2):
            x, dy = torch.randn(M, K, requires_grad=True), torch.randn(M, N)
            y, _, _ = oracle.linear_forward(x.detach().numpy(), codes.astype(np.int8), layer.scale.detach().numpy())
            out = layer(x)
            assert np.array_equal(out.detach().numpy(), y)
            out.backward(dy)
            gradient += dense_gradient(layer, x, dy)
        assert layer._latent is not None and layer._latent.grad is not None and layer.scale.grad is not None
        np.testing.assert_allclose(layer._latent.grad.numpy(), gradient, rtol=1e-4, atol=1e-3)
        ds = (gradient * codes).sum(1)
        wanted = ds if layer.scale.numel() > 1 else ds.sum(keepdims=True)
        np.testing.assert_allclose(layer.scale.grad.numpy(), wanted, rtol=1e-3, atol=1e-2)
        optimizer.step()
        optimizer.zero_grad()
        assert layer._latent.grad is None
        new = step(codes, gradient)
        assert np.mean(layer.codes().numpy() == new) > 0.999  # float32 against float64 on the brink
        moved += int((new != codes).sum())
        assert abs(optimizer.stats()[0]["flip_rate"] - (new != codes).mean()) < 0.002
    return moved


def test_the_optimizer_method_is_adam_on_codes_and_residual() -> None:
    torch.manual_seed(2)
    layer = BitLinear(K, N, scale="row")
    s0 = float(layer.scale.detach().mean())
    optimizer = LatentAdam(layer, lr=0.1 * s0, betas=(0.7, 0.85))
    e, m, v, t = np.zeros((N, K)), np.zeros((N, K)), np.zeros((N, K)), 0

    def step(codes: Any, g: Any) -> Any:
        nonlocal e, m, v, t
        t += 1
        m, v = 0.7 * m + 0.3 * g, 0.85 * v + 0.15 * g * g
        latent = codes + e - 0.1 * (m / (1 - 0.7**t)) / (np.sqrt(v / (1 - 0.85**t)) + 1e-8)
        new = codes + np.where(latent - codes > 0.5, 1, np.where(latent - codes < -0.5, -1, 0))
        new = np.clip(new, -1, 1)
        e = np.where((np.abs(codes) == 1) & (new == codes), np.clip(latent - new, -0.5, 0.5), latent - new)
        return new

    assert run(optimizer, layer, step) > N * K / 10
    np.testing.assert_allclose(optimizer.state[layer.weight]["residual"].numpy(), e, atol=2e-2)


def test_bop_is_bop() -> None:
    torch.manual_seed(2)
    layer = BitLinear(K, N)
    optimizer = Bop(layer, lr=0.2, threshold=1.5)
    m = np.zeros((N, K))

    def step(codes: Any, g: Any) -> Any:
        nonlocal m
        m = m + 0.2 * (g - m)
        return np.clip(codes - np.sign(m) * (np.abs(m) > 1.5 * np.sqrt((m * m).mean())), -1, 1)

    assert run(optimizer, layer, step) > N * K / 10


METHODS: list[dict[str, Any]] = [
    {"method": "residual"},
    {"method": "residual", "recipe": "pretrain"},
    {"method": "residual", "stripes": 2},
    {"method": "optimizer"},
    {"method": "optimizer", "shadow_dtype": torch.bfloat16},
    {"method": "shadow", "lr": 3e-3},
    {"method": "stochastic"},
    {"method": "bop"},
]


@pytest.mark.parametrize("options", METHODS, ids=str)
def test_every_method_learns(options: dict[str, Any]) -> None:
    """Codes towards a teacher's, of which 15 % differ; floats stay, and so do scales where there are any."""
    torch.manual_seed(0)
    codes = torch.randint(-1, 2, (48, 64))
    teacher = BitLinear.from_codes(torch.where(torch.rand(48, 64) < 0.15, torch.randint(-1, 2, (48, 64)), codes), 0.1)
    model = nn.Sequential(BitLinear.from_codes(codes, 0.1))
    held_out = torch.randn(512, 64)
    model, optimizer = prepare(model, **{"scale_lr": 0.0} | options)

    def loss(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            wanted = teacher(x)
        return (model(x) - wanted).square().mean() / wanted.var()

    first = loss(held_out).item()
    schedule = cosine_schedule(optimizer, 150)
    for _ in range(150):
        loss(torch.randn(128, 64)).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    last = loss(held_out).item()
    assert last < 0.8 * first, (first, last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [LatentAdam, Bop])
def test_dense_methods_resume_exactly(kind: Any, dtype: torch.dtype) -> None:
    options = OPTIONS | {"lr": 0.02, "dtype": dtype} | ({"threshold": 1.5} if kind is Bop else {})
    model = net()
    optimizer = kind(model, **options)
    train(model, optimizer, 0, 6)
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    twin = net(9)
    other = kind(twin, **options)
    twin.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    codes = model.up.codes()
    train(model, optimizer, 6, 14)
    train(twin, other, 6, 14)
    assert same(snapshot(model, optimizer), snapshot(twin, other)) and not torch.equal(codes, model.up.codes())
    other_dtype = torch.bfloat16 if dtype == torch.float32 else torch.float32
    for bad in (FlipOptimizer(net(), **OPTIONS), kind(net(), **options | {"dtype": other_dtype})):
        with pytest.raises(ValueError, match="state of 'up'"):
            other.load_state_dict(bad.state_dict())


def test_dense_methods_give_a_step_up() -> None:
    model = net()
    optimizer = LatentAdam(model, lr=0.02)
    train(model, optimizer, 0, 3)
    (loss_of(model, 3) * math.nan).backward()
    before = snapshot(model, optimizer)
    with pytest.raises(FloatingPointError, match="'up', 'down'"):
        optimizer.step()
    assert same(before, snapshot(model, optimizer))
    optimizer.discard()
    optimizer.zero_grad()
    train(model, optimizer, 4, 6)
    FlipOptimizer(model)
    with pytest.raises(RuntimeError, match="another optimizer took the layer"):
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "bits"),
    [
        ({"method": "frozen"}, 2),
        ({"method": "stochastic"}, 2),
        ({"method": "residual"}, 10),
        ({"method": "optimizer"}, 98),
        ({"method": "optimizer", "shadow_dtype": torch.bfloat16}, 50),
        ({"method": "bop"}, 34),
        ({"method": "bop", "shadow_dtype": torch.bfloat16}, 18),
        ({"method": "shadow"}, 96),
        ({"method": "shadow", "shadow_dtype": torch.bfloat16}, 48),
    ],
    ids=str,
)
def test_memory_is_what_lives(options: dict[str, Any], bits: float) -> None:
    model, optimizer = prepare(nn.Sequential(nn.Linear(1024, 1024, bias=False)), **options)
    for _ in range(2):
        model(torch.randn(2, 1024)).sum().backward()
        dense = gradient_bytes(model)
        optimizer.step()
        optimizer.zero_grad()
    assert bits <= bits_per_weight(model, optimizer) <= bits * 1.05 + 0.1
    wide = {torch.bfloat16: 2}.get(options.get("shadow_dtype"), 4) if options["method"] == "shadow" else 4
    assert dense == (1024**2 * wide if options["method"] in ("optimizer", "bop", "shadow") else 0) + (
        0 if options["method"] == "shadow" else 4
    )
    assert state_bytes(model) < state_bytes(model, optimizer)


# ------------------------------------------------------------------ rates
def test_cosine_schedule() -> None:
    optimizer = FlipOptimizer(net(), lr=0.1, float_lr=0.2)
    schedule = cosine_schedule(optimizer, 100, 0.1)
    seen = []
    for step in range(101):
        seen.append([group["lr"] for group in optimizer.param_groups])
        want = min(1, (step + 1) / 10) * (1 + math.cos(math.pi * step / 100)) / 2
        assert seen[-1][0] == pytest.approx(0.1 * want, abs=1e-12) and seen[-1][2] == pytest.approx(
            0.2 * want, abs=1e-12
        )
        optimizer.step()
        schedule.step()
    assert seen[100] == [0, 0, 0]
    with pytest.raises(ValueError, match="'steps'"):
        cosine_schedule(optimizer, 0)


@pytest.mark.parametrize("warmup", [0.0, 0.2, 1.0])
def test_linear_schedule(warmup: float) -> None:
    """As transformers' behind the warmup, whose first step has a rate here; every group alike."""
    optimizer, other = FlipOptimizer(net(), lr=0.1, float_lr=0.2), torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0)
    schedule = linear_schedule(optimizer, 30, warmup)
    wanted = get_linear_schedule_with_warmup(other, round(30 * warmup), 30)
    for step in range(31):
        want = (step + 1) / (30 * warmup) if step < 30 * warmup else wanted.get_last_lr()[0]
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([0.1 * want, 2e-3 * want, 0.2 * want])
        for each in (optimizer, other, schedule, wanted):
            each.step()
    with pytest.raises(ValueError, match="linear_schedule: 'steps'"):
        linear_schedule(optimizer, 0)


def test_every_stripe_has_its_own_cycle() -> None:
    model = net()
    optimizer = FlipOptimizer(model, lr=0.1, float_lr=0.2, stripes=3)
    schedule = cosine_schedule(optimizer, 29, 0.2)
    assert optimizer.param_groups[0]["stripe_steps"] == 10
    rates, stripes = [], []
    for step in range(30):
        rates.append(optimizer.param_groups[0]["lr"])
        stripes.append(optimizer.stats()[0]["stripe"])
        train(model, optimizer, step, step + 1, schedule)
    assert rates[:10] == rates[10:20] == rates[20:] and rates[0] < rates[1] > rates[9]
    assert stripes == [0] * 10 + [1] * 10 + [2] * 10
    assert optimizer.param_groups[0]["lr"] == optimizer.param_groups[2]["lr"] == 0


@pytest.mark.parametrize("stripes, cycle", [(1, 30), (3, 10), (0, 30)])
def test_wsd_schedule(stripes: int, cycle: int) -> None:
    """stripes = 0: a float shadow, whose rate goes as that of codes."""
    if stripes:
        optimizer: torch.optim.Optimizer = FlipOptimizer(net(), lr=0.1, float_lr=0.2, stripes=stripes)
    else:
        model, optimizer = prepare(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), "shadow", lr=0.1, float_lr=0.2)
    schedule = wsd_schedule(optimizer, 30, 0.2)
    for step in range(31):
        place = step % cycle
        want = min((place + 1) / (0.2 * cycle), 1) * min(1, (cycle - place) / (0.4 * cycle)) * (step < 30)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * want, abs=1e-12)
        rest = min(1, (step + 1) / 6) * (1 + math.cos(math.pi * step / 30)) / 2
        assert optimizer.param_groups[-1]["lr"] == pytest.approx(0.2 * rest, abs=1e-12)
        optimizer.step()
        schedule.step()
    with pytest.raises(ValueError, match="wsd_schedule: 'steps'"):
        wsd_schedule(optimizer, 0)


def test_eta_from_hybrid() -> None:
    linear = nn.Linear(64, 48)
    mean = linear.weight.abs().mean().item()
    for model in (
        nn.Sequential(linear),
        BitLinear.from_float(linear.weight),
        prepare(nn.Sequential(linear), "shadow")[0],
    ):
        assert eta_from_hybrid(model, 1e-3) == pytest.approx(1e-3 / mean, rel=1e-5)
    with pytest.raises(ValueError, match="no linear layer"):
        eta_from_hybrid(nn.Embedding(3, 4), 1e-3)
    with pytest.raises(ValueError, match="'lr'"):
        eta_from_hybrid(linear, -1.0)


def test_options_of_another_method_are_refused() -> None:
    for method, options, error in (
        ("bop", {"residual_bits": 4}, "of method 'residual'"),
        ("optimizer", {"stripes": 2}, "of method 'residual'"),
        ("frozen", {"rule": "byte"}, "of method 'residual'"),
        ("stochastic", {"momentum_bits": 4}, "of method 'residual'"),
        ("bop", {"threshold": -1.0}, "'threshold'"),
        ("bop", {"shadow_dtype": torch.float16}, "'dtype'"),
    ):
        with pytest.raises(ValueError, match=error):
            prepare(nn.Sequential(nn.Linear(8, 8)), method, **options)
    with pytest.raises(ValueError, match="no flip rule"):
        LatentAdam(net(), rule="byte")
