"""GGUF: bytes against the gguf package, codes and scales exact, q/k order numerically, keys, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import models
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, quants
from models import BITNET_2B, FALCON_E, build, i2_s

from onebit_ext import CheckpointError
from onebit_ext.hf import export_gguf, from_pretrained
from onebit_ext.hf import gguf as gguf_module
from onebit_ext.hf.folder import Folder
from onebit_ext.hf.gguf_read import GGUFFile
from onebit_ext.torch import replace_linear

Array = np.ndarray[Any, Any]
TERNARY = {"tq2_0": GGMLQuantizationType.TQ2_0, "tq1_0": GGMLQuantizationType.TQ1_0}
NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def interleaved(rows: int, heads: int) -> list[int]:
    """ggml's row order of q and k: row 2i is transformers' i, row 2i+1 its i + head_dim/2."""
    half = rows // heads // 2
    return [head * 2 * half + pair + side * half for head in range(heads) for pair in range(half) for side in (0, 1)]


# ------------------------------------------------------------------ files
@pytest.mark.parametrize("packing", TERNARY)
def test_codes_and_scales_are_exact(tmp_path: Path, packing: str) -> None:
    truth = build(tmp_path / "in", "hf-packed", biases=True)
    export_gguf(tmp_path / "in", tmp_path / "out.gguf", f"gguf-{packing}")
    tensors = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "out.gguf").tensors}
    plain = Folder(tmp_path / "in")
    assert len(tensors) == len(truth) * 2 + len(plain.others)
    for name, hf_name in NAMES.items():
        for i in range(2):
            codes, s, bias = truth[f"model.layers.{i}.{hf_name}"]
            order = list(range(len(codes)))
            if name in ("attn_q", "attn_k"):
                order = interleaved(len(codes), 4 if name == "attn_q" else 2)
            tensor = tensors[f"blk.{i}.{name}.weight"]
            assert tensor.tensor_type == TERNARY[packing]
            want = codes[order].numpy() * np.float32(np.float16(s))
            assert np.array_equal(quants.dequantize(tensor.data, tensor.tensor_type), want)
            assert bias is not None and np.array_equal(tensors[f"blk.{i}.{name}.bias"].data, bias[order].numpy())
    for name, hf_name in {"token_embd": "model.embed_tokens", "output": "lm_head"}.items():
        tensor = tensors[f"{name}.weight"]
        assert tensor.tensor_type == GGMLQuantizationType.F16
        assert np.array_equal(tensor.data, plain.tensor(f"{hf_name}.weight").half().numpy())
    for name, hf_name in {"blk.1.attn_norm": "model.layers.1.input_layernorm", "output_norm": "model.norm"}.items():
        tensor = tensors[f"{name}.weight"]
        assert tensor.tensor_type == GGMLQuantizationType.F32
        assert np.array_equal(tensor.data, plain.tensor(f"{hf_name}.weight").float().numpy())


def scores_of_ggml(q: Array, k: Array, x: Array, heads: int, theta: float) -> Array:
    """Attention scores (heads, M, M) as ggml's llama graph computes them: neighbouring rows are rotated."""
    m, head_dim = len(x), q.shape[0] // heads

    def rotated(w: Array) -> Array:
        pairs = (x @ w.T).reshape(m, -1, head_dim // 2, 2)
        angle = np.arange(m)[:, None, None] * theta ** (-np.arange(0, head_dim, 2) / head_dim)
        real, imaginary = pairs[..., 0], pairs[..., 1]
        turned = [
            real * np.cos(angle) - imaginary * np.sin(angle),
            real * np.sin(angle) + imaginary * np.cos(angle),
        ]
        return np.stack(turned, -1).reshape(m, -1, head_dim)

    keys = np.repeat(rotated(k), heads // (k.shape[0] // head_dim), axis=1)
    return np.einsum("mhd,nhd->hmn", rotated(q), keys)


def scores_of_transformers(model: Any, x: Array, q: Array, k: Array) -> Array:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

    heads, m = model.config.num_attention_heads, len(x)
    shape = (1, m, -1, model.config.hidden_size // heads)
    states = torch.from_numpy(x)
    cosine, sine = model.model.rotary_emb(states[None], torch.arange(m)[None])
    query, key = ((states @ torch.from_numpy(w).T).view(shape).transpose(1, 2) for w in (q, k))
    query, key = apply_rotary_pos_emb(query, key, cosine, sine)
    key = repeat_kv(key, heads // model.config.num_key_value_heads)
    return (query @ key.transpose(2, 3))[0].numpy()


@pytest.mark.parametrize("dropped", [False, True])
def test_the_order_of_q_and_k(tmp_path: Path, dropped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With exported rows ggml's rotation gives the scores that transformers' gives with the original ones."""
    truth = build(tmp_path / "in", "hf-packed", FALCON_E | {"rope_theta": 1234.5})
    if dropped:
        monkeypatch.setattr(gguf_module, "_row_order", lambda *_: slice(None))
    export_gguf(tmp_path / "in", tmp_path / "out.gguf")
    reader = GGUFReader(tmp_path / "out.gguf")
    tensors = {tensor.name: quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    theta = reader.fields["llama.rope.freq_base"].contents()
    x = np.random.default_rng(1).standard_normal((20, 256)).astype(np.float32)
    got = scores_of_ggml(tensors["blk.1.attn_q.weight"], tensors["blk.1.attn_k.weight"], x, 4, theta)
    q, k = (
        codes.numpy() * np.float32(np.float16(s))
        for codes, s, _ in (truth[f"model.layers.1.self_attn.{part}_proj"] for part in "qk")
    )
    want = scores_of_transformers(from_pretrained(tmp_path / "in", torch.float32), x, q, k)
    error = np.sqrt(np.mean((got - want) ** 2)) / want.std()
    assert error > 0.1 if dropped else error < 1e-5


KEYS = {
    "general.architecture", "general.name", "general.file_type", "general.quantization_version", "llama.context_length",
    "llama.embedding_length", "llama.block_count", "llama.feed_forward_length", "llama.attention.head_count",
    "llama.attention.head_count_kv", "llama.attention.layer_norm_rms_epsilon", "llama.vocab_size",
    "llama.rope.freq_base", "llama.rope.dimension_count", "tokenizer.ggml.model", "tokenizer.ggml.pre",
    "tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.merges", "tokenizer.ggml.bos_token_id",
    "tokenizer.ggml.eos_token_id", "tokenizer.ggml.padding_token_id", "tokenizer.ggml.add_bos_token",
    "tokenizer.chat_template",
}  # fmt: skip


def test_every_key(tmp_path: Path) -> None:
    build(tmp_path / "in", "hf-packed", FALCON_E | {"vocab_size": 264, "num_hidden_layers": 1})
    export_gguf(tmp_path / "in", tmp_path / "tiny.gguf", "gguf-tq1_0")
    values = {name: field.contents() for name, field in GGUFReader(tmp_path / "tiny.gguf").fields.items()}
    assert set(values) >= KEYS
    assert values["general.architecture"] == "llama" and values["general.file_type"] == gguf.LlamaFileType.MOSTLY_TQ1_0
    assert values["general.name"] == "tiny" and values["llama.block_count"] == 1
    assert (values["llama.attention.head_count"], values["llama.attention.head_count_kv"]) == (4, 2)
    assert values["llama.rope.freq_base"] == 1000042 and values["llama.rope.dimension_count"] == 64
    assert values["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    tokens, kinds = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == 264
    vocabulary = models.byte_tokenizer().get_vocab()
    assert {token: i for i, token in enumerate(tokens) if i < 259} == vocabulary
    normal, control, unused = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL, gguf.TokenType.UNUSED
    assert kinds == [normal] * 256 + [control] * 3 + [unused] * 5
    assert len(values["tokenizer.ggml.merges"]) == 1
    assert [values[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding")] == [256, 257, 258]


def test_a_model_exports_as_its_folder_does(tmp_path: Path) -> None:
    build(tmp_path / "in", "hf-packed")
    export_gguf(tmp_path / "in", tmp_path / "out.gguf")
    model = from_pretrained(tmp_path / "in")
    (tmp_path / "model").mkdir()
    export_gguf(model, tmp_path / "model" / "out.gguf", tokenizer=models.byte_tokenizer())
    assert (tmp_path / "model" / "out.gguf").read_bytes() == (tmp_path / "out.gguf").read_bytes()
    with pytest.raises(ValueError, match="needs its 'tokenizer'"):
        export_gguf(model, tmp_path / "other.gguf")
    with pytest.raises(FileExistsError, match="overwrite"):
        export_gguf(tmp_path / "in", tmp_path / "out.gguf")


def test_row_scales(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=260, hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4,
    )  # fmt: skip
    model = replace_linear(AutoModelForCausalLM.from_config(config), scale="row")
    layer = model.model.layers[0].self_attn.q_proj
    layer.scale.data = torch.linspace(0.01, 0.05, 256)
    export_gguf(model, tmp_path / "out.gguf", tokenizer=models.byte_tokenizer())
    tensors = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "out.gguf").tensors}
    want = (layer.codes().float() * layer.scale.detach().half().float()[:, None])[interleaved(256, 4)].numpy()
    assert np.array_equal(quants.dequantize(tensors["blk.0.attn_q.weight"].data, TERNARY["tq2_0"]), want)
    read = GGUFFile(tmp_path / "out.gguf")
    q = next(filter(None, (read.linear(t) for t in read.tensors if t.name == "blk.0.attn_q.weight")))
    assert np.array_equal(q.scale.numpy(), layer.scale.detach().half().float().numpy()[interleaved(256, 4)])
    with pytest.raises(CheckpointError, match="i2_s holds one per tensor"):
        export_gguf(model, tmp_path / "out.i2_s", "i2_s", models.byte_tokenizer())


@pytest.mark.parametrize("arch", ["llama", "bitnet"])
def test_i2_s(tmp_path: Path, arch: str) -> None:
    """Type 36, file type 40, 128/32 groups, then float32 s and zeros to 32 bytes.

    bitnet.cpp's bitnet-b1.58 graph rotates (i, i + head_dim/2), so its q and k keep their order.
    """
    config = FALCON_E if arch == "llama" else BITNET_2B
    truth = build(tmp_path / "in", "hf-packed-direct", config)
    export_gguf(tmp_path / "in", tmp_path / "out.gguf", "i2_s")
    file = GGUFFile(tmp_path / "out.gguf")
    assert file.keys["general.architecture"] == ("llama" if arch == "llama" else "bitnet-b1.58")
    assert file.keys["general.file_type"] == 40
    data = np.fromfile(tmp_path / "out.gguf", np.uint8)
    tensors = {tensor.name: tensor for tensor in file.tensors}
    assert ("output.weight" in tensors) == (arch == "llama")
    assert arch == "llama" or {"blk.0.attn_sub_norm.weight", "blk.1.ffn_sub_norm.weight"} <= set(tensors)
    for name, hf_name in NAMES.items():
        codes, s, _ = truth[f"model.layers.1.{hf_name}"]
        tensor = tensors[f"blk.1.{name}.weight"]
        assert tensor.type == 36 and tensor.shape == tuple(codes.shape) and tensor.offset % 32 == 0
        heads = {"attn_q": 4, "attn_k": 2}.get(name)
        order = interleaved(len(codes), heads) if heads and arch == "llama" else list(range(len(codes)))
        size = codes.numel() // 4
        assert (data[tensor.offset : tensor.offset + size] == i2_s(codes[order].numpy())).all()
        tail = data[tensor.offset + size : tensor.offset + size + 32]
        assert tail[:4].view("<f4")[0] == np.float32(s) and not tail[4:].any()
        layer = file.linear(tensor)
        assert layer is not None and float(layer.scale) == np.float32(s)
    offsets = sorted(tensor.offset for tensor in file.tensors)
    sizes = {GGMLQuantizationType.F32: 4, GGMLQuantizationType.F16: 2}
    last = max(file.tensors, key=lambda tensor: tensor.offset)
    nbytes = int(np.prod(last.shape)) * sizes[last.type] if last.type in sizes else int(np.prod(last.shape)) // 4 + 32
    assert offsets[-1] + nbytes <= data.size < offsets[-1] + nbytes + 32


def test_llama3_rope_factors() -> None:
    """Against transformers' own scaled frequencies."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = LlamaConfig(hidden_size=512, num_attention_heads=4, max_position_embeddings=131072, rope_parameters=rope)
    scaled = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0].double().numpy()
    plain = 500000.0 ** (-np.arange(0, 128, 2) / 128)
    factors = gguf_module._rope_factors(rope, 128)
    assert factors.dtype == np.float32 and factors.min() == 1 and factors.max() == 32
    assert np.allclose(factors, plain / scaled, rtol=1e-5)


# ------------------------------------------------------------------ tokenizers
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "in"
    build(path, "hf-packed", FALCON_E | {"vocab_size": 272, "num_hidden_layers": 1})
    return path


def with_tokenizer(folder: Path, path: Path, change: Any) -> Path:
    """A copy of the folder whose tokenizer, with two merges, was changed."""
    path.mkdir()
    for file in folder.iterdir():
        (path / file.name).symlink_to(file)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).unlink()
    tokenizer = models.byte_tokenizer([("t", "h"), ("th", "e")])
    change(tokenizer)
    tokenizer.save_pretrained(path)
    return path


def written(folder: Path, out: Path, **options: Any) -> dict[str, Any]:
    export_gguf(folder, out, **options)
    return {name: field.contents() for name, field in GGUFReader(out).fields.items()}


def test_pre_tokenizers_are_recognised(tmp_path: Path, folder: Path) -> None:
    from tokenizers import Regex, pre_tokenizers, processors

    def llama3(tokenizer: Any) -> None:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(LLAMA3), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        )
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 256)])

    def digits(tokenizer: Any) -> None:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)]
        )

    values = written(with_tokenizer(folder, tmp_path / "a", lambda _: None), tmp_path / "a.gguf")
    assert values["tokenizer.ggml.pre"] == "gpt-2" and not values["tokenizer.ggml.add_bos_token"]
    assert values["tokenizer.ggml.merges"] == ["t h", "th e"]
    assert values["tokenizer.ggml.tokens"][259:261] == ["th", "the"]
    values = written(with_tokenizer(folder, tmp_path / "b", llama3), tmp_path / "b.gguf")
    assert values["tokenizer.ggml.pre"] == "llama-bpe" and values["tokenizer.ggml.add_bos_token"]
    odd = with_tokenizer(folder, tmp_path / "c", digits)
    with pytest.raises(CheckpointError, match="cuts text like none of gpt-2, llama-bpe, qwen2"):
        export_gguf(odd, tmp_path / "c.gguf")
    assert written(odd, tmp_path / "c.gguf", tokenizer_pre="falcon")["tokenizer.ggml.pre"] == "falcon"


def test_tokenizers_that_cannot_be_written(tmp_path: Path, folder: Path) -> None:
    from tokenizers import decoders, pre_tokenizers

    def sentencepiece(tokenizer: Any) -> None:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.backend_tokenizer.decoder = decoders.Metaspace()

    with pytest.raises(CheckpointError, match="only byte-level BPE"):
        export_gguf(with_tokenizer(folder, tmp_path / "a", sentencepiece), tmp_path / "a.gguf")
    many = with_tokenizer(folder, tmp_path / "b", lambda t: t.add_tokens([f"<{i}>" for i in range(20)]))
    with pytest.raises(CheckpointError, match="of 272"):
        export_gguf(many, tmp_path / "b.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


# ------------------------------------------------------------------ refusals
def test_relu2_is_refused_for_llama_cpp(tmp_path: Path) -> None:
    build(tmp_path / "in", "hf-packed-direct", BITNET_2B)
    for to in ("gguf-tq2_0", "gguf-tq1_0"):
        with pytest.raises(CheckpointError, match="hard-codes SiLU, this model uses relu2"):
            export_gguf(tmp_path / "in", tmp_path / "out.gguf", to)
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({}, {"rms_norm": True}, "no norm inside a linear layer"),
        ({"hidden_size": 128, "head_dim": 32}, {}, "has 128 inputs; tq2_0 needs a multiple of 256"),
        ({"hidden_act": "gelu"}, {}, "got 'llama' with 'gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, {}, "got 'yarn'"),
    ],
)
def test_what_llama_cpp_cannot_run(tmp_path: Path, config: Any, options: Any, message: str) -> None:
    build(tmp_path / "in", "hf-packed", FALCON_E | config, **options)
    with pytest.raises(CheckpointError, match=message):
        export_gguf(tmp_path / "in", tmp_path / "out.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_scales_beyond_float16(tmp_path: Path) -> None:
    build(tmp_path / "in", "hf-packed")
    model = from_pretrained(tmp_path / "in")
    model.model.layers[1].mlp.up_proj.scale.data.fill_(1e-7)
    with pytest.raises(CheckpointError, match="1e-07 does not fit"):
        export_gguf(model, tmp_path / "out.gguf", tokenizer=models.byte_tokenizer())
