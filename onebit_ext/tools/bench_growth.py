"""How cost grows: one Alternation per variable (M, N, K, threads), forward and whole layer step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from .bench_ops import Layer, Setting, using
from .bench_timing import Alternation, Contender, Spread

TOKENS = [*range(1, 20), 24, 25, 31, 32, 33, 48, 64, 96, 128, 256, 512]
WIDTHS = [64, 128, 192, 256, 320, 384, 512, 640, 768, 1024, 1536, 2048, 2560, 3072, 4096, 6144, 8192]
BASE = 2560  # N and K of the other variables
OPERATIONS = ("forward", "layer step")


@dataclass(frozen=True)
class Growth:
    """Seconds of one operation at each value of one variable."""

    variable: str
    operation: str
    values: list[int]
    times: list[Spread]
    largest_step: float  # largest rise of the time per unit of work from one value to the next


def measure(setting: Setting, threads: int) -> list[Growth]:
    """`threads`: up to how many."""
    cases = {
        "M": [(m, (BASE, BASE, m)) for m in TOKENS],
        "N": [(n, (n, BASE, 128)) for n in WIDTHS],
        "K": [(k, (BASE, k, 128)) for k in WIDTHS],
    }
    curves = []
    for variable, points in cases.items():
        layers = {value: Layer(*sizes).start() for value, sizes in points}
        curves += _curves(setting, variable, [(value, layers[value], setting.threads) for value in layers])
        del layers
    if threads > 1:
        layer = Layer(BASE, BASE, 512).start()
        curves += _curves(setting, "threads", [(count, layer, count) for count in range(1, threads + 1)])
    return curves


def _curves(setting: Setting, variable: str, points: Sequence[tuple[int, Layer, int]]) -> list[Growth]:
    curves = []
    for operation in OPERATIONS:
        contenders = []
        for value, layer, threads in points:
            run = layer.forward if operation == "forward" else layer.step
            contenders.append(Contender(str(value), run, {"MAC": layer.macs}, partial(using, threads)))
        alternation = Alternation(contenders, setting.repetitions, 0.003, setting.clock)
        values = [value for value, _, _ in points]
        times = [alternation.time(str(value)) for value in values]
        steps = [
            alternation.ratio(str(a), str(b)).median for a, b in zip(values, values[1:], strict=False)
        ]  # work per second before over after
        curves.append(Growth(variable, operation, values, times, max(steps)))
    return curves
