"""What the compiler made: instruction sets stay in their files, nothing is contracted, nothing leaks out.

Row 19 of the reliability table.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from onebit_ext import _core

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from setup import FLAGS, ISA_FLAGS, sources  # noqa: E402


def objects() -> dict[str, Path]:
    """Source (relative to csrc/) -> object of the in-place build."""
    found = {}
    for base in ROOT.glob(f"build/temp.*-{sys.implementation.cache_tag}"):
        for source in sources():
            path = (base / source).with_suffix(".o")
            if path.exists():
                found[source.removeprefix("csrc/")] = path
    if not found:
        pytest.skip("no objects under build/: the module was not built in place")
    return found


def disassembly(path: Path) -> str:
    if not shutil.which("objdump"):
        pytest.skip("objdump is missing (Debian: binutils)")
    return subprocess.run(["objdump", "-d", path], check=True, capture_output=True, text=True).stdout


def wide_registers(path: Path) -> set[str]:
    return set(re.findall(r"%([yz]mm)\d", disassembly(path)))


def test_every_source_was_built() -> None:
    assert set(objects()) == {source.removeprefix("csrc/") for source in sources()}


def test_only_isa_files_use_wide_registers() -> None:
    assembly = {"isa/peak.c"}  # by hand, run only where the table that needs it is in use
    for source, path in objects().items():
        if source not in ISA_FLAGS and source not in assembly:
            assert not wide_registers(path), source


def test_isa_files_use_what_they_are_named_for() -> None:
    expected = {"isa/avx2.c": {"ymm"}, "isa/avxvnni.c": {"ymm"}, "isa/avx512vnni.c": {"ymm", "zmm"}}
    expected["isa/trits_avx512vbmi.c"] = expected["isa/amxint8.c"] = {"ymm", "zmm"}
    for source in expected.keys() & objects().keys():
        found = wide_registers(objects()[source])
        assert found and found <= expected[source], source


def test_no_multiplication_was_contracted_with_an_addition() -> None:
    """But for AVX-512's v + r * 2^-32, whose product is exact: the only one that converts unsigned numbers."""
    for source, path in objects().items():
        text = disassembly(path)
        exact = len(re.findall(r"\bvcvtudq2ps", text)) if source == "isa/avx512vnni.c" else 0
        assert len(re.findall(r"\bvfn?m(add|sub)", text)) == exact, source
        assert exact or source != "isa/avx512vnni.c"


def test_flags_are_portable() -> None:
    flags = FLAGS + [flag for extra in ISA_FLAGS.values() for flag in extra]
    assert "-ffp-contract=off" in flags
    banned = r"-march=(?!armv8)|-mtune=|-Ofast|-ffast-math|-funsafe|-fopenmp"
    assert not [flag for flag in flags if re.match(banned, flag)]


def test_the_module_exports_its_init_function_alone() -> None:
    if not shutil.which("nm"):
        pytest.skip("nm is missing (Debian: binutils)")
    command = ["nm", "-D", "--defined-only", _core.__file__]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    symbols = {line.split()[-1] for line in listed.splitlines()} - {"_init", "_fini", "__bss_start", "_edata", "_end"}
    assert symbols == {"PyInit__core"}


def test_clang_has_no_warning() -> None:
    clang = shutil.which("clang")
    if not clang:
        pytest.skip("clang is missing (Debian: clang)")
    for source in sources():
        if source.startswith("csrc/binding/"):
            continue  # Python's own headers warn under clang
        flags = FLAGS + ISA_FLAGS.get(source.removeprefix("csrc/"), [])
        command = [clang, *flags, "-Werror", "-fsyntax-only", str(ROOT / source)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]


def with_isa(value: str) -> "subprocess.CompletedProcess[str]":
    code = "from onebit_ext import _core; print(_core.isa())"
    environment = {**os.environ, "ONEBIT_ISA": value}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("entry", _core.isas(), ids=lambda entry: entry["name"])
def test_onebit_isa_is_honoured_or_refused(entry: dict[str, object]) -> None:
    done = with_isa(str(entry["name"]))
    if entry["supported"]:
        assert done.stdout.strip() == entry["name"], done.stderr
    else:
        assert done.returncode and "ImportError" in done.stderr and f"ONEBIT_ISA='{entry['name']}'" in done.stderr


@pytest.mark.parametrize("value", ["sse9", "AVX2", "avx2 ", "x" * 5000, "%s%n"])
def test_a_wrong_onebit_isa_is_an_import_error(value: str) -> None:
    done = with_isa(value)
    assert done.returncode == 1 and "ImportError: ONEBIT_ISA='" in done.stderr
    assert all(entry["name"] in done.stderr for entry in _core.isas())


def test_an_empty_onebit_isa_is_none() -> None:
    assert with_isa("").stdout.strip() == [entry["name"] for entry in _core.isas() if entry["supported"]][-1]


@pytest.mark.parametrize(("value", "threads"), [("1", 1), ("7", 7), ("256", 256)])
def test_onebit_num_threads_sets_the_count(value: str, threads: int) -> None:
    code = "from onebit_ext import _core; print(_core.num_threads())"
    environment = {**os.environ, "ONEBIT_NUM_THREADS": value}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == str(threads), done.stderr
