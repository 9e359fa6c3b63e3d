"""Checkpoints: exact, atomic, and nothing bad gets in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_numpy_level import normal, same

import onebit_ext as ob
from onebit_ext import checkpoint

ROOT = Path(__file__).resolve().parent.parent
Model = tuple[dict[str, ob.TernaryLinear], ob.FlipOptimizer]


def model(recipe: str = "pretrain", seed: int = 1) -> Model:
    layers = {
        "a.packed": ob.TernaryLinear(70, 83, scale="row", bias=True, seed=seed),
        "β": ob.TernaryLinear(70, 83, seed=seed + 1),
    }
    return layers, ob.FlipOptimizer(list(layers.values()), recipe=recipe, lr=0.2, seed=4, betas=(0.8, 0.9))


def train(layers: dict[str, ob.TernaryLinear], opt: ob.FlipOptimizer, steps: range) -> None:
    for step in steps:
        opt.lr = 0.2 - 0.005 * step
        for layer in layers.values():
            layer.forward(normal(step, 5, 70))
            layer.backward(normal(step + 500, 5, 83))
        opt.step()
        opt.zero_grad()


def state(layers: dict[str, ob.TernaryLinear], opt: ob.FlipOptimizer | None) -> Any:
    arrays = {name: [x.packed, x.scale, x.bias, x.scale_grad, x.bias_grad] for name, x in layers.items()}
    return [arrays, opt.state_dict() if opt is not None else None]


@pytest.mark.parametrize("recipe", ["finetune", "pretrain"])
def test_loading_gives_what_was_saved(tmp_path: Path, recipe: str) -> None:
    layers, opt = model(recipe)
    train(layers, opt, range(6))
    layers["β"].forward(normal(9, 5, 70))
    layers["β"].backward(normal(10, 5, 83))  # saved between a backward and its step
    ob.save(tmp_path / "x", layers, opt, {"step": 6, "data": [1, 2], "note": "β"})
    loaded = ob.load(tmp_path / "x")
    assert loaded.optimizer is not None and loaded.metadata == {"step": 6, "data": [1, 2], "note": "β"}
    assert same(state(loaded.layers, loaded.optimizer), state(layers, opt))
    assert [layer.name for layer in loaded.layers.values()] == list(layers)
    train(layers, opt, range(6, 12))
    train(loaded.layers, loaded.optimizer, range(6, 12))
    assert same(state(loaded.layers, loaded.optimizer), state(layers, opt))
    assert os.listdir(tmp_path) == ["x"]


def test_twenty_steps_are_ten_and_ten_in_a_new_process(tmp_path: Path) -> None:
    layers, opt = model()
    train(layers, opt, range(10))
    ob.save(tmp_path / "half", layers, opt)
    train(layers, opt, range(10, 20))
    code = f"""
import sys
sys.path[:0] = [{str(ROOT / "tests")!r}, {str(ROOT)!r}]
import onebit_ext as ob
from test_checkpoint import train
loaded = ob.load({str(tmp_path / "half")!r})
train(loaded.layers, loaded.optimizer, range(10, 20))
ob.save({str(tmp_path / "whole")!r}, loaded.layers, loaded.optimizer)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    whole = ob.load(tmp_path / "whole")
    assert same(state(whole.layers, whole.optimizer), state(layers, opt))


def test_layers_alone(tmp_path: Path) -> None:
    layers, opt = model()
    ob.save(str(tmp_path / "x"), layers)
    loaded = ob.load(str(tmp_path / "x"))
    assert loaded.optimizer is None and loaded.metadata == {}
    for name, layer in layers.items():
        assert same(loaded.layers[name].packed, layer.packed) and same(loaded.layers[name].scale, layer.scale)
    ob.save(tmp_path / "none", {})
    assert ob.load(tmp_path / "none").layers == {}
    empty = {"e": ob.TernaryLinear(0, 5), "f": ob.TernaryLinear(5, 0, bias=True)}
    ob.save(tmp_path / "empty", empty, ob.FlipOptimizer(list(empty.values())))
    assert ob.load(tmp_path / "empty").layers["f"].out_features == 0
    assert opt.layers == tuple(layers.values())


def test_others_can_read_it(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    layers, opt = model()
    ob.save(tmp_path / "x", layers, opt)
    tensors = load_file(tmp_path / "x")
    assert same(tensors["layers.a.packed.packed"], layers["a.packed"].packed)
    assert same(tensors["optimizer.1.residual"], layers["β"].residual)


def test_wrong_arguments(tmp_path: Path) -> None:
    layers, opt = model()
    for wrong in ({3: layers["β"]}, {"a": None}, {"a": opt}):
        with pytest.raises(TypeError, match=r"save\(\): 'layers' must map str to TernaryLinear"):
            ob.save(tmp_path / "x", wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must hold every layer of 'optimizer'"):
        ob.save(tmp_path / "x", {"β": layers["β"]}, opt)
    with pytest.raises(TypeError):
        ob.save(tmp_path / "x", layers, opt, {"a": object()})
    with pytest.raises(FileNotFoundError):
        ob.load(tmp_path / "x")
    with pytest.raises(FileNotFoundError):
        ob.save(tmp_path / "no" / "x", layers)
    assert os.listdir(tmp_path) == []


# ------------------------------------------------------------------ atomicity
CALLS = ("open", "write", "fsync", "close", "replace")


def interrupted(monkeypatch: pytest.MonkeyPatch, at: int, how: Callable[[], None]) -> Callable[[], int]:
    """The `at`-th file system call of a save meets `how`; writes are short.  Returns a counter."""
    count = [0]

    def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            count[0] += 1
            if count[0] == at:
                if name == "write":
                    real(args[0], args[1][: len(args[1]) // 2])
                if name == "close":
                    real(*args)
                how()
            return real(args[0], args[1][:4096]) if name == "write" else real(*args)

        return call

    for name in CALLS:
        monkeypatch.setattr(os, name, wrap(name, getattr(os, name)))
    return lambda: count[0]


def fail() -> None:
    raise OSError(28, "No space left on device")


def test_an_error_at_every_call_leaves_the_old_file(tmp_path: Path) -> None:
    layers, opt = model()
    path = tmp_path / "x"
    ob.save(path, layers, opt, {"version": "old"})
    old = path.read_bytes()
    for at in range(1, 10_000):
        with pytest.MonkeyPatch.context() as patch:
            interrupted(patch, at, fail)
            try:
                ob.save(path, layers, opt, {"version": "new"})
                break
            except OSError as error:
                assert error.errno == 28
        assert os.listdir(tmp_path) == ["x"]
        if path.read_bytes() != old:  # renamed already: whole, and only the folder's flush failed
            assert ob.load(path).metadata == {"version": "new"}
            path.write_bytes(old)
    assert at > 15 and ob.load(path).metadata == {"version": "new"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_death_at_every_call_leaves_the_old_file_or_the_new(tmp_path: Path) -> None:
    layers, opt = model()
    path = tmp_path / "x"
    ob.save(path, layers, opt, {"version": "old"})
    found = []
    for at in range(1, 10_000):
        child = os.fork()
        if child == 0:
            with pytest.MonkeyPatch.context() as patch:
                interrupted(patch, at, lambda: os._exit(9))
                ob.save(path, layers, opt, {"version": "new"})
            os._exit(0)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        found.append(ob.load(path).metadata["version"])
        if ended == 0:
            break
        assert ended == 9
    assert found == sorted(found, reverse=True) and {"old", "new"} == set(found) and len(found) > 15


def test_a_mapped_file_is_never_written(tmp_path: Path) -> None:
    layers, opt = model()
    path = tmp_path / "x"
    ob.save(path, layers)
    before = path.read_bytes()
    mapped = np.memmap(path, np.uint8, "r")
    train(layers, opt, range(3))
    ob.save(path, layers)
    assert mapped.tobytes() == before != path.read_bytes()


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    layers, _ = model()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    ob.save(tmp_path / "link", layers)
    assert (tmp_path / "link").is_symlink() and ob.load(tmp_path / "real").layers.keys() == layers.keys()


# ------------------------------------------------------------------ hostile files
def refuse(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    with pytest.raises(ob.CheckpointError, match=r"^load\(\): '"):
        ob.load(path)


@pytest.fixture
def saved(tmp_path: Path) -> bytes:
    layers, opt = {"a": ob.TernaryLinear(20, 10, bias=True)}, None
    opt = ob.FlipOptimizer(list(layers.values()), recipe="pretrain")
    ob.save(tmp_path / "good", layers, opt, {"step": 1})
    return (tmp_path / "good").read_bytes()


def test_every_truncation_is_refused(tmp_path: Path, saved: bytes) -> None:
    for length in range(len(saved)):
        refuse(tmp_path / "bad", saved[:length])
    refuse(tmp_path / "bad", saved + b"\0")


def test_every_flipped_bit_is_refused(tmp_path: Path, saved: bytes) -> None:
    for position in range(len(saved)):
        data = bytearray(saved)
        data[position] ^= 1 << (position % 8)
        refuse(tmp_path / "bad", bytes(data))


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def resealed(data: bytes, edit: Callable[[dict[str, Any], dict[str, np.ndarray], dict[str, Any]], None]) -> bytes:
    """The file after `edit` of its metadata, tensors and header, with a right checksum again."""
    entries, body = split(data)
    meta = entries.pop("__metadata__")
    types = {text: np.dtype(name) for name, text in checkpoint.DTYPES.items()}
    tensors = {}
    for name, entry in entries.items():
        start, end = entry["data_offsets"]
        tensors[name] = np.frombuffer(body[start:end], types[entry["dtype"]]).reshape(entry["shape"]).copy()
    header = json.loads(meta["header"])
    edit(meta, tensors, header)
    meta["header"] = json.dumps(header) if "header" in meta else None
    meta = {key: value for key, value in meta.items() if value is not None}
    if {"onebit_ext", "header", "user"} <= meta.keys():
        meta["sha256"] = checkpoint._checksum(tensors, meta)
    out: dict[str, Any] = {"__metadata__": meta}
    at = 0
    for name, array in tensors.items():
        entry = {"dtype": checkpoint.DTYPES[array.dtype.name], "shape": list(array.shape)}
        out[name] = entry | {"data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    text = json.dumps(out).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(array.tobytes() for array in tensors.values())


def layer_edit(**changes: Any) -> Callable[..., None]:
    return lambda meta, tensors, header: header["layers"][0].update(changes)


def optimizer_edit(**changes: Any) -> Callable[..., None]:
    return lambda meta, tensors, header: header["optimizer"].update(changes)


def tensor_edit(name: str, index: int, value: Any) -> Callable[..., None]:
    return lambda meta, tensors, header: tensors[name].reshape(-1).__setitem__(index, value)


def test_resealing_itself_is_accepted(tmp_path: Path, saved: bytes) -> None:
    (tmp_path / "same").write_bytes(resealed(saved, lambda *_: None))
    assert ob.load(tmp_path / "same").metadata == {"step": 1}


@pytest.mark.parametrize(
    "edit",
    [
        tensor_edit("layers.a.packed", 0, 0xFF),  # code 3
        tensor_edit("layers.a.packed", -1, 0),  # dirty padding
        *(tensor_edit("layers.a.scale", 0, value) for value in (np.nan, np.inf, 0.0, -1.0)),
        tensor_edit("layers.a.bias", 3, np.nan),
        *(tensor_edit("optimizer.0.control", ob.CONTROL["step"], value) for value in (-1, 0.5, np.nan, 2.0**60)),
        tensor_edit("optimizer.0.control", ob.CONTROL["guard"], 0.0),
        *(
            layer_edit(shape=value)
            for value in ([10, 21], [11, 20], [2**60, 2**60], [-1, 20], [10.0, 20], [10], "ab", None)
        ),
        *(layer_edit(shape=value) for value in ([True, 20], ["10", 20], [10**400, 1], [10, 20, 1], {})),
        *(layer_edit(scales=value) for value in (0, 2, 10, -1, None, 2**70)),
        *(layer_edit(name=value) for value in ("b", None, 3, [], "")),
        layer_edit(bias=False),
        *(optimizer_edit(rule=value) for value in ("residual8", "none", None, 3, [])),
        *(optimizer_edit(layers=value) for value in (["a", "a"], ["b"], [], None, 3, [["a"]])),
        *(optimizer_edit(lr=value) for value in (-1, None, "1", float("nan"), float("inf"), True)),
        lambda meta, tensors, header: header.pop("layers"),
        lambda meta, tensors, header: header.pop("optimizer"),
        lambda meta, tensors, header: header.update(optimizer=None),
        lambda meta, tensors, header: header.update(layers=header["layers"] * 2),
        lambda meta, tensors, header: header.update(layers=7),
        lambda meta, tensors, header: tensors.pop("layers.a.bias"),
        lambda meta, tensors, header: tensors.pop("optimizer.0.residual"),
        lambda meta, tensors, header: tensors.update(extra=np.zeros(3, np.float32)),
        lambda meta, tensors, header: tensors.update({"layers.a.scale": np.zeros(1, np.float64)}),
        lambda meta, tensors, header: tensors.update({"optimizer.0.residual": np.zeros((20, 10), np.int8)}),
        *(lambda meta, tensors, header, key=key: meta.pop(key) for key in ("onebit_ext", "header", "user")),
        *(lambda meta, tensors, header, v=v: meta.update(onebit_ext=v) for v in ("2", "", "one")),
        *(lambda meta, tensors, header, v=v: meta.update(user=v) for v in ("", "{", "[" * 100_000)),
        lambda meta, tensors, header: meta.update(extra="x"),
    ],
)
def test_a_sealed_file_with_bad_content_is_refused(tmp_path: Path, saved: bytes, edit: Callable[..., None]) -> None:
    data = resealed(saved, edit)
    live = ob.memory()["live"]
    ob.reset_peak_memory()
    refuse(tmp_path / "bad", data)
    assert ob.memory()["peak"] - live < 3 * len(data)


def test_hostile_containers(tmp_path: Path, saved: bytes) -> None:
    entries, body = split(saved)
    names = [name for name in entries if name != "__metadata__"]

    def container(text: bytes, rest: bytes = body) -> bytes:
        return len(text).to_bytes(8, "little") + text + rest

    bad = [b"", b"\0" * 8, b"\xff" * 16, (1 << 40).to_bytes(8, "little") + b"{}", container(b"{}"), container(b"[]")]
    bad += [container(b"{" * 50_000), container(b"\xff" + json.dumps(entries).encode()), b"PK\3\4" + saved]
    for name in names[:4]:
        for offsets in ([0, 1 << 60], [-1, 4], [4, 0], [0, 0], [1 << 63, 1 << 63], [0.5, 1]):
            changed = entries | {name: entries[name] | {"data_offsets": offsets}}
            bad.append(container(json.dumps(changed).encode()))
        for shape in ([1 << 62, 4], [-1], [1 << 32, 1 << 32], "x", None):
            bad.append(container(json.dumps(entries | {name: entries[name] | {"shape": shape}}).encode()))
        for dtype in ("F16", "Q8", 3, None):
            bad.append(container(json.dumps(entries | {name: entries[name] | {"dtype": dtype}}).encode()))
        doubled = json.dumps(entries)[:-1] + f', "{name}": ' + json.dumps(entries[names[5]]) + "}"
        bad.append(container(doubled.encode()))
    for data in bad:
        refuse(tmp_path / "bad", data)
