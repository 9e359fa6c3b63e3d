"""Texts of the `small` study: what an environment with torch carries in quantity.

code: the installed packages' Python sources without their docstrings; docs: those docstrings, mostly English; cpp:
torch's C++ headers.  A sixteenth of the files, by a hash of their path, is held out, half of it for tuning ("val") and
half for the figures ("test"); held-out lines that share 48 bytes in a row with training text are cut.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from onebit_ext.tools.text import cut_leaks

SPLITS = ("train", "val", "test")
LIMITS = {"code": 30_000_000, "docs": 12_000_000, "cpp": 20_000_000}  # bytes to train on
HELD_OUT = 600_000  # bytes of each split that is held out
FILE_BYTES = 60_000  # no file counts for more
Text = dict[str, NDArray[np.uint8]]


def load(folder: Path) -> dict[str, Text]:
    """The three texts by split, from `folder`, where the first call writes them (a minute)."""
    files = {(name, split): folder / f"{name}-{split}.bin" for name in LIMITS for split in SPLITS}
    if not all(path.exists() for path in files.values()):
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in build().items():
            for split, data in text.items():
                files[name, split].write_bytes(data)
    return {
        name: {split: np.frombuffer(files[name, split].read_bytes(), np.uint8) for split in SPLITS} for name in LIMITS
    }


def build() -> dict[str, dict[str, bytes]]:
    """Read the installed packages."""
    root = Path(sysconfig.get_path("purelib"))
    texts: dict[str, dict[str, bytes]] = {}
    code, docs = Collector("code"), Collector("docs")
    for path in shuffled(root.rglob("*.py"), root):
        if code.full() and docs.full():
            break
        try:
            source = path.read_text("utf-8")
            bare, strings = split_docstrings(source)
        except (SyntaxError, UnicodeDecodeError, ValueError, RecursionError, OSError):
            continue
        name = path.relative_to(root).as_posix()
        code.add(name, bare)
        docs.add(name, strings)
    cpp = Collector("cpp")
    headers = (path for path in (root / "torch" / "include").rglob("*") if path.suffix in (".h", ".hpp", ".cuh"))
    for path in shuffled(headers, root):
        cpp.add(path.relative_to(root).as_posix(), path.read_text("utf-8", "replace"))
    for collector in (code, docs, cpp):
        texts[collector.name] = collector.texts()
    return texts


def shuffled(paths: Iterable[Path], root: Path) -> list[Path]:
    """In an order that depends on the paths alone."""
    return sorted(paths, key=lambda path: hashlib.md5(path.relative_to(root).as_posix().encode()).digest())


def split_docstrings(source: str) -> tuple[str, str]:
    """A module without its docstrings, and the docstrings."""
    lines, strings = source.splitlines(keepends=True), []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) or not node.body:
            continue
        first = node.body[0]
        text = ast.get_docstring(node)
        if text and isinstance(first, ast.Expr):
            strings.append(text)
            for line in range(first.lineno - 1, first.end_lineno or first.lineno):
                lines[line] = ""
    return "".join(lines), "\n\n".join(strings)


class Collector:
    """Pieces of one text by split, up to its limit."""

    def __init__(self, name: str) -> None:
        self.name, self.seen = name, set[bytes]()
        self.parts: dict[str, list[bytes]] = {split: [] for split in SPLITS}
        self.sizes = dict.fromkeys(SPLITS, 0)

    def full(self) -> bool:
        """Nothing more is wanted."""
        return self.sizes["train"] >= LIMITS[self.name] and min(self.sizes["val"], self.sizes["test"]) >= HELD_OUT

    def add(self, name: str, text: str) -> None:
        """A file, unless it is short or a copy of another."""
        content = text.encode()[:FILE_BYTES]
        digest = hashlib.md5(content).digest()
        if len(content) < 500 or digest in self.seen:
            return
        self.seen.add(digest)
        choice = hashlib.md5(name.encode()).digest()[-1] % 32
        split = {0: "val", 1: "test"}.get(choice, "train")
        limit = LIMITS[self.name] if split == "train" else HELD_OUT
        if self.sizes[split] < limit:
            self.parts[split].append(content)
            self.sizes[split] += len(content)

    def texts(self) -> dict[str, bytes]:
        """train, val, test."""
        whole = {split: b"\n\n".join(parts) for split, parts in self.parts.items()}
        return {split: data if split == "train" else cut_leaks(whole["train"], data) for split, data in whole.items()}
