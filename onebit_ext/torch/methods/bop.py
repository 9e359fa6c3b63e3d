"""Method "bop": the binary optimizer of Helwegen et al. (arXiv 1906.02107), for codes of three values."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import BitLinear
from ..planes import control_of, field
from .dense import DenseOptimizer


class Bop(DenseOptimizer):
    """Codes move where an exponential mean of their gradient is large and points the other way.

    m += lr (g - m); where |m| > threshold * rms(m) the code moves one cell against the sign of m, unless it is at the
    end.  Bop flips a sign; one cell is its step for three values.  The threshold is in units of the layer's root mean
    square of m, so that one number serves every layer.

    Args:
        lr: the rate of the mean (gamma in the paper); 0: m and so the codes stand still.
        threshold: tau, in RMS units of m.
        dtype: of m: float32 (2 + 32 bits per weight) or bfloat16 (2 + 16).
        others: FlipOptimizer's.
    """

    FLOATS = ("mean",)
    METHOD = "bop"

    def __init__(
        self, params: nn.Module | Any, lr: float = 1e-2, *args: Any, threshold: float = 3.0, **options: Any
    ) -> None:
        if not (math.isfinite(threshold) and threshold >= 0):
            raise ValueError(f"Bop: 'threshold' must be finite and not negative, got {threshold!r}")
        self.threshold = threshold
        super().__init__(params, lr, *args, **options)

    def _moves(self, layer: BitLinear, state: dict[str, Tensor], codes: Tensor, grad: Tensor) -> Tensor:
        rate, mean = field(control_of(layer), "eta"), state["mean"]
        if rate == 0:
            return torch.zeros_like(codes)
        mean.lerp_(grad.to(self.dtype), rate)
        m = mean.float()
        return torch.where(m.abs() > self.threshold * m.square().mean().sqrt(), -m.sign(), 0.0).to(torch.int8)
