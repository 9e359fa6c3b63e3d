"""`onebit-ext convert` and `inspect`: every form into every other, figures, errors in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from models import BITNET_2B, FALCON_E, build, distance, logits, stock_logits

from onebit_ext.hf import from_pretrained
from onebit_ext.tools.cli import main

FOLDERS = ("hf-packed", "hf-packed-direct", "bf16")
FILES = ("gguf-tq2_0", "gguf-tq1_0", "i2_s")


@pytest.mark.parametrize("source", (*FOLDERS, "float"))
@pytest.mark.parametrize("to", (*FOLDERS, *FILES))
def test_every_form_into_every_other(tmp_path: Path, source: str, to: str, capsys: pytest.CaptureFixture[str]) -> None:
    truth = build(tmp_path / "in", source)
    out = tmp_path / ("out.gguf" if to in FILES else "out")
    assert main(["convert", str(tmp_path / "in"), str(out), "--to", to, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["found"], facts["to"], facts["layers"], facts["written"]) == (source, to, 14, True)
    size = out.stat().st_size if out.is_file() else sum(path.stat().st_size for path in out.iterdir())
    assert facts["bytes"] == size
    assert main(["inspect", str(out), "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert seen["form"] == ("gguf" if to in FILES else to) and len(seen["layers"]) == 14
    assert seen["ternary_weights"] == sum(codes.numel() for codes, _, _ in truth.values())
    for value, key in ((-1, "-1"), (0, "0"), (1, "+1")):
        share = sum(int((codes == value).sum()) for codes, _, _ in truth.values()) / seen["ternary_weights"]
        assert seen["shares"][key] == pytest.approx(share, abs=1e-9)
    assert sorted(layer["scale"] for layer in seen["layers"]) == pytest.approx(
        sorted(s for _, s, _ in truth.values()), rel=2**-8
    )
    if to in FOLDERS:
        want = logits(from_pretrained(tmp_path / "in"))
        assert distance(logits(from_pretrained(out)), want) <= (0.03 if to == "bf16" else 1e-6)
        if to != source:
            assert distance(stock_logits(out), want) <= 0.03


def test_dry_run_and_overwrite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(tmp_path / "in", "hf-packed")
    arguments = ["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--to", "hf-packed-direct"]
    assert main([*arguments, "--dry-run"]) == 0
    assert "would be about 0.6 MB" in capsys.readouterr().out and not (tmp_path / "out").exists()
    assert main(arguments) == 0
    assert main(arguments) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0


def test_inspect_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(tmp_path / "in", "hf-packed-direct", BITNET_2B)
    assert main(["inspect", str(tmp_path / "in")]) == 0
    text = capsys.readouterr().out
    assert "autobitlinear offline: uint8 codes, weight_scale = s" in text and "bitnet, relu2, bfloat16" in text
    assert "2 x q_proj" in text and "share of codes" in text and "scales s" in text
    assert "no: it has no right graph for bitnet with relu2" in text
    assert main(["inspect", str(tmp_path / "in"), "--layers"]) == 0
    assert "model.layers.1.mlp.down_proj" in capsys.readouterr().out


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(tmp_path / "in", "hf-packed-direct", BITNET_2B)
    build(tmp_path / "torn", "hf-packed", FALCON_E)
    path = tmp_path / "torn" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    (tmp_path / "x.gguf").write_bytes(b"nothing")
    for arguments, message in [
        (["convert", "IN/in", "IN/o", "--to", "gguf-tq2_0"], "hard-codes SiLU"),
        (["convert", "IN/none", "IN/o", "--to", "bf16"], "hf download"),
        (["convert", "IN/torn", "IN/o", "--to", "bf16"], "not a whole safetensors file"),
        (["inspect", "IN/torn"], "not a whole safetensors file"),
        (["inspect", "IN/none.gguf"], "No such file"),
        (["inspect", "IN/x.gguf"], "more was promised"),
    ]:
        assert main([argument.replace("IN", str(tmp_path)) for argument in arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (tmp_path / "o").exists()
