"""What each rank of test_two_ranks_under_the_trainer does: `torchrun --nproc-per-node 2 rank_trainer.py MODEL OUT`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import sftkit as kit
import torch
from transformers import Trainer, TrainingArguments

from onebit_ext.hf.trainer import FlipFactory
from onebit_ext.torch import replace_linear

FLIPS: dict[str, Any] = {"lr": 0.15, "float_lr": 2e-3, "scale_lr": 3e-3, "seed": 5}


def train(model_path: Path, out: Path, auto: bool, **options: Any) -> Trainer:
    torch.manual_seed(0)
    model = kit.load(model_path)
    replace_linear(model, auto=auto, **({"flip_lr": 0.15} if auto else {}))
    given: dict[str, Any] = {} if auto else {"optimizer_cls_and_kwargs": (FlipFactory, FLIPS)}
    arguments = kit.arguments(TrainingArguments, out, max_steps=12, logging_steps=4, **options)
    trainer = Trainer(model, arguments, train_dataset=kit.tokens(), **given)
    trainer.train()
    return trainer


def main() -> None:
    model, out, rank = Path(sys.argv[1]), Path(sys.argv[2]), int(os.environ["RANK"])
    for auto in (False, True):
        options = {"gradient_accumulation_steps": 2, "gradient_checkpointing": True} if auto else {}
        trainer = train(model, out, auto, per_device_train_batch_size=2, ddp_backend="gloo", **options)
        start = kit.codes(replace_linear(kit.load(model)))
        wrapped = type(trainer.model_wrapped).__name__
        facts = {"changed": kit.changed(start, kit.codes(trainer.model)), "losses": kit.losses(trainer)}
        torch.save(facts | {"wrapped": wrapped, "bits": kit.everything(trainer)}, out / f"{auto}-{rank}.pt")


if __name__ == "__main__":
    main()
