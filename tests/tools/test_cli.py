"""The command line as a user runs it: in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from onebit_ext.tools.cli import SUBCOMMANDS


def run(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, "-m", "onebit_ext", *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.mark.parametrize("arguments", [[], *([name] for name in SUBCOMMANDS)])
def test_help_says_what_it_does(arguments: list[str]) -> None:
    shown = run(*arguments, "--help").stdout
    assert " ".join(["usage: onebit-ext", *arguments]) in shown
    assert len(shown.splitlines()) > 8


def test_info() -> None:
    facts = json.loads(run("info", "--json").stdout)
    assert facts["isa"] in [entry["name"] for entry in facts["isas"] if entry["supported"]]
    assert sum(bool(entry["active"]) for entry in facts["isas"]) == 1
    shown = run("info").stdout
    assert facts["version"] in shown and facts["isa"] in shown and "tile16" in shown


def test_info_follows_the_forced_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEBIT_ISA", "scalar")
    assert json.loads(run("info", "--json").stdout)["isa"] == "scalar"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["demo", "--steps", "0"], "must be an integer in 1..1000000, got '0'"),
        (["demo", "--threads", "many"], "must be an integer in 1..256, got 'many'"),
        (["demo", "--text", "/no/such/file"], "cannot read /no/such/file"),
        (["demo", "--numpy", "--out", "/proc/nothing"], "cannot write to"),
        (["dance"], "invalid choice"),
        ([], "required"),
    ],
)
def test_mistakes_get_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    if arguments[:1] == ["demo"] and "--out" not in arguments:
        arguments = [*arguments, "--out", str(tmp_path)]
    done = run(*arguments, code=2)
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_numpy_demo_never_imports_torch(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from onebit_ext.tools.cli import main\n"
        f"sys.exit(main(['demo', '--numpy', '--json', '--steps', '80', '--threads', '1', '--out', {str(tmp_path)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    losses = list(result["losses"].values())
    assert losses[-1] < losses[0] - 1  # it learns, already in 80 steps
    assert losses[-1] < result["baselines"]["unigram"]
    assert result["changed"] > 0
