"""`onebit-ext finetune`: text in, a model out that learned it, loads elsewhere and is what was evaluated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sftkit as kit
import torch
from models import build, byte_tokenizer, distance, logits, stock_logits

from onebit_ext.hf import from_pretrained
from onebit_ext.tools import UserError
from onebit_ext.tools.cli import main
from onebit_ext.tools.finetune import read_rows, split

GGUF_SIZE = kit.SMALL | {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 1}
FAST = ["--steps", "24", "--length", "64", "--float-lr", "2e-3", "--lr", "0.1", "--json"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed checkpoint and data of every kind."""
    path = tmp_path_factory.mktemp("finetune")
    build(path / "model", "hf-packed", GGUF_SIZE)
    lines = kit.sentences(120)
    (path / "notes.txt").write_text("\n".join(lines), encoding="utf-8")
    rows: dict[str, list[Any]] = {
        "text": [{"text": line, "source": 3} for line in lines],
        "chat": [{"messages": [{"role": "user", "content": line}]} for line in lines],
        "pairs": [{"prompt": line[:9], "completion": line[9:]} for line in lines],
    }
    for name, entries in rows.items():
        (path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, entries)) + "\n\n", encoding="utf-8")
    return path


def finetune(place: Path, data: str, out: Path, *options: str) -> list[str]:
    return ["finetune", "--model", str(place / "model"), "--data", str(place / data), "--out", str(out), *options]


def test_from_text_to_a_model_that_runs_elsewhere(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mine"
    assert main(finetune(place, "notes.txt", out, "--gguf", *FAST)) == 0
    captured = capsys.readouterr()
    facts = json.loads(captured.out)
    assert facts["loss_after"] < 0.9 * facts["loss_before"] and facts["steps"] == 24
    before, after = (kit.codes(from_pretrained(path)) for path in (place / "model", out))
    assert facts["changed"] == pytest.approx(kit.changed(before, after)) and facts["changed"] >= 0.001
    assert "held-out loss" in captured.err and captured.err.count("  step ") >= 10
    model = from_pretrained(out)
    assert distance(stock_logits(out), logits(model)) <= 0.02
    assert {Path(file).name for file in facts["files"]} == {"model.safetensors", "mine-tq2_0.gguf"}
    assert facts["files"] == {file: Path(file).stat().st_size for file in facts["files"]}
    assert main(["inspect", str(out / "mine-tq2_0.gguf"), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["layers"]) == 7
    assert not out.with_name("mine.checkpoints").exists()


@pytest.mark.parametrize("data", ["text.jsonl", "chat.jsonl", "pairs.jsonl"])
def test_every_kind_of_data(place: Path, tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(finetune(place, data, tmp_path / "out", *FAST, "--recompute")) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["loss_after"] < facts["loss_before"] and (facts["rows"], facts["held_out"]) == (114, 6)


def test_resume_is_the_uninterrupted_run(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Trainer

    saved = Trainer._save_checkpoint

    def interrupt(trainer: Any, *args: Any, **kwargs: Any) -> None:
        saved(trainer, *args, **kwargs)
        raise KeyboardInterrupt

    assert main(finetune(place, "notes.txt", tmp_path / "straight", *FAST)) == 0
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_checkpoint", interrupt)
        assert main(finetune(place, "notes.txt", tmp_path / "again", *FAST, "--save-every", "10")) == 130
    assert not (tmp_path / "again").exists()
    assert main(finetune(place, "notes.txt", tmp_path / "again", *FAST, "--save-every", "10", "--resume")) == 0
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("straight", "again"))
    assert a == b


def test_dry_run(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(finetune(place, "notes.txt", tmp_path / "out", "--dry-run", "--json", "--gguf")) == 0
    facts = json.loads(capsys.readouterr().out)
    model = from_pretrained(place / "model")
    floats = sum(p.numel() for n, p in model.named_parameters() if p.dtype.is_floating_point and "scale" not in n)
    codes = sum(value.numel() for value in kit.codes(model).values())
    assert (facts["codes"], facts["floats"], facts["trained"]) == (codes, floats, False)
    assert codes * 1.25 + floats * 16 <= facts["state_bytes"] <= codes * 1.4 + floats * 16
    assert [*tmp_path.iterdir()] == []


def test_held_out_documents_are_not_trained_on() -> None:
    rows = [{"text": str(i)} for i in range(60)]
    train, held_out = split(rows)
    assert len(held_out) == 3 and sorted(train + held_out, key=rows.index) == rows
    assert len(split(rows[:2])[1]) == 1


def test_plain_text_is_kept_whole(tmp_path: Path) -> None:
    text = "".join(f"line {i} äß\n" for i in range(999))
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    rows = read_rows(tmp_path / "t.txt")
    assert "".join(row["text"] for row in rows) == text and len(rows) >= 18


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", b"a,b", "must be a .txt or .jsonl"),
        ("x.txt", b"\xff\xfe", "not UTF-8 \\(byte 0\\)"),
        ("x.txt", b"one line", "at least 2 are needed"),
        ("x.jsonl", b'{"text": "a"}\n{"text"', "line 2: not JSON"),
        ("x.jsonl", b"[1]\n", "line 1: must have 'text'"),
        ("x.jsonl", b'{"prompt": "a"}\n', "line 1: must have 'text'"),
        ("x.jsonl", b'{"text": "a"}\n\n{"messages": []}\n', "line 3: has \\['messages'\\]"),
    ],
)
def test_data_errors_name_the_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_rows(tmp_path / name)


def test_mistakes_cost_no_training(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    small = kit.float_model(tmp_path / "small")
    mute = tmp_path / "mute"
    build(mute, "hf-packed", GGUF_SIZE)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    (mute / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(mute)
    out = tmp_path / "out"
    for arguments, message in [
        (finetune(place, "none.txt", out), "No such file"),
        (finetune(tmp_path, "x", out), "hf download"),
        (finetune(place, "notes.txt", tmp_path / "full"), "exists already"),
        ([*finetune(place, "notes.txt", out, "--gguf"), "--model", str(small)], "needs a multiple of 256"),
        ([*finetune(place, "chat.jsonl", out), "--model", str(mute)], "no chat template"),
    ]:
        assert main(arguments) == 2, message
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and not out.exists()
    assert torch.is_grad_enabled()
