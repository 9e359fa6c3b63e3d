"""The flip rules on a GPU, for runs that a CPU cannot make: bit for bit what the C core does, on dense tensors.

`EmulatedLinear` is a BitLinear of a tensor scale with one micro-batch a step; its backward votes and flips (in
emulation.cu), `Rules.step()` does what is left of a step for all layers at once.  Nothing waits for the device, so a
whole training step can be captured as one CUDA graph.  On a CPU the same source is compiled as C: that is how the tests
compare it.
"""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from onebit_ext import _core

from ..planes import default_betas

SOURCE = Path(__file__).with_name("emulation.cu")
CONTROL = _core.CONTROL
CONTROL_LEN = 48  # onebit.h's fields, then the mean of R at 32 and the keys of the random streams from 40
TOKENS, ROWS, STRIP = 16, 256, 64  # as in emulation.cu
CODES_ONLY = -1  # residual bits of an arm whose codes stay


class _Arguments(ctypes.Structure):
    _fields_ = [("p", ctypes.c_void_p * 16), ("n", ctypes.c_int64 * 12)]


@functools.cache
def library(kind: str) -> ctypes.CDLL:
    """emulation.cu compiled for tensors of device type `kind`, "cuda" or "cpu"; OSError names a missing compiler."""
    target = Path(tempfile.mkdtemp(prefix="onebit-emulation-")) / "emulation.so"
    if kind == "cuda":
        major, minor = torch.cuda.get_device_capability()
        command = ["nvcc", f"-arch=sm_{major}{minor}", "-O3", "-fmad=false", "-Xcompiler", "-fPIC"]
    else:
        compiler = os.environ.get("CC", str(sysconfig.get_config_var("CC"))).split()
        command = [*compiler, "-x", "c", "-O2", "-ffp-contract=off", "-fPIC"]
    subprocess.run([*command, "-shared", "-o", str(target), str(SOURCE), "-lm"], check=True)
    return ctypes.CDLL(str(target))


def launch(name: str, count: int, pointers: Sequence[Tensor | None], numbers: Sequence[int] = ()) -> None:
    """Run kernel `name` for `count` pieces on the device of the first tensor."""
    device = next(tensor.device for tensor in pointers if tensor is not None)
    arguments = _Arguments()
    for i, tensor in enumerate(pointers):
        arguments.p[i] = 0 if tensor is None else tensor.data_ptr()
    for i, number in enumerate(numbers):
        arguments.n[i] = int(number)
    stream = torch.cuda.current_stream().cuda_stream if device.type == "cuda" else 0
    status = getattr(library(device.type), f"launch_{name}")(
        ctypes.byref(arguments), ctypes.c_int64(count), ctypes.c_void_p(stream)
    )
    if status:
        raise RuntimeError(f"emulation kernel {name} failed to start: CUDA error {status}")


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """int8 (M, L) by int8 (N, L) -> int32 (M, N), exact."""
    if a.is_cuda:
        return torch._int_mm(a, b.t())
    return (a.double() @ b.double().t()).int()  # below 2^53: exact too


def absmax(x: Tensor) -> Tensor:
    """(M, L) -> float32 (M,)."""
    return torch.linalg.vector_norm(x, float("inf"), -1).float()


def tokens_of(x: Tensor) -> Tensor:
    """(..., K) -> (M, K), in autocast's dtype; M must be a multiple of 16."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    if len(flat) % TOKENS:
        raise ValueError(f"the emulation takes tokens by the {TOKENS}, got {len(flat)}")
    return flat


class Rule:
    """A flip rule's name and widths, or None for codes that stay."""

    def __init__(self, name: str | None, stripes: int = 1) -> None:
        self.name, self.stripes = name, stripes
        if name is None:
            self.bits, self.momentum, self.units, self.half_zones = CODES_ONLY, 0, 1, 0
            return
        spec = _core.rule_spec(name)
        self.bits, self.momentum, self.units = spec["residual_bits"], spec["momentum_bits"], spec["units"]
        self.half_zones = round(2 * spec["dead_zone"])  # in halves of u


class EmulatedLinear(nn.Module):
    """y = x W^T, W = s * T; x (..., K) float32 or bfloat16.  `codes` int8 (N, K) and its transpose `turned`."""

    def __init__(self, codes: Tensor, scale: float, rule: Rule, layer: int, **options: Any) -> None:
        super().__init__()
        n, k = codes.shape
        if k % STRIP or n % (8 * rule.stripes):
            raise ValueError(f"EmulatedLinear: N must be a multiple of {8 * rule.stripes} and K of 64, got {(n, k)}")
        device, rows = codes.device, n // rule.stripes
        self.rule, self.layer, self.rows, self.out_features, self.in_features = rule, layer, rows, n, k
        self.scale = nn.Parameter(torch.tensor([scale], device=device, dtype=torch.float32))
        self.codes = codes.to(torch.int8, copy=True).contiguous()
        self.turned = self.codes.t().contiguous()
        control = np.zeros(CONTROL_LEN)
        options = {"betas": default_betas(rule.name)} | options
        control[: len(CONTROL)] = _core.new_control(layer=layer, scale_init=scale, **options)
        control[CONTROL["stripes"]] = rule.stripes
        self.control = torch.from_numpy(control).to(device)
        self.residual = torch.zeros(rows, k, dtype=torch.int16, device=device)
        self.momentum = torch.zeros(rows, k if rule.momentum else 0, dtype=torch.int8, device=device)
        self.momentum_scale = torch.zeros(rows, k // STRIP if rule.momentum else 0, device=device)
        self.row_factor, self.col_factor = torch.zeros(rows, device=device), torch.zeros(k, device=device)
        self.products = torch.zeros(rows, dtype=torch.int64, device=device)
        self.hs, self.ds = torch.zeros(rows, device=device), torch.zeros(1, device=device)
        self.moments, self.moved = torch.zeros(2, device=device), torch.zeros(1, dtype=torch.int32, device=device)
        self.start_residual()
        launch("begin", 1, [self.control])

    def start_residual(self) -> None:
        """As `ob_start_residual`: from the C core's own plane, unpacked."""
        if self.rule.name is None or (self.rule.name != "byte" and self.rule.bits not in (4, 2)):
            self.residual.zero_()
            return
        if self.rule.name == "byte":
            self.residual.copy_(85 * self.codes.to(torch.int16))
            return
        seed = int(self.control[CONTROL["seed"]])
        plane = _core.new_planes(self.rows, self.in_features, self.rule.name, seed=seed, layer=self.layer)["residual"]
        fields, bits = plane.reshape(self.rows, -1, 8 * self.rule.bits).view(np.uint8), self.rule.bits
        parts = [(fields >> shift & (2**bits - 1)).astype(np.int16) for shift in range(0, 8, bits)]
        values = np.concatenate(parts, -1).reshape(self.rows, -1)
        self.residual.copy_(torch.from_numpy(np.where(values >= 2 ** (bits - 1), values - 2**bits, values)))

    def forward(self, x: Tensor) -> Tensor:
        flat = tokens_of(x)
        return _Product.apply(flat, self.scale, self).view(*x.shape[:-1], self.out_features)

    def quantized(self, x: Tensor, keep: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        """x (M, K) -> xq (M, K), its transpose if wanted, sx (M,)."""
        m, k = x.shape
        xq, sx = x.new_empty((m, k), dtype=torch.int8), x.new_empty((m,), dtype=torch.float32)
        turned = x.new_empty((k, m), dtype=torch.int8) if keep else None
        launch("quantize_tokens", k * m // TOKENS, [x, absmax(x), xq, turned, sx], [m, k, x.dtype == torch.bfloat16])
        return xq, turned, sx

    def product(self, x: Tensor, keep: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        """y (M, N) of x's dtype and what the backward needs."""
        xq, turned, sx = self.quantized(x, keep)
        return scaled(multiply(xq, self.codes), sx, self.scale, x.dtype), turned, sx

    def input_gradient(self, dy: Tensor) -> Tensor:
        """dx (M, K)."""
        m, n = dy.shape
        codes, d = torch.empty_like(dy, dtype=torch.int8), dy.new_empty((m,), dtype=torch.float32)
        pointers = [dy, absmax(dy), self.scale, codes, d, self.control]
        launch("round_tokens", m * n // 8, pointers, [n, dy.dtype == torch.bfloat16])
        return scaled(multiply(codes, self.turned), d, None, dy.dtype)

    def vote(self, dy: Tensor, turned: Tensor, sx: Tensor) -> None:
        """The weight side of a step's backward, and its flips."""
        (m, n), k, rows, rule = dy.shape, self.in_features, self.rows, self.rule
        bf16, strips, blocks = dy.dtype == torch.bfloat16, self.in_features // STRIP, -(-self.rows // ROWS)
        tops = dy.new_zeros((rows,), dtype=torch.int32)
        hq = dy.new_empty((rows, m), dtype=torch.int8)
        launch("outputs_absmax", rows * -(-m // STRIP), [dy, sx, tops, self.control], [m, n, bf16, rows])
        pointers = [dy, sx, tops, self.control, hq, self.hs]
        launch("round_outputs", rows * m // TOKENS, pointers, [m, n, bf16, rows])
        acc = multiply(hq, turned)
        squares, columns = self.hs.new_empty((strips, rows)), self.hs.new_empty((blocks, k))
        products = self.hs.new_empty((strips, rows), dtype=torch.int64)
        sizes = [n, k, rows]
        launch("column_squares", blocks * k, [acc, self.hs, self.scale, self.control, columns], sizes)
        pointers = [acc, self.hs, self.scale, self.control, self.row_factor, self.col_factor, self.codes, self.turned]
        pointers += [self.residual, self.momentum, self.momentum_scale, squares, products, self.moved]
        launch(
            "vote_strip",
            rows * strips,
            pointers,
            [*sizes, rule.bits, rule.momentum, rule.units, rule.half_zones],
        )
        pointers = [squares, self.row_factor, self.control, products, self.products]
        launch("collect", rows, pointers, [rows, strips, k])
        launch("collect", k, [columns, self.col_factor, self.control, None, None], [k, blocks, rows])

    def table(self) -> list[int]:
        """Addresses of what `finish_step` reads and writes."""
        tensors = (self.control, self.row_factor, self.products, self.hs, self.scale, self.moments, self.moved, self.ds)
        return [tensor.data_ptr() for tensor in tensors]


def scaled(acc: Tensor, sx: Tensor, s: Tensor | None, dtype: torch.dtype) -> Tensor:
    """float(acc) * (sx * s) in `dtype`."""
    y = torch.empty_like(acc, dtype=dtype)
    launch("scale_outputs", acc.numel() // 4, [acc, sx, s, y], [acc.shape[1], dtype == torch.bfloat16])
    return y


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, layer: EmulatedLinear) -> Tensor:
        keep = any(ctx.needs_input_grad)
        y, turned, sx = layer.product(x, keep)
        ctx.layer = layer
        if keep:
            ctx.save_for_backward(turned, sx)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        dy = dy.contiguous()
        dx = ctx.layer.input_gradient(dy) if ctx.needs_input_grad[0] else None  # before codes move
        ctx.layer.vote(dy, *ctx.saved_tensors)
        return dx, None, None


class Rules:
    """The rest of a step for all layers: factors are done, here guard, counters, keys, and Adam on the scales."""

    def __init__(self, layers: Sequence[EmulatedLinear]) -> None:
        self.layers = list(layers)
        device = layers[0].codes.device
        self._table = torch.tensor([layer.table() for layer in layers], device=device)
        self._sizes = torch.tensor([[layer.rows, layer.in_features] for layer in layers], device=device)
        self.rates = torch.zeros(2, dtype=torch.float64, device=device)  # eta of the next step, scale's lr of this one

    def set_eta(self, eta: float) -> None:
        """Of the first step."""
        for layer in self.layers:
            layer.control[CONTROL["eta"]] = eta

    def step(self) -> None:
        """After the backward; `rates` says the learning rates."""
        launch("finish_step", len(self.layers), [self._table, self._sizes, self.rates], [1])

    def rotate(self) -> None:
        """The next stripe of a block-cyclic rule: it measures first, and nothing of the last one counts."""
        for layer in self.layers:
            control = layer.control
            control[CONTROL["stripe"]] = (control[CONTROL["stripe"]] + 1) % layer.rule.stripes
            control[CONTROL["step"]] = control[CONTROL["moved"]] = 0
            layer.start_residual()
            launch("begin", 1, [control])

    def flip_rate(self) -> Tensor:
        """Share of codes that the last step moved, (1,), without waiting for the device."""
        moved = torch.stack([layer.control[CONTROL["moved"]] for layer in self.layers]).sum()
        return moved / sum(layer.codes.numel() for layer in self.layers)
