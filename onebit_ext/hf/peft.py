"""LoRA adapters on top of ternary layers, with PEFT."""

from __future__ import annotations

from typing import Any, NoReturn

from peft import LoraConfig
from peft.tuners.lora import Linear

from onebit_ext.torch import BitLinear


class BitLoraLinear(Linear):
    """PEFT's LoRA layer around a BitLinear, whose codes stay as they are."""

    def merge(self, *args: Any, **kwargs: Any) -> NoReturn:
        """TypeError: codes cannot hold the sum."""
        raise TypeError(
            "a LoRA adapter cannot be merged into ternary codes; keep it beside the model (save_pretrained)"
        )


def on_bit_linear(config: LoraConfig) -> LoraConfig:
    """The same config, made to accept BitLinear among its `target_modules`.

    The layers' codes and scales are frozen, as PEFT freezes any base model: no optimizer of ours is needed.
    """
    config._register_custom_module({BitLinear: BitLoraLinear})
    return config
