"""BitLinear: a linear layer of ternary codes, made of plain tensors."""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from onebit_ext import _core

from . import direct, ops
from .dense import dense_linear

_ids = itertools.count()
_layers: WeakIdKeyDictionary = WeakIdKeyDictionary()  # codes and scale Parameters -> weakref of their BitLinear


def layer_of(parameter: Tensor) -> BitLinear | None:
    """The live BitLinear whose codes or scale this Parameter is, or None."""
    reference = _layers.get(parameter)
    return None if reference is None else reference()


def tile16_shape(out_features: int, in_features: int) -> tuple[int, ...]:
    """Shape of the uint8 plane that holds (N, K) codes for the kernels."""
    return (math.ceil(out_features / 64), math.ceil(in_features / 16), 4, 16, 4)


def exact_inverse(scale: Tensor) -> Tensor:
    """1/(1/s) in float32: the nearest scale whose stored inverse gives it back to the bit."""
    return 1 / (1 / scale)


class CodesParameter(nn.Parameter):
    """uint8 codes as a Parameter (so that `.to` and DDP keep its identity) that never requires grad."""

    def __new__(cls, data: Tensor, requires_grad: bool = False) -> Self:
        return super().__new__(cls, data, False)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """`model.requires_grad_(True)` leaves the codes alone."""
        return self

    @property
    def requires_grad(self) -> bool:
        """False; `p.requires_grad = True` over all parameters leaves the codes alone too."""
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        pass


class BitLinear(nn.Module):
    """y = x W^T + b with W = s * T, T in {-1, 0, +1}^(N, K): 2 bits a weight, no float copy of them.

    Args:
        in_features, out_features: K and N.
        bias: adds a float Parameter (N,) of `dtype`.
        scale: "tensor" for one s, "row" for one per output.
        device, dtype: of the bias; the scale is always float32.  device="meta" leaves all values open.

    Tensors: `weight` uint8 tile16 plane (see `codes()` for (N, K)), `scale` float32 (1,) or (N,), `bias`.  The scale
    anchors autograd: where it requires grad, the layer trains; where it does not, the backward gives dX alone.
    The layer votes only in training mode with an optimizer attached and outside `no_votes()`.

    state_dict: `weight` uint8 (N/4, K) and `weight_scale` = 1/s float32 (1,) as transformers packs them, or, with row
    scales or N not a multiple of 4, `weight_tile16` and `scale`.  Both load, exactly.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        scale: str = "tensor",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if scale not in ("tensor", "row"):
            raise ValueError(f"BitLinear: 'scale' must be 'tensor' or 'row', got {scale!r}")
        self.in_features, self.out_features = in_features, out_features
        device = torch.get_default_device() if device is None else torch.device(device)
        shape = tile16_shape(out_features, in_features)
        if device.type == "meta":
            packed, value = torch.empty(shape, dtype=torch.uint8, device="meta"), torch.empty(1, device="meta")
        else:
            packed, value = _absmean(torch.randn(out_features, in_features, device=device) / max(in_features, 1) ** 0.5)
        value = value.repeat(out_features) if scale == "row" else value
        self.weight = CodesParameter(packed)
        self.scale = nn.Parameter(value)
        offset = torch.zeros(out_features, device=device, dtype=dtype) if bias else None
        self.bias = None if offset is None else nn.Parameter(offset)
        self.control = torch.from_numpy(_core.new_control(layer=next(_ids)))  # random position where nothing votes
        self._planes: dict[str, Tensor] | None = None  # the optimizer's, while one is attached
        self._moves = False  # their rule moves codes in votes
        self._latent: Tensor | None = (
            None  # where a dense gradient goes, for the methods that need one: (N, K) of one 0
        )
        self._sync: Callable[[], None] | None = None  # brings the learning rate of a foreign optimizer
        self._auto: Callable[[], Any] | None = None  # weakref of the AutoFlip that owns the layer
        self._start: Tensor | None = None  # int8 (N, K), 1/128 cell: where the residual of the next optimizer begins
        self._views: direct.Views | None = None  # of codes and scale, kept by direct calls
        self._inverse: Tensor | None = None  # weight_scale as loaded, kept verbatim until s changes
        self._register()

    # ------------------------------------------------------------------ making
    @classmethod
    def from_packed(cls, packed: Tensor, scale: Tensor, shape: tuple[int, int], bias: Tensor | None = None) -> Self:
        """From a tile16 plane (kept, not copied, if 64-byte aligned), float32 scale (1,) or (N,) and (N, K)."""
        n, k = shape
        if packed.dtype != torch.uint8 or packed.shape != tile16_shape(n, k):
            raise ValueError(f"BitLinear.from_packed: 'packed' must be uint8 {tile16_shape(n, k)}, got {_text(packed)}")
        if scale.shape not in ((1,), (n,)):
            raise ValueError(f"BitLinear.from_packed: 'scale' must be of shape (1,) or ({n},), got {_text(scale)}")
        if bias is not None and bias.shape != (n,):
            raise ValueError(f"BitLinear.from_packed: 'bias' must be of shape ({n},), got {_text(bias)}")
        layer = cls(k, n, bias is not None, "tensor" if scale.shape == (1,) else "row", device="meta")
        layer.weight = CodesParameter(_aligned(packed.detach()))
        layer.scale = nn.Parameter(scale.detach().to(torch.float32))
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone())
        layer._register()
        return layer

    @classmethod
    def from_codes(cls, codes: Tensor, scale: Tensor | float, bias: Tensor | None = None) -> Self:
        """From codes (N, K) in {-1, 0, +1} of any dtype and a scale."""
        signs = codes.detach().to(torch.int8).contiguous()
        if codes.ndim != 2 or not torch.equal(signs.to(codes.dtype), codes.detach()) or bool((signs.abs() > 1).any()):
            raise ValueError(f"BitLinear.from_codes: 'codes' must be (N, K) with values -1, 0, 1, got {_text(codes)}")
        value = torch.as_tensor(scale, dtype=torch.float32).reshape(-1)
        return cls.from_packed(
            torch.from_numpy(_core.pack(signs.numpy())), value, (codes.shape[0], codes.shape[1]), bias
        )

    @classmethod
    def from_float(cls, weight: Tensor, bias: Tensor | None = None, scale: str = "tensor") -> Self:
        """From a float weight (N, K) by absmean; a row scale starts at the tensor's."""
        packed, value = _absmean(weight)
        value = value.repeat(weight.shape[0]) if scale == "row" else value
        return cls.from_packed(packed, value, (weight.shape[0], weight.shape[1]), bias)

    # ------------------------------------------------------------------ using
    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) float32 or bfloat16 -> (..., N) of the same dtype, or of autocast's."""
        kind = x.device.type
        if torch.is_autocast_enabled(kind):  # custom ops are not autocast
            x = x.to(torch.get_autocast_dtype(kind))
        if x.dtype not in (torch.float32, torch.bfloat16):
            raise TypeError(f"BitLinear: input must be float32 or bfloat16, got {x.dtype}")
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"BitLinear: input must be of shape (..., {self.in_features}), got {tuple(x.shape)}")
        if self._sync is not None and not torch.compiler.is_compiling():
            self._sync()
        if direct.possible(x):
            return direct.linear(self, x)
        planes: list[Tensor] = []
        control, position = self.control, None
        trains = self.scale.requires_grad
        keep = trains and torch.is_grad_enabled()
        if trains and self.training and not ops.votes_suspended():
            if self._latent is not None and keep:
                return dense_linear(x, self.weight, self.scale, self.bias, self._latent, control)[0]
            if self._planes is not None:
                planes = plane_list(self._planes)
                control = self._planes["control"]
                position = ops.position_of(control) if self._moves and keep else None
        return ops.linear(x, self.weight, self.scale, self.bias, self.out_features, keep, control, planes, position)[0]

    def attach(self, planes: dict[str, Tensor] | None, rule: str | None = None) -> None:
        """For optimizers: vote by `rule` into these planes, which stay the optimizer's, or into none."""
        self._planes, self._latent = planes, None
        self._moves = rule in _core.RULES_MOVING_IN_VOTE and planes is not None and "votes" not in planes

    def codes(self) -> Tensor:
        """The codes T, int8 (N, K), a copy."""
        shape = (self.out_features, self.in_features)
        return torch.from_numpy(_core.unpack(ops.array(self.weight), shape))

    def extra_repr(self) -> str:
        kind = "tensor" if self.scale.numel() == 1 else "row"
        names = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{names}, scale={kind!r}"

    # ------------------------------------------------------------------ moving, copying
    def _register(self) -> None:
        _layers[self.weight] = _layers[self.scale] = weakref.ref(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        scale = self.scale.detach()
        super()._apply(fn, recurse)
        if self.scale.dtype != torch.float32:  # .to(bfloat16), .half(): the scale is a training parameter
            self.scale.data = scale.to(self.scale.device)
            if self.scale.grad is not None:
                self.scale.grad = self.scale.grad.float()
        self._restore_codes()
        return self

    def _restore_codes(self) -> None:
        """After torch has rebuilt the Parameter: our class, and memory the kernels accept."""
        if type(self.weight) is not CodesParameter:
            self.weight = CodesParameter(self.weight.data)
        aligned = _aligned(self.weight.data)
        if aligned is not self.weight.data and aligned.data_ptr() != self.weight.data_ptr():
            self.weight.data = aligned
        self._register()

    def __getstate__(self) -> dict[str, Any]:
        gone = dict.fromkeys(("_planes", "_latent", "_sync", "_auto", "_views"))  # the optimizer's, not ours
        return self.__dict__ | gone

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._restore_codes()

    # ------------------------------------------------------------------ state_dict
    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight, scale = destination.pop(prefix + "weight"), destination.pop(prefix + "scale")
        n, k = self.out_features, self.in_features
        if scale.numel() != 1 or n % 4:
            destination[prefix + "weight_tile16"], destination[prefix + "scale"] = weight, scale
            return
        if weight.is_meta:
            rows = torch.empty((n // 4, k), dtype=torch.uint8, device="meta")
        else:
            rows = torch.from_numpy(_core.convert(ops.array(weight), (n, k), "tile16", "rows4"))
        loaded, inverse = self._inverse, 1 / scale.detach()
        if loaded is not None and torch.equal(1 / loaded, scale.detach()):
            inverse = loaded.clone()
        destination[prefix + "weight"], destination[prefix + "weight_scale"] = rows, inverse

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        try:
            inverse = self._decode(state_dict, prefix)
        except ValueError as error:
            error_msgs.append(f"{prefix[:-1] or 'BitLinear'}: {error}")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if inverse is not None:
            self._inverse = inverse
        self._restore_codes()

    def _decode(self, state_dict: dict[str, Any], prefix: str) -> Tensor | None:
        """Rewrite this layer's entries into `weight` (tile16) and `scale`; the inverse scale if there was one."""
        n, k = self.out_features, self.in_features
        rows, tiles = state_dict.pop(prefix + "weight", None), state_dict.pop(prefix + "weight_tile16", None)
        inverse, scale = state_dict.pop(prefix + "weight_scale", None), state_dict.pop(prefix + "scale", None)
        stored, form, shape = (rows, "rows4", (n // 4, k)) if tiles is None else (tiles, "tile16", tile16_shape(n, k))
        if stored is not None:
            if stored.dtype != torch.uint8 or stored.shape != shape or (form == "rows4" and n % 4):
                raise ValueError(f"the codes must be uint8 {tuple(shape)} for {form}, got {_text(stored)}")
            plane = ops.array(stored.contiguous())
            if form == "tile16":
                _core.validate(plane, (n, k), form)
            packed = torch.from_numpy(_core.convert(plane, (n, k), form, "tile16"))
            state_dict[prefix + "weight"] = CodesParameter(packed)
            self._start = None  # it belonged to other codes
        if inverse is not None:
            inverse = inverse.detach().to(torch.float32, copy=True).reshape(-1)
            scale = 1 / inverse
        if scale is not None:
            scale = scale.detach().to(torch.float32)
            if not bool((torch.isfinite(scale) & (scale > 0)).all()):
                raise ValueError("the scale must be finite and positive")
            state_dict[prefix + "scale"] = scale
        return inverse


def plane_list(planes: Mapping[str, Tensor]) -> list[Tensor]:
    """The planes of a layer in the order of the ops' `planes` argument."""
    return [planes[name] for name in ops.PLANES if name in planes]


def _absmean(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Float (N, K) -> tile16 codes and scale (1,), float32 with an exact inverse."""
    weight = weight.detach()
    if weight.dtype not in (torch.float32, torch.bfloat16):
        weight = weight.to(torch.float32)
    packed, scale = _core.absmean(ops.array(weight.contiguous()))
    return torch.from_numpy(packed), exact_inverse(torch.from_numpy(scale))


def _aligned(packed: Tensor) -> Tensor:
    """The plane itself if contiguous and 64-byte aligned (a memory map may not be), else a copy that is."""
    if packed.device.type != "cpu" or (packed.is_contiguous() and packed.data_ptr() % 64 == 0):
        return packed
    return packed.clone(memory_format=torch.contiguous_format)


def _text(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
