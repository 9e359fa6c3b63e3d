"""What the demo says at the end: the table, samples, the picture, and the bars it must hold."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import text
from .console import Console

LABELS = {
    "nothing": "nothing trained",
    "wrong": "ours, wrong text",
    "flip": "ours, 10 bits",
    "hybrid": "hybrid float32 shadow",
}


@dataclass
class Bar:
    """One claim. Exact ones hold whatever was trained, the others belong to the default run."""

    claim: str
    got: str
    holds: bool
    exact: bool = False


def bars(result: dict[str, Any]) -> list[Bar]:
    """The claims of this demo, in order."""
    loss = {name: arm["losses"][-1] for name, arm in result["arms"].items()}
    loss["nothing"] = result["nothing_loss"]
    stage1, trigram = result["stage1"]["losses"][-1], result["code"]["baselines"]["trigram"]
    share = result["codes_changed"] / result["weights"]

    def gap(what: str, value: float, low: float) -> Bar:
        return Bar(f"{what} by {low:.2f} nats or more", f"{value:.3f}", value >= low)

    behind = loss["flip"] - loss["hybrid"]
    return [
        gap("stage 1 beats a trigram model", trigram - stage1, 0.15),
        gap("ours beats nothing trained", loss["nothing"] - loss["flip"], 0.38),
        gap("ours beats the wrong text", loss["wrong"] - loss["flip"], 0.30),
        Bar("ours is at most 0.03 nats behind hybrid float32", f"{behind:+.3f}", behind <= 0.03),
        Bar("at least 5 % of the codes changed", f"{100 * share:.1f} %", share >= 0.05),
        Bar(
            "every other tensor is bit-equal (SHA-256)",
            f"{result['other_tensors']} tensors",
            result["other_tensors_equal"],
            True,
        ),
        Bar(
            "the reloaded checkpoint has the same loss",
            f"{result['reloaded_loss']:.6f}",
            result["reloaded_loss"] == loss["flip"],
            True,
        ),
    ]


def report(console: Console, result: dict[str, Any], judged: bool, out: Path) -> bool:
    """Print everything, extend result; True if all bars that apply hold."""
    console.heading("Result")
    console.table(
        [
            "held-out text: " + result["target"]["name"],
            "nats/byte",
            "bits/byte",
            "bytes/weight",
            "+ gradient",
            "ms/step",
        ],
        rows(result),
    )
    console.say(
        "bytes/weight: live arrays of the ternary layers between two steps, measured; + gradient: what backward adds"
    )
    console.say(
        f"{result['codes_changed']:,} of {result['weights']:,} codes changed "
        f"({100 * result['codes_changed'] / result['weights']:.1f} %); loss on code went "
        f"{result['stage1']['losses'][-1]:.3f} -> {result['code_loss_after']:.3f} (it forgets)"
    )
    console.heading("Sample (temperature 0.5)")
    console.say(f"before: {text.one_line(result['sample_before'])}")
    console.say(f"after:  {text.one_line(result['sample_after'])}")
    console.heading("Files")
    console.say(f"{result['checkpoint']} ({result['checkpoint_bytes']:,} bytes), {out / 'demo.json'}")
    result["picture"] = picture(console, result, out / "demo.png")
    console.heading("Bars")
    passed = True
    for bar in (found := bars(result)):
        applies = judged or bar.exact
        verdict = ("PASS" if bar.holds else "FAIL") if applies else "----"
        console.say(f"{verdict}  {bar.claim}: {bar.got}", style="red" if verdict == "FAIL" else "")
        passed &= bar.holds or not applies
    if not judged:
        console.say("----  belongs to the default steps and text, not judged here")
    result |= {"bars": [vars(bar) for bar in found], "passed": passed}
    console.say(f"\n{result['seconds']:.0f} s in all, {result['processor_seconds']:.0f} s of processor time")
    return passed


def rows(result: dict[str, Any]) -> list[list[str]]:
    """The table's cells."""
    baselines = result["target"]["baselines"]
    table = [[name, *_losses(baselines[name]), "", "", ""] for name in ("trigram", "zlib -9")]
    codes = f"{result['nothing_bytes_per_weight']:.3f}"
    table.append(["nothing trained", *_losses(result["nothing_loss"]), codes, "", ""])
    for name, arm in result["arms"].items():
        kept = f"{arm['state_bytes_per_weight']:.3f}"
        gradient, ms = (
            f"{arm['gradient_bytes_per_weight']:.3f}",
            f"{1000 * arm['step_seconds']:.1f}",
        )
        table.append([LABELS[name], *_losses(arm["losses"][-1]), kept, gradient, ms])
    return table


def picture(console: Console, result: dict[str, Any], path: Path) -> str | None:
    """Draw the curves if matplotlib is there."""
    try:
        from .demo_plot import draw
    except ImportError:
        console.say("no picture: matplotlib is missing (pip install 'onebit-ext[demo]')")
        return None
    draw(result, path)
    console.say(f"{path}: held-out loss against step")
    return str(path)


def _losses(nats: float) -> list[str]:
    return [f"{nats:.3f}", f"{nats / math.log(2):.3f}"]
