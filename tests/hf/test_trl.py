"""TRL's other trainers, and PEFT, over ternary layers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import sftkit as kit
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

from onebit_ext.torch import replace_linear


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kit.float_model(tmp_path_factory.mktemp("float") / "model")


def preferences() -> Dataset:
    """Good ends in a fixed way, bad does not."""
    lines = kit.sentences(64)
    rows = {"prompt": [t[:8] for t in lines], "chosen": [" big sun" * 3] * 64, "rejected": [t[8:32] for t in lines]}
    return Dataset.from_dict(rows)


@pytest.mark.parametrize("kind", ["dpo", "reward"])
def test_preference_trainers_learn(folder: Path, tmp_path: Path, kind: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    options: dict[str, Any] = {"max_steps": 16, "logging_steps": 4, "max_length": 96}
    if kind == "dpo":
        model = kit.load(folder)
        trainer: type = DPOTrainer
        arguments = kit.arguments(DPOConfig, tmp_path, **options)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
        model.config.pad_token_id = tokenizer.pad_token_id
        trainer, arguments = RewardTrainer, kit.arguments(RewardConfig, tmp_path, **options)
    replace_linear(model, skip=("lm_head", "score"), auto=True, flip_lr=0.1)
    start = kit.codes(model)
    trained = trainer(model=model, args=arguments, train_dataset=preferences(), processing_class=tokenizer)
    trained.train()
    losses = kit.losses(trained)
    assert losses[0] < 1.1 * math.log(2) and losses[-1] < 0.8 * losses[0], losses
    assert kit.changed(start, kit.codes(model)) >= 0.001


def test_lora_on_ternary_layers(folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from onebit_ext.hf.peft import on_bit_linear

    torch.manual_seed(0)
    base = replace_linear(kit.load(folder))
    start = {name: value.clone() for name, value in base.named_parameters()}
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, on_bit_linear(config))
    arguments = kit.arguments(TrainingArguments, tmp_path, max_steps=12, learning_rate=2e-2)
    trainer = Trainer(model, arguments, train_dataset=kit.tokens())
    trainer.train()
    losses = kit.losses(trainer)
    assert losses[-1] < losses[0] - 0.05, losses
    for name, value in base.named_parameters():
        if "lora" not in name:
            assert torch.equal(value, start[name.replace(".base_layer", "")]), name
    with pytest.raises(TypeError, match="cannot be merged into ternary codes"):
        model.merge_and_unload()
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftConfig.from_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(
        replace_linear(kit.load(folder)), tmp_path / "adapter", config=on_bit_linear(again)
    )
    model.eval()
    with torch.no_grad():
        assert torch.equal(loaded(kit.IDS).logits, model(kit.IDS).logits)
