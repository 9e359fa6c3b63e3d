"""Method "optimizer": codes only in the layer; the float residual and Adam's moments live in the optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..nn import BitLinear
from ..planes import control_of, field
from .dense import DenseOptimizer


class LatentAdam(DenseOptimizer):
    """The weight that learns is T + e: Adam (arXiv 1412.6980) moves e, and T follows where |e| passes half a cell.

    Args:
        lr: Adam's, in units of the weight W = s T; e moves lr / s0 cells per step, s0 the mean scale at the start.
        dtype: of e and both moments: float32 (2 + 96 bits per weight) or bfloat16 (2 + 48).
        others: FlipOptimizer's; `betas` are this Adam's too.
    At +-1 the move is refused and e stays within half a cell.  No weight decay.
    """

    FLOATS = ("residual", "exp_avg", "exp_avg_sq")
    METHOD = "optimizer"

    def __init__(self, params: nn.Module | Any, lr: float = 1e-3, *args: Any, **options: Any) -> None:
        super().__init__(params, lr, *args, **options)

    def _moves(self, layer: BitLinear, state: dict[str, Tensor], codes: Tensor, grad: Tensor) -> Tensor:
        control = control_of(layer)
        beta1, beta2, step = (field(control, name) for name in ("beta1", "beta2", "step"))
        residual, mean, square = (state[name] for name in self.FLOATS)
        mean.lerp_(grad.to(self.dtype), 1 - beta1)
        square.lerp_(grad.square().to(self.dtype), 1 - beta2)
        update = (mean.float() / (1 - beta1**step)) / ((square.float() / (1 - beta2**step)).sqrt_() + 1e-8)
        e = residual.float() - field(control, "eta") / field(control, "scale_init") * update
        moves = (e > 0.5).to(torch.int8) - (e < -0.5).to(torch.int8)
        refused = (codes + moves).abs() > 1
        e = torch.where(refused, e.clamp(-0.5, 0.5), e - moves)
        residual.copy_(e)
        return moves
