"""Training state of one layer as tensors: what an optimizer's state holds for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onebit_ext import _core

from . import ops
from .nn import BitLinear

CONTROL = _core.CONTROL
RECIPES = {"finetune": (8, 0), "pretrain": (8, 4)}  # bits of residual, bits of momentum
FRESH = ("step", "micro", "nonfinite", "sketch_energy", "moved", "vote_moved")  # control of a stripe as it begins
Kinds = dict[str, tuple[tuple[int, ...], torch.dtype]]


def choose_rule(
    recipe: str, residual_bits: int | None = None, momentum_bits: int | None = None, rule: str | None = None
) -> str | None:
    """Name of the flip rule, by name or by bits, which the recipe sets where they are not given; None for recipe
    "frozen" (codes stay, scales and float parameters train).  ValueError if there is none."""
    if recipe not in (*RECIPES, "frozen"):
        raise ValueError(f"'recipe' must be one of {[*RECIPES, 'frozen']}, got {recipe!r}")
    if rule is not None and (residual_bits is not None or momentum_bits is not None):
        raise ValueError("'rule' says the bits too: give it, or 'residual_bits' and 'momentum_bits'")
    if recipe == "frozen":
        return None
    residual, momentum = RECIPES[recipe]
    residual = residual if residual_bits is None else residual_bits
    momentum = momentum if momentum_bits is None else momentum_bits
    by_bits = f"residual{residual}" + (f"_momentum{momentum}" if momentum else "")
    name = by_bits if rule is None else rule
    if name not in _core.RULES:
        got = f"rule={rule!r}" if rule is not None else f"residual_bits={residual}, momentum_bits={momentum}"
        raise ValueError(f"no flip rule with {got}; there are {', '.join(_core.RULES)}")
    return name


def default_betas(rule: str | None) -> tuple[float, float]:
    """Of a flip rule, (.7, .95) with a momentum; (.9, .95) for whatever is none."""
    betas: tuple[float, float] = _core.rule_spec(rule if rule in _core.RULES else "residual8")["betas"]
    return betas


def kinds(layer: BitLinear, rule: str | None, stripes: int = 1, stripe: int = 0, vote_plane: bool = False) -> Kinds:
    """Shape and dtype of everything that a rule keeps for a layer, and of `draws`, which every layer has."""
    where: dict[str, Any] = {"stripes": stripes, "stripe": stripe, "vote_plane": vote_plane}
    found = {} if rule is None else _core.plane_specs(layer.out_features, layer.in_features, rule, **where)
    control = {"draws": ((len(CONTROL),), torch.float64)}
    return {name: (shape, _tensor(np.empty(0, dtype)).dtype) for name, (shape, dtype) in found.items()} | control


def new_planes(layer: BitLinear, rule: str, /, **options: Any) -> dict[str, Tensor]:
    """Fresh planes for a layer; options as `_core.new_planes` takes them."""
    options["scale_init"] = float(layer.scale.detach().mean())
    start, layer._start = layer._start, None
    bits = next((bits for bits in (8, 16) if rule.startswith(f"residual{bits}")), None)
    if start is not None and (bits is None or options.get("stripes", 1) != 1):
        raise ValueError(
            f"a residual that begins at its shadow (replace_linear(shadow=True)) needs 8 or 16 bits and all rows, "
            f"got rule {rule!r}, stripes={options.get('stripes', 1)}"
        )
    planes = _fresh(layer, rule, options)
    if start is not None:
        planes["residual"] = start if bits == 8 else start.to(torch.int16) * 128
    return planes


def _fresh(layer: BitLinear, rule: str, options: Mapping[str, Any]) -> dict[str, Tensor]:
    shape = layer.out_features, layer.in_features
    arrays = _core.new_planes(*shape, rule, packed=ops.array(layer.weight), **options)
    return {name: _tensor(value) for name, value in arrays.items()}


def _tensor(value: np.ndarray[Any, Any]) -> Tensor:
    tensor = torch.from_numpy(value)
    return tensor.view(torch.bfloat16) if value.dtype == np.uint16 else tensor  # the only use of uint16


def rotate(layer: BitLinear, planes: dict[str, Tensor], stripe_steps: int) -> bool:
    """Block-cyclic: after `stripe_steps` steps of a stripe the next one begins, in the memory of the last.

    What a new stripe is: csrc/README.md, "Block-cyclic".  True if it did.
    """
    control = ops.array(planes["control"])
    stripes = int(field(control, "stripes"))
    if stripes == 1 or field(control, "step") < stripe_steps:
        return False
    stripe = (int(field(control, "stripe")) + 1) % stripes
    options: dict[str, Any] = {"stripes": stripes, "stripe": stripe, "vote_plane": "votes" in planes}
    options |= {n: int(field(control, n)) for n in ("seed", "layer")}
    for name in FRESH:
        control[CONTROL[name]] = 0
    control[CONTROL["stripe"]] = stripe
    for name, value in _fresh(layer, _core.RULES[int(field(control, "rule"))], options).items():
        if name != "control":
            planes[name] = _into_pool(planes[name], value)
    return True


def _into_pool(plane: Tensor, value: Tensor) -> Tensor:
    """`value` in the memory of `plane`, which stripe 0 made: no stripe has more rows."""
    if plane.shape != value.shape:
        plane = plane.new_empty(0).set_(plane.untyped_storage(), 0, value.shape, value.stride())
    return plane.copy_(value)


def repool(layer: BitLinear, planes: dict[str, Tensor], vote_plane: bool = False) -> dict[str, Tensor]:
    """Loaded planes in memory of our own, with room for every stripe; a vote plane that was empty comes back."""
    control = ops.array(planes["control"])
    rule, stripes = _core.RULES[int(field(control, "rule"))], int(field(control, "stripes"))
    if vote_plane and "votes" not in planes:
        shape = len(planes["row_factor"]), layer.in_features
        planes = planes | {"votes": torch.zeros(shape, dtype=torch.int16)}
    if stripes == 1:
        return {name: value.clone() for name, value in planes.items()}
    pool = kinds(layer, rule, stripes, vote_plane=vote_plane)
    return {name: _into_pool(torch.empty(pool[name][0], dtype=value.dtype), value) for name, value in planes.items()}


def without_empty_votes(planes: dict[str, Any]) -> dict[str, Any]:
    """What is to be saved: between steps a vote plane is zero."""
    if "votes" not in planes or field(ops.array(planes["control"]), "micro") > 0:
        return planes
    return {name: value for name, value in planes.items() if name != "votes"}


def rescale_votes(votes: Tensor, ratio: float) -> None:
    """Votes times `ratio`, to the nearest, by rows: there is no float of the plane's size."""
    for rows in votes.split(64):
        rows.copy_((rows.double() * ratio).round().clamp(-32767, 32767))


def check(
    layer: BitLinear, planes: Mapping[str, Any], rule: str | None, stripes: int, where: str, vote_plane: bool = False
) -> None:
    """ValueError unless `planes` can be those of `rule` for this layer, or those of a layer that does not train."""
    if set(planes) == {"draws"}:
        rule = None
    held = rule is not None and vote_plane and "votes" in planes
    if set(planes) != set(kinds(layer, rule, vote_plane=held)):
        raise ValueError(f"{where} must hold the planes of {rule}, got {sorted(planes)}")
    stripe = 0
    if rule is not None:
        check_kind(planes["control"], kinds(layer, rule)["control"], where, "control")
        control = ops.array(planes["control"])
        stripe = _check_control(control, rule, stripes, where)
        if vote_plane and not held and field(control, "micro") > 0:
            raise ValueError(f"{where} was saved between micro-batches without the votes that vote_plane=True holds")
    for name, kind in kinds(layer, rule, stripes, stripe, held).items():
        check_kind(planes[name], kind, where, name)


def _check_control(control: np.ndarray[Any, Any], rule: str, stripes: int, where: str) -> int:
    """The stripe that a control is at."""
    number, held, stripe = (field(control, name) for name in ("rule", "stripes", "stripe"))
    if (number, held) != (_core.RULES.index(rule), stripes):
        known = number in range(len(_core.RULES))
        got = _core.RULES[int(number)] if known else f"rule number {number}"
        raise ValueError(f"{where} must hold the planes of {rule} with {stripes} stripe(s), got {got} with {held:g}")
    if stripe not in range(stripes):
        raise ValueError(f"{where} has a control at stripe {stripe}, and there are {stripes}")
    return int(stripe)


def check_kind(value: Any, wanted: tuple[tuple[int, ...], torch.dtype], where: str, name: str) -> None:
    """ValueError unless `value` is a tensor of the shape and dtype that are wanted."""
    if not isinstance(value, Tensor) or (tuple(value.shape), value.dtype) != wanted:
        got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{where}: {name!r} must be {wanted[1]} {wanted[0]}, got {got}")


def control_of(layer: BitLinear) -> np.ndarray[Any, Any]:
    """The control that the layer's optimizer reads and writes, as a live view."""
    return ops.array(layer.control if layer._planes is None else layer._planes["control"])


def field(control: np.ndarray[Any, Any], name: str) -> float:
    """One field of a control."""
    return float(control[CONTROL[name]])


def nonfinite(layer: BitLinear) -> bool:
    """Whether a backward since the last step met a gradient that is not finite."""
    if layer._planes is not None and field(control_of(layer), "nonfinite") > 0:
        return True
    return layer.scale.grad is not None and not bool(torch.isfinite(layer.scale.grad).all())
