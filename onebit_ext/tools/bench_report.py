"""What `onebit-ext bench` says: rows as plain JSON types, and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .console import Console

if TYPE_CHECKING:
    from .bench_growth import Growth
    from .bench_ops import Row


def row_facts(row: Row) -> dict[str, Any]:
    """A Row as plain JSON types; times in seconds and ratios as [median, lower quartile, upper quartile]."""
    contenders = {
        name: {"seconds": row.alternation.time(name).as_list(), "work": dict(work)}
        for name, work in row.alternation.work.items()
    }
    bars = [
        {
            "text": bar.text,
            "value": bar.value.as_list(),
            "target": bar.target,
            "at_most": bar.at_most,
            "in_us": bar.in_us,
            "verdict": bar.verdict,
        }
        for bar in row.bars
    ]
    head = {"name": row.name, "shape": row.shape, "tokens": row.tokens, "threads": row.threads}
    return head | {"contenders": contenders, "bars": bars}


def growth_facts(curve: Growth) -> dict[str, Any]:
    times = [spread.as_list() for spread in curve.times]
    head = {"variable": curve.variable, "operation": curve.operation, "largest_step": curve.largest_step}
    return head | {"values": curve.values, "seconds": times}


def introduce(console: Console, facts: dict[str, Any]) -> None:
    torch = f"torch {facts['torch']}" if facts["torch"] else "no torch: ratios to the machine's limits only"
    console.say(f"onebit-ext {facts['onebit_ext']} ({facts['isa']}), {facts['cpu']}, {facts['cpus']} CPUs, {torch}")
    if facts["load"] > 0.5:
        console.say(f"load {facts['load']:.1f}: other work runs here; trust the ratios, not the absolute figures")
    console.say()


def report(console: Console, result: dict[str, Any]) -> None:
    lines: list[Sequence[str]] = []
    for row in result["rows"]:
        head = [f"{row['name']}  {row['shape']}", str(row["threads"]), _speed(row)]
        for bar in row["bars"] or [{"text": "", "value": None}]:
            lines.append([*head, *_bar_cells(bar)])
            head = ["", "", ""]
    console.table(["", "threads", "ours", "compared with", "ratio", "[quartiles]", "target", ""], lines)
    if model := result["model"]:
        peaks = ", ".join(f"{name} {peak / 1e6:,.0f} MB" for name, peak in model["peak_bytes"].items())
        count = f"{model['layers']} block{'s' * (model['layers'] > 1)}, {model['weights'] / 1e6:.0f} M weights"
        console.say(f"\npeak memory of the training step ({count}, {model['tokens']} tokens): {peaks}")
    for path in result.get("plots", []):
        console.say(f"picture: {path}")
    bars = [bar["verdict"] for row in result["rows"] for bar in row["bars"]]
    console.say(f"\n{bars.count('PASS')} bars passed, {bars.count('MISS')} missed, {result['machine']['seconds']} s")


def _speed(row: dict[str, Any]) -> str:
    name, contender = next(iter(row["contenders"].items()))
    if "2 threads" in row["contenders"]:
        contender = row["contenders"]["2 threads"]
    seconds = contender["seconds"][0]
    unit, work = next(iter(contender["work"].items()))
    if unit == "token":
        return f"{work / seconds:,.0f} tokens/s"
    return f"{work / seconds / 1e9:.1f} G{unit}/s"


def _bar_cells(bar: dict[str, Any]) -> list[str]:
    if bar["value"] is None:
        return [""] * 5
    scale, digits = (1e6, 1) if bar["in_us"] else (1, 3)
    value, low, high = (f"{x * scale:.{digits}f}" for x in bar["value"])
    target = "" if bar["target"] is None else f"{'<=' if bar['at_most'] else '>='} {bar['target'] * scale:g}"
    return [bar["text"], value, f"[{low} {high}]", target, bar["verdict"]]
