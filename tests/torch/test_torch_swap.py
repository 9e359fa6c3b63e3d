"""replace_linear: what it takes, what it leaves, what it refuses.

The layers of transformers and onebitllms are imitated by name and attributes, as they are recognised.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import pytest
import torch
from torch import Tensor, nn
from torchkit import same, snapshot

from onebit_ext.torch import BitLinear, FlipOptimizer, replace_linear

N, K = 72, 37


class Packed(nn.Module):
    """transformers' BitLinear: row blocks in a buffer, inverse scale."""

    def __init__(self, codes: Tensor, inverse: float, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = codes.shape
        self.register_buffer("weight", torch.from_numpy(oracle.pack(codes.numpy().astype(np.int8), "rows4")))
        self.register_buffer("weight_scale", torch.tensor([inverse], dtype=dtype))
        self.register_buffer("bias", bias)
        self.rms_norm = None


class AutoBitLinear(nn.Linear):
    """transformers' AutoBitLinear; offline: codes as floats and a buffer with the scale."""

    def offline(self, codes: Tensor, scale: float) -> AutoBitLinear:
        self.register_buffer("weight_scale", torch.tensor([scale]))
        self.weight = nn.Parameter(codes.to(self.weight.dtype), requires_grad=False)
        return self


class BitNetLinear(nn.Linear):
    """onebitllms: a float weight."""


Packed.__name__ = "BitLinear"


def codes_of() -> Tensor:
    return torch.randint(-1, 2, (N, K))


def check_absmean(layer: Any, weight: Tensor) -> None:
    codes, scale = oracle.absmean(weight.detach().float().numpy())
    assert type(layer) is BitLinear and np.array_equal(layer.codes().numpy(), codes)
    assert layer.scale.item() == pytest.approx(float(np.asarray(scale).reshape(-1)[0]), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", [nn.Linear, BitNetLinear, AutoBitLinear])
def test_float_layers_by_absmean(kind: type[nn.Linear], dtype: torch.dtype) -> None:
    source = kind(K, N, dtype=dtype)
    model = replace_linear(nn.Sequential(source))
    check_absmean(model[0], source.weight)
    assert torch.equal(model[0].bias, source.bias) and model[0].bias.dtype == dtype


def test_a_packed_layer_keeps_its_bytes() -> None:
    codes, bias = codes_of(), torch.randn(N)
    source = Packed(codes, 13.7, bias, torch.bfloat16)
    model = replace_linear(nn.Sequential(source).eval())
    layer = model[0]
    assert type(layer) is BitLinear and torch.equal(layer.codes().long(), codes) and not layer.training
    assert torch.equal(layer.scale, 1 / source.weight_scale.float()) and torch.equal(layer.bias, bias)
    assert torch.equal(layer.state_dict()["weight"], source.weight)
    assert torch.equal(layer.state_dict()["weight_scale"], source.weight_scale.float())
    x = torch.randn(5, K)
    xq, sx = oracle.quantize_tokens(x.numpy())
    want = (xq[:, :K].astype(np.float64) @ codes.numpy().T) * sx[:, None] / float(source.weight_scale) + bias.numpy()
    assert np.allclose(layer(x).detach().numpy(), want, rtol=1e-5, atol=1e-5)
    assert layer.scale.requires_grad


def test_an_offline_layer_scales_its_bias_too() -> None:
    codes = codes_of()
    source = AutoBitLinear(K, N).offline(codes, 0.073)
    layer = replace_linear(source)
    assert type(layer) is BitLinear and torch.equal(layer.codes().long(), codes) and layer.scale.requires_grad
    x = torch.randn(5, K)
    xq, sx = oracle.quantize_tokens(x.numpy())
    fake = torch.from_numpy((xq[:, :K] * sx[:, None]).astype(np.float32))
    assert torch.allclose(layer(x), source(fake) * source.weight_scale, rtol=1e-4, atol=1e-4)


def test_row_scales() -> None:
    layer = replace_linear(nn.Sequential(nn.Linear(K, N)), scale="row")[0]
    assert layer.scale.shape == (N,) and bool((layer.scale == layer.scale[0]).all())


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.shared = self.blocks[0]
        self.ours = BitLinear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.embed_tokens = nn.Embedding(5, 8)
        self.lm_head = nn.Linear(8, 5, bias=False)
        self.lm_head.weight = self.embed_tokens.weight


def test_what_stays() -> None:
    model = Model()
    model.blocks[1].weight.requires_grad_(False)
    ours, out_proj = model.ours, model.attention.out_proj
    result = replace_linear(model)
    assert result is model and model.ours is ours and model.attention.out_proj is out_proj
    assert type(model.blocks[0]) is BitLinear and model.shared is model.blocks[0]
    assert model.lm_head.weight is model.embed_tokens.weight
    assert model.blocks[0].scale.requires_grad and not model.blocks[1].scale.requires_grad  # frozen stays frozen
    replace_linear(model)  # again: nothing left to swap, and no complaint


def test_skip_takes_names_and_last_parts() -> None:
    model = replace_linear(Model(), skip=("blocks.1", "lm_head"))
    assert type(model.blocks[0]) is BitLinear and type(model.blocks[1]) is nn.Linear


def test_the_traces_of_a_quantizer_go() -> None:
    model: Any = nn.Sequential(nn.Linear(8, 8))
    model.is_quantized, model.hf_quantizer, model.quantization_method = True, object(), "bitnet"
    model._weight_conversions = []
    replace_linear(model)
    assert model.is_quantized is False
    assert not any(hasattr(model, name) for name in ("hf_quantizer", "quantization_method", "_weight_conversions"))


def broken() -> dict[str, tuple[nn.Module, dict[str, Any], str]]:
    tied = Model()
    norm = Packed(codes_of(), 1.0, None, torch.float32)
    norm.rms_norm = nn.RMSNorm(K)
    crooked = Packed(codes_of(), 1.0, None, torch.float32)
    crooked.out_features = N - 1
    infinite = nn.Linear(8, 8)
    infinite.weight.data[3, 3] = float("inf")
    good = nn.Linear(8, 8)
    return {
        "tied": (tied, {"skip": ()}, "'lm_head' shares its weight .*embed_tokens.weight"),
        "norm": (nn.Sequential(good, norm), {}, "'1' has a norm inside"),
        "crooked": (nn.Sequential(good, crooked), {}, "'1' is not packed as transformers"),
        "infinite": (nn.Sequential(good, infinite), {}, "'1' has a non-finite weight"),
        "meta": (nn.Sequential(good, nn.Linear(8, 8, device="meta")), {}, "'1' has no values"),
        "none": (nn.Sequential(nn.ReLU()), {}, "no linear layer"),
        "scale": (nn.Sequential(nn.Linear(8, 8)), {"scale": "column"}, "'scale'"),
    }


@pytest.mark.parametrize("name", broken())
def test_refusals_change_nothing(name: str) -> None:
    model, options, text = broken()[name]
    before, kinds = snapshot(model), [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=text):
        replace_linear(model, **options)
    assert kinds == [type(module) for module in model.modules()]
    assert name in ("meta", "infinite") or same(before, snapshot(model))


def test_options_need_auto() -> None:
    with pytest.raises(TypeError, match="flip_lr"):
        replace_linear(nn.Sequential(nn.Linear(8, 8)), flip_lr=0.1)


def test_a_swapped_model_trains() -> None:
    model = replace_linear(nn.Sequential(Packed(codes_of(), 9.0, None, torch.float32), nn.Tanh(), nn.Linear(N, 5)))
    optimizer = FlipOptimizer(model, lr=0.2)
    before = model[0].codes()
    x, target = torch.randn(16, K), torch.randn(16, 5)
    losses = []
    for _ in range(20):
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and not torch.equal(before, model[0].codes())


@pytest.mark.parametrize("scale", ["tensor", "row"])
@pytest.mark.parametrize("auto", [False, True])
def test_residuals_begin_at_the_shadows_fraction(scale: str, auto: bool) -> None:
    model = nn.Sequential(nn.Linear(K, N, bias=False), nn.Linear(N, 8))
    weights = [model[0].weight.detach().clone(), model[1].weight.detach().clone()]
    model[1].weight.requires_grad_(False)
    replace_linear(model, scale=scale, shadow=True, auto=auto)
    layer = model[0]
    if auto:
        optimizer: torch.optim.Optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
        layer.scale.grad = torch.zeros_like(layer.scale)
        optimizer.step()
    else:
        FlipOptimizer(model)
    s = weights[0].abs().mean(dtype=torch.float64)
    wanted = ((weights[0].double() / s - layer.codes()) * 128).clamp(-64, 64)
    residual = layer._planes["residual"]
    assert residual.dtype == torch.int8 and (residual - wanted).abs().max() <= 0.5 + 1e-3
    assert (wanted.abs() < 60).float().mean() > 0.3 and layer._start is None and model[1]._start is None
    again = replace_linear(nn.Sequential(nn.Linear(K, N)), shadow=True)
    again.load_state_dict(again.state_dict())  # other codes, for all it knows
    FlipOptimizer(again)
    assert not again[0]._planes["residual"].any()
