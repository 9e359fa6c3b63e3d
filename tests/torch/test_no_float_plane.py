"""No float of the weight's shape exists during a training step, and little lives between steps.

M, N and K all differ and M is the smallest, so that an activation is never as large as the weight.  Each detector is
shown to see the float plane of the hybrid recipe.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from onebit_ext import _core
from onebit_ext.torch import BitLinear, FlipOptimizer, prepare

M, N, K = 48, 640, 576


class Outputs(TorchDispatchMode):
    """Most elements of a float tensor that any operator returned."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                self.largest = max(self.largest, tensor.numel())
        return out


def operators(step: Callable[[], None]) -> int:
    with Outputs() as outputs:
        step()
    return outputs.largest


def saved_tensors(step: Callable[[], None]) -> int:
    largest = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal largest
        if tensor.is_floating_point():
            largest = max(largest, tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return largest


def torch_memory(step: Callable[[], None]) -> int:
    """Largest block that torch's allocator gave out, also inside operators; in floats of two bytes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    sizes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert sizes
    return max(sizes) // 2


def python_memory(step: Callable[[], None]) -> int:
    """Peak of Python and NumPy allocations."""
    tracemalloc.start()
    step()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak // 2


def core_memory(step: Callable[[], None]) -> int:
    """Largest block of the C core."""
    _core.reset_peak_memory()
    step()
    return int(_core.memory()["largest"]) // 2


def training_step(**options: Any) -> Callable[[], None]:
    model, optimizer = prepare(nn.Sequential(nn.Linear(K, N), nn.Tanh(), nn.Linear(N, 9)), **options)
    x = torch.randn(M, K, requires_grad=True)

    def step() -> None:
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # the first makes state
    return step


DETECTORS = [operators, saved_tensors, torch_memory, python_memory, core_memory]


WAYS: list[dict[str, Any]] = [
    *({"rule": rule} for rule in _core.RULES),
    {"stripes": 2, "stripe_steps": 2},
    {"stripes": 3, "stripe_steps": 1, "rule": "residual4"},
    {"method": "frozen"},
]


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("detector", DETECTORS)
def test_no_float_of_the_weights_shape(detector: Callable[[Callable[[], None]], int], options: dict[str, Any]) -> None:
    step = training_step(**options)
    for _ in range(2):
        assert detector(step) < N * K


@pytest.mark.parametrize("detector", [operators, saved_tensors, torch_memory])
def test_the_detectors_see_a_float_plane(detector: Callable[[Callable[[], None]], int]) -> None:
    model = nn.Linear(K, N)
    x = torch.randn(M, K, requires_grad=True)

    def dense() -> None:
        (model(x) @ (model.weight * 1.0)).sum().backward()

    assert detector(dense) >= N * K


def test_the_detectors_outside_torch_see_a_plane() -> None:
    held: list[Any] = []
    assert python_memory(lambda: held.append(bytearray(N * K * 2))) >= N * K
    assert core_memory(lambda: held.append(_core.empty((N, K), "float32"))) >= N * K


@pytest.mark.parametrize(("n", "k"), [(512, 512), (512, 1536), (768, 640)])
@pytest.mark.parametrize(("scale", "extra"), [("tensor", 0.35), ("row", 0.55)])
@pytest.mark.parametrize(("recipe", "bits"), [("finetune", 10), ("pretrain", 14.25)])
def test_live_training_state(n: int, k: int, scale: str, extra: float, recipe: str, bits: float) -> None:
    """Everything that lives between two steps, from the live arrays: 10.34 bits a weight at 512 x 512."""
    layer = BitLinear(k, n, scale=scale)
    optimizer = FlipOptimizer(layer, recipe=recipe)
    for _ in range(2):
        layer(torch.randn(3, k)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    state = [*optimizer.state[layer.weight].values(), *optimizer.state[layer.scale].values()]
    live = [layer.weight, layer.scale, layer.control, *state]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in live}
    assert bits < 8 * sum(storages.values()) / (n * k) <= bits + extra
