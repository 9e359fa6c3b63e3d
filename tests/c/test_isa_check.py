"""Instruction sets that this machine's Python module cannot run give the bits of the reference too.

AVX-VNNI runs in AVX-512's encoding of its one instruction where the processor has only that, AMX on tiles in plain C;
AArch64's run under qemu (`make check-arm`). Row 2 of the reliability table.
"""

import json
import shutil
from pathlib import Path

import pytest
from test_disassembly import hot_loops, spills
from test_harness import CC, CORE, FLAGS, C, built_core, checked, link

from onebit_ext import _core
from setup import ISA_FLAGS, ISA_FLAGS_OF, sources

ARM_CC = "aarch64-linux-gnu-gcc"
ARM_RUN = "qemu-aarch64"


def compiled(folder: Path, source: str, *flags: str, cc: str = CC) -> Path:
    made = folder / (source.replace("/", "_") + ".o")
    checked(cc, *flags, "-c", source, "-o", made)
    return made


def check(*command: object) -> list[str]:
    """The instruction sets that `command`, an isa_check, compared without a difference."""
    figures = json.loads(checked(*command))
    assert figures["differences"] == 0 and figures["bytes"] > 10**6
    return figures["isas"]


def test_instruction_sets_of_this_machine(tmp_path: Path) -> None:
    objects = dict(zip(CORE, built_core(tmp_path / "core"), strict=True))
    objects["csrc/base/alloc.c"] = compiled(tmp_path, "csrc/base/alloc.c", *FLAGS)
    expected = [isa["name"] for isa in _core.isas() if isa["supported"]]
    pretended = []
    if "avx512vnni" in expected and "isa/avxvnni.c" in ISA_FLAGS and "avxvnni" not in expected:
        evex = ("-mavx2", "-mavx512vl", "-mavx512vnni", "-mprefer-vector-width=256")
        objects["csrc/isa/avxvnni.c"] = compiled(tmp_path, "csrc/isa/avxvnni.c", *FLAGS, *evex)
        expected.insert(expected.index("avx512vnni"), "avxvnni")
        pretended.append("OB_CPU_AVXVNNI")
    if "avx512vnni" in expected and "isa/amxint8.c" in ISA_FLAGS:
        soft = (*ISA_FLAGS["isa/amxint8.c"], "-include", C / "soft_tiles.h")
        objects["csrc/isa/amxint8.c"] = compiled(tmp_path, "csrc/isa/amxint8.c", *FLAGS, *soft)
        expected += [] if "amxint8" in expected else ["amxint8"]
        pretended.append("OB_CPU_AMXINT8")
    real = "-Dob_cpu_features=ob_cpu_features_real"
    objects["csrc/base/cpu.c"] = compiled(tmp_path, "csrc/base/cpu.c", *FLAGS, real)
    pretend = [f"-DOB_PRETEND=({'|'.join(pretended) or 0})", C / "pretend.c"]
    assert check(link(tmp_path / "isa_check", C / "isa_check.c", *pretend, *objects.values())) == expected
    objects["csrc/base/alloc.c"] = C / "guard_alloc.c"
    guard = link(tmp_path / "guard_pages", C / "guard_pages.c", *pretend, *objects.values())
    assert json.loads(checked(guard, 101))["isas"] >= len(expected)


@pytest.fixture(scope="module")
def arm_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for tool, package in ((ARM_CC, "gcc-aarch64-linux-gnu libc6-dev-arm64-cross"), (ARM_RUN, "qemu-user")):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is missing (Debian: {package})")
    folder = tmp_path_factory.mktemp("arm")
    flags = [flag for flag in FLAGS if not flag.startswith("-DOB_WITHOUT_")]
    arm = ISA_FLAGS_OF["aarch64"]
    shared = [name for name in sources() if not name.startswith("csrc/binding/")]
    names = [name for name in shared if name.removeprefix("csrc/") not in ISA_FLAGS]
    objects = [compiled(folder, name, *flags, "-Werror", cc=ARM_CC) for name in names]
    objects += [compiled(folder, f"csrc/{name}", *flags, *arm[name], "-Werror", cc=ARM_CC) for name in arm]
    target = folder / "isa_check"
    checked(
        ARM_CC, "-O1", "-std=gnu11", "-pthread", "-static", C / "isa_check.c", *objects, "-lm", "-ldl", "-o", target
    )
    return target


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processor", "every", "expected"),
    [("max", 1, ["scalar", "neon", "neondot", "neoni8mm"]), ("cortex-a72", 7, ["scalar", "neon"])],
)
def test_aarch64(arm_program: Path, processor: str, every: int, expected: list[str]) -> None:
    assert check(ARM_RUN, "-cpu", processor, arm_program, every) == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", ["neon", "neondot", "neoni8mm"])
def test_aarch64_sums_are_registers(arm_program: Path, name: str) -> None:
    text = checked("aarch64-linux-gnu-objdump", "-d", arm_program.parent / f"csrc_isa_{name}.c.o")
    assert len(list(hot_loops(text))) >= 10
    assert spills(text) == []
