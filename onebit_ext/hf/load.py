"""A transformers model whose ternary linears are BitLinear, from a checkpoint folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from onebit_ext import CheckpointError
from onebit_ext.torch import BitLinear

from .config import PACKED, Form
from .folder import Folder, Linear


class NormedBitLinear(BitLinear):
    """A BitLinear that normalises its input first: `use_rms_norm` of a quantization_config."""

    rms_norm: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N)."""
        return super().forward(self.rms_norm(x))


def from_pretrained(
    path: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    skip: Sequence[str] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    **config_overrides: Any,
) -> Any:
    """Load a causal language model from a local folder; ready to train and to save with `save_pretrained`.

    Every form of config.DESCRIPTIONS is read, without transformers' own loader.  The codes and scales are what the
    files hold, to the bit; latent and plain floats become codes by absmean (floats that are s T already keep s).
    Biases of ternary layers are float32.

    Args:
        dtype: of everything that is not ternary; None: config.json's.
        skip: names (patterns) of linear layers that stay floats; None: the config's, or lm_head.
        progress: called as progress(done, total, name) after each layer.
        config_overrides: fields of the model's config, for example `attn_implementation="eager"`.
    Raises CheckpointError, in one line, for a folder that is incomplete, contradictory or no checkpoint of this kind.
    """
    folder = Folder(path, skip)
    model = _skeleton(folder, dtype or folder.dtype, config_overrides)
    modules = dict(model.named_modules())
    _compare(folder, modules)
    for done, name in enumerate(folder.linears, 1):
        model.set_submodule(name, _layer(folder.linear(name), folder.form))
        if progress:
            progress(done, len(folder.linears), name)
    _load_others(model, folder, dtype or folder.dtype)
    entry = Form(PACKED, folder.form.skip, folder.form.use_rms_norm, folder.form.rms_norm_eps)
    model.config.quantization_config = entry.quantization_config()  # what the model's state_dict is
    return model.eval()


def _skeleton(folder: Folder, dtype: torch.dtype, overrides: dict[str, Any]) -> Any:
    """The model with its parameters on the meta device and its buffers computed."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    try:
        config = AutoConfig.from_pretrained(folder.path, **overrides)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{folder.path}: transformers makes no model of its config.json: {reason}") from None
    if (folder.path / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder.path)
    return model


def _compare(folder: Folder, modules: dict[str, nn.Module]) -> None:
    """CheckpointError unless the ternary layers of the files are linear layers of the model, all of them."""
    for name in folder.linears:
        if not isinstance(modules.get(name), nn.Linear):
            got = type(modules[name]).__name__ if name in modules else "nothing"
            raise CheckpointError(f"layer {name!r} must be a linear layer of the model, got {got}; name it in 'skip'")
    linears = {name for name, module in modules.items() if isinstance(module, nn.Linear)}
    missing = {name for name in linears - set(folder.linears) if f"{name}.weight" not in folder.tensors}
    tied = {name for name in missing if modules[name] is modules.get("lm_head")}
    if missing - tied:
        raise CheckpointError(f"{folder.path}: holds no weight for layer {min(missing - tied)!r}")


def _layer(linear: Linear, form: Form) -> BitLinear:
    if not form.use_rms_norm:
        return _bit_linear(BitLinear, linear)
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    layer = _bit_linear(NormedBitLinear, linear)
    layer.rms_norm = LlamaRMSNorm(linear.shape[1], eps=form.rms_norm_eps).to("meta")
    return layer


def _bit_linear(kind: type[BitLinear], linear: Linear) -> BitLinear:
    packed = torch.from_numpy(linear.to("tile16"))
    layer = kind.from_packed(packed, linear.scale, linear.shape, linear.bias)
    layer._inverse = linear.inverse  # saved back verbatim until s changes
    return layer


def _load_others(model: Any, folder: Folder, dtype: torch.dtype) -> None:
    state = {name: folder.tensor(name).to(dtype) for name in folder.others}
    for name, value in model.named_parameters(remove_duplicate=False):
        if name in state and state[name].shape != value.shape:
            wanted, got = tuple(value.shape), tuple(state[name].shape)
            raise CheckpointError(f"tensor {name!r} must be {wanted} by config.json, got {got}")
    unexpected = model.load_state_dict(state, strict=False, assign=True).unexpected_keys
    unexpected = [name for name in unexpected if not name.endswith(".rotary_emb.inv_freq")]
    if unexpected:
        raise CheckpointError(f"{folder.path}: the model has no place for tensor {unexpected[0]!r}")
    model.tie_weights()
    absent = [name for name, value in model.named_parameters() if value.is_meta]
    if absent:
        raise CheckpointError(f"{folder.path}: holds no tensor {absent[0]!r}")
