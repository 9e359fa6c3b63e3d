"""Bad input: the named error, and every array as it was (bar 8 of the foundation)."""

from __future__ import annotations

import hashlib
import time
from typing import Any

import numpy as np
import pytest
from hostile import Case, K, M, N, Target, cases
from hostile_targets import CODES, DY, TARGETS, X, attached, kept, layer, planes, weights, with_forward

import onebit_ext as ob
from onebit_ext import _core


def arrays_in(value: Any) -> list[np.ndarray]:
    """Every array that an argument holds or gives access to."""
    if isinstance(value, np.ndarray):
        return [value]
    if isinstance(value, dict):
        return [array for item in value.values() for array in arrays_in(item)]
    if isinstance(value, (list, tuple)):
        return [array for item in value for array in arrays_in(item)]
    if isinstance(value, ob.TernaryLinear):
        held = (value.packed, value.scale, value.bias, value.scale_grad, value.bias_grad, value.planes)
        return arrays_in([item for item in held if item is not None])
    return []


def digest(value: Any) -> str:
    state = hashlib.blake2b()
    for array in arrays_in(value):
        if array.dtype != object:
            state.update(array.tobytes())
    return state.hexdigest()


def refused(target: Target, case: Case) -> str | None:
    """None if the case is refused as it should be, else what went wrong."""
    arguments = target.make()
    case.change(arguments)
    before = digest(arguments)
    where = f"{target.name}({case.argument}: {case.label})"
    try:
        target.call(**arguments)
    except Exception as error:
        text = str(error)
        if not isinstance(error, case.errors):
            return f"{where} raised {error!r:.150}"
        if not text.startswith(f"{target.name}(): "):
            return f"{where}: message {text!r:.150}"
        if case.named and f"'{case.argument}'" not in text:
            return f"{where}: message does not name it: {text!r:.150}"
        return None if digest(arguments) == before else f"{where} changed an array"
    return f"{where} was accepted"


def names(targets: list[Target]) -> list[str]:
    return [f"{i}-{target.name}" for i, target in enumerate(targets)]


@pytest.mark.parametrize("target", TARGETS, ids=names(TARGETS))
def test_legal_arguments_are_accepted(target: Target) -> None:
    target.call(**target.make())


@pytest.mark.parametrize("target", TARGETS, ids=names(TARGETS))
def test_every_wrong_argument_is_refused(target: Target) -> None:
    wrong = [problem for case in cases(target) if (problem := refused(target, case)) is not None]
    assert not wrong, f"{len(wrong)} of them:\n" + "\n".join(wrong[:20])


def test_enough_cases_in_little_time() -> None:
    start = time.monotonic()
    assert sum(1 for target in TARGETS for _ in cases(target)) >= 5000
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("target", TARGETS, ids=names(TARGETS))
def test_calls_of_the_wrong_form(target: Target) -> None:
    for args, kw in (((), {"unknown": 1}), ((1,) * 20, {}), ((), {**target.make(), "unknown": 1})):
        with pytest.raises(TypeError):
            target.call(*args, **kw)


def test_the_message_names_function_argument_wanted_and_got() -> None:
    w = weights()
    with pytest.raises(TypeError) as caught:
        layer().forward(np.zeros((3, K - 1)))
    text = f"TernaryLinear.forward(): 'x' must be float32 or bfloat16 of shape (..., {K}), got float64 (3, {K - 1})"
    assert str(caught.value) == text
    with pytest.raises(ValueError, match=r"'scale' must be float32 of shape \(1,\) or \(64,\), got float32 \(63,\)"):
        ob.linear_forward(X, w["packed"], w["scale"][1:], N)
    with pytest.raises(ValueError, match="'packed' must be aligned to 64 bytes"):
        unaligned = np.frombuffer(ob.empty(w["packed"].nbytes + 16, np.uint8)[16:].data, np.uint8)
        ob.linear_forward(X, unaligned.reshape(w["packed"].shape), w["scale"], N)
    with pytest.raises(BufferError, match="'out' is written and must not share memory with 'x'"):
        square = ob.pack(np.ones((K, K), np.int8))
        ob.linear_forward(X, square, np.ones(1, np.float32), K, out=X)


def test_contents() -> None:
    bad = CODES.copy()
    bad[3, 5] = 2
    for call in (lambda: ob.pack(bad), lambda: ob.TernaryLinear.from_codes(bad, 1.0)):
        with pytest.raises(ValueError, match="'codes'"):
            call()
    for form in ("tile16", "seq2", "rows4"):
        reserved = ob.pack(CODES, form)
        reserved.reshape(-1)[7] = 0xFF
        for call in (ob.unpack, ob.validate):
            with pytest.raises(ValueError, match="'packed'"):
                call(reserved, (N, K), form)
        with pytest.raises(ValueError, match="'packed'"):
            ob.convert(reserved, (N, K), form, "tile16")
    reserved = ob.pack(CODES)
    reserved.reshape(-1)[0] |= 3
    with pytest.raises(ValueError, match="'packed'"):
        ob.TernaryLinear.from_packed(reserved, 1.0, (N, K))
    for value in (np.nan, np.inf, -np.inf):
        w = np.ones((N, K), np.float32)
        w[-1, -1] = value
        for call in (lambda: ob.absmean(w), lambda: ob.TernaryLinear.from_float(w)):  # noqa: B023
            with pytest.raises(ValueError, match="'w'"):
                call()
        for scale in (value, np.array([value], np.float32), 0.0, -1.0, np.zeros(1, np.float32), None, "1"):
            with pytest.raises((TypeError, ValueError), match="'scale'"):
                ob.TernaryLinear.from_codes(CODES, scale)
        with pytest.raises(ValueError, match="'bias'"):
            ob.TernaryLinear.from_codes(CODES, 1.0, np.full(N, value, np.float32))


def test_pairs_of_arguments() -> None:
    w, arguments = weights(), kept()
    for only in ({"xq": np.zeros((M, K), np.int8)}, {"sx": np.zeros(M, np.float32)}):
        with pytest.raises(ValueError, match="'xq' and 'sx' must be given together"):
            ob.linear_forward(X, w["packed"], w["scale"], N, **only)
    for both in ({}, {"planes": planes(), "control": ob.new_control()}):
        with pytest.raises(ValueError, match="one of 'planes' and 'control'"):
            ob.vote(**arguments, **both)


def test_shapes_that_no_format_holds() -> None:
    with pytest.raises(ValueError, match=r"'rows4' cannot hold the shape \(5, 8\)"):
        ob.pack(np.zeros((5, 8), np.int8), "rows4")


def test_giants_without_memory_behind_them() -> None:
    endless = np.empty((1 << 40, 0), np.float32)
    packed = ob.pack(np.zeros((1 << 20, 0), np.int8))
    with pytest.raises(MemoryError):
        ob.linear_forward(endless, packed, np.ones(1, np.float32), 1 << 20)
    for shape in ((1 << 62, 8), 1 << 55, (1 << 40, 1 << 40)):
        with pytest.raises(MemoryError):
            ob.empty(shape, np.float64)
    flat = np.broadcast_to(np.float32(1), (1 << 30, K))
    with pytest.raises(ValueError, match="'x' must be C-contiguous"):
        ob.linear_forward(flat, packed, np.ones(1, np.float32), 1 << 20)
    wide = np.empty((0, _core.MAX_K + 1), np.float32)
    with pytest.raises(ValueError, match="'x' must have at most"):
        ob.linear_forward(wide, packed, np.ones(1, np.float32), 64)


@pytest.mark.parametrize("dtype", ["O", "S3", "U3", "V8", "M8[s]", ">f8", [("a", "f4")], "nonsense", 3, None.__class__])
def test_empty_takes_number_types_only(dtype: Any) -> None:
    with pytest.raises(TypeError, match=r"empty\(\): 'dtype'"):
        ob.empty(3, dtype)


def test_subclasses_and_maps_are_used_in_place(tmp_path: Any) -> None:
    class Sub(np.ndarray):
        pass

    w = weights()
    wanted = ob.linear_forward(X, w["packed"], w["scale"], N)
    mapped = np.memmap(tmp_path / "x", np.float32, "w+", shape=X.shape)
    mapped[...] = X
    for x in (X.view(Sub), mapped):
        assert np.array_equal(ob.linear_forward(x, w["packed"], w["scale"], N), wanted)
    out = np.memmap(tmp_path / "y", np.float32, "w+", shape=(M, N))
    assert ob.linear_forward(X, w["packed"], w["scale"], N, out=out) is out
    assert np.array_equal(out, wanted)


def test_layers_of_an_optimizer() -> None:
    one, two = layer(1), layer(2)
    for wrong in (None, one, "ab", {one}, iter([one])):
        with pytest.raises(TypeError, match=r"FlipOptimizer\(\): 'layers'"):
            ob.FlipOptimizer(wrong)
    for item in (None, 1, np.zeros(3), ob.TernaryLinear):
        with pytest.raises(TypeError, match="'layers' must hold TernaryLinear"):
            ob.FlipOptimizer([one, item])
    with pytest.raises(ValueError, match="each layer once"):
        ob.FlipOptimizer([one, two, one])
    keeper = ob.FlipOptimizer([two])
    with pytest.raises(ValueError, match="attached to an optimizer"):
        ob.FlipOptimizer([one, two])
    assert one.planes is None and two.planes is not None and keeper.layers == (two,)
    for bits in ((3, None), (None, 2), (16, 4), (0, 8)):
        with pytest.raises(ValueError, match=r"must be one of \(8, 0\), .*\(0, 0\), got"):
            ob.FlipOptimizer([one], residual_bits=bits[0], momentum_bits=bits[1])
    frozen = ob.pack(CODES)
    frozen.flags.writeable = False
    with pytest.raises(BufferError, match="'layers' must be writeable"):
        ob.FlipOptimizer([ob.TernaryLinear.from_packed(frozen, 1.0, (N, K))])


def test_attributes() -> None:
    made, optimizer = attached()
    for value in (3, b"x", ["x"]):
        with pytest.raises(TypeError, match="name must be a str or None"):
            made.name = value
    for value in (None, 1, "yes"):
        with pytest.raises(TypeError, match="'paused' must be a bool"):
            made.paused = value
    for target, name in ((made, "packed"), (made, "in_features"), (optimizer, "flip_rate"), (optimizer, "layers")):
        with pytest.raises(AttributeError):
            setattr(target, name, getattr(target, name))
    for name in ("lr", "scale_lr"):
        with pytest.raises(TypeError):
            delattr(optimizer, name)


def spoiled_states(state: dict[str, Any]) -> list[tuple[type[Exception], dict[str, Any]]]:
    """Wrong states, each sharing the arrays of the right one."""

    def entry(**changes: Any) -> dict[str, Any]:
        return state | {"layers": [state["layers"][0] | changes]}

    first = state["layers"][0]
    wrong: list[tuple[type[Exception], Any]] = [(TypeError, value) for value in (None, [], "state", 3)]
    wrong += [(ValueError, {key: value for key, value in state.items() if key != gone}) for gone in state]
    wrong += [(ValueError, state | {"version": 2}), (TypeError, state | {"version": "1"})]
    wrong += [(ValueError, state | {"rule": "residual8"}), (ValueError, state | {"rule": "none"})]
    wrong += [(ValueError, state | {rate: value}) for rate in ("lr", "bias_lr") for value in (-1, np.nan, np.inf)]
    wrong += [(ValueError, state | {"layers": value}) for value in ([], [first, first], (first,), None)]
    wrong += [(TypeError, state | {"layers": [value]}) for value in (None, [first], 3)]
    wrong += [(ValueError, entry(extra=np.zeros(3)))]
    for name, array in first.items():
        wrong.append((ValueError, state | {"layers": [{key: value for key, value in first.items() if key != name}]}))
        wrong.append((ValueError, entry(**{name: np.zeros((*array.shape, 1), array.dtype)})))
        if array.shape[-1] > 1:
            wrong.append((ValueError, entry(**{name: np.repeat(array, 2, axis=-1)[..., ::2]})))
        wrong.append((TypeError, entry(**{name: array.astype(np.float16)})))
        wrong.append((TypeError, entry(**{name: array.tolist()})))
    for value in (-1, np.nan, 0.5):
        control = first["control"].copy()
        control[_core.CONTROL["step"]] = value
        wrong.append((ValueError, entry(control=control)))
    return wrong


def test_a_wrong_state_changes_nothing() -> None:
    made, optimizer = attached()
    for _ in range(3):
        made.forward(X)
        made.backward(DY)
        optimizer.step()
    state = optimizer.state_dict()
    before, lr = digest(made), optimizer.lr
    for error, wrong in spoiled_states(state):
        with pytest.raises(error, match=r"FlipOptimizer\.load_state_dict\(\): '"):
            optimizer.load_state_dict(wrong)
        assert digest(made) == before and optimizer.lr == lr
    optimizer.load_state_dict(state)


def test_backward_needs_its_forward() -> None:
    made, _ = attached()
    with pytest.raises(RuntimeError, match="no activations are kept"):
        made.backward(DY)
    made.forward(X, keep=False)
    with pytest.raises(RuntimeError, match="no activations are kept"):
        made.backward(DY)
    made.forward(X)
    with pytest.raises(ValueError, match="'dy' must have the 6 tokens of the last forward, got 5"):
        made.backward(DY[:5])
    made.backward(DY)
    with pytest.raises(RuntimeError, match="no activations are kept"):
        made.backward(DY)


def test_a_gradient_over_the_layers_own_memory() -> None:
    made = ob.TernaryLinear(K, N, scale="row", bias=True)
    keeper = ob.FlipOptimizer([made])
    made.forward(X[:1])
    for array in (made.scale_grad, made.bias_grad, made.planes["row_factor"], made.planes["sketch"]):
        before = digest(made)
        with pytest.raises(BufferError, match="must not share memory with 'dy'"):
            made.backward(array.reshape(1, N))
        assert digest(made) == before
    assert keeper.layers == (made,)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("input_grad", [True, False])
def test_a_non_finite_gradient_changes_nothing(value: float, input_grad: bool) -> None:
    made, optimizer = with_forward()
    made.backward(DY)  # gradients and votes that must survive
    optimizer.step()
    made.forward(X)
    made.backward(DY)
    made.forward(X)
    for m, n in ((0, 0), (M - 1, N - 1)):
        wrong = DY.copy()
        wrong[m, n] = value
        before = digest(made)
        with pytest.raises(FloatingPointError, match="non-finite gradient in layer 'layer 1'; nothing was changed"):
            made.backward(wrong, input_grad)
        assert digest(made) == before
    made.backward(DY, input_grad)  # the activations are still there


def test_a_non_finite_activation_is_found_by_the_votes() -> None:
    made, _ = attached()
    x = X.copy()
    x[2, 3] = np.inf
    y = made.forward(x)
    assert np.isnan(y[2]).all() and np.isfinite(np.delete(y, 2, 0)).all()
    before = digest(made)
    with pytest.raises(FloatingPointError, match="layer 1"):
        made.backward(DY)
    assert digest(made) == before


@pytest.mark.parametrize("twin", [False, True])
def test_the_stateless_functions_count_non_finite_gradients(twin: bool) -> None:
    core = _core.reference if twin else _core
    arguments, control = kept(), ob.new_control()
    dy, packed, scale = arguments["dy"], arguments["packed"], arguments["scale"]
    dy[3, 4] = np.inf
    dx = core.linear_backward_input(dy, packed, scale, K, control)
    assert np.isnan(dx[3]).all() and np.isfinite(np.delete(dx, 3, 0)).all() and control[_core.CONTROL["nonfinite"]] == 1
    ds, db = np.zeros(N, np.float32), np.zeros(N, np.float32)
    core.vote(**arguments, control=control, ds=ds, db=db)
    assert np.isnan(ds).all() and np.isnan(db).all() and control[_core.CONTROL["nonfinite"]] == 2
    state = ob.new_planes(N, K)
    core.vote(**arguments, planes=state)
    assert state["control"][_core.CONTROL["nonfinite"]] == 1 and not state["row_sum"].any()
