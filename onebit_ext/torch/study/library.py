"""The study's folder: texts, the checkpoint, the tasks made of them, and the records."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from onebit_ext.tools import UserError, text

from . import site_text
from .arms import Arm
from .run import Engine, pretrain
from .sizes import SIZES, Size
from .tasks import Copying, Facts, Reading, Task, Teaching, Text

TASKS = {
    "short": "docstrings",
    "long": "headers",
    "scratch": "code",
    "copy": None,
    "teacher": None,
    "facts": "code",
}  # and the text they read
FINETUNE = ("short", "long", "facts")
SOURCES = {"code": text.standard_library, "docstrings": text.docstrings, "headers": text.headers}
BLOCK = 4096  # bytes of held-out text that go to val and to test in turn


class Library:
    """What one size of the study needs, in one folder; `steps` replaces the size's, of every task."""

    def __init__(self, folder: Path, size: str, steps: int | None = None) -> None:
        self.folder, self.size = folder, SIZES[size]
        if steps is not None:
            budgets = {name: replace(budget, steps=steps) for name, budget in self.size.budgets.items()}
            self.size = replace(self.size, budgets=budgets)
        self.checkpoint = folder / f"pretrained-{size}-{self.size.budgets['pretrain'].steps}.safetensors"

    def gather(self, names: Iterable[str], engine: Engine, say: Callable[[str], None]) -> None:
        """Make the texts and the checkpoint that are not there yet."""
        names = list(names)
        finetune = any(name in FINETUNE for name in names)
        sources = {TASKS[name] for name in names} | ({"code"} if finetune else set())
        self._gather_texts(sorted(source for source in sources if source is not None), say)
        if finetune and not self.checkpoint.exists():
            say("  pre-training the checkpoint of short, long and facts on code: hybrid float32")
            state, record = pretrain(Reading("pretrain", self.size, self.text("code"), None), engine)
            _write(self.checkpoint.with_suffix(".json"), lambda path: path.write_text(json.dumps(record)))
            _write(self.checkpoint, lambda path: save_file(state, path))
            say(f"  held-out {record['start']:.3f} -> {record['val']:.3f} nats/byte, {record['seconds']:.0f} s")

    def _gather_texts(self, sources: list[str], say: Callable[[str], None]) -> None:
        missing = [source for source in sources if not self._text(source).exists()]
        if missing and self.size.all_packages:
            say("  reading the installed packages: three minutes")
            found = {
                name: {split: _array(data) for split, data in parts.items()}
                for name, parts in site_text.texts().items()
            }
        else:
            found = {source: _parts(SOURCES[source]()) for source in missing}
        for source in missing:
            sizes = {split: f"{len(data):,}" for split, data in found[source].items()}
            say(f"  {source}: {sizes['train']} bytes to train on, {sizes['val']} and {sizes['test']} held out")
            parts: dict[str, Any] = {**found[source]}
            _write(self._text(source), partial(np.savez, **parts))

    def _text(self, source: str) -> Path:
        return self.folder / f"text-{source}.npz"

    def text(self, source: str) -> Text:
        with np.load(self._text(source)) as arrays:
            return Text(*(torch.from_numpy(arrays[part]) for part in ("train", "val", "test")))

    def task(self, name: str) -> Task:
        size, source = self.size, TASKS[name]
        start = load_file(self.checkpoint) if name in FINETUNE else None
        if name == "copy":
            return Copying(name, size)
        if name == "teacher":
            return Teaching(name, size)
        assert source is not None
        if name == "facts":
            assert start is not None
            return Facts(name, size, self.text(source), start)
        return Reading(name, size, self.text(source), start)

    # ------------------------------------------------------------------ records
    def settings(self, name: str, arm: Arm, engine: str) -> str:
        """What a record depends on beside its own fields, in twelve hex digits."""
        size: Size = self.size
        fixed = {key: value for key, value in asdict(size).items() if key not in ("budgets", "seeds")}
        files = [self._text(TASKS[name] or "")] + [self.checkpoint] * (name in FINETUNE)
        sums = [_digest(path) for path in files if path.exists()]
        whole = json.dumps([fixed, asdict(size.budgets[name]), asdict(arm), sums, engine], sort_keys=True)
        return hashlib.sha256(whole.encode()).hexdigest()[:12]

    def path(self, task: str, arm: str, purpose: str, seed: int, eta: float) -> Path:
        return self.folder / "records" / f"{task}-{arm}-{purpose}-seed{seed}-{eta:g}.json"

    def read(self, path: Path, settings: str) -> dict[str, Any] | None:
        """A record of an earlier run, if there is one."""
        try:
            record: dict[str, Any] = json.loads(path.read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {path} ({error}): delete it, it will be made again") from None
        if record.get("settings") != settings:
            raise UserError(f"{path} was made with other settings, texts or engine: choose another folder with --out")
        return record

    def write(self, path: Path, record: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, lambda aside: aside.write_text(json.dumps(record)))


_digests: dict[tuple[Path, int], str] = {}


def _digest(path: Path) -> str:
    key = (path, path.stat().st_mtime_ns)
    if key not in _digests:
        _digests[key] = hashlib.sha256(path.read_bytes()).hexdigest()
    return _digests[key]


def _array(data: bytes) -> text.Bytes:
    return np.frombuffer(data, np.uint8)


def _parts(corpus: text.Corpus) -> dict[str, text.Bytes]:
    val, test = split(corpus.held_out)
    return {"train": corpus.train, "val": val, "test": test}


def split(held_out: text.Bytes) -> tuple[text.Bytes, text.Bytes]:
    """Blocks in turn, so that both halves come from everywhere in the text."""
    turn = np.arange(len(held_out)) // BLOCK % 2
    return held_out[turn == 0], held_out[turn == 1]


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """All or nothing: written aside, then renamed."""
    aside = path.with_name(f"aside-{path.name}")
    write(aside)
    aside.replace(path)
