"""What training does to a ternary layer, in plain numbers for any logger."""

from __future__ import annotations

from typing import Any

from onebit_ext import _core

from . import ops
from .nn import BitLinear, plane_list
from .planes import control_of, field


def layer_stats(layer: BitLinear, name: str) -> dict[str, Any]:
    """A layer after a step; all floats but the name.

    flip_rate      share of all codes that the last step moved
    zero_fraction  share of codes that are 0
    saturated      share of the weights in training whose residual waits at its bound for votes of the other sign
    guard          factor in (0, 1] on eta; below 1 too many codes moved
    eta            learning rate, cells per step
    scale          mean scale
    step, stripe   steps the layer (its stripe) took part in; which rows are in training, block-cyclic
    """
    control = control_of(layer)
    weights = max(layer.in_features * layer.out_features, 1)
    found = {key: field(control, key) for key in ("guard", "eta", "step", "stripe")}
    return {
        "name": name,
        "flip_rate": field(control, "moved") / weights,
        "zero_fraction": int((layer.codes() == 0).sum()) / weights,
        "saturated": _saturated(layer),
        "scale": float(layer.scale.detach().mean()),
        **found,
    }


def _saturated(layer: BitLinear) -> float:
    planes = layer._planes
    if planes is None:
        return 0.0
    arrays = ops.plane_arrays(planes["control"], plane_list(planes))
    trained = len(planes["row_factor"]) * layer.in_features
    return _core.saturated(ops.array(layer.weight), arrays) / max(trained, 1)
