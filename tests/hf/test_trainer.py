"""Trainer and SFTTrainer, unmodified, over the real layers: every option trains, and a resumed run is the same run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sftkit as kit
import torch
from transformers import AutoTokenizer, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from onebit_ext.hf import from_pretrained
from onebit_ext.hf.trainer import FlipFactory, FlipLogger
from onebit_ext.torch import BitLinear, FlipOptimizer, replace_linear

FLIPS: dict[str, Any] = {"lr": 0.15, "float_lr": 2e-3, "scale_lr": 3e-3, "weight_decay": 0.01, "seed": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kit.float_model(tmp_path_factory.mktemp("float") / "model")


def make(
    folder: Path, out: Path, trl: bool = False, auto: bool = False, data: Any = None, flips: Any = FLIPS, **options: Any
) -> Any:
    """A trainer of a fresh model; explicit factory, or `auto`: nothing but the swap."""
    torch.manual_seed(0)
    model = kit.load(folder)
    replace_linear(model, auto=auto, **({"flip_lr": 0.15, "seed": 5} if auto else {}))
    given: dict[str, Any] = {} if auto else {"optimizer_cls_and_kwargs": (FlipFactory, flips)}
    evaluation = {"eval_dataset": kit.tokens(8)} if "eval_strategy" in options else {}
    if not trl:
        arguments = kit.arguments(TrainingArguments, out, **options)
        return Trainer(model, arguments, train_dataset=data or kit.tokens(), **given, **evaluation)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    arguments = kit.arguments(SFTConfig, out, max_length=96, **options)
    return SFTTrainer(model, arguments, train_dataset=data or kit.texts(), processing_class=tokenizer, **given)


def run(*parts: Any, resume: Any = None, **options: Any) -> Any:
    trainer = make(*parts, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture(scope="module")
def plain(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Six plain steps, to which the options that change nothing are compared."""
    return kit.everything(run(folder, tmp_path_factory.mktemp("plain"), max_steps=6))


# ------------------------------------------------------------------ bar 2
@pytest.mark.parametrize("trl", [False, True], ids=["Trainer", "SFTTrainer"])
@pytest.mark.parametrize("auto", [False, True], ids=["factory", "auto"])
def test_resume_at_10_of_20_is_the_uninterrupted_run(folder: Path, tmp_path: Path, trl: bool, auto: bool) -> None:
    options: dict[str, Any] = {"trl": trl, "auto": auto, "bf16": trl}
    straight = run(folder, tmp_path / "out", save_strategy="steps", save_steps=10, **options)
    resumed = run(folder, tmp_path / "again", resume=str(tmp_path / "out" / "checkpoint-10"), **options)
    assert resumed.state.global_step == 20
    assert kit.same(kit.everything(straight), kit.everything(resumed))
    start = kit.codes(from_pretrained(tmp_path / "out" / "checkpoint-10"))
    assert kit.changed(start, kit.codes(resumed.model)) > 0.001


# ------------------------------------------------------------------ options that change nothing
@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"dataloader_num_workers": 1},
        {"auto_find_batch_size": True},
    ],
    ids=["checkpointing", "reentrant", "workers", "batch-size"],
)
def test_the_same_bits(folder: Path, tmp_path: Path, plain: dict[str, torch.Tensor], options: dict[str, Any]) -> None:
    assert kit.same(kit.everything(run(folder, tmp_path, max_steps=6, **options)), plain)


def test_the_callers_dict_serves_a_second_trainer(folder: Path, tmp_path: Path, plain: dict[str, torch.Tensor]) -> None:
    flips = dict(FLIPS)
    for _ in range(2):
        trainer = run(folder, tmp_path, max_steps=6, flips=flips)
        assert kit.same(kit.everything(trainer), plain) and flips == FLIPS
    optimizer = trainer.optimizer.optimizer
    assert isinstance(optimizer, FlipOptimizer)
    assert [group["kind"] for group in optimizer.param_groups] == ["codes", "scales", "floats", "floats"]
    assert optimizer.param_groups[0]["initial_lr"] == 0.15 and optimizer.param_groups[1]["weight_decay"] == 0


# ------------------------------------------------------------------ options that change the numbers
MATRIX: dict[str, dict[str, Any]] = {
    "accumulation": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2},
    "no clipping": {"max_grad_norm": 0.0},
    "cosine": {"lr_scheduler_type": "cosine"},
    "bf16": {"bf16": True},
    "neftune": {"neftune_noise_alpha": 5.0},
    "sft": {"trl": True},
    "sft packing": {"trl": True, "packing": True},
    "sft wrapped": {"trl": True, "packing": True, "packing_strategy": "wrapped"},
    "sft accumulation": {"trl": True, "gradient_accumulation_steps": 3, "bf16": True, "auto": True},
}


@pytest.mark.parametrize("name", MATRIX)
def test_options_train(folder: Path, tmp_path: Path, name: str) -> None:
    trainer = run(folder, tmp_path, **({"max_steps": 12, "logging_steps": 3} | MATRIX[name]))
    losses = kit.losses(trainer)
    start = kit.codes(replace_linear(kit.load(folder)))
    assert losses[-1] < 0.9 * losses[0], losses
    assert kit.changed(start, kit.codes(trainer.model)) >= 0.001
    steps = {int(layer._planes["control"][2]) for layer in trainer.model.modules() if isinstance(layer, BitLinear)}
    assert steps == {11 if MATRIX[name].get("auto") else 12}  # one flip pass a step, however many micro-batches


def test_the_best_model_is_loaded_at_the_end(folder: Path, tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
    trainer = make(folder, tmp_path, max_steps=12, load_best_model_at_end=True, greater_is_better=True, **options)
    trainer.train()  # greater_is_better: the best checkpoint is an early one
    best = trainer.state.best_model_checkpoint
    assert best is not None and not best.endswith("checkpoint-12")
    loaded = from_pretrained(best)
    assert kit.changed(kit.codes(loaded), kit.codes(trainer.model)) == 0
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), trainer.model.parameters(), strict=True))


def test_flip_statistics_in_the_logs(folder: Path, tmp_path: Path) -> None:
    trainer = make(folder, tmp_path, max_steps=12, logging_steps=4)
    trainer.add_callback(FlipLogger())
    rates: list[float] = []
    step = FlipOptimizer.step

    def spy(optimizer: FlipOptimizer, closure: Any = None) -> Any:
        result = step(optimizer, closure)
        rates.append(optimizer.flip_rate)
        return result

    trainer.create_optimizer = lambda model=None: _spied(Trainer.create_optimizer(trainer), spy)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    means = [sum(rates[i : i + 4]) / 4 for i in (0, 4, 8)]
    assert len(rates) == 12 and sum(rates) > 0
    assert [entry["flip_rate"] for entry in logs] == pytest.approx(means)
    assert logs[-1]["flips"] == pytest.approx(sum(rates)) and 0 < logs[-1]["flip_guard"] <= 1


def _spied(optimizer: Any, spy: Any) -> Any:
    optimizer.step = spy.__get__(optimizer)
    return optimizer


def test_a_factory_for_a_model_without_our_layers(folder: Path) -> None:
    with pytest.raises(ValueError, match="no BitLinear"):
        FlipFactory()(kit.load(folder), lr=0.1)


# ------------------------------------------------------------------ compiled
@pytest.mark.slow
def test_torch_compile(folder: Path, tmp_path: Path, plain: dict[str, torch.Tensor]) -> None:
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    assert kit.same(kit.everything(run(folder, tmp_path, max_steps=6, **options)), plain)


@pytest.mark.slow
def test_no_graph_break(folder: Path) -> None:
    model = replace_linear(kit.load(folder))
    FlipOptimizer(model, **FLIPS)
    ids = torch.arange(32).view(2, 16)
    explained = torch._dynamo.explain(model)(input_ids=ids, labels=ids)
    assert explained.graph_break_count == 0, explained.break_reasons


# ------------------------------------------------------------------ two processes
@pytest.mark.slow
def test_two_ranks_under_the_trainer(folder: Path, tmp_path: Path) -> None:
    """Bit-identical ranks; the factory's loss is that of one process with twice the batch."""
    script = Path(__file__).with_name("rank_trainer.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run([*command, str(folder), str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for auto in (False, True):
        first, second = (torch.load(tmp_path / f"{auto}-{rank}.pt", weights_only=True) for rank in (0, 1))
        assert first["wrapped"] == "DistributedDataParallel" and first["changed"] >= 0.001
        assert kit.same(first["bits"], second["bits"])
        if not auto:
            alone = run(folder, tmp_path, max_steps=12, logging_steps=4)
            assert first["losses"] == pytest.approx(kit.losses(alone), rel=0.03)
