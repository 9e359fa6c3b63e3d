"""A small float Llama, texts and the arguments that the tests of training share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import torch
import transformers
from datasets import Dataset
from models import FALCON_E, build
from torch import Tensor, nn

from onebit_ext.torch import BitLinear

torch.set_num_threads(1)
datasets.disable_progress_bars()
transformers.logging.set_verbosity_error()

SMALL = FALCON_E | {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "max_position_embeddings": 256}
IDS = torch.arange(48).view(1, 48) * 37 % 250
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "the", "dog", "ran", "to", "red", "big", "sun"]


def float_model(path: Path) -> Path:
    """The folder of a float model, as a *prequantized* checkpoint is."""
    if not path.exists():
        build(path, "float", SMALL, torch.float32)
    return path


def load(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


def sentences(count: int, seed: int = 3) -> list[str]:
    rng = torch.Generator().manual_seed(seed)
    pick = lambda: WORDS[int(torch.randint(0, len(WORDS), (), generator=rng))]  # noqa: E731
    return [" ".join(f"{pick()} {pick()} sat on a mat" for _ in range(2)) for _ in range(count)]


def texts(count: int = 96) -> Dataset:
    return Dataset.from_dict({"text": sentences(count)})


def chats(count: int = 96) -> Dataset:
    rows = [[{"role": "user", "content": t[:12]}, {"role": "assistant", "content": t}] for t in sentences(count)]
    return Dataset.from_dict({"messages": rows})


def tokens(count: int = 96, length: int = 32) -> Dataset:
    rng = torch.Generator().manual_seed(1)
    rows = (torch.randint(0, 4, (count, length), generator=rng).cumsum(1) * 7 % 250).tolist()
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def arguments(kind: type, out: Path, **options: Any) -> Any:
    """TrainingArguments or SFTConfig; nothing at its default that matters."""
    common: dict[str, Any] = {
        "output_dir": str(out), "max_steps": 20, "per_device_train_batch_size": 4, "learning_rate": 2e-3, "seed": 7,
        "logging_steps": 5, "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True,
        "warmup_steps": 3, "weight_decay": 0.01,
    }  # fmt: skip
    return kind(**common | options)


def codes(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.codes() for name, layer in model.named_modules() if isinstance(layer, BitLinear)}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    """Share of codes that differ."""
    moved = sum(int((before[name] != after[name]).sum()) for name in before)
    return moved / sum(value.numel() for value in before.values())


def everything(trainer: Any) -> dict[str, Tensor]:
    """Every bit of a trainer's model and optimizer."""
    found = {f"model.{name}": value.detach().clone() for name, value in trainer.model.named_parameters()}
    for index, state in trainer.optimizer.state_dict()["state"].items():
        found |= {f"state.{index}.{name}": torch.as_tensor(value).clone() for name, value in state.items()}
    return found


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
