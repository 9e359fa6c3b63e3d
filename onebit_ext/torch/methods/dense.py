"""What the methods with a dense gradient of the codes share: codes in the layers, floats in the optimizer."""

from __future__ import annotations

import abc
from typing import Any

import torch
from torch import Tensor

from onebit_ext import _core

from .. import ops
from ..nn import BitLinear
from ..optim import FlipOptimizer
from ..planes import CONTROL, check_kind, control_of, field
from ..ranks import world_size


class DenseOptimizer(FlipOptimizer, abc.ABC):
    """A FlipOptimizer whose codes move by an update of their dense gradient dL/dW, float32 (N, K), instead of votes.

    Scales, float parameters, groups, resuming and non-finite gradients are FlipOptimizer's; seed, caps and stripes mean
    nothing here.  Between two steps a layer has the floats named in `FLOATS`, of `dtype`.  The gradient waits for
    `step()` or `discard()`, whatever `zero_grad` does, and no clipping of the float parameters sees it.
    """

    FLOATS: tuple[str, ...] = ()
    METHOD = "dense"

    def __init__(self, params: Any, lr: float, *args: Any, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"{type(self).__name__}: 'dtype' must be float32 or bfloat16, got {dtype}")
        if options.get("stripes", 1) != 1:
            raise ValueError(
                f"{type(self).__name__}: method {self.METHOD!r} trains all rows at once, 'stripes' must be 1"
            )
        self.dtype = dtype
        super().__init__(params, lr, *args, **options)

    def _choose_rule(self, *given: Any) -> str | None:
        if any(value is not None for value in given[1:]):
            raise ValueError(f"{type(self).__name__}: method {self.METHOD!r} has no flip rule: no bits, no 'rule'")
        return self.METHOD

    # ------------------------------------------------------------------ layers
    def _make_planes(self, layer: BitLinear) -> None:
        shape = layer.out_features, layer.in_features
        self.state[layer.weight].update({name: torch.zeros(shape, dtype=self.dtype) for name in self.FLOATS})
        self._open(layer)

    @staticmethod
    def _open(layer: BitLinear) -> None:
        """Give the layer a leaf that collects the gradient: one zero, seen as (N, K)."""
        layer.attach(None)
        layer._latent = torch.zeros(1).expand(layer.out_features, layer.in_features).requires_grad_()

    @staticmethod
    def _linked(layer: BitLinear, state: dict[str, Any]) -> bool:
        return (
            layer.control is state["draws"] and layer._planes is None and (len(state) == 1) == (layer._latent is None)
        )

    def _link(self, layer: BitLinear, state: dict[str, Any]) -> None:
        layer.control = state["draws"]
        layer.attach(None)
        if len(state) > 1:
            self._open(layer)

    def _check_planes(self, layer: BitLinear, planes: dict[str, Any], where: str) -> None:
        if set(planes) not in ({"draws"}, {"draws", *self.FLOATS}):
            raise ValueError(f"{where} must hold {self.FLOATS} of method {self.METHOD!r}, got {sorted(planes)}")
        for name, value in planes.items():
            floats = (layer.out_features, layer.in_features), self.dtype
            check_kind(value, ((len(CONTROL),), torch.float64) if name == "draws" else floats, where, name)

    # ------------------------------------------------------------------ the step
    def _check_links(self) -> None:
        if world_size() > 1:
            raise RuntimeError(f"method {self.METHOD!r} does not train across ranks; use method='residual'")
        super()._check_links()

    @staticmethod
    def _discard(layer: BitLinear) -> None:
        if layer._latent is not None:
            layer._latent.grad = None

    def _flip_layer(self, layer: BitLinear) -> None:
        if layer._latent is None or layer._latent.grad is None:
            return
        control = control_of(layer)
        grad, layer._latent.grad = layer._latent.grad, None
        grad.div_(field(control, "grad_scale"))
        control[CONTROL["step"]] += 1
        codes = layer.codes()
        moved = (codes + self._moves(layer, self.state[layer.weight], codes, grad)).clamp_(-1, 1)
        control[CONTROL["moved"]] = int((moved != codes).sum())
        layer.weight.copy_(torch.from_numpy(_core.pack(ops.array(moved))))

    @abc.abstractmethod
    def _moves(self, layer: BitLinear, state: dict[str, Tensor], codes: Tensor, grad: Tensor) -> Tensor:
        """int8 (N, K) in -1, 0, 1: which cells the codes should move; those beyond +-1 are refused."""
