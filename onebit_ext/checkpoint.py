"""Checkpoints: a safetensors file, written atomically, checked before anything is allocated.

Tensors: `layers.NAME.packed` (tile16), `.scale`, `.bias`, and, with an optimizer, `.scale_grad`,
`.bias_grad` and `optimizer.I.ARRAY` for every array of FlipOptimizer.state_dict().  Metadata, all
str: onebit_ext (file version), header (JSON: layers, rates, rule), user (JSON), sha256 of all of it.
Nothing in a file is executed.  A file of a newer version, with a missing, extra or misshapen tensor,
a wrong checksum or a reserved code raises CheckpointError.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._core import MAX_K, FlipOptimizer, TernaryLinear, empty, plane_specs

__all__ = ["Checkpoint", "CheckpointError", "load", "save"]

Array = NDArray[Any]
Path = str | os.PathLike[str]

VERSION = "1"
MAX_HEADER = 64 << 20
DTYPES = {"int8": "I8", "uint8": "U8", "int16": "I16", "uint16": "U16", "float32": "F32", "float64": "F64"}
RATES = ("lr", "scale_lr", "bias_lr", "flip_rate")


class CheckpointError(ValueError):
    """The file is no checkpoint of ours, torn, altered or of a newer version."""


@dataclass
class Checkpoint:
    """What load() returns: layers by name, the optimizer if the file holds one, the user's metadata."""

    layers: dict[str, TernaryLinear]
    optimizer: FlipOptimizer | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


# ------------------------------------------------------------------ saving
def save(
    path: Path,
    layers: Mapping[str, TernaryLinear],
    optimizer: FlipOptimizer | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write layers, and all that resuming their training needs, to `path`: the old file or the new one, never a part.

    optimizer: attached to layers of `layers` only (ValueError otherwise).  metadata: anything JSON
    can hold, for example the position in the data.  Written beside `path` first, flushed to disk,
    then renamed over it, so that a process that has the old file mapped keeps the old one.
    Raises TypeError for a key or value of the wrong kind, OSError from the file system.
    """
    for name, layer in layers.items():
        if not isinstance(name, str) or not isinstance(layer, TernaryLinear):
            raise TypeError(f"save(): 'layers' must map str to TernaryLinear, got {name!r}: {type(layer).__name__}")
    training = [] if optimizer is None else optimizer.state_dict()["layers"]
    tensors, header = _layer_tensors(layers, optimizer is not None), _header(layers, optimizer, training)
    for i, arrays in enumerate(training):
        tensors |= {f"optimizer.{i}.{key}": array for key, array in arrays.items()}
    meta = {
        "onebit_ext": VERSION,
        "header": json.dumps(header),
        "user": json.dumps(dict(metadata or {})),
    }
    meta["sha256"] = _checksum(tensors, meta)
    _write(os.path.realpath(path), tensors, meta)


def _layer_tensors(layers: Mapping[str, TernaryLinear], training: bool) -> dict[str, Array]:
    for name, layer in layers.items():
        if layer.packing != "tile16":
            raise ValueError(f"save(): layer {name!r} is packed as {layer.packing}: save its repack('tile16')")
    kinds = ("packed", "scale", "bias") + (("scale_grad", "bias_grad") if training else ())
    found = {f"layers.{name}.{kind}": getattr(layer, kind) for name, layer in layers.items() for kind in kinds}
    return {name: array for name, array in found.items() if array is not None}


def _header(
    layers: Mapping[str, TernaryLinear], optimizer: FlipOptimizer | None, training: list[dict[str, Array]]
) -> dict[str, Any]:
    header: dict[str, Any] = {
        "layers": [
            {
                "name": name,
                "shape": [layer.out_features, layer.in_features],
                "scales": layer.scale.size,
                "bias": layer.bias is not None,
            }
            for name, layer in layers.items()
        ],
        "optimizer": None,
    }
    if optimizer is not None:
        names = {id(layer): name for name, layer in layers.items()}
        missing = [repr(layer) for layer in optimizer.layers if id(layer) not in names]
        if missing or not optimizer.layers:
            raise ValueError(f"save(): 'layers' must hold every layer of 'optimizer', which lacks {missing}")
        order = [names[id(layer)] for layer in optimizer.layers]
        rates = {rate: getattr(optimizer, rate) for rate in RATES}
        rows = {"stripes": optimizer.stripes, "stripe": optimizer.stripe}
        header["optimizer"] = {"rule": optimizer.rule, "layers": order, **rows, **rates}
        if optimizer.vote_plane:  # and which layers hold votes, between two micro-batches of a step
            held = [name for name, arrays in zip(order, training, strict=True) if "votes" in arrays]
            header["optimizer"] |= {"vote_plane": True, "held": held}
    return header


def _checksum(tensors: Mapping[str, Array], meta: Mapping[str, str]) -> str:
    import hashlib

    digest = hashlib.sha256(json.dumps([meta[key] for key in ("onebit_ext", "header", "user")]).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tensors[name].shape}\n".encode())
        digest.update(tensors[name].data)
    return digest.hexdigest()


def _write(path: str, tensors: Mapping[str, Array], meta: Mapping[str, str]) -> None:
    """The safetensors container: length, JSON header, data; temporary file, fsync, rename, fsync of the folder."""
    entries: dict[str, Any] = {"__metadata__": dict(meta)}
    offset = 0
    for name, array in tensors.items():
        end = offset + array.nbytes
        entries[name] = {"dtype": DTYPES[array.dtype.name], "shape": list(array.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    temporary = f"{path}.{os.getpid()}.{os.urandom(4).hex()}.tmp"
    file = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        try:
            _write_all(file, memoryview(len(text).to_bytes(8, "little") + text))
            for array in tensors.values():
                _write_all(file, array.reshape(-1).view(np.uint8).data)
            os.fsync(file)
        finally:
            os.close(file)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    folder = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _write_all(file: int, data: memoryview) -> None:
    while data:
        data = data[os.write(file, data) :]


# ------------------------------------------------------------------ loading
def load(path: Path) -> Checkpoint:
    """Read a file of save(): new layers, and a new optimizer attached to them if it was saved.

    Raises CheckpointError for a file that is not whole and ours, OSError from the file system.
    Allocates about the size of the file.
    """
    from safetensors import SafetensorError, safe_open

    with open(path, "rb"):  # the plain OSError if there is no such file
        pass
    try:
        with safe_open(os.fspath(path), framework="numpy") as file:
            meta, header = _read_header(path, file.metadata() or {})
            _check_tensors(path, file, header)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"load(): {os.fspath(path)!r} is not a whole safetensors file: {error}") from error
    if _checksum(tensors, meta) != meta["sha256"]:
        raise CheckpointError(f"load(): {os.fspath(path)!r} does not match its checksum")
    try:
        return _build(tensors, header, json.loads(meta["user"]))
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"load(): {os.fspath(path)!r} holds no valid training state: {error}") from error


def _read_header(path: Path, meta: dict[str, str]) -> tuple[dict[str, str], dict[str, Any]]:
    where = f"load(): {os.fspath(path)!r}"
    if meta.get("onebit_ext") != VERSION:
        raise CheckpointError(f"{where} must be of file version {VERSION}, got {meta.get('onebit_ext')!r:.40}")
    if set(meta) != {"onebit_ext", "header", "user", "sha256"} or len(meta["header"]) > MAX_HEADER:
        raise CheckpointError(f"{where} has unknown metadata")
    try:
        header = json.loads(meta["header"])
        json.loads(meta["user"])
        _expected(header)
    except (ValueError, TypeError, KeyError, RecursionError, AttributeError) as error:
        raise CheckpointError(f"{where} has a malformed header: {error!r:.200}") from error
    return meta, header


def _size(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= MAX_K:
        raise ValueError(f"a size must be an integer in [0, {MAX_K}], got {value!r:.40}")
    return value


def _expected(header: dict[str, Any]) -> dict[str, tuple[str, list[int]]]:
    """Name -> (dtype, shape) of every tensor that a file with this header holds."""
    expected: dict[str, tuple[str, list[int]]] = {}
    parts: dict[str, dict[str, tuple[str, list[int]]]] = {}
    state = header["optimizer"]
    for entry in header["layers"]:
        n, k = (_size(value) for value in entry["shape"])
        scale: tuple[str, list[int]] = ("F32", [_size(entry["scales"])])
        tensors = {"packed": ("U8", [-(-n // 64), -(-k // 16), 4, 16, 4]), "scale": scale}
        training = {"scale_exp_avg": scale, "scale_exp_avg_sq": scale}
        if entry["bias"]:
            tensors["bias"] = ("F32", [n])
            training |= {"bias_exp_avg": ("F32", [n]), "bias_exp_avg_sq": ("F32", [n]), "bias_powers": ("F64", [2])}
        if state is not None:
            tensors |= {f"{kind}_grad": tensors[kind] for kind in ("scale", "bias") if kind in tensors}
            held = entry["name"] in state.get("held", ())
            rows = {"stripes": state["stripes"], "stripe": state["stripe"]}
            specs = plane_specs(n, k, state["rule"], **rows, vote_plane=held)
            training |= {plane: (DTYPES[dtype.name], list(shape)) for plane, (shape, dtype) in specs.items()}
        if entry["name"] in parts or not isinstance(entry["name"], str):
            raise ValueError("layer names must be str and differ")
        parts[entry["name"]] = training
        expected |= {f"layers.{entry['name']}.{kind}": spec for kind, spec in tensors.items()}
    if state is not None:
        for i, name in enumerate(state["layers"]):
            expected |= {f"optimizer.{i}.{kind}": spec for kind, spec in parts[name].items()}
    return expected


def _check_tensors(path: Path, file: Any, header: dict[str, Any]) -> None:
    expected = _expected(header)
    found = set(file.keys())
    if found != set(expected):
        wrong = sorted(found ^ set(expected))
        raise CheckpointError(f"load(): {os.fspath(path)!r} has missing or extra tensors: {wrong[:4]!r:.200}")
    for name, (dtype, shape) in expected.items():
        part = file.get_slice(name)
        if part.get_dtype() != dtype or part.get_shape() != shape:
            got = f"{part.get_dtype()} {part.get_shape()}"
            raise CheckpointError(f"load(): {os.fspath(path)!r}: {name!r:.80} must be {dtype} {shape}, got {got:.80}")


def _aligned(array: Array) -> Array:
    copy = empty(array.shape, array.dtype)
    copy[...] = array
    return copy


def _build(tensors: dict[str, Array], header: dict[str, Any], user: dict[str, Any]) -> Checkpoint:
    layers: dict[str, TernaryLinear] = {}
    for entry in header["layers"]:
        name = entry["name"]
        part = {kind: tensors.get(f"layers.{name}.{kind}") for kind in ("packed", "scale", "bias")}
        packed, scale, bias = (None if array is None else _aligned(array) for array in part.values())
        assert packed is not None and scale is not None
        n, k = entry["shape"]
        layer = TernaryLinear.from_packed(packed, scale, (n, k), bias)
        layer.name = name
        layers[name] = layer
    state = header["optimizer"]
    if state is None:
        return Checkpoint(layers, None, user)
    order = [layers[name] for name in state["layers"]]
    optimizer = FlipOptimizer(
        order, rule=state["rule"], stripes=state["stripes"], vote_plane=state.get("vote_plane", False)
    )
    saved: list[dict[str, Array]] = [{} for _ in order]
    for name, array in tensors.items():
        kind, index, key = name.split(".", 2)
        if kind == "optimizer":
            saved[int(index)][key] = array
    rates = {rate: state[rate] for rate in RATES}
    optimizer.load_state_dict({"version": 1, "rule": state["rule"], "layers": saved, **rates})
    for name, layer in layers.items():
        layer.scale_grad[...] = tensors[f"layers.{name}.scale_grad"]
        if layer.bias_grad is not None:
            layer.bias_grad[...] = tensors[f"layers.{name}.bias_grad"]
    return Checkpoint(layers, optimizer, user)
