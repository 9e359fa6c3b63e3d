"""TernaryLinear and FlipOptimizer: what they do with the operations, from NumPy alone."""

from __future__ import annotations

import gc
from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest
from numpy.typing import NDArray

import onebit_ext as ob
from onebit_ext import _core

Array = NDArray[Any]
C = ob.CONTROL
BF16 = ml_dtypes.bfloat16


def normal(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def pair(seed: int = 1, **options: Any) -> tuple[ob.TernaryLinear, ob.FlipOptimizer]:
    layer = ob.TernaryLinear(70, 83, scale="row", bias=True, seed=seed)
    return layer, ob.FlipOptimizer([layer], **options)


def same(a: Any, b: Any) -> bool:
    """Bitwise equality of nested dicts, lists, arrays and numbers."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return bool(a == b)


# ------------------------------------------------------------------ making layers
@pytest.mark.parametrize("shape", [(1, 1), (83, 70), (64, 64), (0, 5), (5, 0)])
@pytest.mark.parametrize("seed", [0, 7, 2**53 - 1])
def test_starting_codes(shape: tuple[int, int], seed: int) -> None:
    n, k = shape
    control = ob.new_control(seed=seed)
    bits = oracle.draw(control, 0, oracle.INIT, np.arange(n), np.arange(k)).astype(np.uint64)
    wanted = (bits * np.uint64(3) >> np.uint64(32)).astype(np.int8) - np.int8(1)
    layer = ob.TernaryLinear(k, n, seed=seed)
    assert np.array_equal(layer.codes(), wanted)
    assert np.array_equal(layer.packed, ob.random_codes(n, k, seed)) and np.array_equal(
        layer.packed, oracle.pack(wanted)
    )
    ob.validate(layer.packed, (n, k))


def test_starting_codes_are_uniform_and_keep_the_variance() -> None:
    layer = ob.TernaryLinear(1024, 512, seed=3)
    shares = np.bincount(layer.codes().ravel() + 1) / (1024 * 512)
    assert np.abs(shares - 1 / 3).max() < 4 * np.sqrt(2 / 9 / (1024 * 512))
    assert layer.scale[0] == np.float32(1) / np.sqrt(np.float32(1024) * np.float32(2 / 3))
    assert 0.9 < layer.forward(normal(4, 64, 1024)).std() < 1.1
    other = ob.TernaryLinear(1024, 512, seed=4)
    assert abs((layer.codes() == other.codes()).mean() - 1 / 3) < 0.01


def test_constructors_agree() -> None:
    w, bias = normal(5, 83, 70), normal(6, 83)
    packed, scale = ob.absmean(w)
    codes, wanted = oracle.absmean(w)
    layers = [
        ob.TernaryLinear.from_float(w, bias),
        ob.TernaryLinear.from_codes(codes, float(scale[0]), bias),
        ob.TernaryLinear.from_codes(codes, scale, bias),
        ob.TernaryLinear.from_packed(packed, scale, (83, 70), bias),
    ]
    x = normal(7, 3, 70)
    y = oracle.linear_forward(x, codes, wanted, bias)[0]
    for layer in layers:
        assert (layer.in_features, layer.out_features) == (70, 83)
        assert np.array_equal(layer.codes(), codes) and np.array_equal(layer.scale, wanted)
        assert np.array_equal(layer.forward(x), y)
    half = ob.TernaryLinear.from_float(w.astype(BF16))
    assert np.array_equal(half.codes(), oracle.absmean(w.astype(BF16))[0])


def test_arrays_are_views_and_callers_arrays_are_used_in_place() -> None:
    packed, scale, bias = ob.random_codes(83, 70, 1), np.full(83, 0.5, np.float32), np.zeros(83, np.float32)
    layer = ob.TernaryLinear.from_packed(packed, scale, (83, 70), bias)
    for mine, theirs in ((packed, layer.packed), (scale, layer.scale), (bias, layer.bias)):
        assert mine.__array_interface__["data"] == theirs.__array_interface__["data"]
    layer = ob.TernaryLinear(70, 83, bias=True)
    opt = ob.FlipOptimizer([layer], recipe="pretrain")
    first, second = layer.planes, layer.planes
    assert first is not None and second is not None
    for name, array in [*first.items(), *((n, getattr(layer, n)) for n in ("packed", "scale", "bias", "scale_grad"))]:
        other = second[name] if name in second else getattr(layer, name)
        assert other is not array and np.shares_memory(other, array) and array.size == other.size
        assert array.__array_interface__["data"][0] % 64 == 0 and array.flags.writeable and not array.flags.owndata
    view = layer.scale
    view[0] = 3.0
    assert layer.scale[0] == 3.0
    first["residual"][2, 3] = 5
    assert layer.residual is not None and layer.residual[2, 3] == 5
    first.clear()  # the dict is the caller's
    assert layer.planes is not None and len(layer.planes) == 9
    del layer, opt
    gc.collect()
    assert view[0] == 3.0  # a view outlives its layer


def test_a_view_cannot_be_turned_against_its_layer() -> None:
    layer = ob.TernaryLinear(70, 83, seed=2)
    x = normal(1, 4, 70)
    y = layer.forward(x)
    view = layer.packed
    with pytest.raises(ValueError, match="resize"):
        view.resize(1)
    view.shape = (-1,)
    view.dtype = np.uint64
    assert layer.packed.shape == (2, 5, 4, 16, 4) and layer.packed.dtype == np.uint8
    assert np.array_equal(layer.forward(x), y)


def test_text() -> None:
    layer = ob.TernaryLinear(70, 83, scale="row")
    layer.name = "fc1"
    text = "TernaryLinear(in_features=70, out_features=83, scale='row', bias=False, packing='tile16', name='fc1', rule="
    assert repr(layer) == text + "None)"
    opt = ob.FlipOptimizer([layer], lr=0.5)
    assert repr(layer) == text + "residual8)"
    assert repr(opt) == "FlipOptimizer(1 layers, lr=0.5, scale_lr=0.002, bias_lr=0.001, rule=residual8)"
    opt.detach()
    assert "detached" in repr(opt) and repr(layer) == text + "None)"


# ------------------------------------------------------------------ forward and backward
@pytest.mark.parametrize("dtype", [np.float32, BF16, np.uint16])
@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (2, 1, 3, 2), (0,), (2, 0)])
def test_forward_and_backward_take_any_leading_shape(dtype: Any, leading: tuple[int, ...]) -> None:
    layer, opt = pair()
    x, dy = normal(1, *leading, 70), normal(2, *leading, 83)
    if dtype != np.float32:
        x, dy = (a.astype(BF16).view(dtype) for a in (x, dy))
    y = layer.forward(x)
    dx = layer.backward(dy)
    assert y.shape == (*leading, 83) and dx.shape == (*leading, 70) and y.dtype == dx.dtype == x.dtype
    codes = layer.codes()
    wanted = oracle.linear_forward(x.reshape(-1, 70), codes, layer.scale, layer.bias)[0]
    assert same(y.reshape(-1, 83), wanted)
    control = ob.new_control()
    assert same(dx.reshape(-1, 70), oracle.linear_backward_input(dy.reshape(-1, 83), codes, layer.scale, control)[0])
    assert opt.layers == (layer,)


@pytest.mark.parametrize("recipe", ["finetune", "pretrain"])
def test_training_is_the_oracles(recipe: str) -> None:
    """Forward, backward and step against NumPy, every hyper-parameter off its default."""
    layer = ob.TernaryLinear(70, 83, scale="row", bias=True, seed=9)
    layer.scale[:] = np.linspace(0.05, 0.2, 83, dtype=np.float32)
    options = {"lr": 0.4, "scale_lr": 3e-3, "betas": (0.6, 0.85), "flip_rate_cap": 0.004, "seed": 5, "bias_lr": 2e-2}
    opt = ob.FlipOptimizer([ob.TernaryLinear(3, 2), layer], recipe=recipe, **options)
    planes = ob.new_planes(83, 70, opt.rule, seed=5, layer=1, eta=0.4, cap=0.004, betas=(0.6, 0.85))
    codes, scale, bias = layer.codes(), layer.scale.copy(), np.zeros(83, np.float32)
    planes["control"][C["scale_init"]] = sum(map(float, scale)) / 83
    moments = np.zeros((4, 83), np.float32)
    powers = [1.0, 1.0]
    for step in range(12):
        opt.lr = planes["control"][C["eta"]] = 0.4 / (1 + step)
        ds, db = np.zeros(83, np.float32), np.zeros(83, np.float32)
        opt.zero_grad()
        for micro in range(1 + step % 2):
            x, dy = normal(100 * step + micro, 5, 70), normal(100 * step + 50 + micro, 5, 83)
            y, xq, sx = oracle.linear_forward(x, codes, scale, bias)
            assert same(layer.forward(x), y)
            assert same(layer.backward(dy), oracle.linear_backward_input(dy, codes, scale, planes["control"])[0])
            oracle.vote(dy, xq, sx, codes, scale, planes, ds=ds, db=db)
        assert same([layer.scale_grad, layer.bias_grad], [ds, db])
        opt.step()
        moved = oracle.flip(codes, planes)
        oracle.scale_step(scale, ds, moments[0], moments[1], planes["control"], 3e-3)
        bias_adam(bias, db, moments[2:], powers, 2e-2, (0.6, 0.85))
        assert opt.flip_rate == moved / (83 * 70 + 6)
        assert same([layer.codes(), layer.scale, layer.bias], [codes, scale, bias]) and same(layer.planes, planes)
    assert (layer.codes() != ob.TernaryLinear(70, 83, seed=9).codes()).mean() > 0.003


def bias_adam(
    bias: Array, grad: Array, moments: Array, powers: list[float], lr: float, betas: tuple[float, float]
) -> None:
    f = np.float32
    powers[:] = [p * b for p, b in zip(powers, betas, strict=True)]
    moments[0] = f(betas[0]) * moments[0] + f(1 - betas[0]) * grad
    moments[1] = f(betas[1]) * moments[1] + (f(1 - betas[1]) * grad) * grad
    bias -= (f(lr) * (moments[0] / f(1 - powers[0]))) / (np.sqrt(moments[1] / f(1 - powers[1])) + f(1e-8))


def test_gradients_accumulate_until_zero_grad() -> None:
    layer, opt = pair()
    x, dy = normal(1, 5, 70), normal(2, 5, 83)
    for _ in range(2):
        layer.forward(x)
        layer.backward(dy)
        opt.step()  # does not clear them
    once = oracle.in_order(dy)
    assert layer.bias_grad is not None
    assert np.allclose(layer.bias_grad, 2 * once, rtol=1e-5)
    opt.zero_grad()
    assert not layer.scale_grad.any() and not layer.bias_grad.any()


def test_without_an_optimizer_there_are_gradients_and_fresh_random_numbers() -> None:
    layer = ob.TernaryLinear(70, 83, bias=True, seed=4)
    packed = layer.packed.copy()
    x, dy = normal(1, 5, 70), normal(2, 5, 83)
    found = []
    for _ in range(3):
        layer.forward(x)
        found.append(layer.backward(dy))
    assert layer.planes is None and layer.residual is None and np.array_equal(layer.packed, packed)
    assert layer.scale_grad[0] != 0
    assert not np.array_equal(found[0], found[1]) and not np.array_equal(found[1], found[2])
    dense = dy @ (layer.scale * layer.codes())
    assert np.abs(np.mean(found, 0) - dense).max() < 0.1 * np.abs(dense).max()


def test_paused_layers_cast_no_votes() -> None:
    layer, opt = pair()
    x, dy = normal(1, 5, 70), normal(2, 5, 83)
    before = {name: array.copy() for name, array in (layer.planes or {}).items()}
    with ob.no_votes([layer]):
        assert layer.paused
        layer.forward(x)
        layer.backward(dy)
    assert not layer.paused and same(layer.planes, before) and layer.scale_grad.any()
    opt.step()
    assert same(layer.planes, before)  # a step without votes changes nothing
    layer.forward(x)
    layer.backward(dy)
    assert layer.planes is not None and layer.planes["control"][C["micro"]] == 1


def test_what_a_forward_keeps() -> None:
    layer, opt = pair()
    x, other, dy = normal(1, 5, 70), normal(2, 4, 70), normal(3, 5, 83)
    layer.forward(other)
    layer.forward(x)  # replaces it
    layer.forward(other, keep=False)  # leaves it alone
    dx = layer.backward(dy)
    assert dx.shape == x.shape
    twin, twin_opt = pair()
    twin.forward(x)
    assert same(twin.backward(dy), dx) and same(twin.planes, layer.planes)
    layer.forward(x)
    assert layer.backward(dy, input_grad=False) is None
    assert opt.layers == (layer,) and twin_opt.layers == (twin,)


# ------------------------------------------------------------------ the optimizer
def test_recipes_and_rates() -> None:
    layer = ob.TernaryLinear(70, 83)
    for options, rule in (
        ({}, "residual8"),
        ({"recipe": "pretrain"}, "residual8_momentum4"),
        ({"recipe": "pretrain", "momentum_bits": 0}, "residual8"),
        ({"recipe": "finetune", "momentum_bits": 4, "residual_bits": 8}, "residual8_momentum4"),
    ):
        opt = ob.FlipOptimizer([layer], **options)
        assert opt.rule == rule and layer.planes is not None
        assert layer.planes["control"][C["cap"]] == 0.025
        opt.lr, opt.scale_lr, opt.bias_lr = 0.25, 0.5, 0.75
        assert layer.planes["control"][C["eta"]] == 0.25 and (opt.lr, opt.scale_lr, opt.bias_lr) == (0.25, 0.5, 0.75)
        opt.detach()
        assert layer.planes is None


def test_layers_get_ids_in_order_and_differ() -> None:
    layers = [ob.TernaryLinear(70, 83, seed=1) for _ in range(3)]
    opt = ob.FlipOptimizer(layers, seed=11)
    x, dy = normal(1, 5, 70), normal(2, 5, 83)
    found = []
    for i, layer in enumerate(layers):
        assert layer.planes is not None
        assert list(layer.planes["control"][[C["seed"], C["layer"]]]) == [11, i]
        layer.forward(x)
        found.append(layer.backward(dy).tobytes())
    assert len(set(found)) == 3 and len(opt.layers) == 3


def test_detaching() -> None:
    layer, opt = pair()
    opt.detach()
    opt.detach()
    assert opt.layers == ()
    for call in (opt.step, opt.zero_grad, opt.state_dict, opt.stats, lambda: setattr(opt, "lr", 1.0)):
        with pytest.raises(RuntimeError, match="detached"):
            call()
    again = ob.FlipOptimizer([layer])
    del again  # an optimizer that dies lets go of its layers
    gc.collect()
    assert layer.planes is None
    ob.FlipOptimizer([layer])


def test_stats() -> None:
    layer, opt = pair(lr=1.0, flip_rate_cap=0)
    layer.name = "fc"
    for i in range(6):
        layer.forward(normal(i, 5, 70))
        layer.backward(normal(i + 50, 5, 83))
        opt.step()
    (stats,) = opt.stats()
    assert layer.planes is not None and stats["name"] == "fc" and stats["guard"] == 1.0
    assert stats["flip_rate"] == opt.flip_rate == layer.planes["control"][C["moved"]] / (83 * 70) > 0
    assert stats["zero_fraction"] == (layer.codes() == 0).mean()
    assert stats["saturated"] == (np.abs(layer.planes["residual"].astype(int)) >= 64).mean() > 0


def run(layer: ob.TernaryLinear, opt: ob.FlipOptimizer, steps: range) -> None:
    for step in steps:
        opt.lr = 0.3 - 0.01 * step
        layer.forward(normal(step, 5, 70).astype(BF16))
        layer.backward(normal(step + 500, 5, 83).astype(BF16))
        opt.step()
        opt.zero_grad()


@pytest.mark.parametrize("recipe", ["finetune", "pretrain"])
def test_resuming_is_never_having_stopped(recipe: str) -> None:
    layer, opt = pair(recipe=recipe, seed=3)
    opt.scale_lr, opt.bias_lr = 3e-3, 2e-2
    run(layer, opt, range(10))
    state = opt.state_dict()
    packed = ob.empty(layer.packed.shape, np.uint8)
    packed[...] = layer.packed
    assert layer.bias is not None
    copy = ob.TernaryLinear.from_packed(packed, layer.scale.copy(), (83, 70), layer.bias.copy())
    other = ob.FlipOptimizer([copy], recipe=recipe, lr=1.0, betas=(0.1, 0.2), seed=99, flip_rate_cap=0.5)
    other.load_state_dict(state)
    assert same(other.state_dict(), state) and other.lr == opt.lr
    run(layer, opt, range(10, 20))
    run(copy, other, range(10, 20))
    assert same(other.state_dict(), opt.state_dict()) and same(copy.packed, layer.packed)
    assert same([copy.scale, copy.bias], [layer.scale, layer.bias]) and not same(state, opt.state_dict())


def test_a_small_network_learns() -> None:
    layers = [
        ob.TernaryLinear(16, 128, bias=True, seed=1),
        ob.TernaryLinear(128, 128, bias=True, scale="row", seed=2),
        ob.TernaryLinear(128, 4, bias=True, seed=3),
    ]
    opt = ob.FlipOptimizer(layers, lr=0.05, scale_lr=1e-3, recipe="pretrain")
    before = [layer.codes() for layer in layers]
    teacher = normal(0, 16, 4)
    losses = []
    for step in range(300):
        opt.lr = 0.05 * (1 - step / 320)
        x = normal(step + 1, 64, 16)
        h, masks = x, []
        for layer in layers[:-1]:
            h = layer.forward(h)
            masks.append(h > 0)
            h = h * masks[-1]
        error = layers[-1].forward(h) - np.tanh(x @ teacher)
        losses.append(float((error**2).mean()))
        grad = error / 64
        for i in (2, 1, 0):
            grad = layers[i].backward(grad, i > 0)
            if i > 0:
                grad = grad * masks[i - 1]
        opt.step()
        opt.zero_grad()
    assert np.mean(losses[-20:]) < 0.25 * np.mean(losses[:5])
    assert min((layer.codes() != old).mean() for layer, old in zip(layers, before, strict=True)) > 0.02


def test_kernels_list_what_runs() -> None:
    rows = ob.kernels()
    assert {row["isa"] for row in rows if row["active"]} == {ob.isa(), "any"}
    assert all(row["exact"] for row in rows)
    for entry in ob.isas():
        mine = [row for row in rows if row["isa"] == entry["name"]]
        assert {row["rule"] for row in mine if row["op"] == "vote"} == set(ob.RULES)
        assert next(row for row in mine if row["op"] == "forward")["tile_rows"] == entry["tiles"][0]
    assert {row["format"] for row in rows if row["op"] == "pack"} == set(_core.FORMATS)
