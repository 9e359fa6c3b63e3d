"""torch's float32, bfloat16 and dynamic int8 as contenders, on the same numbers as ours."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onebit_ext.tools.bench_timing import Contender
from onebit_ext.torch import BitLinear, FlipOptimizer

Array = np.ndarray[Any, Any]
DTYPES = {"torch f32": torch.float32, "torch bf16": torch.bfloat16}


class Rivals:
    """Makes contenders; torch's thread count is the caller's business (`set_threads`)."""

    no_grad = torch.no_grad

    @staticmethod
    def set_threads(threads: int) -> None:
        torch.set_num_threads(threads)

    @staticmethod
    def forward(x: Array, codes: Array, cold_bytes: int) -> Iterator[Contender]:
        """x (M, K), codes (N, K).  cold_bytes: cycle through copies of the weight with so many bytes in all."""
        macs = float(x.shape[0]) * codes.size
        for name, dtype in DTYPES.items():
            inputs, weight = torch.from_numpy(x).to(dtype), torch.from_numpy(codes).to(dtype)
            layers: list[Any] = [weight.clone() for _ in range(_copies(cold_bytes, weight.nbytes))]
            yield Contender(name, _each(partial(F.linear, inputs), layers), {"MAC": macs * len(layers)})
        layers = _dynamic_int8(codes, _copies(cold_bytes, codes.nbytes))
        if layers:
            inputs = torch.from_numpy(x)
            yield Contender("torch int8", _each(lambda layer: layer(inputs), layers), {"MAC": macs * len(layers)})

    @staticmethod
    def backward_input(dy: Array, codes: Array) -> Iterator[Contender]:
        """dy (M, N) times codes (N, K)."""
        for name, dtype in DTYPES.items():
            gradient, weight = torch.from_numpy(dy).to(dtype), torch.from_numpy(codes).to(dtype)
            out = torch.empty(dy.shape[0], codes.shape[1], dtype=dtype)
            yield _product(name, gradient, weight, out)

    @staticmethod
    def weight_gradient(dy: Array, x: Array) -> Iterator[Contender]:
        """dy (M, N) transposed times x (M, K)."""
        for name, dtype in DTYPES.items():
            gradient, inputs = torch.from_numpy(dy).to(dtype).t(), torch.from_numpy(x).to(dtype)
            out = torch.empty(dy.shape[1], x.shape[1], dtype=dtype)
            yield _product(name, gradient, inputs, out)

    @staticmethod
    def whole_step(x: Array, dy: Array, codes: Array) -> Iterator[Contender]:
        """nn.Linear forward and backward to input and weight, through autograd."""
        n, k = codes.shape
        for name, dtype in DTYPES.items():
            layer = nn.Linear(k, n, bias=False, dtype=dtype)
            layer.weight.data.copy_(torch.from_numpy(codes))
            run = _training(layer, torch.from_numpy(x).to(dtype), torch.from_numpy(dy).to(dtype))
            yield Contender(name, run, {"MAC": 3.0 * x.shape[0] * codes.size})

    @staticmethod
    def bitlinear(x: Array, dy: Array, packed: Array, training: bool) -> Callable[[], object]:
        """Our own module on the same codes in the same memory: the forward, to be run in `no_grad`, or forward and
        backward with an optimizer attached."""
        shape = (dy.shape[1], x.shape[1])
        layer = BitLinear.from_packed(torch.from_numpy(packed), torch.tensor([0.02]), shape)
        inputs, gradient = torch.from_numpy(x), torch.from_numpy(dy)
        if not training:
            layer.eval()
            return lambda: layer(inputs)
        optimizer = FlipOptimizer(layer.parameters(), lr=0.02)
        train = _training(layer, inputs, gradient)
        train()
        optimizer.step()  # the first step only measures
        turns = count(1)

        def run() -> None:
            train()
            if next(turns) % 1000 == 0:  # votes that nobody consumes are an error
                optimizer.step()

        return run


def _copies(cold_bytes: int, bytes_each: int) -> int:
    return math.ceil(cold_bytes / bytes_each) + 1 if cold_bytes else 1


def _each(call: Callable[[Any], object], layers: list[Any]) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            for layer in layers:
                call(layer)

    return run


def _product(name: str, a: Tensor, b: Tensor, out: Tensor) -> Contender:
    return Contender(name, lambda: torch.mm(a, b, out=out), {"MAC": float(a.shape[0]) * a.shape[1] * b.shape[1]})


def _training(layer: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], None]:
    x = x.detach().requires_grad_()

    def run() -> None:
        layer.zero_grad()
        x.grad = None
        layer(x).backward(dy)

    return run


def _dynamic_int8(codes: Array, copies: int) -> list[Any]:
    """torch's dynamically quantised Linear; empty where this torch no longer has it."""
    quantize = getattr(getattr(torch.ao, "quantization", None), "quantize_dynamic", None)
    if quantize is None:
        return []
    layer = nn.Linear(codes.shape[1], codes.shape[0], bias=False)
    layer.weight.data.copy_(torch.from_numpy(codes))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = [nn.Sequential(layer) for _ in range(copies)]
            layers = [quantize(m, {nn.Linear}, dtype=torch.qint8)[0] for m in model]
            layers[0](torch.zeros(1, codes.shape[1]))
        except RuntimeError:  # no quantised engine for this processor
            return []
    return layers
