"""The build of onebit_ext._core: every csrc/**/*.c, each with the flags of its instruction set.

ONEBIT_WERROR=1 makes warnings errors; ONEBIT_SANITIZE=address,undefined and ONEBIT_COVERAGE=1 build for those tools;
ONEBIT_PURE=1 leaves the C module out (to register an editable install beside an in-place build).
"""

import json
import os
import platform
import shlex
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent

AVX512VNNI = [
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"),
    "-mprefer-vector-width=512",
]
# What the instruction set of a file in csrc/isa/ needs, by architecture; every other file is compiled for the baseline.
ISA_FLAGS_OF = {
    "x86_64": {
        "isa/avx2.c": ["-mavx2"],
        "isa/avxvnni.c": ["-mavx2", "-mavxvnni"],
        "isa/avx512vnni.c": AVX512VNNI,
        "isa/amxint8.c": [*AVX512VNNI, "-mamx-tile", "-mamx-int8"],
        "isa/trits_avx512vbmi.c": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni", "-mavx512vbmi"],
    },
    "aarch64": {
        # gcc schedules for AArch64 before it allocates registers, and then spills up to 76 sums of a tile
        "isa/neon.c": ["-fno-schedule-insns"],
        "isa/neondot.c": ["-march=armv8.2-a+dotprod", "-fno-schedule-insns"],
        "isa/neoni8mm.c": ["-march=armv8.2-a+i8mm", "-fno-schedule-insns"],
    },
}
MACHINE = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())


def accepted(flags: list[str]) -> bool:
    """Whether the C compiler knows `flags`."""
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    command = [*compiler, *flags, "-c", "-x", "c", os.devnull, "-o", os.devnull]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return True  # the build will say so


ISA_FLAGS = {name: flags for name, flags in ISA_FLAGS_OF.get(MACHINE, {}).items() if not flags or accepted(flags)}
WITHOUT = [Path(name).stem for name in ISA_FLAGS_OF.get(MACHINE, {}) if name not in ISA_FLAGS]
FLAGS = [
    *("-O3", "-std=gnu11", "-pthread", "-fvisibility=hidden"),
    *(
        "-ffp-contract=off",
        "-fno-math-errno",
        "-fno-fast-math",
    ),  # the same bits on every instruction set
    *("-Wall", "-Wextra", "-Wconversion", "-Wshadow"),
    *(f"-DOB_WITHOUT_{name}" for name in WITHOUT),
]
MACROS = ["-DNPY_NO_DEPRECATED_API=NPY_2_0_API_VERSION", "-DNPY_TARGET_VERSION=NPY_2_0_API_VERSION"]


def sources() -> list[str]:
    """Every C file this machine can compile, as paths relative to the repository."""
    files = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/*/*.c"))
    foreign = {name for flags_of in ISA_FLAGS_OF.values() for name in flags_of} - set(ISA_FLAGS)
    return [name for name in files if name.removeprefix("csrc/") not in foreign]


def variant() -> tuple[str, list[str], list[str]]:
    """(name, compiler flags, linker flags) of the build the environment asks for."""
    name, compile_flags, link_flags = "", [], []
    if sanitizers := os.environ.get("ONEBIT_SANITIZE"):
        name += "-" + sanitizers.replace(",", "-")
        link_flags.append(f"-fsanitize={sanitizers}")
        compile_flags += [
            *link_flags,
            "-O1",
            "-g",
            "-fno-omit-frame-pointer",
            "-fno-sanitize-recover=undefined",
        ]
    if os.environ.get("ONEBIT_COVERAGE"):
        name += "-coverage"
        link_flags.append("--coverage")
        compile_flags += ["--coverage", "-O1"]
    return name, compile_flags, link_flags


def numpy_include() -> str:
    import numpy

    return numpy.get_include()


class BuildExt(build_ext):
    """Compiles changed files only, several at a time, and puts the module in place in one step."""

    def build_extension(self, ext: Extension) -> None:
        for isa in WITHOUT:
            print(f"onebit_ext: this C compiler does not know {isa}: built without it", file=sys.stderr)
        name, compile_flags, link_flags = variant()
        folder = Path(self.build_temp + name)
        self.headers = [sysconfig.get_path("include"), numpy_include()]
        self.flags = FLAGS + MACROS + compile_flags
        self.strict = ["-Werror"] if os.environ.get("ONEBIT_WERROR") else []
        with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2) as pool:
            objects = list(pool.map(lambda source: self.compile_one(source, folder), ext.sources))
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        linked = folder / target.name
        self.compiler.link_shared_object(
            [str(path) for path in objects],
            str(linked),
            extra_preargs=[*link_flags, "-pthread"],
            build_temp=str(folder),
        )
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_name(target.name + ".new")
        self.copy_file(str(linked), str(fresh))
        os.replace(fresh, target)  # a running process keeps the module it has mapped

    def compile_one(self, source: str, folder: Path) -> Path:
        """Compile `source` unless its object, its headers and the command are as they were."""
        made = folder / Path(source).with_suffix(".o")
        depends, recipe = made.with_suffix(".d"), made.with_suffix(".json")
        made.parent.mkdir(parents=True, exist_ok=True)
        system = [f"-isystem{path}" for path in self.headers]  # their warnings are not ours
        flags = self.flags + ISA_FLAGS.get(source.removeprefix("csrc/"), [])
        command = [
            *self.compiler.compiler_so,
            *flags,
            *system,
            "-MMD",
            "-MF",
            str(depends),
            "-c",
            source,
            "-o",
            str(made),
        ]
        if not self.is_current(made, depends, recipe, command):
            recipe.unlink(missing_ok=True)
            done = subprocess.run(command + self.strict, cwd=ROOT, stderr=subprocess.PIPE, text=True)
            sys.stderr.write(done.stderr)
            if done.returncode:
                raise SystemExit(f"could not compile {source}")
            if not done.stderr:  # a file with warnings shows them at every build, until it has none
                recipe.write_text(json.dumps(command))
        return made

    @staticmethod
    def is_current(made: Path, depends: Path, recipe: Path, command: list[str]) -> bool:
        if not (made.exists() and depends.exists() and recipe.exists()) or json.loads(recipe.read_text()) != command:
            return False
        rule = depends.read_text().replace("\\\n", " ").split(":", 1)[1]
        needed = [ROOT / name for name in rule.split()]
        return all(path.exists() and path.stat().st_mtime < made.stat().st_mtime for path in needed)


if __name__ == "__main__":
    os.chdir(ROOT)
    pure = bool(os.environ.get("ONEBIT_PURE"))
    headers = sorted(
        path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/**/*") if path.suffix in (".h", ".def")
    )
    setup(
        ext_modules=[] if pure else [Extension("onebit_ext._core", sources(), depends=headers)],
        cmdclass={"build_ext": BuildExt},
    )
