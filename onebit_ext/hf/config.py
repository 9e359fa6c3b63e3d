"""What a checkpoint folder says about its ternary layers: `config.json` -> Form, and back."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onebit_ext import CheckpointError

PACKED, DIRECT, ONLINE, FLOAT = "hf-packed", "hf-packed-direct", "bf16", "float"

DESCRIPTIONS = {
    PACKED: "transformers packed, bitlinear: uint8 codes, weight_scale = 1/s",
    DIRECT: "transformers packed, autobitlinear offline: uint8 codes, weight_scale = s",
    ONLINE: "latent floats, autobitlinear online: codes and s by absmean at load",
    FLOAT: "plain floats, no quantization_config: codes and s by absmean",
}


@dataclass(frozen=True)
class Form:
    """How ternary layers are stored.

    kind: "hf-packed" (weight_scale = 1/s), "hf-packed-direct" (weight_scale = s), "bf16" (latent floats marked as
    such) or "float" (a model like any other).  skip: patterns of modules that stay as they are.  use_rms_norm: every
    ternary layer holds a norm of its input.
    """

    kind: str
    skip: tuple[str, ...] = ("lm_head",)
    use_rms_norm: bool = False
    rms_norm_eps: float = 1e-6

    @property
    def packed(self) -> bool:
        """True if the folder holds codes and `weight_scale`."""
        return self.kind in (PACKED, DIRECT)

    def skips(self, module: str) -> bool:
        """True if a pattern matches from the start of the name or is its end, as transformers matches."""
        edge = r"(?:(?<=\.)|(?=\.|$))"
        return any(re.match(rf"(?:{key}){edge}", module) or module.endswith(key) for key in self.skip)

    def quantization_config(self) -> dict[str, Any] | None:
        """The entry of `config.json` that makes transformers read such a folder rightly; None for plain floats."""
        if self.kind == FLOAT:
            return None
        entry: dict[str, Any] = {"quant_method": "bitnet", "modules_to_not_convert": list(self.skip)}
        if self.kind != PACKED:
            entry["linear_class"] = "autobitlinear"
            entry["quantization_mode"] = "offline" if self.kind == DIRECT else "online"
        if self.use_rms_norm:
            entry |= {"use_rms_norm": True, "rms_norm_eps": self.rms_norm_eps}
        return entry


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError otherwise."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, got {type(value).__name__}")
    return value


def read_form(config: Mapping[str, Any], has_scales: bool, skip: Sequence[str] | None = None) -> Form:
    """The form that `config` (a whole config.json) and the presence of `weight_scale` tensors tell.

    skip: replaces the config's modules_to_not_convert.  Raises CheckpointError for what is no BitNet checkpoint.
    """
    entry = config.get("quantization_config")
    if entry is None:
        if has_scales:
            raise CheckpointError(
                "there are weight_scale tensors but config.json has no quantization_config, which says whether they are"
                ' s or 1/s; for 1/s add "quantization_config": {"quant_method": "bitnet"}, for s also'
                ' "linear_class": "autobitlinear", "quantization_mode": "offline"'
            )
        return Form(FLOAT, tuple(skip) if skip is not None else ("lm_head",))
    if not isinstance(entry, dict) or entry.get("quant_method") != "bitnet":
        got = entry.get("quant_method") if isinstance(entry, dict) else entry
        raise CheckpointError(f"quant_method must be 'bitnet', got {got!r}; dequantize the model first")
    kind = _kind(entry.get("linear_class", "bitlinear"), entry.get("quantization_mode", "offline"))
    if has_scales != (kind != ONLINE):
        raise CheckpointError(
            f"config.json says {DESCRIPTIONS[kind]!r}, but the files hold {'' if has_scales else 'no '}weight_scale"
            " tensors: config and weights are of two checkpoints"
        )
    return Form(
        kind,
        tuple(skip) if skip is not None else _patterns(entry.get("modules_to_not_convert")),
        bool(entry.get("use_rms_norm", False)),
        float(entry.get("rms_norm_eps", 1e-6)),
    )


def _kind(linear_class: Any, mode: Any) -> str:
    kinds = {
        ("bitlinear", "offline"): PACKED,
        ("autobitlinear", "offline"): DIRECT,
        ("autobitlinear", "online"): ONLINE,
    }
    if (linear_class, mode) not in kinds:
        raise CheckpointError(
            "quantization_config must have linear_class 'bitlinear' (offline) or 'autobitlinear' with quantization_mode"
            f" 'offline' or 'online', got {linear_class!r}, {mode!r}"
        )
    return kinds[linear_class, mode]


def _patterns(value: Any) -> tuple[str, ...]:
    if value is None:
        return ("lm_head",)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise CheckpointError(f"modules_to_not_convert must be a list of names, got {value!r}")
    for pattern in value:
        try:
            re.compile(pattern)
        except re.error as error:
            raise CheckpointError(f"modules_to_not_convert: {pattern!r} is no pattern ({error})") from None
    return tuple(value)
