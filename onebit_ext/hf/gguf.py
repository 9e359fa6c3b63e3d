"""GGUF files that llama.cpp (TQ2_0, TQ1_0) and bitnet.cpp (I2_S) load: Llama models, BitNet 2B-4T for bitnet.cpp."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from onebit_ext import CheckpointError, pack, unpack

from .folder import Folder, Linear
from .save import ModelSource, Progress, Source, new_file
from .tokenizer_gguf import add_tokenizer

Array = NDArray[Any]


class Kind(NamedTuple):
    """A way to store ternary tensors: packing, ggml's tensor type, the file type, weights per block."""

    packing: str
    tensor_type: int
    file_type: int
    block: int


KINDS = {
    "gguf-tq2_0": Kind("tq2_0", 35, 37, 256),
    "gguf-tq1_0": Kind("tq1_0", 34, 36, 256),
    "i2_s": Kind("i2_s", 36, 40, 128),  # bitnet.cpp's numbers; ggml uses 40 for something else
}
F32, F16 = 0, 1
MODULES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.attn_sub_norm": "attn_sub_norm", "mlp.ffn_sub_norm": "ffn_sub_norm",
}  # fmt: skip
GLOBALS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def export_gguf(
    model: nn.Module | str | os.PathLike[str],
    path: str | os.PathLike[str],
    to: str = "gguf-tq2_0",
    tokenizer: Any = None,
    overwrite: bool = False,
    tokenizer_pre: str | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a model with BitLinear layers, or a checkpoint folder, as one GGUF file.

    Codes are exact; d is float16(s), I2_S keeps float32 s.  Norms and biases are float32, embedding and head float16.

    Args:
        to: "gguf-tq2_0" (2.06 bits a weight), "gguf-tq1_0" (1.69) for llama.cpp; "i2_s" for bitnet.cpp.
        tokenizer: of a model; a folder has its own.
        overwrite: replace the file at `path`.
        tokenizer_pre: llama.cpp's name of the pre-tokenizer, where it is not recognised.
        progress: called as progress(done, total, name).
    Raises CheckpointError, with nothing written, for what the reader of that kind cannot run, and says why.
    """
    if not isinstance(model, nn.Module):
        folder = Folder(model)
        return write_gguf(folder, folder.path, path, to, overwrite, tokenizer_pre, progress)
    if tokenizer is None:
        raise ValueError("export_gguf: a model needs its 'tokenizer', which goes into the file")
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        write_gguf(ModelSource(model), Path(scratch), path, to, overwrite, tokenizer_pre, progress)
    return None


def write_gguf(
    source: Source,
    tokenizer: Path,
    path: str | os.PathLike[str],
    to: str,
    overwrite: bool = False,
    tokenizer_pre: str | None = None,
    progress: Progress | None = None,
) -> None:
    """As export_gguf, from a Source and a folder with the tokenizer; one tensor in memory at a time."""
    if to not in KINDS:
        raise ValueError(f"'to' must be one of {', '.join(KINDS)}, got {to!r}")
    try:
        from gguf import GGUFWriter
    except ImportError:
        raise CheckpointError("writing GGUF needs the package gguf: pip install gguf") from None
    arch, kind = _architecture(source, to), KINDS[to]
    with new_file(Path(path), overwrite) as part:
        writer = GGUFWriter(part, arch, use_temp_file=True)  # the header comes before the tensors and needs them all
        writer.add_name(Path(path).stem)
        _add_model_keys(writer, source.config, kind)
        add_tokenizer(writer, tokenizer, source.config["vocab_size"], source.config, tokenizer_pre)
        for name, data, shape, tensor_type in _tensors(source, arch, kind, progress):
            writer.add_tensor(name, data.reshape(-1).view(np.int8), raw_shape=shape, raw_dtype=tensor_type)  # type: ignore[arg-type]
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _architecture(source: Source, to: str) -> str:
    """GGUF's name of the architecture; CheckpointError if the reader has no right graph for the model."""
    config = source.config
    model, activation = config.get("model_type"), config.get("hidden_act")
    if source.form.use_rms_norm:
        raise CheckpointError("use_rms_norm: GGUF's graphs have no norm inside a linear layer")
    if model == "llama" and activation == "silu":
        return "llama"
    if model == "bitnet" and activation == "relu2":
        if to != "i2_s":
            raise CheckpointError(
                "llama.cpp's bitnet graph hard-codes SiLU, this model uses relu2 (squared ReLU): its output would be"
                " wrong; export it with 'i2_s' for bitnet.cpp"
            )
        if not config.get("tie_word_embeddings"):
            raise CheckpointError("bitnet.cpp's graph uses the embedding as head, this model has a head of its own")
        return "bitnet-b1.58"
    raise CheckpointError(f"GGUF export knows llama with silu and bitnet with relu2, got {model!r} with {activation!r}")


def _add_model_keys(writer: Any, config: dict[str, Any], kind: Kind) -> None:
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(_rope(config).get("rope_theta", 10000.0)))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(kind.file_type)
    writer.add_quantization_version(2)


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters, where old (rope_theta, rope_scaling) and new (rope_parameters) configs keep them."""
    old = {"rope_theta": config["rope_theta"]} if config.get("rope_theta") is not None else {}
    rope = old | (config.get("rope_scaling") or {}) | (config.get("rope_parameters") or {})
    name = rope.get("rope_type", rope.get("type", "default"))
    if name not in ("default", "llama3"):
        raise CheckpointError(f"rope scaling must be 'default' or 'llama3', got {name!r}")
    return rope | {"rope_type": name}


def _rope_factors(rope: dict[str, Any], head_dim: int) -> Array:
    """What llama.cpp divides each rotary frequency by (head_dim/2,), for rope_type "llama3"."""
    frequency = float(rope.get("rope_theta", 10000.0)) ** (-np.arange(0, head_dim, 2) / head_dim)
    turns = rope["original_max_position_embeddings"] * frequency / (2 * np.pi)  # within the original context
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - keep) / rope["factor"] + keep)).astype(np.float32)


# ------------------------------------------------------------------ tensors
def _tensors(
    source: Source, arch: str, kind: Kind, progress: Progress | None
) -> Iterator[tuple[str, Array, tuple[int, ...], int]]:
    """Every tensor: name, bytes, shape, ggml's type."""
    rope = _rope(source.config)
    if rope["rope_type"] == "llama3":
        heads = source.config["num_attention_heads"]
        factors = _rope_factors(rope, source.config.get("head_dim") or source.config["hidden_size"] // heads)
        yield "rope_freqs.weight", factors, factors.shape, F32
    for name in source.others:
        if name.endswith(".rotary_emb.inv_freq"):
            continue
        value = source.tensor(name).float()
        value = value[_row_order(name, len(value), source.config, arch)] if value.ndim == 2 else value
        if value.ndim == 1:
            yield _gguf_name(name), value.numpy(), tuple(value.shape), F32
        else:
            yield _gguf_name(name), _half(name, value), tuple(value.shape), F16
    for done, name in enumerate(source.linears, 1):
        layer = source.linear(name)
        order = _row_order(name, layer.shape[0], source.config, arch)
        yield _gguf_name(f"{name}.weight"), _blocks(layer, order, kind), layer.shape, kind.tensor_type
        if layer.bias is not None:
            yield _gguf_name(f"{name}.bias"), layer.bias[order].numpy(), (layer.shape[0],), F32
        if progress:
            progress(done, len(source.linears), name)


def _row_order(name: str, rows: int, config: dict[str, Any], arch: str) -> Array | slice:
    """Row order of q and k: ggml's `llama` rotates neighbouring rows (2i, 2i+1), transformers (i, i + head_dim/2)."""
    heads = {"q_proj": config["num_attention_heads"]}
    heads["k_proj"] = config.get("num_key_value_heads") or heads["q_proj"]
    part = next((part for part in heads if f".{part}" in f".{name}"), None)
    if part is None or arch != "llama":
        return slice(None)
    return np.arange(rows).reshape(heads[part], 2, -1).swapaxes(1, 2).reshape(rows)


def _blocks(layer: Linear, order: Array | slice, kind: Kind) -> Array:
    """The bytes of a ternary tensor with its scale."""
    n, k = layer.shape
    if k % kind.block:
        raise CheckpointError(f"layer {layer.name!r} has {k} inputs; {kind.packing} needs a multiple of {kind.block}")
    scale = layer.scale.numpy()
    if isinstance(order, slice):
        packed = layer.to(kind.packing)
    else:
        packed = pack(unpack(layer.packed, layer.shape, layer.packing)[order], kind.packing)
        scale = scale[order] if scale.size > 1 else scale
    if kind.packing == "i2_s":
        if scale.size > 1:
            raise CheckpointError(f"layer {layer.name!r} has a scale per row; i2_s holds one per tensor")
        return np.concatenate([packed, scale.astype("<f4").view(np.uint8), np.zeros(28, np.uint8)])
    d = scale.astype("<f2")
    if not (np.abs(d.astype(np.float32) - scale) <= scale * 2**-10).all():
        raise CheckpointError(f"layer {layer.name!r}: scale {scale.max():.3g} does not fit ggml's float16")
    blocks = packed.reshape(n, k // kind.block, -1)
    blocks[..., -2:] = d.view(np.uint8).reshape(-1, 1, 2)  # both block types end with d
    return blocks


def _half(name: str, value: Tensor) -> Array:
    half = value.to(torch.float16)
    if not bool(torch.isfinite(half).all()):
        raise CheckpointError(f"tensor {name!r} holds values beyond float16's 65504")
    return half.numpy()


def _gguf_name(name: str) -> str:
    module, _, part = name.rpartition(".")
    block = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    mapped = GLOBALS.get(module) or (block and MODULES.get(block[2]) and f"blk.{block[1]}.{MODULES[block[2]]}")
    if not mapped or part not in ("weight", "bias"):
        raise CheckpointError(f"tensor {name!r} has no place in the GGUF file")
    return f"{mapped}.{part}"
