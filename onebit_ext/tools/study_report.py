"""What `onebit-ext study` says: the arithmetic on records, the Markdown table, answers with figures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .console import Console

FROZEN, HYBRID = "frozen", "shadow32"  # share 0 and share 1
FIGURES = {
    "digits": "digits, nats",
    "recall": "digits right",
    "old_text": "old text, nats/byte",
    "wrong": "codes wrong",
    "codes_changed": "codes changed",
}  # of some tasks, and their heads in the table
Record = dict[str, Any]
Pair = tuple[str, str]  # task, arm


@dataclass(frozen=True)
class Entry:
    """A line that the report is to have."""

    task: str
    unit: str
    scratch: bool
    arm: str
    label: str
    nominal_bits: float


@dataclass
class Row:
    """One method on one task: figures over the seeds."""

    task: str
    unit: str
    scratch: bool
    arm: str
    label: str
    nominal_bits: float
    eta: float
    edge: bool  # the best rate was the largest or smallest that was tried
    losses: list[float] = field(default_factory=list)  # by seed
    diverged: int = 0
    loss: float | None = None
    spread: float | None = None  # standard deviation over the seeds
    share: float | None = None  # of the gain from codes frozen to hybrid float32
    share_spread: float | None = None
    above: float | None = None  # loss above hybrid float32
    bits: float = 0.0  # measured, per weight
    peak_bytes: float = 0.0  # measured
    seconds: float = 0.0
    figures: dict[str, float] = field(default_factory=dict)  # what else the task measures, by name


def best(tuned: Iterable[Record]) -> dict[Pair, float]:
    """The rate with the lowest validation loss, by task and arm; a run that diverged loses."""
    found: dict[Pair, Record] = {}
    for record in tuned:
        pair = record["task"], record["arm"]
        if pair not in found or _val(record) < _val(found[pair]):
            found[pair] = record
    return {pair: record["eta"] for pair, record in found.items()}


def _val(record: Record) -> float:
    return math.inf if record["val"] is None else record["val"]


def table(records: Sequence[Record], order: Iterable[Entry]) -> list[Row]:
    """A row per entry, in order."""
    rows = [_row(records, entry) for entry in order]
    by_pair = {(row.task, row.arm): row for row in rows}
    for row in rows:
        frozen, hybrid = (by_pair.get((row.task, arm)) for arm in (FROZEN, HYBRID))
        if row.loss is None or hybrid is None or hybrid.loss is None:
            continue
        row.above = row.loss - hybrid.loss
        if frozen is not None and frozen.loss is not None and frozen.loss > hybrid.loss:
            gain = frozen.loss - hybrid.loss
            row.share = (frozen.loss - row.loss) / gain
            row.share_spread = None if row.spread is None else row.spread / gain
    return rows


def _row(records: Sequence[Record], entry: Entry) -> Row:
    mine = [record for record in records if (record["task"], record["arm"]) == (entry.task, entry.arm)]
    final = [record for record in mine if record["purpose"] == "final"]
    tried = sorted(record["eta"] for record in mine if record["purpose"] == "tune")
    eta = final[0]["eta"]
    row = Row(**vars(entry), eta=eta, edge=len(tried) > 1 and eta in (tried[0], tried[-1]))
    row.losses = [record["test"] for record in final if record["test"] is not None]
    row.diverged = len(final) - len(row.losses)
    if row.losses and not row.diverged:
        row.loss = statistics.mean(row.losses)
        row.spread = statistics.stdev(row.losses) if len(row.losses) > 1 else None
    row.bits = statistics.mean(record["bits"] for record in final)
    row.peak_bytes = max(record["peak_bytes"] for record in final)
    row.seconds = statistics.mean(record["seconds"] for record in final)
    measured = [{**record, **record.get("figures", {}).get("test", {})} for record in final]
    row.figures = {
        name: statistics.mean(figures[name] for figures in measured)
        for name in FIGURES
        if all(figures.get(name) is not None for figures in measured)
    }
    return row


# ------------------------------------------------------------------ Markdown
def markdown(rows: Sequence[Row], records: Sequence[Record]) -> str:
    """The whole report."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    seeds = max(len(row.losses) + row.diverged for row in rows)
    parts = [
        f"Mean over {seeds} seeds, +- their standard deviation. Fine-tuning: share of the gain from codes frozen to "
        "hybrid float32; from scratch and copying: loss above hybrid float32. * the best rate was at the end of those "
        "tried.\n",
        _grid(["method", "bits", *tasks], _summary(rows, tasks)),
    ]
    for task in tasks:
        mine = [row for row in rows if row.task == task]
        head = ["method", f"loss, {mine[0].unit}", "bits, measured", "peak KB", "seconds", "rate"]
        more = [name for name in FIGURES if any(name in row.figures for row in mine)]
        lines = [_cells(row) + [_more(row, name) for name in more] for row in mine]
        parts += [f"\n## {task}\n", _grid(head + [FIGURES[name] for name in more], lines)]
    answers = questions(rows, records)
    if answers:
        parts += ["\n## Answers\n", *[f"* {line}" for line in answers]]
    return "\n".join(parts) + "\n"


def _summary(rows: Sequence[Row], tasks: Sequence[str]) -> list[list[str]]:
    lines = []
    for arm in dict.fromkeys(row.arm for row in rows):
        mine = {row.task: row for row in rows if row.arm == arm}
        first = next(iter(mine.values()))
        lines.append([first.label, f"{first.nominal_bits:g}", *(_figure(mine[task]) for task in tasks)])
    return lines


def _figure(row: Row) -> str:
    star = "*" if row.edge else ""
    if row.diverged:
        return f"diverged {row.diverged}x"
    if row.scratch or row.share is None:
        figure, spread = (row.loss, row.spread) if row.above is None else (row.above, row.spread)
        sign = "" if row.above is None else "+"
        return f"{figure:{sign}.3f}{_pm(spread, 3)}{star}"
    return f"{row.share:.2f}{_pm(row.share_spread, 2)}{star}"


def _cells(row: Row) -> list[str]:
    loss = f"diverged {row.diverged}x" if row.loss is None else f"{row.loss:.4f}{_pm(row.spread, 4)}"
    rate = f"{row.eta:g}" + ("*" if row.edge else "")
    return [row.label, loss, f"{row.bits:.2f}", f"{row.peak_bytes / 1e3:,.0f}", f"{row.seconds:.1f}", rate]


def _more(row: Row, name: str) -> str:
    return f"{row.figures[name]:.3f}" if name in row.figures else ""


def _pm(spread: float | None, digits: int) -> str:
    return "" if spread is None else f" +- {spread:.{digits}f}"


def _grid(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *lines))


# ------------------------------------------------------------------ answers
def questions(rows: Sequence[Row], records: Sequence[Record]) -> list[str]:
    """What was asked of binary networks' techniques, in this run's figures; only what its methods can answer."""
    arms = {arm: [row for row in rows if row.arm == arm] for arm in dict.fromkeys(row.arm for row in rows)}

    def says(arm: str) -> str:
        found = [f"{row.task} {_figure(row)}" for row in arms.get(arm, [])]
        return f"{arms[arm][0].label}: {', '.join(found)}" if found else ""

    def lines(question: str, *names: str) -> list[str]:
        found = [says(name) for name in names if name in arms]
        return [f"{question} {'; '.join(found)}."] if len(found) == len(names) else []

    return [
        *lines("Which techniques of binary networks carry over?", "bop", "stochastic", "residual8"),
        *lines("Does momentum help?", "residual8", "residual8_momentum4"),
        *lines("Is a finer residual worth its bits?", "residual16", "residual8", "residual4", "residual2"),
        *lines("Fewer than 8 bits: coarser, or part of the rows at a time?", "residual4", "cyclic2", "cyclic4"),
        *_against_hybrid(arms),
        *_law(records),
    ]


def _against_hybrid(arms: dict[str, list[Row]]) -> list[str]:
    if HYBRID not in arms or "residual8" not in arms:
        return []
    both = [(ours, hybrid) for ours, hybrid in zip(arms["residual8"], arms[HYBRID], strict=True)]
    known = [(a, b, a.loss - b.loss) for a, b in both if a.loss is not None and b.loss is not None]
    gaps = ", ".join(f"{a.task} {gap:+.4f}{_pm(_both(a, b), 4)}" for a, b, gap in known)
    better = sum(gap <= 0 for *_, gap in known)
    memory = statistics.mean(a.bits / b.bits for a, b in both)
    peak = statistics.mean(a.peak_bytes / b.peak_bytes for a, b in both)
    seconds = statistics.median(a.seconds / b.seconds for a, b in both)
    return [
        f"Does it converge as well as hybrid? Residual 8 minus hybrid float32: {gaps}; no worse on {better} of "
        f"{len(known)} tasks.",
        f"What memory is saved? {1 - memory:.0%} of the persistent bits, {1 - peak:.0%} of the peak of the training "
        "state (its float embedding and head included).",
        f"How much faster is a step? {1 / seconds:.2f} x hybrid float32 on these kernels and models.",
    ]


def _both(a: Row, b: Row) -> float | None:
    return None if a.spread is None or b.spread is None else math.hypot(a.spread, b.spread)


def law(records: Sequence[Record]) -> list[Record]:
    """Runs that measured sigma^2 and know what rounding should have made of it."""
    return [record for record in records if record.get("sigma2") and record.get("rounding")]


def _law(records: Sequence[Record]) -> list[str]:
    found = [record for record in law(records) if record["arm"] in ("residual8", "byte") and record["sigma2"] < 0.02]
    if not found:
        return []
    ratios = sorted(record["sigma2"] / record["rounding"] for record in found)
    return [
        "What rounding diffuses, sigma^2, over what independent numbers would, residual 8 and one byte, "
        f"{len(found)} runs: median {statistics.median(ratios):.2f}, {ratios[0]:.2f} to {ratios[-1]:.2f}."
    ]


# ------------------------------------------------------------------ screen and files
def report(console: Console, rows: Sequence[Row], records: Sequence[Record], out: Path) -> None:
    """Print the summary and write study.md."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    console.heading("Result")
    console.table(["method", "bits", *tasks], _summary(rows, tasks))
    console.say(
        "share of the gain codes frozen -> hybrid float32; scratch, copy: loss above it; *: rate at the end tried"
    )
    for line in questions(rows, records):
        console.say(f"- {line}")
    (out / "study.md").write_text(markdown(rows, records))


def draw(
    console: Console, rows: Sequence[Row], records: Sequence[Record], labels: dict[str, str], out: Path
) -> list[str]:
    """The pictures, if matplotlib is there."""
    try:
        from . import study_plot
    except ImportError:
        console.say("no pictures: matplotlib is missing (pip install 'onebit-ext[study]')")
        return []
    paths = study_plot.draw(rows, records, labels, out)
    for path in paths:
        console.say(f"picture: {path}")
    return [str(path) for path in paths]
