"""The pictures of `onebit-ext study`: loss against memory and time, curves, and the law of rounding."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from .study_report import FROZEN, HYBRID, Record, Row, law  # noqa: E402

INK, MUTED = "#222222", "#8a8a8a"
GREY, RED, BLUE, GREEN, GOLD = "#7a7a7a", "#b03a48", "#1f5fa8", "#3f8f5a", "#c98a2b"
STYLE = {  # colour: family; marker and dashes: member
    "frozen": (GREY, "s", "-"),
    "stochastic": (GREY, "D", "--"),
    "bop": (GREY, "^", ":"),
    "shadow32": (RED, "o", "-"),
    "shadow16": (RED, "v", "--"),
    "optimizer32": (RED, "^", ":"),
    "residual16": (BLUE, "^", "-."),
    "residual8": (BLUE, "o", "-"),
    "byte": (BLUE, "X", (0, (1, 1))),
    "residual4": (BLUE, "s", "--"),
    "residual2": (BLUE, "D", ":"),
    "residual8_momentum4": (GREEN, "o", "-"),
    "residual4_momentum4": (GREEN, "s", "--"),
    "cyclic2": (GOLD, "o", "-"),
    "cyclic4": (GOLD, "s", "--"),
    "cyclic8": (GOLD, "D", ":"),
}
Get = Callable[[Row], float]


def draw(rows: Sequence[Row], records: Sequence[Record], labels: dict[str, str], out: Path) -> list[Path]:
    """Write the PNGs; their paths."""
    found = [
        _scatter(rows, labels, "persistent bits per weight, measured", lambda row: row.bits, out / "loss-bits.png"),
        _scatter(
            rows, labels, "peak of the training state, MB", lambda row: row.peak_bytes / 1e6, out / "loss-peak.png"
        ),
        _scatter(rows, labels, "seconds of training", lambda row: row.seconds, out / "loss-seconds.png", False),
        _curves(records, labels, "losses", "validation loss", out / "curves.png"),
    ]
    if any(rate for record in _final(records) for rate in record["flip_rates"]):
        found.append(_curves(records, labels, "flip_rates", "codes moved per step, %", out / "flip-rates.png"))
    if law(records):
        found.append(_law(law(records), labels, out / "rounding.png"))
    return found


def _panels(tasks: Sequence[str], ylabel: str) -> tuple[Figure, dict[str, Axes]]:
    columns = min(3, len(tasks))
    lines = -(-len(tasks) // columns)
    size = (4.3 * columns + 2.6, 3.6 * lines + 0.9 * (lines == 1))
    figure, grid = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
    panels = dict(zip(tasks, grid.flat, strict=False))
    for axes in grid.flat[len(tasks) :]:
        axes.set_visible(False)
    for task, axes in panels.items():
        axes.set_title(task, loc="left", color=INK, fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)
    for axes in grid[:, 0]:
        axes.set_ylabel(ylabel)
    return figure, panels


def _finish(figure: Figure, panels: dict[str, Axes], labels: dict[str, str], path: Path) -> Path:
    """One legend for all panels, in the order of the arms."""
    named = [axes.get_legend_handles_labels() for axes in panels.values()]
    handles = {text: handle for pair in named for handle, text in zip(*pair, strict=True)}
    shown = [label for label in labels.values() if label in handles]
    figure.legend([handles[text] for text in shown], shown, loc="outside right center", frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _scatter(rows: Sequence[Row], labels: dict[str, str], xlabel: str, x_of: Get, path: Path, log: bool = True) -> Path:
    tasks = list(dict.fromkeys(row.task for row in rows))
    figure, panels = _panels(tasks, "held-out loss (test)")
    for task, axes in panels.items():
        mine = [row for row in rows if row.task == task and row.loss is not None]
        top, height = _top(mine), 7
        for row in sorted(mine, key=x_of):
            colour, marker, _ = STYLE[row.arm]
            x, y = x_of(row), min(row.loss or 0.0, top)
            inside = (row.loss or 0.0) <= top
            spread = [[y - min(row.losses)], [max(row.losses) - y]] if inside else None
            axes.errorbar(
                x, y, spread, color=colour, marker=marker, markersize=6.5, linestyle="none", linewidth=1.2,
                markeredgecolor="white", markeredgewidth=0.6, label=row.label, clip_on=False,
            )  # fmt: skip
            if not inside:
                place: dict[str, Any] = {"xytext": (0, height), "textcoords": "offset points", "ha": "center"}
                axes.annotate(f"↑ {row.loss:.3g}", (x, top), color=colour, fontsize=7.5, **place)
                height = 24 - height  # neighbours one above the other
            if row.arm in (FROZEN, HYBRID) and inside:
                axes.axhline(y, color=MUTED, linewidth=0.8, linestyle=(0, (2, 3)), zorder=0)
        axes.set_xlabel(xlabel, fontsize=9)
        axes.margins(0.08)
        if log:
            axes.set_xscale("log")
            _plain_ticks(axes, [x_of(row) for row in mine])
    figure.suptitle("dotted: codes frozen, hybrid float32; bars: all seeds", color=MUTED, fontsize=9)
    return _finish(figure, panels, labels, path)


def _top(rows: Sequence[Row]) -> float:
    """Where a panel ends: a little above frozen codes and hybrid, so that failed runs do not flatten the others."""
    losses = [row.loss for row in rows if row.loss is not None]
    controls = [row.loss for row in rows if row.arm in (FROZEN, HYBRID) and row.loss is not None]
    if not controls:
        return max(losses, default=0.0)
    return min(max(losses), max(controls) + 0.25 * (max(controls) - min(losses)))


def _plain_ticks(axes: Axes, values: Sequence[float]) -> None:
    low, high = min(values, default=1), max(values, default=1)
    steps = (1, 1.5, 2, 3, 5, 7) if high / low < 10 else (1, 2, 5) if high / low < 100 else (1, 3)
    ticks = [step * 10.0**power for power in range(-4, 6) for step in steps]
    ticks = [tick for tick in ticks if 0.8 * low <= tick <= 1.25 * high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)


def _final(records: Sequence[Record]) -> list[Record]:
    return [record for record in records if record["purpose"] == "final"]


def _curves(records: Sequence[Record], labels: dict[str, str], what: str, ylabel: str, path: Path) -> Path:
    """Means over the seeds of a field of the records, against the step."""
    tasks = list(dict.fromkeys(record["task"] for record in records))
    figure, panels = _panels(tasks, ylabel)
    for task, axes in panels.items():
        ends = []
        for arm, label in labels.items():
            mine = [record for record in _final(records) if (record["task"], record["arm"]) == (task, arm)]
            curve = _mean([record[what] for record in mine])
            if what == "flip_rates":
                curve = [100 * value for value in curve]
            if not curve or not any(curve):
                continue
            colour, marker, dashes = STYLE[arm]
            steps = mine[0]["steps"][-len(curve) :]
            axes.plot(
                steps, curve, color=colour, marker=marker, markersize=3.5, linewidth=1.3, linestyle=dashes, label=label
            )
            ends.append((curve[0], curve[-1]))
        if what == "losses" and ends:
            start, last = ends[0][0], [end for _, end in ends]
            high = min(start, max(last)) if len(last) < 3 else sorted(last)[-2]
            low = min(last)
            axes.set_ylim(low - 0.06 * (high - low), high + 0.6 * (high - low))
        else:
            axes.set_yscale("log")
            axes.set_xlim(left=0)
        axes.set_xlabel("step", fontsize=9)
    return _finish(figure, panels, labels, path)


def _mean(curves: Sequence[Sequence[float | None]]) -> list[float]:
    """Pointwise; as far as every seed has a figure."""
    points: list[float] = []
    for values in zip(*curves, strict=False):
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            break
        points.append(statistics.mean(known))
    return points


def _law(records: Sequence[Record], labels: dict[str, str], path: Path) -> Path:
    """sigma^2 as the twins measured it against what rounding should add."""
    figure, axes = plt.subplots(figsize=(7.6, 5.2), layout="constrained")
    place: dict[str, Any] = {"color": MUTED, "fontsize": 9}
    for record in records:
        colour, marker, _ = STYLE[record["arm"]]
        axes.plot(
            record["rounding"], record["sigma2"], color=colour, marker=marker, markersize=7, linestyle="none",
            markeredgecolor="white", markeredgewidth=0.6, label=labels[record["arm"]],
        )  # fmt: skip
    low = min(min(record["rounding"], record["sigma2"]) for record in records) / 2
    high = max(0.5, *(2 * max(record["rounding"], record["sigma2"]) for record in records))
    axes.plot([low, high], [low, high], color=INK, linewidth=1, zorder=0)
    axes.axhline(0.25, color=MUTED, linewidth=0.8, linestyle=(0, (2, 3)), zorder=0)
    axes.text(low * 1.2, 0.27, "sigma = half a cell", va="bottom", **place)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    axes.set_xlabel("sigma² that independent rounding would add to T + e, cells²")
    axes.set_ylabel("sigma² between twins / 2, measured, cells²")
    axes.set_title("teacher: rounding as diffusion (line: independent numbers)", loc="left", color=INK, fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    shown = [label for label in labels.values() if label in handles]
    axes.legend([handles[label] for label in shown], shown, loc="lower right", frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
