"""The block types of GGUF as packings, against the gguf package; torn and foreign files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from models import FALCON_E, build, i2_s

from onebit_ext import CheckpointError, convert, pack, unpack, validate
from onebit_ext.hf import export_gguf
from onebit_ext.hf.gguf_read import GGUFFile

Array = np.ndarray[Any, Any]
TERNARY = {"tq2_0": GGMLQuantizationType.TQ2_0, "tq1_0": GGMLQuantizationType.TQ1_0}
BLOCKS = {"tq2_0": (256, 66), "tq1_0": (256, 54), "i2_s": (128, 32)}


def random_codes(n: int, k: int, seed: int = 0) -> Array:
    codes = np.random.default_rng(seed).integers(-1, 2, (n, k), np.int8)
    codes[:, ::128] = 1  # no block of zeros, for which the quantiser of gguf writes d = 0
    return codes


# ------------------------------------------------------------------ packings
@pytest.mark.parametrize("packing", BLOCKS)
@pytest.mark.parametrize("shape", [(1, 256), (5, 512), (3, 1280), (64, 1024), (7, 2048), (2, 2304), (0, 256), (4, 0)])
def test_packings(packing: str, shape: tuple[int, int]) -> None:
    codes = random_codes(*shape)
    packed = pack(codes, packing)
    if packing == "i2_s" or codes.size == 0:
        want = i2_s(codes) if codes.size else np.zeros(0, np.uint8)
    else:
        want = quants.quantize(codes.astype(np.float32), TERNARY[packing]).reshape(-1)
    assert (packed == want).all() and packed.shape == want.shape
    assert (unpack(packed, shape, packing) == codes).all()
    validate(packed, shape, packing)
    for other in ("tile16", "seq2", "tq1_0", "i2_s"):
        assert (convert(packed, shape, packing, other) == pack(codes, other)).all()
        assert (convert(pack(codes, other), shape, other, packing) == packed).all()


@pytest.mark.parametrize("packing", BLOCKS)
def test_what_has_no_whole_blocks(packing: str) -> None:
    block = BLOCKS[packing][0]
    for k in (1, block - 1, block + 1, block // 2):
        with pytest.raises(ValueError, match=f"'{packing}' cannot hold the shape"):
            pack(np.zeros((2, k), np.int8), packing)


@pytest.mark.parametrize("packing", BLOCKS)
def test_every_byte_is_an_image_or_refused(packing: str) -> None:
    """Each value at each kind of place either unpacks to codes that pack to it again, or is refused; d is not read."""
    block, size = BLOCKS[packing]
    clean = pack(random_codes(1, block), packing)
    images = 0
    for place in {"tq2_0": (0, 63), "tq1_0": (0, 32, 47, 48, 51), "i2_s": (0, 31)}[packing]:
        for byte in range(256):
            packed = clean.copy()
            packed[place] = byte
            try:
                codes = unpack(packed, (1, block), packing)
            except ValueError as error:
                assert "reserved" in str(error)
                continue
            images += 1
            assert (pack(codes, packing) == packed).all()
    assert images == {"tq2_0": 2 * 81, "tq1_0": 3 * 243 + 2 * 81, "i2_s": 2 * 81}[packing]
    if packing != "i2_s":
        clean[size - 2 :] = 0xFF
        validate(clean, (1, block), packing)


# ------------------------------------------------------------------ reading
def test_torn_and_foreign_files(tmp_path: Path) -> None:
    build(tmp_path / "in", "hf-packed", FALCON_E | {"num_hidden_layers": 1})
    export_gguf(tmp_path / "in", tmp_path / "out.gguf")
    whole = (tmp_path / "out.gguf").read_bytes()
    start = min(tensor.offset for tensor in GGUFFile(tmp_path / "out.gguf").tensors)
    for length in [*range(300), *range(300, start - 64, 97)]:
        (tmp_path / "torn.gguf").write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            GGUFFile(tmp_path / "torn.gguf")
    (tmp_path / "torn.gguf").write_bytes(whole[:-100_000])
    file = GGUFFile(tmp_path / "torn.gguf")
    with pytest.raises(CheckpointError, match="fetch it again"):
        [file.linear(tensor) for tensor in file.tensors]
    rng = np.random.default_rng(7)
    for _ in range(300):  # any byte of the header: refused or read, never anything else
        broken = bytearray(whole)
        broken[rng.integers(0, start)] = rng.integers(0, 256)
        (tmp_path / "torn.gguf").write_bytes(broken)
        try:
            file = GGUFFile(tmp_path / "torn.gguf")
            [file.linear(tensor) for tensor in file.tensors]
        except CheckpointError as error:
            assert "\n" not in str(error)
