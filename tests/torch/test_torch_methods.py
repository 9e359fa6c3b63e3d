"""prepare() and the hybrid baseline."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from torch import nn
from torchkit import batch, loss_of, net, train

from onebit_ext.torch import BitLinear, FlipOptimizer, ShadowLinear, ops, prepare
from onebit_ext.torch.nn import layer_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shadow_forward_is_that_of_its_codes(dtype: torch.dtype) -> None:
    weight, bias = torch.randn(70, 37).to(dtype), torch.randn(70)
    layer = ShadowLinear(weight, bias)
    codes, scale = oracle.absmean(ops.array(weight) if dtype == torch.bfloat16 else weight.numpy())
    x = torch.randn(2, 5, 37)
    want, _, _ = oracle.linear_forward(x.numpy().reshape(10, 37), codes, np.atleast_1d(scale), bias.numpy())
    assert np.array_equal(layer(x).detach().numpy().reshape(10, 70), want)


def test_shadow_gradients() -> None:
    """dW straight through the quantiser, from the quantised activation, against float64; dX by the ternary kernel."""
    weight = torch.randn(70, 37)
    layer = ShadowLinear(weight, torch.zeros(70))
    x, dy = torch.randn(2, 5, 37, requires_grad=True), torch.randn(2, 5, 70)
    layer(x).backward(dy)
    flat = x.detach().numpy().reshape(10, 37)
    codes, scale = oracle.absmean(weight.numpy())
    xq, sx = oracle.quantize_tokens(flat)
    dense = (dy.double().numpy().reshape(10, 70) * sx[:, None]).T @ xq[:, :37].astype(np.float64)
    assert layer.weight.grad is not None and np.allclose(layer.weight.grad.numpy(), dense, rtol=1e-4, atol=1e-4)
    control = layer.control.clone().numpy()
    control[ops.CONTROL["micro"]] = 0
    want, _ = oracle.linear_backward_input(dy.numpy().reshape(10, 70), codes, np.atleast_1d(scale), control)
    assert x.grad is not None and np.array_equal(x.grad.numpy().reshape(10, 37), want)
    assert layer.bias is not None and torch.allclose(layer.bias.grad, dy.sum((0, 1)), atol=1e-5)
    assert layer.control[ops.CONTROL["micro"]] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_shadow_of_codes_gives_the_codes_back(dtype: torch.dtype) -> None:
    source = BitLinear(64, 48, bias=True)
    again = BitLinear.from_float(ShadowLinear.from_bitlinear(source, dtype).weight)
    assert torch.equal(again.codes(), source.codes())
    assert torch.allclose(again.scale, source.scale, rtol=1e-6 if dtype == torch.float32 else 1e-2)


def test_shadow_inputs_are_checked() -> None:
    layer = ShadowLinear(torch.randn(8, 16))
    with pytest.raises(TypeError, match="got torch.float16"):
        layer(torch.zeros(2, 16, dtype=torch.float16))
    with pytest.raises(ValueError, match="16"):
        layer(torch.zeros(2, 15))
    with pytest.raises(ValueError, match="'weight'"):
        ShadowLinear(torch.zeros(3))
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(layer(torch.zeros(2, 16)).sum(), layer.weight, create_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.zeros(2, 16)).dtype == torch.bfloat16


def floats() -> nn.Sequential:
    torch.manual_seed(0)
    lin = nn.Linear
    return nn.Sequential(nn.Embedding(13, 20), lin(20, 72), nn.SiLU(), lin(72, 36, bias=False), lin(36, 13))


@pytest.mark.parametrize("method", ["residual", "frozen", "shadow"])
def test_every_method_learns(method: str) -> None:
    lr = 3e-3 if method == "shadow" else 0.1
    model, optimizer = prepare(floats(), method, lr=lr, float_lr=1e-2, skip=("4",))
    assert type(model[4]) is nn.Linear
    kind = ShadowLinear if method == "shadow" else BitLinear
    assert type(model[1]) is type(model[3]) is kind
    codes = model[1].codes() if kind is BitLinear else None
    losses = train(model, optimizer, 0, 50)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    if codes is not None:
        assert torch.equal(codes, model[1].codes()) == (method == "frozen")


def test_shadows_of_ternary_layers() -> None:
    model = net()
    x, _ = batch(0)
    before = model(x)
    model, optimizer = prepare(model, "shadow", lr=1e-4, float_lr=2e-3, shadow_dtype=torch.bfloat16)
    assert type(model.up) is ShadowLinear and model.up.weight.dtype == torch.bfloat16
    assert torch.allclose(model(x), before, atol=0.05)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-4, 2e-3]
    assert len(optimizer.param_groups[0]["params"]) == 2
    loss_of(model, 0).backward()
    assert model.up.weight.grad is not None and model.up.weight.grad.dtype == torch.bfloat16


def test_prepare_passes_its_arguments_on() -> None:
    model, optimizer = prepare(floats(), lr=0.2, float_lr=0.3, scale_lr=0.4, momentum_bits=4, seed=9)
    assert isinstance(optimizer, FlipOptimizer) and optimizer.rule == "residual8_momentum4" and optimizer.seed == 9
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.4, 0.3]
    assert layer_of(model[1].weight) is model[1]
    with pytest.raises(ValueError, match="'method'"):
        prepare(floats(), "other")
