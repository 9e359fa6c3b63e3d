"""The laws of the tree as greps: who includes whom, one malloc, intrinsics in isa/, short files, no loose ends."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
C_FILES = sorted(path for path in CSRC.rglob("*") if path.suffix in {".c", ".h", ".def"})
PY_FILES = sorted((ROOT / "onebit_ext").rglob("*.py"))
ALL_FILES = C_FILES + PY_FILES + sorted((ROOT / "tests").rglob("*.[ch]")) + sorted((ROOT / "tests").rglob("*.py"))

# folder (or file, which comes first) -> what it may include besides its own folder, onebit.h and system headers
MAY_INCLUDE = {
    "onebit.h": {"flip_rules/rules.def", "formats/formats.def"},
    "isa/dispatch.c": {"kernels/kernel.h", "formats", "base"},
    "base": set(),
    "formats": {"base"},
    "flip_rules": {"base"},
    "kernels": {"formats", "flip_rules", "base"},
    "isa": {"kernels", "formats", "flip_rules", "base"},
    "ops": {"kernels/kernel.h", "formats", "base"},
    "reference": {"formats", "base"},
    "binding": set(),
}

# Longer than 400 lines, with the reason.
LONG_FILES: dict[str, str] = {}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def code(path: Path) -> str:
    """The C source without comments and string literals."""
    text = re.sub(r"/\*.*?\*/", " ", path.read_text(), flags=re.S)
    text = re.sub(r"//[^\n]*", " ", text)
    return re.sub(r'"(?:\\.|[^"\\\n])*"', '""', text)


def includes(path: Path) -> list[str]:
    """Project headers that `path` includes, relative to csrc/."""
    found = re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), flags=re.M)
    return [(path.parent / header).resolve().relative_to(CSRC).as_posix() for header in found]


def allowed(path: Path) -> set[str]:
    relative = path.relative_to(CSRC)
    if relative.as_posix() in MAY_INCLUDE:
        return MAY_INCLUDE[relative.as_posix()]
    return MAY_INCLUDE[relative.parts[0]]


@pytest.mark.parametrize("path", C_FILES, ids=name)
def test_includes_follow_the_law(path: Path) -> None:
    own = path.relative_to(CSRC).parts[0]
    for header in includes(path):
        assert (CSRC / header).is_file(), f"{name(path)} includes {header}, which does not exist"
        folder = header.split("/")[0]
        ok = header == "onebit.h" or folder == own or folder in allowed(path) or header in allowed(path)
        assert ok, f"{name(path)} may not include {header}"


@pytest.mark.parametrize("path", C_FILES, ids=name)
def test_no_isa_file_includes_another(path: Path) -> None:
    assert not [header for header in includes(path) if re.fullmatch(r"isa/.*\.c", header)]


def violations(pattern: str, files: list[Path]) -> list[str]:
    return [f"{name(path)}: {hit}" for path in files for hit in re.findall(pattern, code(path))]


def outside(*places: str) -> list[Path]:
    return [path for path in C_FILES if not path.relative_to(CSRC).as_posix().startswith(places)]


def test_one_place_allocates() -> None:
    pattern = r"\b(?:malloc|calloc|realloc|free|aligned_alloc|posix_memalign|mmap|munmap|strdup|alloca)\s*\("
    assert violations(pattern, outside("base/alloc.c")) == []


def test_intrinsics_live_in_isa() -> None:
    pattern = (
        r"immintrin\.h|arm_neon\.h|\b_mm\d*_\w+|\b__m(?:128|256|512)\w*|\b__builtin_ia32_\w+|pragma\s+GCC\s+target"
    )
    assert violations(pattern, outside("isa/")) == []


def test_processor_questions_live_in_cpu() -> None:
    assert violations(r"cpuid\.h|\b__get_cpuid\w*|xgetbv|__builtin_cpu_supports", outside("base/cpu.")) == []


def test_python_lives_in_the_binding() -> None:
    pattern = r"\bPy[A-Z]\w+|\bNPY_\w+"
    assert violations(pattern, outside("binding/")) == []
    text = "".join(path.read_text() for path in outside("binding/"))
    assert "Python.h" not in text.replace("the only Python.h", "")


def test_the_core_neither_prints_nor_exits() -> None:
    pattern = r"\b(?:printf|fprintf|puts|putchar|perror|exit|_exit|abort)\s*\("
    assert violations(pattern, C_FILES) == []


def test_file_names_are_unique() -> None:
    names = [path.name for path in C_FILES]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("path", ALL_FILES, ids=name)
def test_files_are_short(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= 400 or name(path) in LONG_FILES, f"{name(path)} has {lines} lines"


def test_the_list_of_long_files_is_current() -> None:
    for file, reason in LONG_FILES.items():
        assert reason and len((ROOT / file).read_text().splitlines()) > 400, file


@pytest.mark.parametrize("path", ALL_FILES, ids=name)
def test_no_loose_ends(path: Path) -> None:
    words = "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK", "NotImplemented" + "Error"))
    assert not re.findall(rf"\b(?:{words})\b", path.read_text())


def imports(tree: ast.AST, at_top: bool) -> set[str]:
    """Packages imported in `tree`; at_top: only by statements that run when the module is imported."""
    found: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        elif not (at_top and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)):
            found |= imports(node, at_top)
    return found


FRAMEWORKS = {
    "torch",
    "transformers",
    "trl",
    "accelerate",
    "datasets",
    "gguf",
    "peft",
    "onebitllms",
}


@pytest.mark.parametrize("path", PY_FILES, ids=name)
def test_torch_is_imported_only_above_the_numpy_level(path: Path) -> None:
    layer = path.relative_to(ROOT / "onebit_ext").parts[0]
    if layer in {"torch", "hf"}:
        return
    tree = ast.parse(path.read_text())
    assert not imports(tree, at_top=layer == "tools") & FRAMEWORKS


@pytest.mark.parametrize("path", PY_FILES, ids=name)
def test_the_torch_level_stands_without_hugging_face(path: Path) -> None:
    if path.relative_to(ROOT / "onebit_ext").parts[0] == "torch":
        assert not imports(ast.parse(path.read_text()), at_top=True) & (FRAMEWORKS - {"torch"})


def test_every_isa_packing_and_rule_has_its_file() -> None:
    registries = {"isa": ("isas.def", "OB_ISA"), "formats": ("formats.def", "OB_FORMAT")}
    registries["flip_rules"] = ("rules.def", "OB_RULE")
    for folder, (registry, macro) in registries.items():
        suffix = ".c" if folder == "isa" else ".h"
        listed = re.findall(rf"^{macro}\((\w+)", (CSRC / folder / registry).read_text(), flags=re.M)
        assert listed
        for entry in listed:
            assert (CSRC / folder / f"{entry}{suffix}").is_file(), f"{registry} lists {entry}"


def test_the_laws_can_fail() -> None:
    planted = CSRC / "base" / "alloc.c"
    assert violations(r"\bmalloc\s*\(", [planted])  # the grep sees a malloc where there is one
    assert imports(ast.parse("def f():\n    import torch"), at_top=False) == {"torch"}
    assert imports(ast.parse("def f():\n    import torch"), at_top=True) == set()
    assert imports(ast.parse("try:\n    import torch\nexcept ImportError:\n    pass"), at_top=True) == {"torch"}
