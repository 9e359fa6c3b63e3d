"""The C harness: guard pages around every buffer of every operation, and races in the thread pool.

Rows 3, 7 and 15 of the reliability table. The core's objects are those of the build; ONEBIT_SANITIZE is not needed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from setup import FLAGS, ISA_FLAGS, sources  # noqa: E402

C = ROOT / "tests" / "c"
CC = os.environ.get("CC", "cc")
CORE = [name for name in sources() if not name.startswith("csrc/binding/") and name != "csrc/base/alloc.c"]
POOL = [f"csrc/base/{stem}.c" for stem in ("alloc", "cpu", "pool", "status")]


def run(*command: object, **environment: str) -> "subprocess.CompletedProcess[str]":
    words = [str(word) for word in command]
    return subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, timeout=900, env={**os.environ, **environment}
    )


def checked(*command: object, **environment: str) -> str:
    done = run(*command, **environment)
    assert done.returncode == 0, f"{command[0]} ended with {done.returncode}: {done.stderr[-2000:]}"
    return done.stdout


def build_core(folder: Path, *extra: str) -> list[Path]:
    """Objects of the whole core but the binding and the allocator, compiled as setup.py does."""
    folder.mkdir(exist_ok=True)
    objects = []
    for source in CORE:
        made = folder / (source.replace("/", "_") + ".o")
        checked(CC, *FLAGS, *ISA_FLAGS.get(source.removeprefix("csrc/"), []), *extra, "-c", source, "-o", made)
        objects.append(made)
    return objects


def built_core(folder: Path) -> list[Path]:
    """The objects that `make build` left, if they are newer than every source; else new ones."""
    newest = max(path.stat().st_mtime for path in (ROOT / "csrc").rglob("*.*"))
    for base in ROOT.glob(f"build/temp.*-{sys.implementation.cache_tag}"):
        objects = [(base / source).with_suffix(".o") for source in CORE]
        if all(path.exists() and path.stat().st_mtime > newest for path in objects):
            return objects
    return build_core(folder)


def link(target: Path, *parts: object) -> Path:
    checked(CC, "-O1", "-g", "-std=gnu11", "-Wall", "-Wextra", "-pthread", *parts, "-lm", "-ldl", "-o", target)
    return target


@pytest.fixture(scope="module")
def guard_pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guard")
    return link(folder / "guard_pages", C / "guard_pages.c", C / "guard_alloc.c", *built_core(folder))


def test_no_operation_leaves_its_buffers(guard_pages: Path) -> None:
    figures = json.loads(checked(guard_pages, 11))
    assert figures["shapes"] > 3000 and figures["calls"] > 10**5


@pytest.mark.slow
def test_no_operation_leaves_its_buffers_on_the_whole_grid(guard_pages: Path) -> None:
    figures = json.loads(checked(guard_pages, 1))
    assert figures["shapes"] > 30000


def test_the_guard_sees_one_byte_too_far(guard_pages: Path) -> None:
    done = run(guard_pages, "overrun")
    assert done.returncode == 3 and "fault in the planted overrun" in done.stderr


@pytest.mark.slow
def test_undefined_behaviour_sanitizer_is_silent(tmp_path: Path) -> None:
    flags = ("-O1", "-g", "-fsanitize=undefined", "-fno-sanitize-recover=undefined")
    objects = build_core(tmp_path / "core", *flags)
    harness = link(tmp_path / "guard", *flags, C / "guard_pages.c", C / "guard_alloc.c", *objects)
    assert json.loads(checked(harness, 97))["shapes"] > 300


@pytest.fixture(scope="module")
def pool_race(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return link(tmp_path_factory.mktemp("pool") / "pool_race", C / "pool_race.c", *POOL)


@pytest.mark.parametrize("jitter", ["0", "200"])
def test_pool_keeps_its_promises_under_racing_callers_and_forks(pool_race: Path, jitter: str) -> None:
    rounds, forks = (1000, 100) if jitter == "0" else (30, 20)
    figures = json.loads(checked(pool_race, rounds, forks, ONEBIT_POOL_JITTER=jitter))
    assert figures == {"regions": 3 * rounds + 20, "forks": forks}


def test_thread_sanitizer_is_silent(tmp_path: Path) -> None:
    probe = tmp_path / "probe.c"
    probe.write_text("int main(void) { return 0; }")
    if run(CC, "-fsanitize=thread", probe, "-o", tmp_path / "probe").returncode or run(tmp_path / "probe").returncode:
        pytest.skip("no thread sanitizer on this machine")
    race = link(tmp_path / "race", "-fsanitize=thread", C / "pool_race.c", *POOL)
    done = run(race, 200, 0)
    assert done.returncode == 0 and "ThreadSanitizer" not in done.stderr, done.stderr[-3000:]
