"""How much memory ternary layers keep between two steps, for any method, counted on the live tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .methods.shadow import ShadowLinear
from .nn import BitLinear


def ternary_layers(model: nn.Module) -> list[BitLinear | ShadowLinear]:
    """Every layer of the model that multiplies by ternary weights."""
    return [module for module in model.modules() if isinstance(module, (BitLinear, ShadowLinear))]


def weight_count(model: nn.Module) -> int:
    """Ternary weights of a model."""
    return sum(layer.in_features * layer.out_features for layer in ternary_layers(model))


def state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Bytes that live between two steps for the ternary layers of `model`: each storage once, of everything reachable
    from a layer and from what `optimizer` (or AutoFlip) holds for its parameters; gradients are not in it, nor vote
    planes, which hold something between micro-batches only."""
    layers = ternary_layers(model)
    owned = [optimizer.state.get(p) for layer in layers for p in layer.parameters()] if optimizer else []
    return _bytes([[vars(layer) for layer in layers], owned], skip="votes")


def training_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the whole training state now: parameters, buffers, gradients, optimizer state; no activations."""
    owners = [[vars(module) for module in model.modules()], [*optimizer.state.values()]]
    gradients = [tensor.grad for tensor in _tensors(owners) if tensor.is_leaf]
    return _bytes([owners, gradients])


def _bytes(owners: Any, skip: str = "") -> int:
    """Of every storage that is reachable from `owners`, once, but not by the name `skip`."""
    storages = (tensor.untyped_storage() for tensor in _tensors(owners, skip))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def bits_per_weight(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> float:
    """Persistent bits per ternary weight: `state_bytes` for each of `weight_count`; the figure a label claims."""
    return 8 * state_bytes(model, optimizer) / max(weight_count(model), 1)


def gradient_bytes(model: nn.Module) -> int:
    """Bytes of the ternary layers' gradients, after a backward."""
    return sum(
        tensor.grad.nbytes
        for layer in ternary_layers(model)
        for tensor in _tensors(vars(layer))
        if tensor.is_leaf and tensor.grad is not None
    )


def _tensors(value: Any, skip: str = "") -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors([item for name, item in value.items() if name != skip], skip)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item, skip)
