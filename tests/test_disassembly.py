"""The sums of a tile are registers: no innermost loop that multiplies moves a vector register to or from the stack.

Compilers spill for reasons that no C shows (a chain of sums turned into a tree, loads moved up), at a third to half of
the speed. Row 19 of the reliability table.
"""

import re
from collections.abc import Iterator

import pytest
from test_build import disassembly, objects

from setup import ISA_FLAGS

# Multiplies of the tiles; a backward jump; a vector register and the stack in one instruction (x86's broadcasts read
# a buffer of activations, never a sum).
MULTIPLY = re.compile(r"\b(?:vpdpbusd|tdpbssd|vpmaddubsw|vpmaddwd|sdot|smmla|smlal2?)\b")
JUMP = re.compile(r"(?:j[a-z]+|b(?:\.[a-z]+)?|cbn?z\s+\w+,|tbn?z\s+\w+,\s+#\w+,)\s+(?:0x)?([0-9a-f]+)\b")
STACK = re.compile(
    r"(?!vpbroadcast)\w.*(?:[xyz]mm\d+.*\(%(?:rsp|frame)|\(%(?:rsp|frame).*[xyz]mm\d)|\w+\s+q\d+.*\[(?:sp|x29)"
)


def functions(text: str) -> Iterator[list[tuple[int, str]]]:
    """(address, instruction) of each function in the output of objdump -d; %rbp is %frame where it points there."""
    for body in re.split(r"^[0-9a-f]+ <.*>:$", text, flags=re.M)[1:]:
        lines = re.findall(r"^\s*([0-9a-f]+):\t(?:[0-9a-f]{2,8} )+[ \t]*(.*)$", body, flags=re.M)
        framed = any(re.match(r"mov\s+%rsp,%rbp", instruction) for _, instruction in lines)
        yield [(int(at, 16), text.replace("%rbp", "%frame") if framed else text) for at, text in lines]


def hot_loops(text: str) -> Iterator[list[str]]:
    """Instructions of every innermost loop that multiplies; a loop is a backward jump and what it jumps over."""
    for code in functions(text):
        index = {at: i for i, (at, _) in enumerate(code)}
        loops = []
        for i, (at, instruction) in enumerate(code):
            jump = JUMP.match(instruction)
            if jump and int(jump[1], 16) <= at and int(jump[1], 16) in index:
                loops.append((index[int(jump[1], 16)], i))
        for first, last in loops:
            inner = [loop for loop in loops if loop != (first, last) and first <= loop[0] and loop[1] <= last]
            body = [instruction for _, instruction in code[first : last + 1]]
            if not inner and any(MULTIPLY.search(line) for line in body):
                yield body


def spills(text: str) -> list[str]:
    return [line for body in hot_loops(text) for line in body if STACK.match(line)]


@pytest.mark.parametrize("source", sorted(ISA_FLAGS))
def test_no_hot_loop_touches_the_stack(source: str) -> None:
    text = disassembly(objects()[source])
    tiles = {"isa/trits_avx512vbmi.c": 1, "isa/amxint8.c": 8}.get(source, 10)
    assert len(list(hot_loops(text))) >= tiles, f"{source}: where are the tiles?"
    assert spills(text) == []


PLANTED_X86 = """
0000000000000000 <tile>:
       0:\t48 89 e5             \tmov    %rsp,%rbp
       3:\tc5 fd 6f 06          \tvmovdqa (%rsi),%ymm0
       7:\tc4 e2 7d 58 44 24 20 \tvpbroadcastd 0x20(%rsp),%ymm1
       e:\tc4 e2 7d 04 c9       \tvpmaddubsw %ymm1,%ymm0,%ymm1
      13:\t{spill}\t{instruction}
      18:\t75 e9                \tjne    3 <tile+0x3>
      1a:\tc5 fd 6f 04 24       \tvmovdqa (%rsp),%ymm0
"""
PLANTED_ARM = """
0000000000000000 <tile>:
   0:\t3dc00020 \tldr\tq0, [x1]
   4:\t4f81e000 \tsdot\tv0.4s, v0.16b, v1.4b[0]
   8:\t{spill}\t{instruction}
   c:\t54ffffa1 \tb.ne\t0 <tile>  // b.any
  10:\t3dc003e0 \tldr\tq0, [sp]
"""


@pytest.mark.parametrize(
    ("text", "spill", "instruction", "found"),
    [
        (PLANTED_X86, "c5 fd 7f 44 24 40   ", "vmovdqa %ymm0,0x40(%rsp)", 1),
        (PLANTED_X86, "c5 fd fd 45 c0      ", "vpaddw -0x40(%rbp),%ymm0,%ymm0", 1),
        (PLANTED_X86, "c5 fd 7f 07         ", "vmovdqa %ymm0,(%rdi)", 0),
        (PLANTED_ARM, "3d8007e0 ", "str\tq0, [sp, #16]", 1),
        (PLANTED_ARM, "3d800060 ", "str\tq0, [x3]", 0),
    ],
)
def test_a_planted_spill_is_seen(text: str, spill: str, instruction: str, found: int) -> None:
    planted = text.replace("{spill}", spill).replace("{instruction}", instruction)
    assert len(list(hot_loops(planted))) == 1
    assert len(spills(planted)) == found
