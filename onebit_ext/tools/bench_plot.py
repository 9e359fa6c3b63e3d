"""The pictures of `onebit-ext bench --plot`: a roofline, and time against M, N, K and threads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

from .bench_growth import Growth  # noqa: E402
from .bench_ops import PEAK, READ, Row  # noqa: E402
from .bench_timing import Spread  # noqa: E402

COLOURS = {"ours": "#1f5fa8", "torch int8": "#c98a2b", "torch bf16": "#5f8f4e", "torch f32": "#b03a48"}
WEIGHT_BYTES = {"ours": 0.25, "torch int8": 1.0, "torch bf16": 2.0, "torch f32": 4.0}
INK = "#222222"


def roofline(rows: Sequence[Row], threads: int, path: Path) -> bool:
    """Forward products over multiply-adds per byte; False if the run had no GEMV, which measures the slope."""
    forward = [row for row in rows if row.threads == threads and row.name.startswith(("forward M=", "GEMV"))]
    forward = [row for row in forward if "ours" in row.alternation.work]
    gemv = [row for row in forward if READ in row.alternation.work]
    if not gemv:
        return False
    figure, axes = plt.subplots(figsize=(8, 5.4), layout="constrained")
    read = max(rate for row in gemv for rate in row.alternation.rates(READ, "B"))  # a roof: the best that was seen
    peaks = [max(row.alternation.rates(PEAK, "MAC")) for row in forward if PEAK in row.alternation.work]
    top = max(peaks, default=float("inf"))
    intensity = sorted([2.0**-3, 2.0**11, min(top / read, 2.0**11)])
    axes.plot(intensity, [min(read * x, top) / 1e9 for x in intensity], color=INK, linewidth=1.2)
    place: dict[str, Any] = {"color": INK, "textcoords": "offset points"}
    axes.annotate(f"plain read {read / 1e9:.1f} GB/s", (1.0, read / 1e9), xytext=(-8, 6), ha="right", **place)
    if peaks:
        axes.annotate(
            f"int8 peak {top / 1e9:.0f} GMAC/s", (intensity[-1], top / 1e9), xytext=(0, 4), ha="right", **place
        )
    for name, colour in COLOURS.items():
        points = sorted(_point(row, name) for row in forward if name in row.alternation.work)
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=5, linestyle="none", label=name)
    axes.set(xscale="log", yscale="log", xlabel="multiply-adds per byte of weights, input and output", ylabel="GMAC/s")
    axes.set_title(f"forward, {threads} thread{'s' * (threads > 1)}", loc="left", color=INK, fontsize=11)
    axes.legend(frameon=False, loc="lower right")
    _save(figure, path)
    return True


def _point(row: Row, name: str) -> tuple[float, float]:
    n, k = map(int, row.shape.split("x"))
    moved = WEIGHT_BYTES[name] * n * k + (2 if name == "torch bf16" else 4) * row.tokens * (n + k)
    return row.tokens * n * k / moved, Spread(row.alternation.rates(name, "MAC")).median / 1e9


def growth(curves: Sequence[Growth], path: Path) -> None:
    variables = list(dict.fromkeys(curve.variable for curve in curves))
    figure, panels = plt.subplots(2, 2, figsize=(10, 7.6), layout="constrained")
    for axes, variable in zip(panels.flat, variables, strict=False):
        for curve, colour in zip([c for c in curves if c.variable == variable], ("#1f5fa8", "#c98a2b"), strict=False):
            milliseconds = [spread.median * 1e3 for spread in curve.times]
            axes.fill_between(
                curve.values,
                [spread.low * 1e3 for spread in curve.times],
                [spread.high * 1e3 for spread in curve.times],
                color=colour,
                alpha=0.2,
                linewidth=0,
            )
            label = f"{curve.operation}, largest rise per unit of work {curve.largest_step:.2f} x"
            axes.plot(curve.values, milliseconds, color=colour, marker="o", markersize=3, linewidth=1.4, label=label)
            last = curve.values[-1]
            power = -1 if variable == "threads" else 1
            start = milliseconds[0] if variable == "threads" else milliseconds[-1]
            origin = curve.values[0] if variable == "threads" else last
            axes.plot(
                curve.values,
                [start * (value / origin) ** power for value in curve.values],
                color=colour,
                linewidth=0.8,
                linestyle=(0, (2, 3)),
            )
        axes.set(xscale="log", yscale="log", xlabel=variable, ylabel="ms")
        ticks = [value for value in _values(curves, variable) if value & (value - 1) == 0]
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.legend(frameon=False, fontsize=8, loc="lower left" if variable == "threads" else "upper left")
    for axes in list(panels.flat)[len(variables) :]:
        axes.set_visible(False)
    figure.suptitle("time against each size (dotted: proportional)", x=0.01, ha="left", color=INK, fontsize=11)
    _save(figure, path)


def _values(curves: Sequence[Growth], variable: str) -> list[int]:
    return next(curve.values for curve in curves if curve.variable == variable)


def _save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=130)
    plt.close(figure)
