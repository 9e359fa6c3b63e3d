"""The GPU emulation of the study computes what the C core computes: every rule, bit for bit, here compiled as C."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from onebit_ext import _core
from onebit_ext.torch.study import emulation
from onebit_ext.torch.study.emulation import EmulatedLinear, Rule, Rules

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
M, N, K = 80, 320, 192  # N beyond one block of 256 rows
OPTIONS: dict[str, Any] = {"seed": 5, "clip": 2.5, "betas": (0.8, 0.9)}
ETAS = [0.6, 0.6, 0.7, 0.5, 0.4, 0.3]
CASES = [(rule, 1) for rule in _core.RULES] + [("residual8", 2), ("residual8", 4)]


def cap(rule: str, stripes: int) -> float:
    """A stripe or a momentum has too few steps here for what the guard leaves of ETAS."""
    return 0.04 if stripes == 1 and "momentum" not in rule else 0


def tensors(step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(M, K, generator=generator)
    dy = torch.randn(M, N, generator=generator) * torch.rand(N, generator=generator) * 1e-3
    dy[:, 7] = 0  # an output without a gradient
    return x.to(dtype), dy.to(dtype)


def array(tensor: Tensor) -> np.ndarray[Any, Any]:
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


class Core:
    """The same layer through the C core."""

    def __init__(self, codes: Tensor, scale: float, rule: str, stripes: int) -> None:
        self.packed, self.scale = _core.pack(codes.numpy()), np.array([scale], np.float32)
        self.rule, self.stripes, self.stripe = rule, stripes, 0
        self.planes = self.new_planes()
        self.moments = np.zeros(1, np.float32), np.zeros(1, np.float32)

    def new_planes(self) -> dict[str, Any]:
        options = OPTIONS | {"packed": self.packed, "layer": 3, "eta": ETAS[0], "scale_init": float(self.scale[0])}
        options |= {"stripes": self.stripes, "stripe": self.stripe, "cap": cap(self.rule, self.stripes)}
        return _core.new_planes(N, K, self.rule, **options)

    def step(self, x: Tensor, dy: Tensor, next_eta: float) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        control, ds = self.planes["control"], np.zeros(1, np.float32)
        xq, sx = np.empty((M, K), np.int8), np.empty(M, np.float32)
        y = _core.linear_forward(array(x), self.packed, self.scale, N, xq=xq, sx=sx)
        dx = _core.linear_backward_input(array(dy), self.packed, self.scale, K, control.copy())
        _core.vote(array(dy), xq, sx, self.packed, self.scale, K, self.planes, ds=ds)
        _core.scale_step(self.scale, ds, *self.moments, control, 0.01)
        _core.flip(self.packed, self.planes)
        control[_core.CONTROL["eta"]] = next_eta
        return y, dx

    def rotate(self) -> None:
        old, self.stripe = self.planes["control"], (self.stripe + 1) % self.stripes
        self.planes = self.new_planes()
        control = self.planes["control"]
        for name in ("guard", "eta", "eta_peak", "beta1_power", "beta2_power", "scale_init"):
            control[_core.CONTROL[name]] = old[_core.CONTROL[name]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rule", "stripes"), CASES)
def test_equals_the_core(rule: str, stripes: int, dtype: torch.dtype, device: str) -> None:
    codes = torch.randint(-1, 2, (N, K), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    core = Core(codes, 0.37, rule, stripes)
    options = OPTIONS | {"eta": ETAS[0], "cap": cap(rule, stripes)}
    layer = EmulatedLinear(codes.to(device), 0.37, Rule(rule, stripes), 3, **options)
    rules = Rules([layer])
    for step, eta in enumerate([*ETAS[1:], 0.02]):
        x, dy = tensors(step, dtype)
        y, dx = core.step(x, dy, eta)
        leaf = x.to(device).requires_grad_()
        out = layer(leaf)
        out.backward(dy.to(device))
        rules.rates.copy_(torch.tensor([eta, 0.01], dtype=torch.float64))
        rules.step()
        assert np.array_equal(array(out.detach().cpu()), y) and np.array_equal(array(leaf.grad.cpu()), dx)  # type: ignore[union-attr]
        assert np.array_equal(layer.codes.cpu().numpy(), _core.unpack(core.packed, (N, K)))
        assert np.array_equal(layer.turned.cpu().numpy(), layer.codes.cpu().numpy().T)
        assert np.array_equal(layer.row_factor.cpu().numpy(), core.planes["row_factor"])
        assert np.array_equal(layer.col_factor.cpu().numpy(), core.planes["col_factor"])
        assert np.array_equal(layer.scale.detach().cpu().numpy(), core.scale)
        theirs = layer.control.cpu().numpy()
        for name in ("step", "eta", "eta_peak", "guard", "moved", "stripe", "beta1_power", "beta2_power"):
            index = _core.CONTROL[name]
            assert theirs[index] == core.planes["control"][index], (step, name)
        if stripes > 1 and step % 3 == 2:
            core.rotate()
            rules.rotate()
    assert not np.array_equal(_core.unpack(core.packed, (N, K)), codes.numpy())


def test_the_fields_are_those_of_the_header() -> None:
    names = emulation.SOURCE.read_text().split("enum { SEED", 1)[1].split("}")[0].replace("\n", " ")
    ours = ["seed"] + [name.strip().lower() for name in names.split(",") if name.strip()]
    short = {"energy": "sketch_energy", "power1": "beta1_power", "power2": "beta2_power"}
    assert [short.get(name, name) for name in ours] == list(_core.CONTROL)
