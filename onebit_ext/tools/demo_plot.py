"""The picture: held-out loss against step, one panel per stage, curves named where they end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

INK, MUTED = "#222222", "#8a8a8a"
COLOURS = {"wrong": "#c98a2b", "flip": "#1f5fa8", "hybrid": "#b03a48"}
NAMES = {"wrong": "ours, wrong text", "flip": "ours, 10 bits", "hybrid": "hybrid float32"}
Curve = tuple[str, str, list[int], list[float]]  # name, colour, steps, losses


def draw(result: dict[str, Any], path: Path) -> None:
    """result as demo_stages collects it; writes a PNG."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    stage1, arms = result["stage1"], result["arms"]
    panel(
        left,
        f"Stage 1: pre-training on {result['code']['name']}",
        [("ours, 10 bits", COLOURS["flip"], stage1["steps"], stage1["losses"])],
        result["code"]["baselines"],
    )
    curves = [(NAMES[name], COLOURS[name], arms[name]["steps"], arms[name]["losses"]) for name in NAMES]
    panel(
        right,
        f"Stage 2: fine-tuning to {result['target']['name']}, only the ternary layers",
        curves,
        result["target"]["baselines"],
    )
    left.set_ylabel("held-out loss, nats per byte")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def panel(axes: Axes, title: str, curves: list[Curve], baselines: dict[str, float]) -> None:
    """Curves with their names and last values at the right end; baselines as dotted lines."""
    last = max(steps[-1] for _, _, steps, _ in curves)
    lines = {name: baselines[name] for name in ("trigram", "zlib -9")}
    final = [losses[-1] for _, _, _, losses in curves] + list(lines.values())
    low = min(final) - 0.08
    high = min(max(max(losses) for _, _, _, losses in curves), max(final) + 0.8) + 0.06
    axes.set(
        title=title,
        xlabel="step",
        xlim=(0, last * 1.42),
        ylim=(low, high),
        xticks=[round(last * i / 5) for i in range(6)],
    )
    labels = [(losses[-1], f"{name} {losses[-1]:.3f}", colour) for name, colour, _, losses in curves]
    for name, value in lines.items():
        axes.plot([0, last], [value, value], color=MUTED, linewidth=1, linestyle=(0, (2, 3)))
        labels.append((value, f"{name} {value:.3f}", MUTED))
    for _, colour, steps, losses in curves:
        axes.plot(steps, losses, color=colour, linewidth=2, marker="o", markersize=3)
    places = spread([label[0] for label in labels], 0.055 * (high - low))
    for y, (_, label, colour) in zip(places, labels, strict=True):
        axes.text(last * 1.02, y, label, color=colour, va="center", fontsize=9.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines["bottom"].set_bounds(0, last)
    axes.xaxis.set_label_coords(0.5 / 1.42, -0.09)
    axes.title.set(color=INK, fontsize=11, ha="left", x=0.0)


def spread(values: list[float], gap: float) -> list[float]:
    """Label positions near `values`, at least `gap` apart, in the order given."""
    order = sorted(range(len(values)), key=values.__getitem__)
    placed = [values[i] for i in order]
    for _ in range(100):
        for a in range(len(placed) - 1):
            overlap = gap - (placed[a + 1] - placed[a])
            if overlap > 0:
                placed[a] -= overlap / 2
                placed[a + 1] += overlap / 2
    result = [0.0] * len(values)
    for position, i in zip(placed, order, strict=True):
        result[i] = position
    return result
