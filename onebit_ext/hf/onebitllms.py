"""The functions of onebitllms 0.0.4 under their own names: one changed import, and codes train without a float copy.

    from onebit_ext.hf.onebitllms import replace_linear_with_bitnet_linear

Where the results differ from onebitllms': docs/onebitllms.md.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from onebit_ext.torch import AutoFlip, replace_linear
from onebit_ext.torch import BitLinear as BitNetLinear

from .config import FLOAT, PACKED
from .folder import Folder
from .save import write_folder

__all__ = ["BitNetLinear", "convert_to_bf16", "quantize_to_1bit", "replace_linear_with_bitnet_linear"]

Model = TypeVar("Model", bound=nn.Module)


def replace_linear_with_bitnet_linear(model: Model, previous_dtype: torch.dtype | None = None, **options: Any) -> Model:
    """Swap every linear layer but lm_head, in place, and return the model, ready for any Trainer and any optimizer.

    Whatever torch optimizer is made later also flips the codes, on its schedule (`AutoFlip`, which takes `options`,
    for example flip_lr or seed; shadow=True begins the residuals where the floats were between two codes).
    `save_pretrained` of the model writes transformers' packed form.

    previous_dtype is accepted and not used: torch's default dtype stays as it is.
    """
    if AutoFlip.of(model) is None:
        replace_linear(model, auto=True, **options)
    return model


def quantize_to_1bit(input_checkpoint_path: str, output_checkpoint_path: str) -> str:
    """A checkpoint folder (floats, bf16 or packed) -> transformers' packed form with weight_scale = 1/s; its path."""
    folder = Folder(input_checkpoint_path)
    folder.config["is_bitnet_config"] = True
    write_folder(folder, output_checkpoint_path, PACKED, overwrite=True)
    return output_checkpoint_path


def convert_to_bf16(input_checkpoint_path: str, output_checkpoint_path: str) -> str:
    """A checkpoint folder -> a plain bf16 model of weights s T, without quantization_config; its path."""
    write_folder(Folder(input_checkpoint_path), output_checkpoint_path, FLOAT, overwrite=True)
    return output_checkpoint_path
