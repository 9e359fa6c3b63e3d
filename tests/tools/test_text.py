"""The demo's text: baselines and the leak filter against naive twins."""

import collections
import math
from pathlib import Path

import numpy as np
import pytest

from onebit_ext.tools import UserError, text


def naive_ngram(train: bytes, held_out: bytes, order: int) -> float:
    counts = [collections.Counter(train[i - n : i + 1] for i in range(n, len(train))) for n in range(order + 1)]
    total = 0.0
    for i in range(order, len(held_out)):
        p = 1 / 256
        for n in range(order + 1):
            context = held_out[i - n : i]
            seen = sum(counts[n][context + bytes([c])] for c in range(256))
            p = (counts[n][held_out[i - n : i + 1]] + 4 * p) / (seen + 4)
        total -= math.log(p)
    return total / (len(held_out) - order)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_ngram_loss_equals_the_naive_one(order: int) -> None:
    rng = np.random.default_rng(order)
    train = bytes(rng.choice(np.frombuffer(b"abcde\xff", np.uint8), 700))
    held_out = bytes(rng.choice(np.frombuffer(b"abcdfg\x00", np.uint8), 90))  # some bytes never seen
    got = text.ngram_loss(np.frombuffer(train, np.uint8), np.frombuffer(held_out, np.uint8), order)
    assert got == pytest.approx(naive_ngram(train, held_out, order), rel=1e-12)


def naive_cut(train: bytes, held_out: bytes) -> bytes:
    width = text.WINDOW
    seen = {train[i : i + width] for i in range(len(train) - width + 1)}
    lines = held_out.split(b"\n")
    return b"\n".join(
        line for line in lines if not any(line[i : i + width] in seen for i in range(len(line) - width + 1))
    )


def test_cut_leaks_equals_the_naive_one() -> None:
    rng = np.random.default_rng(3)
    train = bytes(rng.integers(97, 100, 5000, np.uint8))
    lines = []
    for i in range(200):
        own = bytes(rng.integers(97, 100, int(rng.integers(0, 90)), np.uint8))
        start, length = int(rng.integers(0, 4900)), int(rng.integers(45, 51))  # around the window
        lines.append(own + train[start : start + length] + own[:7] if i % 2 else own)
    held_out = b"\n".join(lines)
    kept = text.cut_leaks(train, held_out)
    assert kept == naive_cut(train, held_out)
    assert 0 < len(kept) < len(held_out)


def test_cut_leaks_of_short_texts() -> None:
    assert text.cut_leaks(b"", b"abc") == b"abc"
    assert text.cut_leaks(b"abc" * 100, b"") == b""
    line = bytes(range(32, 32 + text.WINDOW))
    assert text.cut_leaks(line, line) == b""
    assert text.cut_leaks(line, line[1:]) == line[1:]


def test_documentation_is_split_without_leaks() -> None:
    corpus = text.documentation()
    assert len(corpus.train) > 200_000 and len(corpus.held_out) > 20_000
    train, held_out = corpus.train.tobytes(), corpus.held_out.tobytes()
    assert naive_cut(train, held_out) == held_out
    losses = corpus.baselines
    assert losses["unigram"] > losses["bigram"] > losses["trigram"] > losses["zlib -9"] > 1


def test_user_text_any_encoding(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    path = tmp_path / "own.txt"
    path.write_bytes(b"\n\n".join(bytes(rng.integers(0, 256, 60, np.uint8)) for _ in range(3000)))
    corpus = text.user_text(path)
    assert corpus.name == "own.txt"
    assert 6 < len(corpus.train) / len(corpus.held_out) < 8


@pytest.mark.parametrize("content, message", [(None, "cannot read"), (b"short", "needs at least")])
def test_user_text_mistakes(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "own.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        text.user_text(path)


def test_user_text_of_one_repeated_line(tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_bytes(b"the same line again and again, longer than a window of 48\n" * 4000)
    with pytest.raises(UserError, match="held-out bytes once repeats are cut"):
        text.user_text(path)
