"""Swap the linear layers of a model for BitLinear, in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from onebit_ext import _core

from . import ops
from .auto import AutoFlip
from .nn import BitLinear

QUANTIZER_TRACES = ("hf_quantizer", "quantization_method", "_weight_conversions")


def replace_linear(
    model: nn.Module,
    skip: Sequence[str] = ("lm_head",),
    auto: bool = False,
    scale: str = "tensor",
    shadow: bool = False,
    **auto_options: Any,
) -> nn.Module:
    """Swap every linear layer of `model` for a BitLinear and return the model.

    Taken: `nn.Linear` (absmean of its weight), transformers' `BitLinear` and `AutoBitLinear`, onebitllms'
    `BitNetLinear`; our own layers stay.  A frozen `nn.Linear` gives a frozen layer.  What makes a Trainer refuse a
    packed model is cleared, and its config says what `save_pretrained` now writes: transformers' packed form.

    Args:
        skip: names, or last parts of dotted names, of layers left alone.
        auto: no optimizer argument anywhere: whatever torch optimizer owns the scales also flips the codes, see
            `AutoFlip`, which takes `auto_options`; the handle is `AutoFlip.of(model)`.
        scale: "tensor" or "row", for layers made from floats.
        shadow: a residual begins where its float weight was between two codes, w/s - T, instead of at 0: for floats
            that were trained as the shadow of ternary weights (a *prequantized* checkpoint).
    Raises ValueError, with the model unchanged, if a layer cannot be swapped or there is none.
    """
    if auto_options and not auto:
        raise TypeError(f"replace_linear: {sorted(auto_options)} only with auto=True")
    if scale not in ("tensor", "row"):
        raise ValueError(f"replace_linear: 'scale' must be 'tensor' or 'row', got {scale!r}")
    targets = dict(linear_layers(model, skip))
    if not targets and not any(isinstance(module, BitLinear) for module in model.modules()):
        raise ValueError("replace_linear: the model has no linear layer to swap")
    model = swap(model, targets, lambda module: convert(module, scale, shadow))
    if getattr(model, "is_quantized", False):
        model.is_quantized = False  # type: ignore[assignment]
    for trace in QUANTIZER_TRACES:
        if hasattr(model, trace):
            delattr(model, trace)
    _tell_config(model)
    if auto:
        AutoFlip(model, **auto_options)
    return model


def _tell_config(model: nn.Module) -> None:
    """The quantization_config that goes with the layers' state_dict, in a transformers model's config."""
    config: Any = getattr(model, "config", None)
    layers = [module for module in model.modules() if isinstance(module, BitLinear)]
    packable = all(layer.scale.numel() == 1 and layer.out_features % 4 == 0 for layer in layers)
    if hasattr(config, "to_json_string") and packable:
        floats = sorted(name for name, module in model.named_modules() if isinstance(module, nn.Linear))
        entry = {"quant_method": "bitnet", "modules_to_not_convert": floats or ["lm_head"]}
        config.quantization_config = entry


def swap(model: nn.Module, targets: dict[nn.Module, list[str]], make: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Put make(module) wherever module stood; one at a time, so that only one layer exists twice."""
    for old, names in targets.items():
        new = make(old).train(old.training)
        for name in names:
            if name:
                model.set_submodule(name, new)
            else:
                model = new
    return model


def linear_layers(model: nn.Module, skip: Sequence[str]) -> Iterator[tuple[nn.Module, list[str]]]:
    """The layers to swap, each with all its names; ValueError for one that cannot be."""
    names: dict[nn.Module, list[str]] = {}
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    for module, paths in names.items():
        for key, parameter in module.named_parameters(recurse=False):
            users.setdefault(id(parameter), []).append(f"{paths[0]}.{key}".lstrip("."))
    skip = tuple(skip)
    for module, paths in names.items():
        if not is_linear(module) or any(path == s or path.endswith("." + s) for path in paths for s in skip):
            continue
        where = f"replace_linear: layer {paths[0]!r}"
        tied = users.get(id(module.weight), [])
        if len(tied) > 1:
            raise ValueError(f"{where} shares its weight ({', '.join(tied)}); name it in 'skip'")
        if getattr(module, "rms_norm", None) is not None:
            raise ValueError(f"{where} has a norm inside (use_rms_norm), which BitLinear has not; name it in 'skip'")
        _check_weight(module, where)
        yield module, paths


def is_linear(module: nn.Module) -> bool:
    """One of the layers that `convert` takes.  Other subclasses of nn.Linear may be used in ways we do not know."""
    if isinstance(module, BitLinear):
        return False
    return type(module) is nn.Linear or type(module).__name__ in ("BitLinear", "AutoBitLinear", "BitNetLinear")


def _check_weight(module: Any, where: str) -> None:
    weight = module.weight.detach()
    if weight.is_meta:
        raise ValueError(f"{where} has no values yet (meta device)")
    if weight.dtype == torch.uint8:
        if not hasattr(module, "weight_scale") or weight.shape[0] * 4 != module.out_features:
            raise ValueError(f"{where} is not packed as transformers packs: {tuple(weight.shape)} uint8")
    elif not bool(torch.isfinite(weight).all()):
        raise ValueError(f"{where} has a non-finite weight")


def convert(module: Any, scale: str = "tensor", shadow: bool = False) -> BitLinear:
    """A BitLinear with the same function as one linear layer (see `replace_linear`)."""
    weight, bias = module.weight.detach(), module.bias
    if weight.dtype == torch.uint8:  # transformers BitLinear: row blocks, inverse scale
        shape = (module.out_features, module.in_features)
        packed = _core.convert(ops.array(weight.contiguous()), shape, "rows4", "tile16")
        inverse = module.weight_scale.detach().float().reshape(1)
        layer = BitLinear.from_packed(torch.from_numpy(packed), 1 / inverse, shape, bias)
        layer._inverse = inverse
        return layer
    if hasattr(module, "weight_scale"):  # AutoBitLinear offline: codes as floats; the scale multiplies the bias too
        value = module.weight_scale.detach().float().reshape(1)
        return BitLinear.from_codes(weight, value, None if bias is None else (bias.detach() * value).to(bias.dtype))
    layer = BitLinear.from_float(weight, bias, scale)
    if shadow and module.weight.requires_grad:
        between = weight.float() / layer.scale.detach()[:, None] - layer.codes()
        layer._start = (128 * between).round_().clamp_(-64, 64).to(torch.int8)
    layer.scale.requires_grad_(module.weight.requires_grad)
    if layer.bias is not None:
        layer.bias.requires_grad_(bias.requires_grad)
    return layer
