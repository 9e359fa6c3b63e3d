"""Text for the demo and the study: every installation of Python and torch carries it. Bytes in, bytes out; numpy only.

A `Corpus` is training and held-out text whose lines share no 48 bytes in a row, with the losses
of simple models on the held-out part, in nats per byte.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import sysconfig
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from . import UserError

Bytes = NDArray[np.uint8]
WINDOW = 48  # bytes; a held-out line that shares this many in a row with training text is cut
SKIPPED = (
    "site-packages",
    "dist-packages",
    "test",
    "idle_test",
    "pydoc_data",
    "encodings",
    "__pycache__",
    "lib2to3",
    "distutils",
    "ensurepip",
    "config-",
)
MIN_HELD_OUT = 4000


@dataclass
class Corpus:
    """train, held_out uint8 (bytes,); cut: held-out bytes that leaked; baselines: nats per byte."""

    name: str
    train: Bytes
    held_out: Bytes
    cut: int

    @cached_property
    def baselines(self) -> dict[str, float]:
        losses = {
            label: ngram_loss(self.train, self.held_out, order)
            for order, label in enumerate(("unigram", "bigram", "trigram"))
        }
        return losses | {"zlib -9": zlib_loss(self.held_out)}


def standard_library() -> Corpus:
    """The standard library's .py files (about 8 MB); held out by the hash of the path."""
    root = Path(sysconfig.get_path("stdlib"))
    train, held_out = _files(root, (".py",))
    if not train:
        raise UserError(f"no Python sources under {root}: install them (Debian: libpython3-stdlib)")
    return _corpus("code", train, held_out)


def headers() -> Corpus:
    """The C++ headers that torch carries (about 30 MB); held out by the hash of the path."""
    root = _package("torch") / "include"
    train, held_out = _files(root, (".h", ".hpp", ".cuh"))
    if not train:
        raise UserError(f"no C++ headers under {root}: this torch is built without them, leave the task 'long' out")
    return _corpus("headers", train, held_out)


def docstrings() -> Corpus:
    """The long docstrings of torch and numpy, English with examples (about 5 MB); held out by the hash of the path."""
    seen: set[str] = set()

    def prose(content: bytes) -> bytes:
        found = [_dedent(part) for part in re.findall(rb'"""(.*?)"""', content, re.DOTALL) if len(part) >= 200]
        return _unique_paragraphs(b"\n\n".join(found).decode("utf-8", "surrogateescape"), seen)

    train: list[bytes] = []
    held_out: list[bytes] = []
    for name in ("torch", "numpy"):
        more, more_held_out = _files(_package(name), (".py",), prose)
        train += more
        held_out += more_held_out
    return _corpus("docstrings", train, held_out)


def documentation() -> Corpus:
    """`pydoc_data.topics`, what `help()` shows (0.4 MB); every eighth topic by size is held out."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError("pydoc_data is missing: install it (Debian: libpython3-stdlib) or pass --text FILE") from None
    seen: set[str] = set()
    ordered = sorted(topics, key=lambda name: (-len(topics[name]), name))
    unique = [_unique_paragraphs(topics[name], seen) for name in ordered]  # topics quote each other
    return _corpus("docs", *_every_eighth([part for part in unique if len(part) >= 300]))


def user_text(path: Path) -> Corpus:
    """A file of the user's, any encoding: cut at line ends into 64 parts, every eighth held out."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; pass a readable file to --text") from None
    if len(content) < 16 * MIN_HELD_OUT:
        raise UserError(f"{path} has {len(content):,} bytes; --text needs at least {16 * MIN_HELD_OUT:,}")
    lines = _unique_paragraphs(content.decode("utf-8", "surrogateescape"), set()).splitlines(keepends=True)
    size, parts = sum(map(len, lines)) // 64 + 1, [b""]
    for line in lines:
        if len(parts[-1]) >= size:
            parts.append(b"")
        parts[-1] += line
    return _corpus(path.name, [part for i, part in enumerate(parts) if i % 8 != 3], parts[3::8])


def one_line(sample: str) -> str:
    """A sample with its line ends and unprintable characters made visible or blank."""
    return "".join(c if c.isprintable() else "⏎" if c == "\n" else " " for c in sample)


def ngram_loss(train: Bytes, held_out: Bytes, order: int) -> float:
    """Nats per byte of p = (count + 4 p') / (total + 4), p' from the context one byte shorter."""
    used = (np.bincount(train, minlength=256) + np.bincount(held_out, minlength=256)) > 0
    size, ids = int(used.sum()), np.cumsum(used) - 1  # a dense alphabet keeps the tables small
    seen, asked = ids[train], ids[held_out]
    p = np.full(len(asked) - order, 1 / 256)
    context_seen, context = np.zeros(len(seen), np.int64), np.zeros(len(p), np.int64)
    for n in range(order + 1):  # n bytes of context
        if n:
            context_seen = context_seen[1:] + seen[:-n] * size ** (n - 1)
            context = context + asked[order - n : len(asked) - n] * size ** (n - 1)
        counts = np.bincount(context_seen * size + seen[n:], minlength=size ** (n + 1))
        totals = counts.reshape(-1, size).sum(1)
        p = (counts[context * size + asked[order:]] + 4 * p) / (totals[context] + 4)
    return float(-np.log(p).mean())


def zlib_loss(held_out: Bytes) -> float:
    """Nats per byte of zlib -9 on the held-out text itself."""
    return len(zlib.compress(held_out.tobytes(), 9)) * math.log(256) / len(held_out)


def cut_leaks(train: bytes, held_out: bytes) -> bytes:
    """held_out without the lines that share WINDOW bytes in a row with train."""
    seen = _window_hashes(np.frombuffer(train, np.uint8))
    hashes = _window_hashes(np.frombuffer(held_out, np.uint8))
    maybe = np.zeros(1 << 24, bool)  # a filter before the exact look-up: train is long
    maybe[hashes >> np.uint64(40)] = True
    leaked = np.isin(hashes, seen[maybe[seen >> np.uint64(40)]])
    before = np.concatenate([[0], np.cumsum(leaked)])
    kept, start = [], 0
    for line in held_out.split(b"\n"):
        windows = len(line) - WINDOW + 1
        if windows <= 0 or before[start + windows] == before[start]:
            kept.append(line)
        start += len(line) + 1
    return b"\n".join(kept)


def _window_hashes(text: Bytes) -> NDArray[np.uint64]:
    """(len - WINDOW + 1,) polynomial hash modulo 2^64 of every window, from prefix sums."""
    if len(text) < WINDOW:
        return np.zeros(0, np.uint64)
    table = np.random.default_rng(0).integers(0, 2**64, 256, np.uint64)
    prefix = np.concatenate([np.zeros(1, np.uint64), np.cumsum(table[text] * _powers(_BASE, len(text)))])
    return (prefix[WINDOW:] - prefix[:-WINDOW]) * _powers(pow(_BASE, -1, 2**64), len(text) - WINDOW + 1)


_BASE = 0x9E3779B97F4A7C15  # odd: it has an inverse modulo 2^64


def _powers(base: int, count: int) -> NDArray[np.uint64]:
    powers = np.full(count, base, np.uint64)
    powers[0] = 1
    return np.cumprod(powers)


def _unique_paragraphs(text: str, seen: set[str]) -> bytes:
    kept = []
    for paragraph in re.split(r"\n[ \t]*\n", text):
        key = " ".join(paragraph.split())
        if len(key) >= 40:
            if key in seen:
                continue
            seen.add(key)
        kept.append(paragraph)
    return "\n\n".join(kept).strip().encode("utf-8", "surrogateescape")


def _every_eighth(parts: list[bytes]) -> tuple[list[bytes], list[bytes]]:
    parts = sorted(parts, key=len, reverse=True)
    return [part for i, part in enumerate(parts) if i % 8 != 3], parts[3::8]


def _files(
    root: Path, suffixes: tuple[str, ...], read: Callable[[bytes], bytes] = bytes
) -> tuple[list[bytes], list[bytes]]:
    """What `read` leaves of the files under root, if long enough: to train on, held out (a sixteenth, by the path)."""
    train: list[bytes] = []
    held_out: list[bytes] = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith(SKIPPED))
        for path in sorted(Path(folder, name) for name in files if name.endswith(suffixes)):
            content = read(path.read_bytes())
            if len(content) >= 2000:
                digest = hashlib.md5(path.relative_to(root).as_posix().encode(), usedforsecurity=False).hexdigest()
                (held_out if int(digest[:8], 16) % 16 == 0 else train).append(content[:100_000])
    return train, held_out


def _package(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{name} is missing: pip install 'onebit-ext[study]'")
    return Path(spec.submodule_search_locations[0])


def _dedent(docstring: bytes) -> bytes:
    return re.sub(rb"\n[ \t]+", b"\n", docstring)


def _corpus(name: str, train_parts: list[bytes], held_out_parts: list[bytes]) -> Corpus:
    train, whole = b"\n\n".join(train_parts), b"\n\n".join(held_out_parts)
    kept = cut_leaks(train, whole)
    if len(kept) < MIN_HELD_OUT:
        raise UserError(
            f"'{name}' leaves {len(kept):,} held-out bytes once repeats are cut, "
            f"{MIN_HELD_OUT:,} are needed: take a longer text"
        )
    return Corpus(name, np.frombuffer(train, np.uint8), np.frombuffer(kept, np.uint8), len(whole) - len(kept))
