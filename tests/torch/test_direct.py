"""Calls beside the dispatcher give the operator's bits, and step aside for whoever wants to see the operator."""

import copy
import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from onebit_ext import _core
from onebit_ext.torch import BitLinear, FlipOptimizer, calls, no_votes, ops


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
            assert calls.plain(x)
            y = layer(x)
        assert y.dtype == dtype and not y.requires_grad
        assert torch.equal(y.view(torch.int16), wanted.view(torch.int16))


def trained(rule: str, direct_calls: bool, monkeypatch: pytest.MonkeyPatch, **options: bool) -> dict[str, torch.Tensor]:
    """Every bit of two layers in a row after 3 steps of 2 micro-batches, the last in bfloat16, by the C calls or by the
    operators."""
    monkeypatch.setattr(calls, "plain", calls.plain if direct_calls else lambda x: False)
    monkeypatch.setattr(ops, "plain", calls.plain)
    net = torch.nn.Sequential(make(70, 37, torch.bfloat16, "row"), make(20, 70, torch.float32, "tensor"))
    optimizer = FlipOptimizer(net, lr=0.1, rule=rule, seed=3, **options)
    found = {}
    for step in range(3):
        for micro in range(2):
            torch.manual_seed(10 * step + micro)
            x = torch.randn(2, 3, 37).to(torch.bfloat16 if micro else torch.float32).requires_grad_()
            y = net(x)
            y.backward(torch.randn_like(y))
            found |= {f"y {step} {micro}": y.detach(), f"dx {step} {micro}": x.grad}
            with no_votes():
                net(x).sum().backward()
        found |= {f"{name} {step}": p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
    for layer in net:
        found |= {f"{layer} {name}": tensor for name, tensor in optimizer.state[layer.weight].items()}
        found[f"{layer} codes"] = layer.codes()
    return found


@pytest.mark.parametrize("vote_plane", [False, True])
@pytest.mark.parametrize("rule", _core.RULES)
def test_training_gives_the_operators_bits(rule: str, vote_plane: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        wanted = trained(rule, False, patch, vote_plane=vote_plane)
    monkeypatch.setattr(ops, "linear", None)
    monkeypatch.setattr(ops, "vote", None)
    monkeypatch.setattr(ops, "linear_backward_input", None)
    got = trained(rule, True, monkeypatch, vote_plane=vote_plane)
    assert wanted.keys() == got.keys()
    for name, tensor in wanted.items():
        assert torch.equal(tensor.view(torch.uint8), got[name].view(torch.uint8)), name


def test_a_frozen_layer_gives_the_operators_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    results, original = [], make(70, 37, torch.float32, "tensor")
    original.scale.requires_grad_(False)
    for plain in (calls.plain, lambda x: False):
        monkeypatch.setattr(calls, "plain", plain)
        monkeypatch.setattr(ops, "plain", plain)
        layer = copy.deepcopy(original)
        torch.manual_seed(1)
        x = torch.randn(5, 37, requires_grad=True)
        for _ in range(2):
            layer(x).square().sum().backward()
        results.append((x.grad, layer.bias.grad, layer.control))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_moved_codes_are_an_error_beside_the_dispatcher_too() -> None:
    layer = make(64, 64, None, "tensor")
    optimizer = FlipOptimizer(layer, lr=0.1, rule="residual4")
    layer(torch.randn(3, 64)).sum().backward()
    optimizer.step()
    y = layer(torch.randn(3, 64))
    layer(torch.randn(3, 64)).sum().backward()
    with pytest.raises(RuntimeError, match="moves codes in the backward"):
        y.sum().backward()


def test_plain_calls_do_not_reach_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = make(64, 64, None, "tensor"), torch.randn(3, 64)
    for name in ("linear", "vote", "linear_backward_input"):
        monkeypatch.setattr(ops, name, None)
    with torch.no_grad():
        layer(x)
    layer(x).sum().backward()


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
    x.requires_grad_()
    with Log() as log:
        layer(x).sum().backward()
    assert {"onebit.linear.default", "onebit.vote.default", "onebit.linear_backward_input.default"} <= {*log.names}


def test_only_plain_tensors_outside_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 64)
    with torch.no_grad():
        assert calls.plain(x)
        assert not calls.plain(torch.nn.Parameter(x))
        assert not calls.plain(x.to("meta"))
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert not calls.plain(x)


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
