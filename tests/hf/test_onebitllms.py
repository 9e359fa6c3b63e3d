"""The drop-in for onebitllms: its own script with one import changed, and its exporters against onebitllms' own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import sftkit as kit
import torch
from models import build, distance, logits, stock_logits
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from onebit_ext.hf import onebitllms as ours
from onebit_ext.hf.folder import Folder
from onebit_ext.torch import AutoFlip, BitLinear, replace_linear

# The example of onebitllms' README, its names kept; the arguments only make it small.
EXAMPLE = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer
from onebitllms import replace_linear_with_bitnet_linear

model = AutoModelForCausalLM.from_pretrained(model_id, torch_dtype=dtype)
tokenizer = AutoTokenizer.from_pretrained(model_id)
model = replace_linear_with_bitnet_linear(model)
trainer = SFTTrainer(model=model, args=SFTConfig(**arguments), train_dataset=dataset, processing_class=tokenizer)
trainer.train()
trainer.save_model(output_dir)
"""


def run_example(model_id: Path, output_dir: Path, dtype: torch.dtype, **options: Any) -> Any:
    script = EXAMPLE.replace("from onebitllms import", "from onebit_ext.hf.onebitllms import")
    assert script.count("onebit_ext") == 1  # the one changed line
    torch.manual_seed(0)
    arguments = kit.arguments(dict, output_dir, **options)
    names = {"model_id": model_id, "output_dir": output_dir, "dtype": dtype, "dataset": kit.texts()}
    scope: dict[str, Any] = names | {"arguments": arguments}
    exec(script, scope)
    return scope["trainer"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kit.float_model(tmp_path_factory.mktemp("float") / "model")


@pytest.mark.parametrize(
    ("optim", "dtype", "bound"), [("adamw_torch", torch.float32, 0.005), ("adafactor", torch.bfloat16, 0.02)]
)
def test_the_sft_example_with_one_import_changed(
    folder: Path, tmp_path: Path, optim: str, dtype: torch.dtype, bound: float
) -> None:
    start = kit.codes(replace_linear(kit.load(folder, dtype)))
    bf16 = dtype == torch.bfloat16
    trainer = run_example(folder, tmp_path / "out", dtype, optim=optim, bf16=bf16, max_steps=30)
    losses = kit.losses(trainer)
    assert losses[-1] < 0.6 * losses[0]
    assert kit.changed(start, kit.codes(trainer.model)) >= 0.001
    want = logits(trainer.model.eval(), kit.IDS)
    assert distance(stock_logits(tmp_path / "out", kit.IDS, dtype), want) <= bound
    assert Folder(tmp_path / "out").form.kind == "hf-packed"


def test_training_without_a_flip_consumer_raises(folder: Path, tmp_path: Path) -> None:
    model = replace_linear(kit.load(folder))
    trainer = Trainer(model, kit.arguments(TrainingArguments, tmp_path), train_dataset=kit.tokens())
    before = kit.codes(model)
    with pytest.raises(RuntimeError, match="nothing flips their codes"):
        trainer.train()
    assert kit.changed(before, kit.codes(model)) == 0


@pytest.mark.parametrize("kind", ["hf-packed", "hf-packed-direct", "bf16"])
def test_it_starts_from_every_kind_of_checkpoint(tmp_path: Path, kind: str) -> None:
    truth = build(tmp_path / "in", kind, kit.SMALL, torch.float32)
    with torch.compiler.set_stance("force_eager"):
        model = ours.replace_linear_with_bitnet_linear(kit.load(tmp_path / "in"), flip_lr=0.2)
    before = kit.codes(model)
    assert all(torch.equal(before[name], codes) for name, (codes, _, _) in truth.items())
    arguments = kit.arguments(TrainingArguments, tmp_path / "out", max_steps=8)
    trainer = Trainer(model, arguments, train_dataset=kit.tokens())
    trainer.train()
    assert kit.changed(before, kit.codes(model)) >= 0.001
    trainer.save_model(tmp_path / "saved")
    assert distance(stock_logits(tmp_path / "saved", kit.IDS), logits(model.eval(), kit.IDS)) <= 0.005


def test_the_swap_leaves_the_rest_alone(folder: Path) -> None:
    model = kit.load(folder, torch.bfloat16)
    head = model.lm_head
    swapped = ours.replace_linear_with_bitnet_linear(model)
    handle = AutoFlip.of(model)
    assert swapped is model and model.lm_head is head and torch.get_default_dtype() == torch.float32
    assert isinstance(model.model.layers[0].mlp.up_proj, ours.BitNetLinear)
    assert ours.replace_linear_with_bitnet_linear(model) is model and AutoFlip.of(model) is handle is not None
    layer = ours.BitNetLinear(8, 12, bias=True)
    assert layer(torch.ones(2, 3, 8)).shape == (2, 3, 12) and layer.bias is not None and isinstance(layer, BitLinear)


# ------------------------------------------------------------------ exporters
@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """onebitllms itself; its exporters use no triton, which its import wants."""
    from transformers.integrations import pack_weights, replace_with_bitnet_linear  # noqa: F401 (before the stand-in)

    for name in ("triton", "triton.language"):
        monkeypatch.setitem(sys.modules, name, MagicMock())
    yield pytest.importorskip("onebitllms")
    for name in [name for name in sys.modules if name.split(".")[0] == "onebitllms"]:
        del sys.modules[name]


def test_exporters_against_onebitllms_own(tmp_path: Path, theirs: Any) -> None:
    """Theirs is absmean in bf16, ours in float32: codes differ where w / s is within bf16's rounding of 1/2."""
    build(tmp_path / "in", "float", kit.SMALL)
    source = load_file(tmp_path / "in" / "model.safetensors")
    for function in ("quantize_to_1bit", "convert_to_bf16"):
        for module, name in ((ours, "ours"), (theirs, "theirs")):
            out = str(tmp_path / f"{function}-{name}")
            assert getattr(module, function)(str(tmp_path / "in"), out) == out
    differ = total = 0
    mine, others = Folder(tmp_path / "quantize_to_1bit-ours"), Folder(tmp_path / "quantize_to_1bit-theirs")
    assert set(mine.tensors) == set(others.tensors) and mine.linears == others.linears
    assert mine.config["is_bitnet_config"] and mine.form.kind == others.form.kind == "hf-packed"
    dense = {n: load_file(tmp_path / f"convert_to_bf16-{n}" / "model.safetensors") for n in ("ours", "theirs")}
    assert "quantization_config" not in Folder(tmp_path / "convert_to_bf16-ours").config
    for name in mine.others:
        assert torch.equal(mine.tensor(name), others.tensor(name))
        assert torch.equal(dense["ours"][name], dense["theirs"][name])
    for name in mine.linears:
        a, b = (_codes(f, name) for f in (mine, others))
        ratio = source[f"{name}.weight"].float().abs() / mine.linear(name).scale
        edge = (ratio - 0.5).abs() < 0.5 * 3 * 2**-8  # roundings of mean, of its inverse and of the product
        assert bool(edge[a != b].all())
        differ, total = differ + int((a != b).sum()), total + a.numel()
        torch.testing.assert_close(mine.linear(name).scale, others.linear(name).scale, rtol=2 * 2**-8, atol=0)
        d = [dense[n][f"{name}.weight"].float() for n in ("ours", "theirs")]
        assert torch.equal(d[0].sign(), a) and torch.equal(d[1].sign(), b)
        torch.testing.assert_close(d[0].abs().max(), d[1].abs().max(), rtol=3 * 2**-8, atol=0)
    assert 0 < differ < 0.005 * total, (differ, total)


def _codes(folder: Folder, name: str) -> torch.Tensor:
    layer = folder.linear(name)
    packed = torch.from_numpy(layer.to("tile16"))
    return BitLinear.from_packed(packed, layer.scale, layer.shape).codes().float()


def test_what_save_model_wrote_quantizes_to_itself(folder: Path, tmp_path: Path) -> None:
    model = ours.replace_linear_with_bitnet_linear(kit.load(folder))
    model.save_pretrained(tmp_path / "saved")
    ours.quantize_to_1bit(str(folder), str(tmp_path / "direct"))
    ours.quantize_to_1bit(str(tmp_path / "saved"), str(tmp_path / "again"))
    first, second, third = (Folder(tmp_path / name) for name in ("saved", "again", "direct"))
    for name in first.tensors:
        assert torch.equal(first.tensor(name), second.tensor(name))
        assert name.endswith("scale") or torch.equal(first.tensor(name), third.tensor(name).to(first.tensor(name)))
