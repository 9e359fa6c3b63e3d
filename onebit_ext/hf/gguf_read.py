"""The header of a GGUF file, and the ternary tensors in it (I2_S too, which the gguf package does not know)."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from onebit_ext import CheckpointError

from .folder import Linear

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
TYPES = {0: "F32", 1: "F16", 8: "Q8_0", 14: "Q6_K", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 36: "I2_S"}
BLOCKS = {34: ("tq1_0", 256, 54), 35: ("tq2_0", 256, 66), 36: ("i2_s", 128, 32)}
MAX_DIMS, MAX_DEPTH = 4, 4


class Tensor(NamedTuple):
    """Name, shape as NumPy has it (rows first), ggml's type number, offset of the bytes in the file."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


class GGUFFile:
    """keys: the metadata.  tensors: what the file holds.  Raises CheckpointError for a torn or foreign file."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.data = np.memmap(self.path, np.uint8, "r") if self.path.stat().st_size else np.zeros(0, np.uint8)
        self.at = 0
        magic, version = bytes(self._take(4)), self._scalar("I")
        if magic != b"GGUF" or version not in (2, 3):
            raise CheckpointError(f"{path}: must begin with GGUF, version 2 or 3, got {magic!r}, version {version}")
        tensors, keys = self._scalar("Q"), self._scalar("Q")
        self.keys = dict(self._times(keys, lambda: (self._string(), self._value(self._scalar("I"), 0))))
        infos = self._times(tensors, self._info)
        alignment = self.keys.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise CheckpointError(f"{path}: general.alignment must be a positive integer, got {alignment!r}")
        start = -(-self.at // alignment) * alignment
        self.tensors = [info._replace(offset=start + info.offset) for info in infos]

    def linear(self, tensor: Tensor) -> Linear | None:
        """A ternary tensor as a layer (rows of q and k as ggml orders them); None for another type."""
        if tensor.type not in BLOCKS or len(tensor.shape) != 2:
            return None
        packing, block, size = BLOCKS[tensor.type]
        n, k = tensor.shape
        if k % block:
            raise CheckpointError(f"tensor {tensor.name!r}: rows of {k} are no multiple of {block}")
        self.at = tensor.offset
        packed = np.array(self._take(n * (k // block) * size))
        if packing == "i2_s":
            scale = np.frombuffer(bytes(self._take(4)), "<f4")
        else:  # per block; ours are equal along a row
            d = np.ascontiguousarray(packed.reshape(n, -1, size)[..., -2:]).view("<f2").astype(np.float32)
            scale = d.reshape(n, -1).max(axis=1) if d.size else np.ones(n, np.float32)
            scale = scale[:1] if (scale == scale[:1]).all() else scale
        return Linear(tensor.name, (n, k), packing, packed, torch.from_numpy(np.array(scale, np.float32)))

    # ------------------------------------------------------------------ parsing
    def _take(self, count: int) -> np.ndarray[Any, Any]:
        if count > self.data.size - self.at:
            raise CheckpointError(f"{self.path}: ends at byte {self.data.size}, more was promised; fetch it again")
        self.at += count
        return self.data[self.at - count : self.at]

    def _scalar(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", bytes(self._take(struct.calcsize(f"<{kind}"))))[0]

    def _string(self) -> str:
        return bytes(self._take(self._scalar("Q"))).decode("utf-8", "replace")

    def _times(self, count: int, read: Callable[[], Any]) -> list[Any]:
        if count > self.data.size - self.at:  # every entry takes a byte at least
            raise CheckpointError(f"{self.path}: {count} entries cannot fit into the file")
        return [read() for _ in range(count)]

    def _value(self, kind: int, depth: int) -> Any:
        if kind in SCALARS:
            return self._scalar(SCALARS[kind])
        if kind == STRING:
            return self._string()
        if kind == ARRAY and depth < MAX_DEPTH:
            inner, count = self._scalar("I"), self._scalar("Q")
            return self._times(count, lambda: self._value(inner, depth + 1))
        raise CheckpointError(f"{self.path}: unknown value type {kind}")

    def _info(self) -> Tensor:
        name, dims = self._string(), self._scalar("I")
        if dims > MAX_DIMS:
            raise CheckpointError(f"{self.path}: tensor {name!r} has {dims} dimensions")
        shape = tuple(self._scalar("Q") for _ in range(dims))[::-1]
        if math.prod(shape) > 2**50:
            raise CheckpointError(f"{self.path}: tensor {name!r} of shape {shape} cannot be")
        return Tensor(name, shape, self._scalar("I"), self._scalar("Q"))
