"""state_dict: transformers' form or ours, exact both ways; hostile entries are refused and change nothing."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torchkit import net, same, snapshot

from onebit_ext.torch import BitLinear, FlipOptimizer
from onebit_ext.torch.nn import layer_of


def rows4(codes: Tensor) -> Tensor:
    """transformers' packing, from its definition: bits 2i of byte row r hold row i * N/4 + r, plus one."""
    quarter = codes.shape[0] // 4
    packed = np.zeros((quarter, codes.shape[1]), np.uint8)
    for row, values in enumerate(codes.numpy()):
        packed[row % quarter] |= ((values + 1) << 2 * (row // quarter)).astype(np.uint8)
    return torch.from_numpy(packed)


def test_a_tensor_scale_is_saved_as_transformers_expects() -> None:
    layer = BitLinear(37, 72, bias=True)
    state = layer.state_dict()
    assert list(state) == ["bias", "weight", "weight_scale"]
    assert torch.equal(state["weight"], rows4(layer.codes()))
    assert state["weight_scale"].dtype == torch.float32 and torch.equal(1 / state["weight_scale"], layer.scale)


@pytest.mark.parametrize(("n", "scale"), [(72, "row"), (70, "tensor"), (70, "row")])
def test_other_layers_have_their_own_keys(n: int, scale: str) -> None:
    layer = BitLinear(37, n, scale=scale)
    assert set(layer.state_dict()) == {"weight_tile16", "scale"}


@pytest.mark.parametrize(("n", "scale"), [(72, "tensor"), (72, "row"), (70, "tensor")])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("through", ["memory", "torch", "safetensors"])
def test_round_trip(n: int, scale: str, assign: bool, through: str) -> None:
    source = nn.Sequential(BitLinear(37, n, bias=True, scale=scale))
    state: dict[str, Any] = dict(source.state_dict())
    if through == "torch":
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        state = torch.load(buffer, weights_only=True)
    elif through == "safetensors":
        state = load(save({name: value.contiguous() for name, value in state.items()}))
    target = nn.Sequential(BitLinear(37, n, bias=True, scale=scale))
    target[0].scale.requires_grad_(False)
    target.load_state_dict(state, assign=assign)
    assert same(snapshot(source), snapshot(target))
    assert target[0].weight.data_ptr() % 64 == 0 and not target[0].scale.requires_grad
    assert layer_of(target[0].weight) is layer_of(target[0].scale) is target[0]
    assert all(torch.equal(value, target.state_dict()[name]) for name, value in state.items())


def test_either_form_loads() -> None:
    source = BitLinear(37, 72)
    other = BitLinear(37, 72)
    other.load_state_dict({"weight_tile16": source.weight.detach(), "scale": source.scale.detach()})
    assert same(snapshot(source), snapshot(other))


def test_a_loaded_inverse_is_kept_verbatim() -> None:
    layer = BitLinear(16, 16)
    state = layer.state_dict()
    lost = 0
    for value in torch.rand(200) * 30 + 0.5:
        state["weight_scale"] = value.reshape(1)
        layer.load_state_dict(state)
        lost += int(1 / (1 / value) != value)
        assert torch.equal(layer.state_dict()["weight_scale"], value.reshape(1))
    assert lost > 10  # of which a plain inverse would have changed the bits
    with torch.no_grad():
        layer.scale.mul_(2)
    assert torch.equal(layer.state_dict()["weight_scale"], 1 / layer.scale.detach())


def test_a_bfloat16_scale_loads() -> None:
    layer = BitLinear(16, 16)
    layer.load_state_dict(layer.state_dict() | {"weight_scale": torch.tensor([25.0], dtype=torch.bfloat16)})
    assert layer.scale.item() == pytest.approx(0.04) and layer.scale.dtype == torch.float32


@pytest.mark.parametrize(
    ("entry", "value", "text"),
    [
        ("weight", torch.zeros(72, 37), "uint8"),
        ("weight", torch.zeros(17, 37, dtype=torch.uint8), r"\(18, 37\)"),
        ("weight", torch.full((18, 37), 255, dtype=torch.uint8), "reserved code"),
        ("weight_scale", torch.tensor([float("nan")]), "finite"),
        ("weight_scale", torch.tensor([-1.0]), "positive"),
        ("weight_scale", torch.tensor([0.0]), "finite"),
        ("weight_scale", torch.ones(5), "size mismatch"),
        ("surprise", torch.ones(1), "Unexpected"),
    ],
)
def test_hostile_entries(entry: str, value: Tensor, text: str) -> None:
    model = nn.Sequential(BitLinear(37, 72))
    before = snapshot(model)
    state = {f"0.{name}": tensor for name, tensor in (model[0].state_dict() | {entry: value}).items()}
    with pytest.raises(RuntimeError, match=text):
        model.load_state_dict(state)
    if text not in ("Unexpected", "size mismatch"):  # there torch copies what fits before it raises
        assert same(before, snapshot(model))


def test_missing_entries_are_named() -> None:
    model = nn.Sequential(BitLinear(37, 72))
    with pytest.raises(RuntimeError, match='Missing key.*"0.weight", "0.scale"'):
        model.load_state_dict({})
    assert model.load_state_dict({}, strict=False).missing_keys == ["0.weight", "0.scale"]


def test_loading_under_an_optimizer_keeps_its_planes() -> None:
    model = net()
    optimizer = FlipOptimizer(model)
    weight = model.up.weight
    model.load_state_dict(net(9).state_dict())
    assert model.up.weight is weight and model.up._planes is optimizer.state[weight]
    optimizer.step()


def test_the_model_state_has_no_training_planes() -> None:
    model = net()
    names = set(model.state_dict())
    FlipOptimizer(model)
    assert set(model.state_dict()) == names
    assert {name for name in names if "down" in name} == {"down.weight", "down.weight_scale"}
