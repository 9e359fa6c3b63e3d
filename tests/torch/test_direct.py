"""Inference beside the dispatcher gives the operator's bits, and steps aside for whoever wants to see the operator."""

import copy
import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from onebit_ext.torch import BitLinear, direct, ops


def make(n: int, k: int, bias: torch.dtype | None, scale: str) -> BitLinear:
    torch.manual_seed(n + k)
    layer = BitLinear(k, n, bias=bias is not None, scale=scale, dtype=bias)
    if layer.bias is not None:
        layer.bias.data.normal_()
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 37), (37,), (2, 3, 37), (0, 37), (2, 0, 37)])
@pytest.mark.parametrize("bias, scale", [(None, "tensor"), (torch.bfloat16, "row"), (torch.float32, "tensor")])
def test_the_operators_bits(dtype: torch.dtype, shape: tuple[int, ...], bias: torch.dtype | None, scale: str) -> None:
    layer = make(70, 37, bias, scale)
    x = torch.randn(*shape[:-1], 74, dtype=dtype)[..., ::2]  # not contiguous
    wanted, _, _ = ops.linear(x, layer.weight, layer.scale, layer.bias, 70, False, layer.control, [], None)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert direct.possible(x)
            y = layer(x)
        assert y.dtype == dtype and not y.requires_grad
        assert torch.equal(y.view(torch.int16), wanted.view(torch.int16))


def test_a_call_without_gradient_does_not_reach_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = make(64, 64, None, "tensor"), torch.randn(3, 64)
    monkeypatch.setattr(ops, "linear", None)
    with torch.no_grad():
        layer(x)
    with pytest.raises(TypeError):
        layer(x)


class Log(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_it_steps_aside() -> None:
    layer, x = make(64, 64, None, "tensor"), torch.randn(3, 64)
    with torch.no_grad():
        wanted = layer(x)
        with Log() as log:
            assert torch.equal(layer(x), wanted)
        assert "onebit.linear.default" in log.names
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = mode.from_tensor(x)
            assert layer(fake).shape == (3, 64)
        traced = torch.jit.trace(layer, (x,), check_trace=False)
        assert "onebit::linear" in str(traced.inlined_graph)
        with pytest.raises(
            RuntimeError, match="Batching rule not implemented for onebit::linear"
        ):  # no rule for it: an error, not a wrong answer
            torch.vmap(layer)(x)
    assert not direct.possible(x)  # gradients are on


def test_only_plain_tensors_outside_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 64)
    with torch.no_grad():
        assert direct.possible(x)
        assert not direct.possible(torch.nn.Parameter(x))
        assert not direct.possible(x.to("meta"))
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert not direct.possible(x)


def test_new_memory_is_noticed() -> None:
    layer, other, x = make(64, 64, None, "row"), make(64, 48, None, "row"), torch.randn(3, 64)
    with torch.no_grad():
        layer(x)
        assert layer._views is not None
        for change in (
            lambda: layer.weight.data.copy_(make(64, 64, None, "row").weight.data.flip(1)),
            lambda: setattr(layer.weight, "data", layer.weight.data.flip(1)),
            lambda: layer.scale.data.mul_(2.0),
            lambda: setattr(layer.scale, "data", layer.scale.data * 3.0),
            lambda: layer.load_state_dict(make(64, 64, None, "row").state_dict()),
        ):
            change()
            wanted, _, _ = ops.linear(x, layer.weight, layer.scale, None, 64, False, layer.control, [], None)
            assert torch.equal(layer(x), wanted)
        twin = copy.deepcopy(layer)
        assert twin._views is None and pickle.loads(pickle.dumps(layer))._views is None
        twin.weight.data.copy_(layer.weight.data.flip(1))
        assert torch.equal(layer(x), wanted)
    assert other._views is None
