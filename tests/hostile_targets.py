"""Every public function with arguments that it accepts, for tests/hostile.py to spoil."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from hostile import FLOAT, Arr, Betas, Flag, K, M, N, Number, Pair, Planes, Target, Text, TritsPair

import onebit_ext as ob
from onebit_ext import _core

F32, F64, I8, U8 = (frozenset({name}) for name in ("float32", "float64", "int8", "uint8"))
PACKED = Arr(U8, aligned=True)
SCALE = Arr(F32)
CONTROL = Arr(F64, out=True)
MAYBE_CONTROL = replace(CONTROL, optional=True)
RNG = np.random.default_rng(5)
CODES = RNG.integers(-1, 2, (N, K)).astype(np.int8)
X, DY = (RNG.standard_normal((M, width)).astype(np.float32) for width in (K, N))


def weights() -> dict[str, Any]:
    return {"packed": ob.pack(CODES), "scale": np.linspace(0.5, 1, N, dtype=np.float32)}


def planes(rule: str = "residual8_momentum4", vote_plane: bool = False) -> dict[str, Any]:
    made = ob.new_planes(N, K, rule, seed=3, layer=2, eta=0.1, vote_plane=vote_plane)
    made["control"][_core.CONTROL["step"]] = 2
    made["control"][_core.CONTROL["micro"]] = 1
    made["row_factor"][:] = made["col_factor"][:] = 0.5
    return made


def control() -> np.ndarray:
    return ob.new_control(seed=3, layer=2)


def forward() -> dict[str, Any]:
    extra = {"bias": np.ones(N, np.float32), "out": np.zeros((M, N), np.float32)}
    kept = {"xq": np.zeros((M, K), np.int8), "sx": np.zeros(M, np.float32)}
    return {"x": X.copy(), **weights(), "out_features": N, **extra, **kept, "packing": "tile16"}


def trits() -> dict[str, Any]:
    return forward() | {"packed": ob.pack(CODES, "trits5"), "packing": "trits5"}


def backward() -> dict[str, Any]:
    out = np.zeros((M, K), np.float32)
    return {"dy": DY.copy(), **weights(), "in_features": K, "control": control(), "out": out}


def kept() -> dict[str, Any]:
    arguments = {"xq": np.zeros((M, K), np.int8), "sx": np.zeros(M, np.float32)}
    w = weights()
    ob.linear_forward(X, w["packed"], w["scale"], N, **arguments)
    return {"dy": DY.copy(), **arguments, **w, "in_features": K}


def sums() -> dict[str, Any]:
    return {"ds": np.zeros(N, np.float32), "db": np.zeros(N, np.float32)}


def layer(seed: int = 1) -> ob.TernaryLinear:
    made = ob.TernaryLinear(K, N, bias=True, seed=seed)
    made.name = f"layer {seed}"
    return made


def attached(vote_plane: bool = False) -> tuple[ob.TernaryLinear, ob.FlipOptimizer]:
    made = layer()
    return made, ob.FlipOptimizer([made], recipe="pretrain", vote_plane=vote_plane)


FORWARD = {
    "x": Arr(FLOAT, leading=True), "packed": PACKED, "scale": SCALE, "out_features": Number(integer=True),
    "bias": Arr(F32, optional=True), "out": Arr(F32, out=True, optional=True), "xq": Arr(I8, out=True, optional=True),
    "sx": Arr(F32, out=True, optional=True), "packing": Text,
}  # fmt: skip
BACKWARD = {
    "dy": Arr(FLOAT, leading=True), "packed": PACKED, "scale": SCALE, "in_features": Number(integer=True),
    "control": CONTROL, "out": Arr(F32, out=True, optional=True),
}  # fmt: skip
KEPT = {
    "dy": Arr(FLOAT, leading=True), "xq": Arr(I8), "sx": Arr(F32), "packed": PACKED, "scale": SCALE,
    "in_features": Number(integer=True),
}  # fmt: skip
SUM = Arr(F32, out=True, optional=True)
OPTIONS = {
    "seed": Number(integer=True), "layer": Number(integer=True), "eta": Number(), "cap": Number(), "clip": Number(),
    "betas": Betas, "scale_init": Number(),
}  # fmt: skip
STRIPES = {"stripes": Number(1, integer=True), "stripe": Number(integer=True)}


def twins(name: str, make: Callable[[], dict[str, Any]], kinds: dict[str, Any]) -> list[Target]:
    """A function and its naive twin."""
    return [
        Target(name, getattr(_core, name), make, kinds),
        Target(f"reference.{name}", getattr(_core.reference, name), make, kinds),
    ]


def method(make: Callable[[], tuple[Any, Any]], name: str) -> Callable[..., Any]:
    def call(**arguments: Any) -> Any:
        return getattr(make()[0], name)(**arguments)

    return call


def with_forward() -> tuple[ob.TernaryLinear, ob.FlipOptimizer]:
    made, optimizer = attached()
    made.forward(X)
    return made, optimizer


def rate_setter(name: str) -> Callable[..., Any]:
    def call(**arguments: Any) -> None:
        if set(arguments) != {name}:
            raise TypeError(f"one argument, {name}")
        setattr(attached()[1], name, arguments[name])

    return call


def scale_step() -> dict[str, Any]:
    names = ("scale", "grad", "exp_avg", "exp_avg_sq")
    return {name: np.ones(N, np.float32) for name in names} | {"control": control(), "lr": 0.01}


def formatted(form: str) -> dict[str, Any]:
    return {"packed": ob.pack(CODES, form), "shape": (N, K), "format": form}


BYTES = Arr(U8)
TARGETS = [
    *twins("linear_forward", forward, FORWARD),
    *twins("linear_forward", trits, FORWARD),
    *twins("linear_backward_input", backward, BACKWARD),
    *twins("vote", lambda: kept() | {"planes": planes()} | sums(), KEPT | {"planes": Planes, "ds": SUM, "db": SUM}),
    *twins("vote", lambda: kept() | {"control": control()} | sums(),
           KEPT | {"control": MAYBE_CONTROL, "ds": SUM, "db": SUM}),
    *twins("vote", lambda: kept() | {"planes": planes("residual4")} | sums(),
           KEPT | {"packed": replace(PACKED, out=True), "planes": Planes, "ds": SUM, "db": SUM}),
    *twins("vote", lambda: kept() | {"planes": planes("residual4", True)} | sums(),
           KEPT | {"planes": Planes, "ds": SUM, "db": SUM}),
    *(twin for held in (False, True)
      for twin in twins("flip", lambda held=held: {"packed": ob.pack(CODES), "planes": planes(vote_plane=held)},
                        {"packed": Arr(U8, out=True, aligned=True), "planes": Planes})),
    *twins("absmean", lambda: {"w": np.ones((N, K), np.float32)}, {"w": Arr(FLOAT, free=True)}),
    Target("reference.weight_gradient", _core.reference.weight_gradient, lambda: kept() | {"control": control()},
           KEPT | {"control": CONTROL}),
    Target("saturated", _core.saturated, lambda: {"packed": ob.pack(CODES), "planes": planes("residual2")},
           {"packed": PACKED, "planes": Planes}),
    Target("plane_specs", _core.plane_specs, lambda: {"out_features": N, "in_features": K, "stripes": 3, "stripe": 2},
           {"out_features": Number(integer=True), "in_features": Number(integer=True), "rule": Text, **STRIPES,
            "vote_plane": Flag}),
    Target("discard", ob.discard, lambda: {"planes": planes("residual8", True)}, {"planes": Planes}),
    Target("scale_step", ob.scale_step, scale_step,
           {"scale": Arr(F32, out=True), "grad": Arr(F32), "exp_avg": Arr(F32, out=True),
            "exp_avg_sq": Arr(F32, out=True), "control": CONTROL, "lr": Number()}),
    Target("average_residuals", _core.average_residuals,
           lambda: {"parts": np.ones((3, 40), np.int8), "first": 7, "columns": K, "control": control(),
                    "out": np.zeros(40, np.int8)},
           {"parts": Arr(frozenset({"int8", "int16"}), free=True), "first": Number(integer=True),
            "columns": Number(integer=True), "control": replace(CONTROL, out=False), "out": Arr(I8, out=True)}),
    Target("new_control", ob.new_control, dict, OPTIONS),
    Target("new_planes", ob.new_planes, lambda: {"out_features": N, "in_features": K, "packed": ob.pack(CODES)},
           {"out_features": Number(integer=True), "in_features": Number(integer=True), "rule": Text,
            "packed": replace(PACKED, optional=True), **STRIPES, **OPTIONS, "vote_plane": Flag}),
    Target("pack", ob.pack, lambda: {"codes": CODES.copy(), "format": "seq2"},
           {"codes": Arr(I8, free=True), "format": Text}),
    *(Target(name, getattr(ob, name), partial(formatted, form),
             {"packed": BYTES, "shape": TritsPair if form == "trits5" else Pair, "format": Text})
      for name in ("unpack", "validate") for form in ob.FORMATS),
    Target("convert", ob.convert, lambda: {"packed": ob.pack(CODES), "shape": (N, K), "source": "tile16",
                                           "target": "rows4"},
           {"packed": BYTES, "shape": Pair, "source": Text, "target": Text}),
    Target("random_codes", ob.random_codes, lambda: {"out_features": N, "in_features": K, "seed": 1},
           {"out_features": Number(integer=True), "in_features": Number(integer=True), "seed": Number(integer=True)}),
    Target("force_isa", ob.force_isa, lambda: {"name": "scalar"}, {"name": Text}),
    Target("set_num_threads", ob.set_num_threads, lambda: {"threads": 2}, {"threads": Number(1, integer=True)}),
    Target("TernaryLinear", ob.TernaryLinear, lambda: {"in_features": K, "out_features": N},
           {"in_features": Number(integer=True), "out_features": Number(integer=True), "scale": Text, "bias": Flag,
            "seed": Number(integer=True), "packing": Text}),
    Target("TernaryLinear.repack", method(attached, "repack"), lambda: {"packing": "trits5"}, {"packing": Text}),
    Target("TernaryLinear.from_float", ob.TernaryLinear.from_float,
           lambda: {"w": np.ones((N, K), np.float32), "bias": np.ones(N, np.float32)},
           {"w": Arr(FLOAT, free=True), "bias": Arr(F32, optional=True), "packing": Text}),
    Target("TernaryLinear.from_codes", ob.TernaryLinear.from_codes,
           lambda: {"codes": CODES.copy(), "scale": 0.5, "bias": np.ones(N, np.float32)},
           {"codes": Arr(I8, free=True), "bias": Arr(F32, optional=True), "packing": Text}),
    Target("TernaryLinear.from_packed", ob.TernaryLinear.from_packed,
           lambda: weights() | {"shape": (N, K), "bias": np.ones(N, np.float32)},
           {"packed": PACKED, "shape": Pair, "bias": Arr(F32, optional=True), "packing": Text}),
    Target("TernaryLinear.from_packed", ob.TernaryLinear.from_packed,
           lambda: weights() | {"packed": ob.pack(CODES, "trits5"), "shape": (N, K), "packing": "trits5"},
           {"packed": PACKED, "shape": TritsPair, "packing": Text}),
    Target("TernaryLinear.forward", method(attached, "forward"), lambda: {"x": X.copy(), "keep": True},
           {"x": Arr(FLOAT, leading=True, tokens=True), "keep": Flag}),
    Target("TernaryLinear.backward", method(with_forward, "backward"), lambda: {"dy": DY.copy(), "input_grad": True},
           {"dy": Arr(FLOAT, leading=True), "input_grad": Flag}),
    Target("FlipOptimizer", ob.FlipOptimizer, lambda: {"layers": [layer()]},
           {"lr": Number(), "scale_lr": Number(), "bias_lr": Number(), "betas": Betas, "recipe": Text,
            "seed": Number(integer=True), "stripes": Number(1, integer=True), "vote_plane": Flag}),
    *(Target("FlipOptimizer", rate_setter(name), lambda name=name: {name: 0.5}, {name: Number()})
      for name in ("lr", "scale_lr", "bias_lr")),
]  # fmt: skip
