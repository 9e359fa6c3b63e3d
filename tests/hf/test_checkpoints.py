"""Checkpoint folders: what we read is the truth, what we compute is what stock transformers computes, round trips are
exact, and what is torn or contradictory is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from models import BITNET_2B, FALCON_E, build, distance, logits, stock_logits
from safetensors.torch import load_file, save_file

from onebit_ext import CheckpointError
from onebit_ext.hf import from_pretrained, save, save_pretrained
from onebit_ext.hf.folder import Folder
from onebit_ext.torch import BitLinear, FlipOptimizer, replace_linear

ARCHITECTURES = {"falcon-e": FALCON_E, "bitnet-2b": BITNET_2B}
PACKED = ("hf-packed", "hf-packed-direct")
KINDS = (*PACKED, "bf16", "float")
WEIGHTS = "model.safetensors"

# rms over the standard deviation of the logits, float32.  Mostly 0; where one ulp moves an int8 activation over a
# rounding edge, 0.003 to 0.007 in models this small.  A wrong scale or a lost bias gives more than 0.3.
SAME = 0.01


def edit_config(folder: Path, **entries: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


# ------------------------------------------------------------------ reading
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_reads_as_what_was_written(tmp_path: Path, arch: str, kind: str) -> None:
    truth = build(tmp_path / "in", kind, ARCHITECTURES[arch], biases=arch == "falcon-e")
    folder = Folder(tmp_path / "in")
    assert folder.form.kind == kind and set(folder.linears) == set(truth)
    for name, (codes, s, bias) in truth.items():
        layer = folder.linear(name)
        assert layer.shape == codes.shape
        model_layer = BitLinear.from_packed(torch.from_numpy(layer.to("tile16")), layer.scale, layer.shape)
        assert torch.equal(model_layer.codes(), codes)
        assert float(layer.scale) == pytest.approx(s, rel=0 if kind in PACKED else 2e-7)
        assert (bias is None) == (layer.bias is None)
        if bias is not None:
            assert layer.bias is not None and torch.equal(layer.bias, bias)
        assert layer.shares() == pytest.approx([(codes == v).double().mean().item() for v in (-1, 0, 1)], abs=1e-12)


def test_floats_that_are_ternary_already_keep_their_scale(tmp_path: Path) -> None:
    """A dequantised export s T: absmean would read s times the share of nonzeros."""
    truth = build(tmp_path / "in", "float")
    edit_tensors(
        tmp_path / "in", lambda t: t.update({f"{k}.weight": (c * 0.0625).bfloat16() for k, (c, _, _) in truth.items()})
    )
    for name, (codes, _, _) in truth.items():
        layer = Folder(tmp_path / "in").linear(name)
        assert float(layer.scale) == 0.0625
        assert torch.equal(
            BitLinear.from_packed(torch.from_numpy(layer.packed), layer.scale, layer.shape).codes(), codes
        )


def test_codes_stored_as_floats(tmp_path: Path) -> None:
    """What transformers saves of a packed autobitlinear model: codes as bf16 beside weight_scale."""
    truth = build(tmp_path / "in", "hf-packed-direct")
    want = logits(from_pretrained(tmp_path / "in"))
    edit_tensors(
        tmp_path / "in",
        lambda t: t.update({f"{name}.weight": codes.bfloat16() for name, (codes, _, _) in truth.items()}),
    )
    assert torch.equal(logits(from_pretrained(tmp_path / "in")), want)


# ------------------------------------------------------------------ computing
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kind", (*PACKED, "bf16"))
@pytest.mark.parametrize("rms_norm", [False, True])
def test_we_compute_what_stock_transformers_computes(tmp_path: Path, arch: str, kind: str, rms_norm: bool) -> None:
    config = ARCHITECTURES[arch]
    build(tmp_path / "in", kind, config, torch.float32, biases=arch == "falcon-e", rms_norm=rms_norm)
    model = from_pretrained(tmp_path / "in")
    assert sum(isinstance(module, BitLinear) for module in model.modules()) == 14
    want = stock_logits(tmp_path / "in")
    assert distance(logits(model), want) <= SAME
    for to in PACKED:
        save_pretrained(model, tmp_path / to, to)
        assert distance(stock_logits(tmp_path / to), logits(model)) <= SAME
    save_pretrained(model, tmp_path / "out", "bf16")
    got = logits(from_pretrained(tmp_path / "out", torch.float32))
    assert distance(got, stock_logits(tmp_path / "out", dtype=torch.float32)) <= SAME
    assert distance(got, want) <= 0.05  # embeddings, norms and the magnitude of the weights rounded to bf16


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_bfloat16(tmp_path: Path, arch: str) -> None:
    """We are as near to float32 as stock transformers is (0.7 % for the Llama, 3 % for the BitNet model)."""
    build(tmp_path / "in", "hf-packed", ARCHITECTURES[arch])
    exact = stock_logits(tmp_path / "in", dtype=torch.float32)
    stock = distance(stock_logits(tmp_path / "in"), exact)
    assert distance(logits(from_pretrained(tmp_path / "in")), exact) <= 1.1 * stock <= 0.05


def test_the_scale_convention_matters(tmp_path: Path) -> None:
    """The test above would see an inverted scale."""
    build(tmp_path / "in", "hf-packed", FALCON_E, torch.float32)
    want = logits(from_pretrained(tmp_path / "in"))
    edit_config(tmp_path / "in", quantization_config=models.QUANTIZATION["hf-packed-direct"])
    assert distance(logits(from_pretrained(tmp_path / "in")), want) > 0.3


def test_a_trained_model_survives(tmp_path: Path) -> None:
    build(tmp_path / "in", "float")
    model = from_pretrained(tmp_path / "in", dtype=torch.float32).train()
    before = [layer.codes() for layer in model.modules() if isinstance(layer, BitLinear)]
    optimizer = FlipOptimizer(model, lr=0.3, float_lr=3e-3, scale_lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(models.IDS, labels=models.IDS).loss
        loss.backward()
        optimizer.step()
        model.zero_grad()
        losses.append(loss.item())
    after = [layer.codes() for layer in model.modules() if isinstance(layer, BitLinear)]
    assert losses[-1] < losses[0] and any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    for to in PACKED:
        save_pretrained(model.eval(), tmp_path / to, to)
        assert distance(stock_logits(tmp_path / to), logits(model)) <= SAME
        again = from_pretrained(tmp_path / to)
        assert torch.equal(logits(again), logits(model))  # float32 scales come back to the bit
    model.save_pretrained(tmp_path / "plain")  # transformers' own, through the state_dict hooks
    assert distance(stock_logits(tmp_path / "plain"), logits(model)) <= SAME


# ------------------------------------------------------------------ round trips
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_packed_to_ours_to_packed_byte_for_byte(tmp_path: Path, arch: str, kind: str, dtype: torch.dtype) -> None:
    build(tmp_path / "in", kind, ARCHITECTURES[arch], dtype, biases=arch == "falcon-e", rms_norm=True)
    save_pretrained(from_pretrained(tmp_path / "in"), tmp_path / "model", kind)
    save.write_folder(Folder(tmp_path / "in"), tmp_path / "folder", kind)
    want = (tmp_path / "in" / WEIGHTS).read_bytes()
    assert (tmp_path / "model" / WEIGHTS).read_bytes() == want
    assert (tmp_path / "folder" / WEIGHTS).read_bytes() == want
    configs = [json.loads((tmp_path / where / "config.json").read_text()) for where in ("in", "model", "folder")]
    assert configs[2] == configs[0]
    assert configs[1]["quantization_config"] == configs[0]["quantization_config"]
    assert (tmp_path / "folder" / "tokenizer.json").read_bytes() == (tmp_path / "in" / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_bf16_export_survives_absmean(tmp_path: Path, arch: str) -> None:
    """The oracle is absmean in float64; without the division by the share of nonzeros the scale would be 2/3 of s."""
    truth = build(tmp_path / "in", "hf-packed", ARCHITECTURES[arch])
    save.write_folder(Folder(tmp_path / "in"), tmp_path / "out", "bf16")
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    for name, (codes, s, _) in truth.items():
        weight = tensors[f"{name}.weight"]
        assert weight.dtype == torch.bfloat16
        mean = weight.double().abs().mean()
        assert torch.equal((weight.double() / mean).round().clamp(-1, 1).to(torch.int8), codes)
        assert abs(float(mean) / s - 1) <= 2**-8
        layer = Folder(tmp_path / "out").linear(name)
        assert abs(float(layer.scale) / s - 1) <= 2**-8


def test_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path / "in", "hf-packed")
    monkeypatch.setattr(save, "SHARD_BYTES", 100_000)
    save.write_folder(Folder(tmp_path / "in"), tmp_path / "out", "hf-packed")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 3
    assert torch.equal(stock_logits(tmp_path / "out"), stock_logits(tmp_path / "in"))
    assert torch.equal(logits(from_pretrained(tmp_path / "out")), logits(from_pretrained(tmp_path / "in")))
    next((tmp_path / "out").glob("model-00002-*")).unlink()
    with pytest.raises(CheckpointError, match="download is incomplete"):
        Folder(tmp_path / "out")


def test_a_float_model_swapped_by_hand(tmp_path: Path) -> None:
    """No quantization_config anywhere; a tied head; a layer the user kept as floats."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=260, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    model = replace_linear(AutoModelForCausalLM.from_config(config).eval(), skip=("lm_head", "o_proj"))
    save_pretrained(model, tmp_path / "out", tokenizer=models.byte_tokenizer())
    entry = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert entry["modules_to_not_convert"] == ["lm_head", "model.layers.0.self_attn.o_proj"]
    assert "lm_head.weight" not in load_file(tmp_path / "out" / WEIGHTS)
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert distance(stock_logits(tmp_path / "out"), logits(model)) <= SAME
    assert torch.equal(logits(from_pretrained(tmp_path / "out")), logits(model))


# ------------------------------------------------------------------ refusing
def break_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../x.safetensors"}}')


def set_tensor(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, lambda t: t.update({name: value(t[name])}))


def add_tensor(name: str, value: torch.Tensor) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, lambda t: t.update({name: value}))


def quantization(folder: Path, **entries: Any) -> None:
    edit_config(folder, quantization_config={"quant_method": "bitnet"} | entries)


LAYER = "model.layers.1.mlp.up_proj"
HOSTILE: list[tuple[str, Callable[[Path], Any], str]] = [
    ("no config", lambda f: (f / "config.json").unlink(), "config.json: no such file"),
    ("config no JSON", lambda f: (f / "config.json").write_text("{"), "not JSON"),
    ("config a list", lambda f: (f / "config.json").write_text("[]"), "must hold a JSON object"),
    ("config nested", lambda f: (f / "config.json").write_text("[" * 99999), "not JSON"),
    ("no quantization_config", lambda f: edit_config(f, quantization_config=None), "whether they are s or 1/s"),
    ("gptq", lambda f: edit_config(f, quantization_config={"quant_method": "gptq"}), "quant_method must be 'bitnet'"),
    ("online with codes", lambda f: edit_config(f, quantization_config=models.QUANTIZATION["bf16"]), "two checkpoints"),
    ("unknown class", lambda f: quantization(f, linear_class="x"), "got 'x'"),
    ("bad dtype", lambda f: edit_config(f, torch_dtype="int4"), "dtype must be one of"),
    ("bad pattern", lambda f: quantization(f, modules_to_not_convert=["("]), "no pattern"),
    ("no list", lambda f: quantization(f, modules_to_not_convert="lm_head"), "must be a list of names"),
    ("unknown model", lambda f: edit_config(f, model_type="nonsense"), "transformers makes no model"),
    ("too few blocks", lambda f: edit_config(f, num_hidden_layers=1), "got nothing"),
    ("too many blocks", lambda f: edit_config(f, num_hidden_layers=3), "holds no weight for layer"),
    ("another vocabulary", lambda f: edit_config(f, vocab_size=300), "must be"),
    ("no weights", lambda f: (f / WEIGHTS).unlink(), "there must be model.safetensors"),
    ("pickle", lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"), "pickles are not read"),
    ("torn", lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-1]), "not a whole safetensors file"),
    ("empty", lambda f: (f / WEIGHTS).write_bytes(b""), "not a whole safetensors file"),
    ("index outside", break_index, "lies outside the folder"),
    ("zero scale", set_tensor(f"{LAYER}.weight_scale", torch.zeros_like), "one finite positive float"),
    ("nan scale", set_tensor(f"{LAYER}.weight_scale", lambda t: t * float("nan")), "one finite positive float"),
    ("two scales", set_tensor(f"{LAYER}.weight_scale", lambda t: t.repeat(2)), "one finite positive float"),
    ("integer scale", set_tensor(f"{LAYER}.weight_scale", lambda t: t.int()), "one finite positive float"),
    ("zero-filled", set_tensor(f"{LAYER}.weight", torch.zeros_like), "failed download"),
    ("reserved code", set_tensor(f"{LAYER}.weight", lambda t: t | 192), "reserved"),
    ("float weight", set_tensor(f"{LAYER}.weight", lambda t: t.float()), "must be uint8 codes"),
    ("flat weight", set_tensor(f"{LAYER}.weight", lambda t: t.reshape(-1)), "2-d weight"),
    ("short bias", add_tensor(f"{LAYER}.bias", torch.zeros(3)), r"bias must be floats \(512,\)"),
    ("code without scale", lambda f: edit_tensors(f, lambda t: t.pop(f"{LAYER}.weight_scale")), "has no weight_scale"),
    ("no norm", lambda f: edit_tensors(f, lambda t: t.pop("model.norm.weight")), "holds no tensor 'model.norm.weight'"),
    ("stray tensor", add_tensor("stray", torch.zeros(3)), "no place for tensor 'stray'"),
]  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "in"
    build(folder, "hf-packed")
    return folder


@pytest.mark.parametrize(("mutate", "message"), [case[1:] for case in HOSTILE], ids=[case[0] for case in HOSTILE])
def test_what_is_wrong_is_named(tmp_path: Path, good: Path, mutate: Callable[[Path], Any], message: str) -> None:
    shutil.copytree(good, tmp_path / "in")
    mutate(tmp_path / "in")
    with pytest.raises(CheckpointError, match=message) as caught:
        from_pretrained(tmp_path / "in")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 100, 1000, 100_000])
def test_every_torn_file_is_refused(tmp_path: Path, good: Path, length: int) -> None:
    shutil.copytree(good, tmp_path / "in")
    (tmp_path / "in" / WEIGHTS).write_bytes((good / WEIGHTS).read_bytes()[:length])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        Folder(tmp_path / "in")


def test_what_a_form_cannot_hold(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": 260}
    odd = AutoModelForCausalLM.from_config(LlamaConfig(hidden_size=32, intermediate_size=30, **sizes))
    with pytest.raises(ValueError, match="has 30 outputs; transformers packs multiples of 4"):
        save_pretrained(replace_linear(odd), tmp_path / "out")
    save_pretrained(odd, tmp_path / "bf16", "bf16")
    assert distance(logits(from_pretrained(tmp_path / "bf16")), logits(odd.eval())) < 0.2
    rows = AutoModelForCausalLM.from_config(LlamaConfig(hidden_size=32, intermediate_size=64, **sizes))
    for to in (*PACKED, "bf16"):
        with pytest.raises(ValueError, match="has a scale per row"):
            save_pretrained(replace_linear(rows, scale="row"), tmp_path / "out", to)
    with pytest.raises(ValueError, match="swap its layers"):
        save_pretrained(torch.nn.Linear(2, 2), tmp_path / "out")
    with pytest.raises(ValueError, match="'to' must be one of"):
        save_pretrained(odd, tmp_path / "out", "gptq")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bf16"]


# ------------------------------------------------------------------ atomic
def test_a_failed_save_leaves_what_was_there(tmp_path: Path, good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(good, tmp_path / "out")
    want = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(FileExistsError, match="exists already"):
        save.write_folder(Folder(good), tmp_path / "out", "bf16")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(save, "save_file", fail)
        with pytest.raises(OSError, match="disk full"):
            save.write_folder(Folder(good), tmp_path / "out", "bf16", overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == want
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    save.write_folder(Folder(tmp_path / "out"), tmp_path / "out", "hf-packed-direct", overwrite=True)  # onto itself
    assert Folder(tmp_path / "out").form.kind == "hf-packed-direct"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
