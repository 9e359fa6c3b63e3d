"""BitLinear against the NumPy oracle to the bit, and what a module must stand."""

from __future__ import annotations

import copy
import io
import pickle
import weakref
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from ml_dtypes import bfloat16
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchkit import net

import onebit_ext.torch as ot
from onebit_ext.torch import BitLinear, FlipOptimizer, calls, ops


def to_numpy(tensor: Tensor) -> Any:
    array = ops.array(tensor)
    return array.view(bfloat16) if tensor.dtype == torch.bfloat16 else array


def layer_with(n: int, k: int, rows: bool, bias: bool) -> BitLinear:
    codes = torch.randint(-1, 2, (n, k))
    scale = torch.rand(n if rows else 1) * 0.1 + 0.01
    return BitLinear.from_codes(codes, scale, torch.randn(n) if bias else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 2), (0,), ()])
def test_forward_is_the_oracle(dtype: torch.dtype, rows: bool, shape: tuple[int, ...]) -> None:
    layer = layer_with(70, 37, rows, bias=True)
    x = torch.randn(*shape, 37).to(dtype)
    y = layer(x)
    assert y.shape == (*shape, 70) and y.dtype == dtype
    flat = to_numpy(x.reshape(-1, 37) if x.numel() else x.reshape(0, 37))
    assert layer.bias is not None
    want, _, _ = oracle.linear_forward(flat, layer.codes().numpy(), to_numpy(layer.scale), to_numpy(layer.bias))
    assert np.array_equal(to_numpy(y).reshape(want.shape), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", ["finetune", "pretrain"])
@pytest.mark.parametrize("rows", [False, True])
def test_training_is_the_oracle(dtype: torch.dtype, recipe: str, rows: bool) -> None:
    """Eight steps of two micro-batches: dx, ds, db, codes, planes, control and scale, every hyper-parameter moved."""
    n, k = 70, 37
    layer = layer_with(n, k, rows, bias=True)
    other = layer_with(6, 9, False, False)  # so that the layer's id is not 0
    model = nn.ModuleList([other, layer])
    cap = 0.01 if recipe == "finetune" else 0  # momentum needs more than what the guard leaves of this rate
    optimizer = FlipOptimizer(
        model, lr=0.4, scale_lr=0.02, betas=(0.6, 0.8), recipe=recipe, flip_rate_cap=cap, seed=2**40 + 9
    )
    planes = {name: to_numpy(t).copy() for name, t in optimizer.state[layer.weight].items() if name != "draws"}
    control = planes["control"]
    assert control[oracle.CONTROL["layer"]] == 1 and control[oracle.CONTROL["seed"]] == 2**40 + 9
    codes, scale = layer.codes().numpy(), to_numpy(layer.scale).copy()
    moments = np.zeros((2, scale.size), np.float32)
    bias = to_numpy(layer.bias).copy()
    moved = 0
    for _ in range(8):
        ds, db = np.zeros(scale.size, np.float32), np.zeros(n, np.float32)
        for _ in range(2):
            x = torch.randn(3, 4, k).to(dtype).requires_grad_()
            dy = torch.randn(3, 4, n).to(dtype)
            layer(x).backward(dy)
            _, xq, sx = oracle.linear_forward(to_numpy(x).reshape(12, k), codes, scale, bias)
            flat = to_numpy(dy).reshape(12, n)
            want, _ = oracle.linear_backward_input(flat, codes, scale, control)
            assert x.grad is not None and np.array_equal(to_numpy(x.grad).reshape(12, k), want)
            part, part_b = np.zeros_like(ds), np.zeros_like(db)
            oracle.vote(flat, xq, sx, codes, scale, planes, ds=part, db=part_b)
            ds, db = ds + part, db + part_b
        assert layer.scale.grad is not None and np.array_equal(to_numpy(layer.scale.grad), ds)
        assert layer.bias is not None and layer.bias.grad is not None
        assert np.array_equal(to_numpy(layer.bias.grad), db)
        optimizer.step()
        optimizer.zero_grad()
        bias = to_numpy(layer.bias).copy()
        oracle.scale_step(scale, ds, moments[0], moments[1], control, 0.02)
        moved += oracle.flip(codes, planes)
        assert np.array_equal(layer.codes().numpy(), codes)
        assert np.array_equal(to_numpy(layer.scale), scale)
        for name, want in planes.items():
            got = to_numpy(optimizer.state[layer.weight][name])
            assert np.array_equal(got.view(want.dtype), want), name
    assert moved > 5


class Calls(TorchDispatchMode):
    """Names of the onebit ops that run, and the number of elements they keep or return."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.kept = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "onebit":
            self.names.append(func._schema.name.split("::")[1])
            if self.names[-1] == "linear":
                self.kept += out[1].numel() + out[2].numel()
        return out


def calls_of(layer: BitLinear, x: Tensor, backward: bool = True) -> Calls:
    with Calls() as calls:
        y = layer(x)
        if backward:
            y.sum().backward()
    return calls


def test_only_what_is_needed_is_computed() -> None:
    layer = layer_with(70, 37, False, bias=True)
    x = torch.randn(5, 37)
    calls = calls_of(layer, x)
    assert calls.names == ["linear", "vote"] and calls.kept == 5 * 48 + 5  # a first layer: no dX
    assert calls_of(layer, x.requires_grad_()).names == ["linear", "linear_backward_input", "vote"]
    layer.scale.requires_grad_(False)
    calls = calls_of(layer, x)
    assert calls.names == ["linear", "linear_backward_input"] and calls.kept == 0  # frozen: dX and db
    assert layer.bias is not None and torch.equal(layer.bias.grad, torch.full((70,), 15.0))
    layer.scale.requires_grad_(True)
    with torch.no_grad():
        assert calls_of(layer, x, backward=False).kept == 0
    with torch.inference_mode():
        assert calls_of(layer, x, backward=False).kept == 0


def test_saved_for_backward_is_one_byte_per_activation() -> None:
    saved: list[Tensor] = []
    layer = layer_with(70, 37, False, False)
    x = torch.randn(50, 37, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        y = layer(x)
    live = [t for t in saved if t.data_ptr() not in (layer.weight.data_ptr(), layer.scale.data_ptr())]
    assert sorted(t.nbytes for t in live) == [50 * 4, 50 * 48]
    reference = weakref.ref(y.untyped_storage())
    loss = y.mean()
    del y
    assert reference() is None  # nobody holds the output
    loss.backward()


def test_inputs_are_checked() -> None:
    layer = layer_with(8, 16, False, False)
    with pytest.raises(TypeError, match="float32 or bfloat16, got torch.float64"):
        layer(torch.zeros(2, 16, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"\(\.\.\., 16\), got \(2, 15\)"):
        layer(torch.zeros(2, 15))
    with pytest.raises(ValueError, match="'scale'"):
        BitLinear(4, 4, scale="column")
    with pytest.raises(ValueError, match="'codes'"):
        BitLinear.from_codes(torch.full((4, 4), 2), 1.0)
    with pytest.raises(ValueError, match="'packed'"):
        BitLinear.from_packed(layer.weight, layer.scale, (9, 160))
    with pytest.raises(ValueError, match="'bias'"):
        BitLinear.from_codes(torch.zeros(4, 4), 1.0, torch.zeros(3))


def test_autocast_decides_the_dtype() -> None:
    layer = layer_with(8, 16, False, True)
    x = torch.randn(3, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    assert torch.equal(y, layer(x.bfloat16()))


def test_double_backward_raises_before_it_votes() -> None:
    model = net()
    optimizer = FlipOptimizer(model)
    x = torch.randn(3, 20, requires_grad=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(model.up(x).sum(), x, create_graph=True)
    assert optimizer.state[model.up.weight]["control"][ops.CONTROL["micro"]] == 0


def test_codes_changed_between_forward_and_backward_are_noticed() -> None:
    model = net()
    optimizer = FlipOptimizer(model)
    x = torch.randn(3, 20, requires_grad=True)
    model.up(x).sum().backward()
    y = model.up(x)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_non_contiguous_input_and_gradient() -> None:
    layer = layer_with(8, 16, False, False)
    x = torch.randn(16, 6).t().requires_grad_()
    layer(x).t().sum().backward()  # an expanded, transposed gradient
    assert x.grad is not None and torch.isfinite(x.grad).all()
    assert torch.equal(layer(x), layer(x.contiguous()))


@pytest.mark.parametrize("move", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double()])
def test_casting_leaves_codes_and_scale(move: Any) -> None:
    layer = layer_with(70, 37, True, True)
    weight, scale, before = layer.weight, layer.scale, layer.scale.detach().clone()
    codes = layer.codes()
    layer.scale.grad = torch.ones_like(layer.scale)
    move(layer)
    assert layer.weight is weight and layer.scale is scale and torch.equal(scale, before)
    assert scale.grad is not None and scale.grad.dtype == torch.float32
    assert torch.equal(layer.codes(), codes) and layer.bias is not None and layer.bias.dtype != torch.float32


def test_bfloat16_bias_trains() -> None:
    layer = layer_with(8, 16, False, True).to(torch.bfloat16)
    layer(torch.randn(3, 16).bfloat16()).sum().backward()
    assert layer.bias is not None and layer.bias.grad is not None
    assert torch.equal(layer.bias.grad, torch.full((8,), 3.0, dtype=torch.bfloat16))


def test_unfreezing_everything_leaves_the_codes() -> None:
    model = net().requires_grad_(False)
    model.requires_grad_(True)
    for parameter in model.parameters():
        parameter.requires_grad = True
    assert not model.up.weight.requires_grad and model.up.scale.requires_grad


def test_copies_share_nothing_and_carry_no_planes() -> None:
    model = net()
    FlipOptimizer(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert twin.up._planes is None and model.up._planes is not None
        assert type(twin.up.weight) is type(model.up.weight)
        assert twin.up.weight.data_ptr() not in (model.up.weight.data_ptr(), 0)
        assert torch.equal(twin.up.codes(), model.up.codes())
        assert len(FlipOptimizer(twin).param_groups[0]["params"]) == 2  # it can be trained
        twin(torch.zeros(1, 2, dtype=torch.long)).sum().backward()


def test_meta_device() -> None:
    with torch.device("meta"):
        layer = BitLinear(37, 72, bias=True)
    assert layer.weight.is_meta and layer.scale.is_meta
    assert layer.state_dict()["weight"].shape == (18, 37)
    source = BitLinear(37, 72, bias=True)
    layer.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(3, 37)
    assert torch.equal(layer(x), source(x)) and type(layer.weight) is type(source.weight)


def test_no_votes() -> None:
    model = net()
    optimizer = FlipOptimizer(model)
    state = optimizer.state[model.up.weight]
    micro = ops.CONTROL["micro"]
    x = torch.randn(3, 20, requires_grad=True)
    with ot.no_votes():  # around the forward, around the backward, in evaluation
        y = model.up(x)
    y.sum().backward()
    y = model.up(x)
    with ot.no_votes():
        y.sum().backward()
    model.eval()
    model.up(x).sum().backward()
    assert state["control"][micro] == 0 and not state["row_sum"].any()
    assert model.up.control[micro] == 2  # these drew their own random numbers
    model.train()
    model.up(x).sum().backward()
    assert state["control"][micro] == 1 and state["row_sum"].any()


def test_votes_that_nobody_uses_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "MICRO_LIMIT", 3)
    model = net()
    FlipOptimizer(model)
    x = torch.randn(3, 20)
    for _ in range(3):
        model.up(x).sum().backward()
    with pytest.raises(RuntimeError, match="no optimizer step used them"):
        model.up(x).sum().backward()
