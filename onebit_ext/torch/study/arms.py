"""The methods that the study compares, as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

FROZEN, HYBRID = "frozen", "shadow32"  # where the gain begins, and where it ends

QUANTA = {16: 1 / 16384, 8: 1 / 128, 4: 1 / 15, 2: 1 / 3}  # of a residual's grid, in cells


@dataclass(frozen=True)
class Arm:
    """prepare(model, **options) with one dial, tried at each of `factors` times the task's eta.

    bits: persistent ones per weight, nominal.  quantum: of what the rule writes, in cells.  dial: what is tuned.
    "eta": cells per step of the codes, or the rate of Bop's mean; "hybrid": AdamW's rate of the float weight, in cells
    (times mean |W|); "scale": the scales' rate.
    """

    name: str
    label: str
    bits: float
    options: dict[str, Any] = field(default_factory=dict)
    dial: str = "eta"
    factors: tuple[float, ...] = (0.5, 1.0, 2.0)
    quantum: float | None = None

    def candidates(self, eta: float) -> list[float]:
        """What the dial is tried at, for a task whose eta is given."""
        return [float(f"{eta * factor:.3g}") for factor in self.factors]


def _residual(bits: int, momentum: int = 0) -> Arm:
    options: dict[str, Any] = {"residual_bits": bits, "momentum_bits": momentum}
    name = f"residual{bits}" + (f"_momentum{momentum}" if momentum else "")
    label = f"residual {bits}" + (f", momentum {momentum}" if momentum else "")
    return Arm(name, label, 2 + bits + momentum, options, quantum=QUANTA[bits])


def _cyclic(stripes: int) -> Arm:
    options = {"residual_bits": 8, "stripes": stripes}
    label, factors = f"block-cyclic 1/{stripes}", (1.0, 2.0, 4.0)
    return Arm(f"cyclic{stripes}", label, 2 + 8 / stripes, options, factors=factors, quantum=QUANTA[8])


ALL = (
    Arm(FROZEN, "codes frozen", 2, {"method": "frozen"}, "scale", (1 / 300, 1 / 30, 1 / 3)),
    Arm(HYBRID, "hybrid float32", 98, {"method": "shadow"}, "hybrid"),
    Arm("shadow16", "hybrid bfloat16", 50, {"method": "shadow", "shadow_dtype": "bfloat16"}, "hybrid"),
    Arm("optimizer32", "float32 in the optimizer", 98, {"method": "optimizer"}, "hybrid"),
    Arm("bop", "Bop", 34, {"method": "bop"}),
    Arm("stochastic", "stochastic rounding", 2, {"method": "stochastic"}, factors=(0.03, 0.1, 0.3), quantum=1.0),
    _residual(16),
    _residual(8, 4),
    _residual(8),
    _residual(4, 4),
    Arm("byte", "one byte", 8, {"rule": "byte"}, quantum=1 / 85),
    _residual(4),
    _cyclic(2),
    _residual(2),
    _cyclic(4),
    _cyclic(8),
)
BY_NAME = {arm.name: arm for arm in ALL}
