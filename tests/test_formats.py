"""Packings: bytes against NumPy, round trips, every byte value, reserved codes and dirty padding refused."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import Array

from onebit_ext import _core

PLAIN = ("tile16", "seq2", "rows4")  # four codes a byte, any K; the block types of GGUF: hf/test_gguf.py
ALL = (*PLAIN, "trits5")
SHAPES = [
    (0, 0), (0, 5), (5, 0), (1, 1), (3, 7), (4, 16), (16, 4), (63, 17), (64, 16), (65, 15),
    (128, 64), (130, 191), (20, 1023), (8, 1024), (12, 1025), (4, 2049),
    (4, 19), (4, 20), (8, 1279), (8, 1280), (68, 1281), (4, 2561),
]  # fmt: skip


def random_codes(n: int, k: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(-1, 2, (n, k), np.int8)


def representable(format: str, n: int) -> bool:
    return format != "rows4" or n % 4 == 0


def test_names() -> None:
    assert (*PLAIN, "tq2_0", "tq1_0", "i2_s", "trits5") == _core.FORMATS


@pytest.mark.parametrize("format", ALL)
@pytest.mark.parametrize("shape", SHAPES)
def test_pack_and_unpack(format: str, shape: tuple[int, int]) -> None:
    if not representable(format, shape[0]):
        with pytest.raises(ValueError, match=r"pack\(\)"):
            _core.pack(random_codes(*shape), format)
        return
    codes = random_codes(*shape)
    packed = _core.pack(codes, format)
    want = oracle.pack(codes, format)
    assert packed.shape == want.shape and (packed == want).all()
    assert packed.ctypes.data % 64 == 0
    _core.validate(packed, shape, format)
    assert (_core.unpack(packed, shape, format) == codes).all()


@pytest.mark.parametrize("source", ALL)
@pytest.mark.parametrize("target", ALL)
def test_convert(source: str, target: str) -> None:
    for n, k in SHAPES:
        if representable(source, n) and representable(target, n):
            codes = random_codes(n, k, seed=n + k)
            got = _core.convert(oracle.pack(codes, source), (n, k), source, target)
            assert (got == oracle.pack(codes, target)).all()


@given(n=st.integers(0, 40), k=st.integers(0, 300), seed=st.integers(0, 2**32))
def test_round_trip_through_all(n: int, k: int, seed: int) -> None:
    codes = random_codes(4 * n, k, seed)
    packed = _core.pack(codes)
    for source, target in (("tile16", "rows4"), ("rows4", "trits5"), ("trits5", "seq2"), ("seq2", "tile16")):
        packed = _core.convert(packed, codes.shape, source, target)
    assert (packed == oracle.pack(codes)).all()


@pytest.mark.parametrize("format", PLAIN)
def test_every_byte(format: str) -> None:
    """Each of the 256 bytes either reads back as its four codes or is refused."""
    shape = (64, 16)
    clean = oracle.pack(np.zeros(shape, np.int8), format)
    for byte in range(256):
        packed = clean.copy()
        packed.reshape(-1)[37] = byte
        if any(byte >> 2 * p & 3 == 3 for p in range(4)):
            for refuse in (
                lambda: _core.validate(packed, shape, format),  # noqa: B023
                lambda: _core.unpack(packed, shape, format),  # noqa: B023
                lambda: _core.convert(packed, shape, format, "seq2"),  # noqa: B023
            ):
                with pytest.raises(ValueError, match="reserved code"):
                    refuse()
        else:
            codes = _core.unpack(packed, shape, format)
            assert (oracle.pack(codes, format) == packed).all()


def test_every_byte_of_five_codes() -> None:
    """The 243 bytes below read back as five codes, each its own; the rest is refused anywhere, also in padding."""
    shape, seen = (64, 20), set()
    clean = oracle.pack(np.zeros(shape, np.int8), "trits5")
    for byte in range(256):
        packed = clean.copy()
        packed.reshape(-1)[37] = byte
        if byte < 243:
            codes = _core.unpack(packed, shape, "trits5")
            seen.add(codes.tobytes())
            assert (oracle.pack(codes, "trits5") == packed).all()
            continue
        for place in (0, 37, 255):
            packed = clean.copy()
            packed.reshape(-1)[place] = byte
            for n, k in (shape, (1, 1)):
                for refuse in (
                    lambda: _core.validate(packed, (n, k), "trits5"),  # noqa: B023
                    lambda: _core.unpack(packed, (n, k), "trits5"),  # noqa: B023
                    lambda: _core.convert(packed, (n, k), "trits5", "tile16"),  # noqa: B023
                ):
                    with pytest.raises(ValueError, match="reserved code"):
                        refuse()
    assert len(seen) == 243


@pytest.mark.parametrize("format", PLAIN)
@pytest.mark.parametrize("shape", [(64, 16), (68, 19), (4, 1025)])
def test_reserved_code_anywhere(format: str, shape: tuple[int, int]) -> None:
    """Code 3 is found at every weight and in every padding position."""
    clean = oracle.pack(random_codes(*shape), format).reshape(-1)
    full = oracle.pack(random_codes(*shape), format).shape
    for i in np.random.default_rng(1).permutation(4 * clean.size)[:600]:
        packed = clean.copy()
        packed[i // 4] |= 3 << 2 * (i % 4)
        with pytest.raises(ValueError, match=r"validate\(\)"):
            _core.validate(packed.reshape(full), shape, format)


@pytest.mark.parametrize("format", ["tile16", "seq2", "trits5"])
def test_dirty_padding(format: str) -> None:
    shape = (63, 15)  # tile16 and trits5 pad rows and columns, seq2 columns
    grid = {"tile16": (64, 16), "trits5": (64, 20), "seq2": (63, 16)}[format]
    codes = np.zeros(grid, np.int8)
    codes[:63, :15] = random_codes(*shape)
    for n, k in [(0, 15), (62, 15), (63, 0)][: 2 if format == "seq2" else 3]:
        for dirt in (-1, 1):
            dirty = codes.copy()
            dirty[n, k] = dirt
            with pytest.raises(ValueError, match="padding"):
                _core.validate(oracle.pack(dirty, format), shape, format)


@pytest.mark.parametrize("format", ALL)
@pytest.mark.parametrize("bad", [-128, -2, 2, 3, 127])
def test_codes_outside_the_domain(format: str, bad: int) -> None:
    codes = random_codes(8, 70)
    codes[7, 69] = bad
    with pytest.raises(ValueError, match="'codes' must hold -1, 0 and 1 only"):
        _core.pack(codes, format)
