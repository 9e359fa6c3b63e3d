"""Checkpoint folders that transformers reads: packed in both scale conventions, or bf16 floats. Atomic."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from onebit_ext import unpack
from onebit_ext.torch import BitLinear

from .config import DIRECT, FLOAT, ONLINE, PACKED, Form
from .folder import Folder, Linear

FOLDER_KINDS = (PACKED, DIRECT, ONLINE, FLOAT)
SHARD_BYTES = 2 << 30
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".index.json")
Progress = Callable[[int, int, str], None]


class Source(Protocol):
    """What is saved: a Folder, or a model behind a ModelSource."""

    config: dict[str, Any]
    form: Form
    dtype: torch.dtype
    linears: tuple[str, ...]
    others: tuple[str, ...]

    def linear(self, name: str) -> Linear:
        """One ternary layer."""
        ...

    def tensor(self, name: str) -> Tensor:
        """One tensor of no ternary layer."""
        ...


class ModelSource:
    """A model with BitLinear layers as a Source; nothing is copied before it is asked for."""

    def __init__(self, model: Any) -> None:
        self.modules = {
            name: module
            for name, module in model.named_modules(remove_duplicate=False)
            if isinstance(module, BitLinear)
        }
        if not self.modules:
            raise ValueError("the model has no BitLinear; swap its layers with onebit_ext.torch.replace_linear first")
        own = {f"{name}.{part}" for name in self.modules for part in ("weight", "scale", "bias")}
        persistent = dict(model.named_parameters()) | {  # named_parameters: a tied weight once
            name: value for name, value in model.named_buffers() if _is_persistent(model, name)
        }
        self.state = {name: value for name, value in persistent.items() if name not in own}
        self.linears, self.others = tuple(sorted(self.modules)), tuple(sorted(self.state))
        self.config = json.loads(model.config.to_json_string(use_diff=False))
        self.config["architectures"] = [type(model).__name__]
        self.dtype = next((value.dtype for value in self.state.values() if value.is_floating_point()), torch.float32)
        self.config["dtype"] = str(self.dtype).removeprefix("torch.")
        linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        entry = self.config.get("quantization_config") or {}
        form = Form(PACKED, tuple(entry.get("modules_to_not_convert") or ("lm_head",)))
        skip = (*form.skip, *sorted(name for name in linears if not form.skips(name)))
        norms = [module.rms_norm for module in self.modules.values() if hasattr(module, "rms_norm")]
        eps = getattr(norms[0], "variance_epsilon", 1e-6) if norms else 1e-6
        self.form = Form(PACKED, skip, bool(norms), eps)

    def linear(self, name: str) -> Linear:
        """The layer as its state_dict has it: the stored 1/s verbatim until s changes."""
        module = self.modules[name]
        state = {key: value.detach().cpu() for key, value in module.state_dict().items()}
        packed = state["weight"] if "weight" in state else state["weight_tile16"]
        inverse = state.get("weight_scale")
        bias = state.get("bias")
        return Linear(
            name,
            (module.out_features, module.in_features),
            "rows4" if "weight" in state else "tile16",
            packed.numpy(),
            module.scale.detach().cpu(),
            inverse,
            self.dtype,
            None if bias is None else bias.float(),
            self.dtype,
        )

    def tensor(self, name: str) -> Tensor:
        """A parameter or persistent buffer."""
        return self.state[name].detach().cpu().contiguous()


def save_pretrained(
    model: Any,
    path: str | os.PathLike[str],
    to: str = PACKED,
    tokenizer: Any = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Save a model with BitLinear layers as a folder that stock transformers loads.

    Args:
        to: "hf-packed" (bitlinear, weight_scale = 1/s), "hf-packed-direct" (autobitlinear, weight_scale = s), "bf16"
            (autobitlinear online: floats s T / share of nonzeros, which absmean turns back into s T; s within 2^-8) or
            "float" (bf16 floats s T and no quantization_config: a model like any other).
        tokenizer: saved along.
        overwrite: replace what is at `path`; otherwise it must not exist or be empty.
        progress: called as progress(done, total, name).
    Raises ValueError, with nothing written, for what the form cannot hold: row scales, N not a multiple of 4.
    """

    def extras(folder: Path) -> None:
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    write_folder(ModelSource(model), path, to, overwrite, progress, extras)


def write_folder(
    source: Source,
    path: str | os.PathLike[str],
    to: str,
    overwrite: bool = False,
    progress: Progress | None = None,
    extras: Callable[[Path], None] | None = None,
) -> None:
    """Write a Source as a folder of kind `to`, whole or not at all; a Folder's other files are copied along."""
    if to not in FOLDER_KINDS:
        raise ValueError(f"'to' must be one of {', '.join(FOLDER_KINDS)}, got {to!r}")
    form = replace(source.form, kind=to)
    with new_folder(Path(path), overwrite) as folder:
        if isinstance(source, Folder):
            copy_extras(source.path, folder)
        if extras:
            extras(folder)
        config = dict(source.config)
        if to != source.form.kind or "quantization_config" not in config:  # else verbatim
            config["quantization_config"] = form.quantization_config()
        if config["quantization_config"] is None:
            del config["quantization_config"]
        dtype = torch.bfloat16 if to in (ONLINE, FLOAT) else source.dtype
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(dtype).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        _write_shards(folder, _tensors(source, to, progress))


def _tensors(source: Source, to: str, progress: Progress | None) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the new folder."""
    for name in source.others:
        value = source.tensor(name)
        yield name, value.to(torch.bfloat16) if to in (ONLINE, FLOAT) else value
    for done, name in enumerate(source.linears, 1):
        layer = source.linear(name)
        tensors = _packed(layer, to) if to in (PACKED, DIRECT) else _floats(layer, to)
        yield from ((f"{name}.{key}", value) for key, value in tensors.items())
        if progress:
            progress(done, len(source.linears), name)


def _packed(layer: Linear, to: str) -> dict[str, Tensor]:
    if layer.scale.numel() != 1:
        raise ValueError(f"layer {layer.name!r} has a scale per row, which transformers' packing has no place for")
    if layer.shape[0] % 4:
        raise ValueError(
            f"layer {layer.name!r} has {layer.shape[0]} outputs; transformers packs multiples of 4: save it as 'bf16'"
        )
    scale = layer.inverse_scale() if to == PACKED else layer.scale
    tensors = {"weight": torch.from_numpy(layer.to("rows4")), "weight_scale": _narrow(scale, layer.scale_dtype)}
    if layer.bias is not None:  # autobitlinear multiplies the bias too
        tensors["bias"] = _narrow(layer.bias, layer.bias_dtype, 1 if to == PACKED else layer.scale)
    return tensors


def _narrow(value: Tensor, dtype: torch.dtype, factor: Tensor | float = 1) -> Tensor:
    """What gives `value` when multiplied by `factor`: in `dtype` if to the bit, otherwise in float32.

    (transformers casts it to the model's dtype when it loads.)
    """
    narrow = (value / factor).to(dtype)
    return narrow if torch.equal(narrow.float() * factor, value) else value / factor


def _floats(layer: Linear, to: str) -> dict[str, Tensor]:
    """bf16 floats of one magnitude v: s, or such that mean |w| = s: absmean gives T and, up to v's rounding, s."""
    if layer.scale.numel() != 1:
        raise ValueError(f"layer {layer.name!r} has a scale per row, which absmean cannot give back")
    if to == ONLINE and float(layer.scale) < 1e-5:
        raise ValueError(f"layer {layer.name!r} has scale {float(layer.scale):.3g}, below absmean's floor of 1e-5")
    codes = torch.from_numpy(unpack(layer.packed, layer.shape, layer.packing))
    nonzero = int(torch.count_nonzero(codes))
    magnitude = layer.scale * codes.numel() / max(nonzero, 1) if to == ONLINE else layer.scale
    tensors = {"weight": codes.to(torch.bfloat16) * magnitude.to(torch.bfloat16)}
    if layer.bias is not None:
        tensors["bias"] = layer.bias.to(torch.bfloat16)
    return tensors


def _is_persistent(model: nn.Module, name: str) -> bool:
    module, _, leaf = name.rpartition(".")
    return leaf not in model.get_submodule(module)._non_persistent_buffers_set


# ------------------------------------------------------------------ files
def _write_shards(folder: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """model.safetensors, or shards of about SHARD_BYTES with an index; one shard in memory at a time."""
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        nonlocal shard, size
        save_file(shard, folder / f"{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append(list(shard))
        shard, size = {}, 0

    for name, value in tensors:
        if size and size + value.nbytes > SHARD_BYTES:
            flush()
        shard[name] = value.contiguous()
        size, total = size + value.nbytes, total + value.nbytes
    flush()
    if len(shards) == 1:
        (folder / "0.safetensors").rename(folder / "model.safetensors")
        return
    where: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        (folder / f"{i}.safetensors").rename(folder / file)
        where |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def copy_extras(source: Path, target: Path) -> None:
    """Copy tokenizer, generation config, licence and the like: every file that holds no weights."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name[0] != "." and path.name != "config.json" and not path.name.endswith(WEIGHTS):
            shutil.copyfile(path, target / path.name)


@contextmanager
def new_folder(path: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to fill that becomes `path` when all went well; FileExistsError if there is something already."""
    path = path.absolute()
    occupied = path.exists() and (not path.is_dir() or any(path.iterdir()))
    if occupied and not overwrite:
        raise FileExistsError(f"{path} exists already; name another folder or overwrite it")
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        new = work / "new"
        new.mkdir()
        yield new
        for written in (*new.iterdir(), new):
            _sync(written)
        if path.exists():
            path.rename(work / "old")
        new.rename(path)
        _sync(path.parent)
    except BaseException:
        if (work / "old").exists() and not path.exists():
            (work / "old").rename(path)
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def new_file(path: Path, overwrite: bool) -> Iterator[Path]:
    """A file name to write to that becomes `path` when all went well; FileExistsError if there is one already."""
    path = path.absolute()
    if path.exists() and (path.is_dir() or not overwrite):
        raise FileExistsError(f"{path} exists already; name another file or overwrite it")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        _sync(part)
        part.replace(path)
        _sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
