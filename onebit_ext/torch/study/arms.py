"""The methods that the study compares, as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from onebit_ext import _core

FROZEN, HYBRID = "frozen", "shadow32"  # where the gain begins, and where it ends

EVEN, SLOWER = (0.5, 1.0, 2.0), (0.25, 0.5, 1.0)


@dataclass(frozen=True)
class Arm:
    """prepare(model, **options) with one dial, tried at each of `factors` times the task's eta (or rate of the scales).

    bits: persistent ones per weight, nominal.  quantum: of what the rule writes, in cells.  dead_zone: of its votes.
    schedule: a name in ..schedule.SHAPES; None: the task's.  dial: what is tuned.
    "eta": cells per step of the codes, or the rate of Bop's mean; "hybrid": AdamW's rate of the float weight, in cells
    (times mean |W|); "scale": the scales' rate.
    """

    name: str
    label: str
    bits: float
    options: dict[str, Any] = field(default_factory=dict)
    dial: str = "eta"
    factors: tuple[float, ...] = EVEN
    quantum: float | None = None
    dead_zone: float = 0.0
    schedule: str | None = None

    def candidates(self, eta: float, scale_lr: float) -> list[float]:
        """What the dial is tried at, for a task with this eta and this rate of the scales."""
        middle = scale_lr if self.dial == "scale" else eta
        return list(dict.fromkeys(float(f"{middle * factor:.3g}") for factor in self.factors))

    def rate(self, model: Any, eta: float) -> float:
        """The learning rate that the dial at eta means for a float model with `linears()`."""
        if self.dial != "hybrid":
            return eta
        weights = [layer.weight.detach() for layer in model.linears()]
        return eta * sum(float(w.abs().sum()) for w in weights) / sum(w.numel() for w in weights)


def _rule(name: str) -> dict[str, Any]:
    """The grid and the dead zone of a flip rule."""
    spec = _core.rule_spec(name)
    return {"quantum": 1 / spec["units"], "dead_zone": spec["dead_zone"]}


def _residual(bits: int, momentum: int = 0) -> Arm:
    name = f"residual{bits}" + (f"_momentum{momentum}" if momentum else "")
    label = f"residual {bits}" + (f", momentum {momentum}" if momentum else "")
    factors = EVEN if momentum or bits >= 8 else SLOWER
    return Arm(name, label, 2 + bits + momentum, {"rule": name}, factors=factors, **_rule(name))


def _cyclic(stripes: int) -> Arm:
    options = {"rule": "residual8", "stripes": stripes}
    label = f"block-cyclic 1/{stripes}"
    return Arm(f"cyclic{stripes}", label, 2 + 8 / stripes, options, schedule="wsd", **_rule("residual8"))


ALL = (
    Arm(FROZEN, "codes frozen", 2, {"method": "frozen"}, "scale"),
    Arm(HYBRID, "hybrid float32", 96, {"method": "shadow"}, "hybrid"),
    Arm("shadow16", "hybrid bfloat16", 48, {"method": "shadow", "shadow_dtype": "bfloat16"}, "hybrid"),
    Arm("optimizer32", "float32 in the optimizer", 98, {"method": "optimizer"}, "hybrid"),
    Arm("bop", "Bop", 34, {"method": "bop"}, factors=(0.25, 1.0, 4.0)),
    Arm("stochastic", "stochastic rounding", 2, {"method": "stochastic"}, factors=SLOWER, **_rule("stochastic")),
    _residual(16),
    _residual(8, 4),
    _residual(8),
    _residual(4, 4),
    Arm("byte", "one byte", 8, {"rule": "byte"}, **_rule("byte")),
    _residual(4),
    _cyclic(2),
    _residual(2),
    _cyclic(4),
    _cyclic(8),
)
BY_NAME = {arm.name: arm for arm in ALL}
