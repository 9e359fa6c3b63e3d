"""Small checkpoints of the shape and config of Falcon-E-1B (Llama) and BitNet 2B-4T, written without our code.

Every builder returns the truth: {layer: (codes int8 (N, K), s, bias or None)}.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

Truth = dict[str, tuple[Tensor, float, Tensor | None]]

FALCON_E = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258, "hidden_act": "silu", "hidden_size": 256,
    "initializer_range": 0.02, "intermediate_size": 512, "max_position_embeddings": 512, "mlp_bias": False,
    "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 64, "rms_norm_eps": 1e-6,
    "rope_scaling": None, "rope_theta": 1000042, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "use_cache": True, "vocab_size": 260, "is_bitnet_config": True, "pretraining_tp": 1,
}  # fmt: skip
BITNET_2B = FALCON_E | {
    "architectures": ["BitNetForCausalLM"], "model_type": "bitnet", "hidden_act": "relu2", "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "tie_word_embeddings": True, "num_key_value_heads": 1,
}  # fmt: skip
QUANTIZATION = {
    "hf-packed": {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"]},
    "hf-packed-direct": {
        "quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline",
        "modules_to_not_convert": ["lm_head"],
    },
    "bf16": {
        "quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online",
        "modules_to_not_convert": ["lm_head"],
    },
    "float": None,
}  # fmt: skip
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Layer name -> (N, K) of every ternary linear."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = hidden // config["num_attention_heads"]
    keys = config["num_key_value_heads"] * head
    sizes = {"q_proj": (hidden, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden), "o_proj": (hidden, hidden)}
    sizes |= {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    return {
        f"model.layers.{i}.{'mlp' if name in MLP else 'self_attn'}.{name}": shape
        for i in range(config["num_hidden_layers"])
        for name, shape in sizes.items()
    }


def rows4(codes: Tensor) -> Tensor:
    """transformers' packing, written out."""
    bits = (codes + 1).to(torch.uint8)
    n = codes.shape[0] // 4
    return bits[:n] | bits[n : 2 * n] << 2 | bits[2 * n : 3 * n] << 4 | bits[3 * n :] << 6


def i2_s(codes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """bitnet.cpp's grouping, written out."""
    bits = (codes + 1).astype(np.uint8).reshape(-1, 4, 32)
    return (bits[:, 0] << 6 | bits[:, 1] << 4 | bits[:, 2] << 2 | bits[:, 3]).reshape(-1)


def build(
    path: Path,
    kind: str,
    config: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    biases: bool = False,
    rms_norm: bool = False,
    seed: int = 3,
) -> Truth:
    """A checkpoint folder of a kind; the floats are large enough that logits have a spread of about 1."""
    config = dict(config or FALCON_E, torch_dtype=str(dtype).removeprefix("torch."))
    rng = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=rng)  # noqa: E731
    embedding, tied = normal(config["vocab_size"], config["hidden_size"]), config["tie_word_embeddings"]
    tensors: dict[str, Tensor] = {"model.embed_tokens.weight": embedding * (0.06 if tied else 1)}
    if not tied:
        tensors["lm_head.weight"] = normal(config["vocab_size"], config["hidden_size"]) * 0.06
    norms = {"input_layernorm": "hidden_size", "post_attention_layernorm": "hidden_size"}
    if config["model_type"] == "bitnet":
        norms |= {"self_attn.attn_sub_norm": "hidden_size", "mlp.ffn_sub_norm": "intermediate_size"}
    for i in range(config["num_hidden_layers"]):
        for name, size in norms.items():
            tensors[f"model.layers.{i}.{name}.weight"] = 1 + 0.1 * normal(config[size])
    tensors["model.norm.weight"] = 1 + 0.1 * normal(config["hidden_size"])
    tensors = {name: value.to(dtype) for name, value in tensors.items()}
    truth: Truth = {}
    for name, (n, k) in shapes(config).items():
        latent = (normal(n, k) * k**-0.5).to(dtype)
        scale = latent.float().abs().mean().clamp(min=1e-5)
        codes = (latent.float() / scale).round().clamp(-1, 1).to(torch.int8)
        s = float(scale)
        if kind in ("hf-packed", "hf-packed-direct"):
            stored = (1 / scale if kind == "hf-packed" else scale).reshape(1).to(dtype)
            tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"] = rows4(codes), stored
            s = float(1 / stored.float() if kind == "hf-packed" else stored.float())
        else:
            tensors[f"{name}.weight"] = latent
        bias = (0.2 * normal(n)).to(dtype) if biases else None
        if bias is not None:
            tensors[f"{name}.bias"] = bias
            bias = bias.float() * s if kind == "hf-packed-direct" else bias.float()
        if rms_norm:
            tensors[f"{name}.rms_norm.weight"] = (1 + 0.1 * normal(k)).to(dtype)
        truth[name] = (codes, s, bias)
    entry = QUANTIZATION[kind]
    if entry:
        extra = {"use_rms_norm": True, "rms_norm_eps": 2e-6} if rms_norm else {}
        config["quantization_config"] = entry | extra
    if biases:
        config |= {"attention_bias": True, "mlp_bias": True}
    path.mkdir(parents=True)
    save_file(
        {name: value.contiguous() for name, value in tensors.items()}, path / "model.safetensors", {"format": "pt"}
    )
    (path / "config.json").write_text(json.dumps(config, indent=2))
    (path / "generation_config.json").write_text('{"bos_token_id": 256, "eos_token_id": 257}')
    byte_tokenizer().save_pretrained(path)
    return truth


def byte_tokenizer(merges: list[tuple[str, str]] | None = None) -> Any:
    """A byte-level BPE of the GPT-2 kind: 256 bytes, <s> </s> <pad>, optional merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(alphabet)}
    specials = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    vocab |= {token: 256 + i for i, token in enumerate(specials.values())}
    vocab |= {left + right: 259 + i for i, (left, right) in enumerate(merges or [])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=merges or []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **specials)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
    return tokenizer


IDS = torch.arange(48).view(1, 48) * 37 % 250


def stock_logits(path: Path, ids: Tensor = IDS, dtype: torch.dtype | str = "auto") -> Tensor:
    """What stock transformers computes from a folder in `dtype`; its compiled helpers run eagerly."""
    from transformers import AutoModelForCausalLM

    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)(ids).logits.float()


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    """What a model of ours computes, float32."""
    with torch.no_grad():
        return model(ids).logits.float()


def distance(got: Tensor, want: Tensor) -> float:
    """rms of the difference over the standard deviation of `want`."""
    return float((got - want).pow(2).mean().sqrt() / want.std())
