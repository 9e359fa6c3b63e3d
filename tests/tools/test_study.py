"""The study: a few steps end to end, going on from records, refusals, and the report's arithmetic by hand."""

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from oracle_basics import read_residual  # noqa: E402

from onebit_ext.tools import UserError, study_report  # noqa: E402
from onebit_ext.tools.study_report import Entry, Row  # noqa: E402
from onebit_ext.torch.study import gpu  # noqa: E402
from onebit_ext.torch.study.arms import ALL, BY_NAME  # noqa: E402
from onebit_ext.torch.study.engine import Engine, Trainer  # noqa: E402
from onebit_ext.torch.study.library import Library, split  # noqa: E402
from onebit_ext.torch.study.run import train_arm  # noqa: E402
from onebit_ext.torch.study.sizes import SIZES  # noqa: E402
from onebit_ext.torch.study.tasks import Teaching, absmean  # noqa: E402

CHOICE = ["--tasks", "facts,teacher", "--arms", "residual8,shadow32", "--seeds", "2"]


def study(out: Path, *more: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "onebit_ext", "study", "--out", str(out), "--json", "--jobs", "1", *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Path]:
    out = tmp_path_factory.mktemp("study")
    done = study(out, *CHOICE, "--steps", "5")
    return json.loads(done.stdout), done.stderr, out


def test_two_arms_end_to_end(first: tuple[dict[str, Any], str, Path]) -> None:
    result, shown, out = first
    assert (result["tasks"], result["arms"], result["seeds"]) == (["teacher", "facts"], ["shadow32", "residual8"], 2)
    runs = [(r["task"], r["arm"], r["purpose"], r["seed"]) for r in result["records"]]
    assert len(runs) == 2 * 2 * (3 + 2) and len(set(runs)) == 2 * 2 * (1 + 2)
    for record in result["records"]:
        tuned = record["purpose"] == "tune"
        assert (record["test"] is None) == tuned and set(record["figures"]) == ({"val"} if tuned else {"val", "test"})
        assert record["seed"] in ((0,) if tuned else (1, 2))
        assert record["steps"] == [0, 5] and len(record["losses"]) == 2 and len(record["flip_rates"]) == 1
        assert record["losses"][-1] == record["val"] and record["engine"] == "c"
    for words in ("Tuning: 12 runs", "Reported: 8 runs", "20/20", "left", "share of the gain"):
        assert words in shown
    assert json.loads((out / "study.json").read_text()) == result
    assert "## facts" in (out / "study.md").read_text()
    assert len(result["plots"]) >= 5 and all(Path(p).read_bytes().startswith(b"\x89PNG") for p in result["plots"])
    assert not list(out.rglob("aside-*"))


def test_memory_is_measured(first: tuple[dict[str, Any], str, Path]) -> None:
    bits = {(row["task"], row["arm"]): row["bits"] for row in first[0]["rows"]}
    assert 96 < bits["facts", "shadow32"] < 96.5  # a float32 weight and two moments
    assert 10 < bits["facts", "residual8"] < 12.5  # factors and control weigh at width 64
    peak = {(row["task"], row["arm"]): row["peak_bytes"] for row in first[0]["rows"]}
    outputs, inputs = SIZES["tiny"].student
    assert 16 * 2 * outputs * inputs <= peak["teacher", "shadow32"] < 1.05 * 16 * 2 * outputs * inputs  # and a gradient


def test_a_second_run_goes_on_from_the_records(first: tuple[dict[str, Any], str, Path]) -> None:
    result, _, out = first
    records = sorted((out / "records").iterdir())
    before = {path: path.stat().st_mtime_ns for path in records}
    gone = (
        out
        / "records"
        / "facts-residual8-final-seed2-{:g}.json".format(
            next(r["eta"] for r in result["rows"] if (r["task"], r["arm"]) == ("facts", "residual8"))
        )
    )
    gone.unlink()
    again = json.loads(study(out, *CHOICE, "--steps", "5").stdout)
    assert [p for p in records if p.stat().st_mtime_ns != before[p]] == [gone]
    for a, b in zip(result["records"], again["records"], strict=True):  # the same numbers, another time
        assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}


def test_several_processes_give_the_same_records(first: tuple[dict[str, Any], str, Path], tmp_path: Path) -> None:
    choice = ["--tasks", "teacher", "--arms", "residual8,shadow32", "--seeds", "2", "--steps", "5", "--jobs", "2"]
    got = json.loads(study(tmp_path, *choice).stdout)["records"]
    want = [record for record in first[0]["records"] if record["task"] == "teacher"]
    for a, b in zip(got, want, strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tasks", "short,poetry"], "no task 'poetry'; there are short, long"),
        (["--arms", "residual9"], "no arm 'residual9'; there are frozen"),
        (["--tasks", "teacher", "--arms", "frozen", "--out", "/dev/null/x"], "cannot write to /dev/null/x"),
        (["--seeds", "0"], "must be an integer in 1..100"),
        (
            ["--device", "cuda", "--tasks", "short,teacher"],
            "no GPU" if not torch.cuda.is_available() else "C kernels only",
        ),
    ],
)
def test_mistakes_get_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    error = study(tmp_path, *arguments, code=2).stderr
    assert message in error and "Traceback" not in error


def test_records_of_other_settings_are_refused(first: tuple[dict[str, Any], str, Path], tmp_path: Path) -> None:
    error = study(first[2], "--tasks", "teacher", "--arms", "residual8", "--steps", "6", code=2).stderr
    assert "other settings" in error and "--out" in error
    library = Library(tmp_path, "tiny")
    path = library.path("copy", "byte", "tune", 0, 0.1)
    assert library.read(path, "s") is None
    library.write(path, {"settings": "s", "val": 1.5})
    assert library.read(path, "s") == {"settings": "s", "val": 1.5}
    path.write_text(path.read_text()[:9])
    with pytest.raises(UserError, match="delete it"):
        library.read(path, "s")


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_their_parent(stop: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "onebit_ext", "study", "--out", str(tmp_path), "--tasks", "teacher", "--jobs", "2"]
    parent = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where tests run in the background
    )
    try:
        wait_until(lambda: len(list(tmp_path.glob("records/*.json"))) > 2, 240)
        workers = [int(pid) for pid in Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()]
        assert len(workers) >= 2
        parent.send_signal(stop)
        assert parent.wait(120) == (130 if stop == signal.SIGINT else -stop)
    finally:
        parent.kill()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), 120)
    for path in tmp_path.glob("records/[!a]*.json"):  # whole, or not there
        assert json.loads(path.read_text())["val"] is not None


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


# ------------------------------------------------------------------ what is trained on
def test_arms_have_equal_budgets_and_are_known_to_the_plots() -> None:
    from onebit_ext.tools.study_plot import STYLE

    assert {len(arm.candidates(0.03, 1e-3)) for arm in ALL} == {3}
    assert {arm.name for arm in ALL} == set(STYLE) and len(set(STYLE.values())) == len(ALL)
    assert BY_NAME["frozen"].candidates(0.03, 1e-3) == [0.0005, 0.001, 0.002]
    assert BY_NAME["shadow32"].candidates(0.08, 1e-3) == [0.04, 0.08, 0.16]


def test_a_shadow_starts_from_the_checkpoint_and_everything_else_from_its_codes(
    first: tuple[dict[str, Any], str, Path],
) -> None:
    library = Library(first[2], "tiny", 5)
    model = library.task("facts").new_model(3)
    shadow = Engine().trainer(BY_NAME["shadow32"], library.task("facts"), 3, 0.01).model
    for layer, theirs in zip(model.linears(), shadow.linears(), strict=True):
        assert torch.equal(theirs.weight, layer.weight) and len(layer.weight.unique()) > 1000
    starts = []
    for name in ("residual8", "shadow32", "frozen"):
        trainer = Engine().trainer(BY_NAME[name], library.task("facts"), 3, 0.01)
        starts.append(torch.cat([codes.flatten() for codes in trainer.codes()]))
    assert torch.equal(starts[0], starts[1]) and torch.equal(starts[0], starts[2])
    assert torch.equal(starts[0], torch.cat([absmean(layer.weight)[0].flatten() for layer in model.linears()]))


def test_val_and_test_share_no_byte_position() -> None:
    text = np.arange(20_000) % 251
    val, test = split(text.astype(np.uint8))
    assert len(val) + len(test) == len(text)
    assert np.array_equal(val[:4096], text[:4096]) and np.array_equal(test[:4096], text[4096:8192])


def test_facts_ask_for_the_digits(first: tuple[dict[str, Any], str, Path]) -> None:
    task = Library(first[2], "tiny", 5).task("facts")
    for fact in task.facts.tolist():
        head, digits = bytes(fact).split(b" is ")
        assert head.startswith(b"The code of ") and digits[:4].isdigit() and digits[4:] == b".\n"

    class Oracle(torch.nn.Module):
        """Knows the fact that the window begins with, and nothing of other text."""

        def __init__(self) -> None:
            super().__init__()
            self.lm_head = torch.nn.Linear(1, 1)

        def forward(self, tokens: Any) -> Any:
            logits = torch.zeros(*tokens.shape, 256)
            for row, window in enumerate(tokens):
                for fact in task.facts.long():
                    if torch.equal(window[:18], fact[:18]):
                        known = fact[1 : len(window) + 1]
                        logits[row, torch.arange(len(known)), known] = 50.0
            return logits

    figures = task.evaluate(Oracle(), "test")
    assert figures["recall"] == 1 and figures["digits"] < 1e-6
    assert figures["loss"] == pytest.approx(math.log(256), abs=1e-5)  # the old text


def test_the_law_of_rounding_against_rounding() -> None:
    rng = np.random.default_rng(0)
    for quantum, etas, zone in ((1 / 128, [0.03, 0.002, 0.01], 0), (1 / 15, [0.02, 0.05], 0), (1.0, [0.01, 0.3], 0.5)):
        got = Teaching.law(quantum, etas, zone)
        u = np.maximum(np.abs(rng.standard_normal((len(etas), 400_000))) - zone, 0)
        steps = np.array(etas)[:, None] * u
        rounded = quantum * np.floor(steps / quantum + rng.random(steps.shape))
        assert got["rounding"] == pytest.approx(((rounded - steps) ** 2).mean(1).sum(), rel=0.02)
        assert got["path"] == pytest.approx(steps.mean(1).sum(), rel=0.01)


@pytest.mark.parametrize("name", ["residual16", "residual8", "residual8_momentum4", "residual4", "residual2", "byte"])
def test_positions_are_what_the_oracle_reads(name: str) -> None:
    task = Library(Path("."), "tiny", 4).task("teacher")
    trainer = Engine().trainer(BY_NAME[name], task, 5, 0.2)
    for _ in range(task.steps):
        trainer.step(False)
    units = {"residual16": 16384, "residual4": 15, "residual2": 3, "byte": 85}.get(name, 128)
    got = trainer.positions()
    assert got is not None and any(bool((position != position.round()).any()) for position in got)
    for layer, position in zip(trainer.model.linears(), got, strict=True):
        planes = {
            key: value.view(torch.uint16).numpy() if value.dtype == torch.bfloat16 else value.numpy()
            for key, value in trainer.optimizer.state[layer.weight].items()
        }
        e = read_residual(planes)
        want = e / units + (0 if name == "byte" else layer.codes().numpy())
        np.testing.assert_allclose(position.numpy(), want, atol=1e-6)


def test_a_run_that_diverges_is_recorded() -> None:
    task = Library(Path("."), "tiny", 40).task("teacher")

    class Broken(Trainer):
        def step(self, watched: bool) -> None:
            if len(self.etas) == 32:
                raise FloatingPointError("non-finite gradient")
            super().step(watched)

    class Breaking(Engine):
        def trainer(self, *arguments: Any) -> Trainer:
            return Broken(*arguments)

    record = train_arm(BY_NAME["residual8"], task, 1, 0.02, Breaking())
    assert record["val"] is None and record["test"] is None and "non-finite" in record["diverged"]
    json.dumps(record, allow_nan=False)


@pytest.mark.parametrize("name", ["residual8", "cyclic2", "stochastic", "frozen", "shadow32", "shadow16"])
def test_the_emulation_trains_as_the_c_kernels(name: str) -> None:
    """The same batches, rates and codes at the start; losses a step apart by rounding alone."""
    task = Library(Path("."), "tiny", 12).task("copy")
    task.size = replace(task.size, windows=16)
    eta, runs = BY_NAME[name].candidates(task.eta, task.scale_lr)[0], []
    for engine in (Engine(), gpu.Engine("cpu")):
        trainer, losses = engine.trainer(BY_NAME[name], task, 3, eta), []
        start = trainer.codes()
        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(task.steps):
                trainer.step(True)
                losses.append(trainer.progress()[0])
        runs.append((losses, trainer.evaluate("test")["loss"], trainer.codes(), trainer))
    (ours, end, codes, compiled), (theirs, their_end, their_codes, emulated) = runs
    np.testing.assert_allclose(theirs, ours, rtol=2e-3)
    assert their_end == pytest.approx(end, rel=4e-3) and ours[-1] < ours[0]
    apart, moved = (sum(int((a != b).sum()) for a, b in zip(codes, c, strict=True)) for c in (their_codes, start))
    assert apart <= 0.1 * moved
    assert emulated.etas == pytest.approx([0.0] * task.steps if name == "frozen" else compiled.etas)
    assert emulated.persistent_bytes() == pytest.approx(compiled.persistent_bytes(), rel=0.03)
    assert emulated.peak_bytes() == pytest.approx(compiled.peak_bytes(), rel=0.15)


def test_what_runs_on_c_kernels_only_says_so() -> None:
    refuses = gpu.Engine("cpu").refuses
    assert [arm.name for arm in ALL if refuses(arm, "short")] == ["optimizer32", "bop"]
    assert "C kernels only" in refuses(BY_NAME["byte"], "teacher")


# ------------------------------------------------------------------ arithmetic
def record(
    arm: str, purpose: str, loss: float | None, eta: float, seed: int = 0, task: str = "short"
) -> dict[str, Any]:
    final = purpose == "final"
    found = {"task": task, "arm": arm, "purpose": purpose, "seed": seed, "eta": eta}
    return found | {
        "val": loss,
        "test": loss if final else None,
        "bits": 10.0,
        "peak_bytes": 1000 * seed,
        "seconds": 2.0,
    }


def example() -> list[Row]:
    losses = {"frozen": (2.0, 2.2), "shadow32": (1.0, 1.2), "residual8": (1.2, 1.3), "bop": (1.5, None)}
    records = [record("residual8", "tune", val, eta) for val, eta in ((1.4, 0.1), (1.3, 0.2), (None, 0.4))]
    records += [record("bop", "tune", val, eta) for val, eta in ((1.4, 0.1), (1.5, 0.2))]
    for arm, pair in losses.items():
        eta = {"residual8": 0.2, "bop": 0.1}.get(arm, 0.5)
        records += [record(arm, "final", loss, eta, seed) for seed, loss in enumerate(pair, 1)]
    assert study_report.best(r for r in records if r["purpose"] == "tune") == {
        ("short", "residual8"): 0.2,
        ("short", "bop"): 0.1,
    }
    return study_report.table(records, [Entry("short", "nats/byte", False, arm, arm, 10) for arm in losses])


def test_shares_by_hand() -> None:
    frozen, hybrid, ours, bop = example()
    assert frozen.loss == pytest.approx(2.1) and hybrid.loss == pytest.approx(1.1)
    assert frozen.share == pytest.approx(0) and hybrid.share == pytest.approx(1)
    assert ours.loss == pytest.approx(1.25) and ours.spread == pytest.approx(0.1 / math.sqrt(2))
    assert ours.share == pytest.approx((2.1 - 1.25) / 1.0) and ours.share_spread == pytest.approx(0.1 / math.sqrt(2))
    assert ours.above == pytest.approx(0.15) and not ours.edge and (ours.bits, ours.peak_bytes) == (10, 2000)
    assert bop.edge and bop.diverged == 1 and bop.loss is None and bop.share is None


def test_the_table_says_what_the_rows_hold() -> None:
    rows = example()
    text = study_report.markdown(rows, [])
    assert "| residual8 | 10 | 0.85 +- 0.07 |" in text
    assert "| bop | 10 | diverged 1x |" in text
    assert "| residual8 | 1.2500 +- 0.0707 | 10.00 | 2 | 2.0 | 0.2 |" in text
    assert "Residual 8 minus hybrid float32: short +0.1500 +- 0.1581; no worse on 0 of 1 tasks" in text
    for row in rows:
        row.scratch = True
    assert "| residual8 | 10 | +0.150 +- 0.071 |" in study_report.markdown(rows, [])


def test_what_a_task_measures_beside_its_loss_has_columns() -> None:
    records = [record("frozen", "final", 1.0, 0.1, seed, "facts") for seed in (1, 2)]
    for one, recall in zip(records, (0.25, 0.5), strict=True):
        one |= {"figures": {"val": {"recall": 0.9}, "test": {"loss": 1.0, "recall": recall}}, "codes_changed": 0.125}
    rows = study_report.table(records, [Entry("facts", "nats/byte", False, "frozen", "frozen", 2)])
    text = study_report.markdown(rows, records)
    assert "| rate | digits right | codes changed |" in text and "| 0.1 | 0.375 | 0.125 |" in text


def test_no_gain_has_no_share() -> None:
    records = [record(arm, "final", loss, 0.1, 1) for arm, loss in (("frozen", 1.0), ("shadow32", 1.5))]
    frozen, hybrid = study_report.table(
        records, [Entry("short", "", False, arm, arm, 2) for arm in ("frozen", "shadow32")]
    )
    assert frozen.share is None and frozen.above == -0.5 and hybrid.above == 0 and frozen.spread is None
