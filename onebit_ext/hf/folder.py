"""A checkpoint folder read by ourselves: config.json and safetensors, one layer in memory at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from onebit_ext import CheckpointError, absmean, convert, pack, unpack, validate
from onebit_ext.torch.ops import array

from .config import DIRECT, FLOAT, PACKED, read_form, read_json

Packed = NDArray[np.uint8]
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Linear:
    """One ternary layer: W = s T, y = x W^T + bias.

    packed: the codes T (N, K) in `packing`.  scale: effective s, float32 (1,) or (N,).  inverse: 1/s as it was stored,
    float32 (1,), or None.  scale_dtype: what holds the stored scale exactly.  bias: effective, float32 (N,), or None;
    bias_dtype: what it was stored in.
    """

    name: str
    shape: tuple[int, int]
    packing: str
    packed: Packed
    scale: Tensor
    inverse: Tensor | None = None
    scale_dtype: torch.dtype = torch.float32
    bias: Tensor | None = None
    bias_dtype: torch.dtype = torch.float32

    def to(self, packing: str) -> Packed:
        """The codes in another packing; ValueError if the shape has none."""
        return self.packed if packing == self.packing else convert(self.packed, self.shape, self.packing, packing)

    def inverse_scale(self) -> Tensor:
        """1/s, float32: the stored one to the bit if there was one."""
        return 1 / self.scale if self.inverse is None else self.inverse

    def shares(self) -> tuple[float, float, float]:
        """Shares of -1, 0 and +1 among the codes."""
        codes = unpack(self.packed, self.shape, self.packing)
        counts = [int(np.count_nonzero(codes == value)) for value in (-1, 0, 1)]
        return tuple(count / max(codes.size, 1) for count in counts)  # type: ignore[return-value]


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: file, safetensors dtype, shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


class Folder:
    """A transformers checkpoint folder with ternary layers, or with floats that absmean makes ternary.

    config: config.json.  form: how the layers are stored.  tensors: every tensor.  linears: names of the ternary
    layers.  others: names of the tensors that belong to none of them.  dtype: the model's.  Raises CheckpointError if
    the folder is incomplete or contradicts itself; layers are checked when they are read.

    skip: names (patterns) of modules that stay floats, instead of the config's.
    """

    def __init__(self, path: str | os.PathLike[str], skip: Sequence[str] | None = None) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise CheckpointError(f"{self.path}: no such folder; to fetch one: hf download NAME --local-dir FOLDER")
        self.config = read_json(self.path / "config.json")
        self.tensors = dict(sorted(_scan(self.path).items()))
        scaled = [name.removesuffix(".weight_scale") for name in self.tensors if name.endswith(".weight_scale")]
        self.form = read_form(self.config, bool(scaled), skip)
        self.linears = tuple(scaled if self.form.packed else filter(self._is_linear, self._modules()))
        if not self.linears:
            raise CheckpointError(f"{self.path}: holds no linear layer in a numbered block, nothing to make ternary")
        own = {f"{name}.{part}" for name in self.linears for part in ("weight", "weight_scale", "bias")}
        self.others = tuple(name for name in self.tensors if name not in own)
        stray = [name for name in self.others if self.tensors[name].dtype not in FLOATS]
        if stray:
            entry = self.tensors[stray[0]]
            raise CheckpointError(f"tensor {stray[0]!r} is {entry.dtype} {entry.shape} and has no weight_scale")
        self.dtype = self._dtype()

    def _modules(self) -> list[str]:
        return [name.removesuffix(".weight") for name in self.tensors if name.endswith(".weight")]

    def _is_linear(self, module: str) -> bool:
        """A 2-d weight in a numbered block, which embeddings and heads are not."""
        blocks = any(part.isdigit() for part in module.split("."))
        return blocks and len(self.tensors[f"{module}.weight"].shape) == 2 and not self.form.skips(module)

    def _dtype(self) -> torch.dtype:
        """The model's: config.json's `dtype` (older: `torch_dtype`)."""
        name = self.config.get("dtype", self.config.get("torch_dtype")) or "float32"
        dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
        if name not in dtypes:
            raise CheckpointError(f"config.json: dtype must be one of {', '.join(dtypes)}, got {name!r}")
        return dtypes[name]

    def tensor(self, name: str) -> Tensor:
        """A copy of one tensor as stored."""
        with _open(self.tensors[name].file) as file:
            return file.get_tensor(name).clone()

    def linear(self, name: str) -> Linear:
        """One ternary layer; CheckpointError names the layer and what is wrong with it."""
        entry = self.tensors.get(f"{name}.weight")
        if entry is None or len(entry.shape) != 2:
            raise CheckpointError(f"layer {name!r}: there must be a 2-d weight, got {entry and entry.shape}")
        bias = self.tensor(f"{name}.bias") if f"{name}.bias" in self.tensors else None
        try:
            layer = self._packed(name) if self.form.packed else self._from_floats(name)
            return layer if bias is None else _with_bias(layer, bias, scaled=self.form.kind == DIRECT)
        except ValueError as error:
            raise CheckpointError(f"layer {name!r}: {error}") from None

    def _packed(self, name: str) -> Linear:
        weight, stored = self.tensor(f"{name}.weight"), self.tensor(f"{name}.weight_scale")
        value = stored.float().reshape(-1)
        if stored.numel() != 1 or not stored.is_floating_point() or not bool(torch.isfinite(value) & (value > 0)):
            raise ValueError(f"weight_scale must be one finite positive float, got {stored.dtype} {stored.tolist()}")
        if weight.dtype == torch.uint8:
            packing, packed, shape = "rows4", weight.numpy(), (weight.shape[0] * 4, weight.shape[1])
            if packed.size and not packed.any():
                raise ValueError("every byte of the weight is zero, which is a failed download; fetch the file again")
        elif self.form.kind == DIRECT and weight.is_floating_point():
            packing, packed, shape = "tile16", _pack_floats(weight), (weight.shape[0], weight.shape[1])
        else:
            raise ValueError(f"the weight must be uint8 codes, got {weight.dtype}")
        validate(packed, shape, packing)
        if self.form.kind == PACKED:
            return Linear(name, shape, packing, packed, 1 / value, value, stored.dtype)
        return Linear(name, shape, packing, packed, value, None, stored.dtype)

    def _from_floats(self, name: str) -> Linear:
        weight = self.tensor(f"{name}.weight")
        n, k = weight.shape
        if not weight.is_floating_point():
            raise ValueError(f"the weight must be floats, got {weight.dtype}")
        exact = _exact_scale(weight) if self.form.kind == FLOAT else None
        if exact is None:
            packed, scale = absmean(array(weight if weight.dtype == torch.bfloat16 else weight.float()))
            return Linear(name, (n, k), "tile16", packed, torch.from_numpy(scale))
        return Linear(name, (n, k), "tile16", _pack_floats(weight / exact), exact.reshape(1).float())


def _with_bias(layer: Linear, bias: Tensor, scaled: bool) -> Linear:
    """The layer with its effective bias; autobitlinear multiplies the stored one by s too."""
    if bias.shape != (layer.shape[0],) or not bias.is_floating_point():
        raise ValueError(f"bias must be floats ({layer.shape[0]},), got {bias.dtype} {tuple(bias.shape)}")
    effective = bias.float() * layer.scale if scaled else bias.float()
    fields = layer.__dict__ | {"bias": effective, "bias_dtype": bias.dtype}
    return Linear(**fields)


def _exact_scale(weight: Tensor) -> Tensor | None:
    """s if the floats are s T already (a dequantised export, not latent weights), else None."""
    scale = weight.abs().max()
    if scale == 0 or not bool(torch.isfinite(scale)):
        return None
    return scale if bool(((weight == 0) | (weight.abs() == scale)).all()) else None


def _pack_floats(codes: Tensor) -> Packed:
    """Floats in {-1, 0, 1} (N, K) -> tile16."""
    signs = codes.to(torch.int8)
    if not torch.equal(signs.to(codes.dtype), codes):
        raise ValueError("the weight must hold -1, 0 and 1 only")
    return pack(signs.contiguous().numpy())


# ------------------------------------------------------------------ files
def _open(path: Path) -> Any:
    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error})") from None


def _scan(folder: Path) -> dict[str, Entry]:
    """Every tensor of the folder's index, or of its only safetensors file."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        if not (folder / "model.safetensors").exists():
            pickles = " (pickles are not read; save it as safetensors)" if any(folder.glob("*.bin")) else ""
            raise CheckpointError(f"{folder}: there must be model.safetensors or its index{pickles}")
        return _entries(folder / "model.safetensors")
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(shard, str) for shard in where.values()):
        raise CheckpointError(f"{index}: weight_map must map tensors to files")
    tensors: dict[str, Entry] = {}
    for shard in sorted(set(where.values())):
        if Path(shard).name != shard:
            raise CheckpointError(f"{index}: {shard!r} lies outside the folder")
        if not (folder / shard).is_file():
            raise CheckpointError(f"{index}: names {shard!r}, which is not there; the download is incomplete")
        found = _entries(folder / shard)
        wrong = [name for name in found if where.get(name) != shard] + [
            name for name, file in where.items() if file == shard and name not in found
        ]
        if wrong:
            raise CheckpointError(f"{index}: does not agree with {shard} about tensor {wrong[0]!r}")
        tensors |= found
    return tensors


def _entries(path: Path) -> dict[str, Entry]:
    with _open(path) as file:
        views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        return {name: Entry(path, view.get_dtype(), tuple(view.get_shape())) for name, view in views.items()}


def nbytes(entry: Entry) -> int:
    """Bytes of a tensor in its file."""
    sizes = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}
    return math.prod(entry.shape) * sizes.get(entry.dtype, 1)
