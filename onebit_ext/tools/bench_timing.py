"""Alternated timing, and the only place where a ratio of speeds comes from.

A machine's speed wanders by tens of per cent within seconds.  So contenders take turns, in short batches, and are
compared pair by pair within one turn; `Ratio` and `Excess` cannot be made from anything else.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from statistics import median, quantiles

MIN_REPETITIONS = 7


@dataclass(frozen=True)
class Contender:
    """Something to time.

    work: what one `run()` does, by unit, e.g. {"MAC": 1e9, "B": 4e6}.  within: a context around each batch, not timed
    (thread count, instruction set, fresh data); single: a batch is one run, because each needs a fresh context.
    """

    name: str
    run: Callable[[], object]
    work: Mapping[str, float]
    within: Callable[[], AbstractContextManager[object]] = field(default=nullcontext)
    single: bool = False


class Spread:
    """Median and quartiles of a sample."""

    def __init__(self, values: Sequence[float]) -> None:
        self.median = median(values)
        self.low, _, self.high = quantiles(values, n=4, method="inclusive")

    def as_list(self) -> list[float]:
        return [self.median, self.low, self.high]


class Alternation:
    """Times `contenders` in turn, `repetitions` (>= 7) times each, in batches of about `batch` seconds.

    clock: seconds; the wall's if None.  settle: seconds that a contender runs before each batch, not timed: the
    last one's OpenMP threads spin for milliseconds on the cores that this one needs.
    """

    def __init__(
        self,
        contenders: Sequence[Contender],
        repetitions: int = 9,
        batch: float = 0.01,
        clock: Callable[[], float] | None = None,
        settle: float = 0.0,
    ) -> None:
        if repetitions < MIN_REPETITIONS:
            raise ValueError(f"Alternation: 'repetitions' must be at least {MIN_REPETITIONS}, got {repetitions}")
        # names and work only: the arrays that a contender ran on are freed with it
        self.work = {contender.name: contender.work for contender in contenders}
        if len(self.work) != len(contenders):
            raise ValueError("Alternation: two contenders have the same name")
        clock = clock or time.perf_counter
        counts = {contender.name: _batch_size(contender, batch, clock) for contender in contenders}
        self.seconds: dict[str, list[float]] = {name: [] for name in self.work}  # of one run, turn by turn
        order = list(contenders)
        for _ in range(repetitions):
            for contender in order:
                count = counts[contender.name]
                self.seconds[contender.name].append(_time(contender, count, clock, settle) / count)
            order = order[1:] + order[:1]  # nobody always follows the same neighbour's cache

    def time(self, name: str) -> Spread:
        """Seconds of one run."""
        return Spread(self.seconds[name])

    def rates(self, name: str, unit: str) -> list[float]:
        """`unit` per second, turn by turn."""
        work = self.work[name][unit]
        return [work / seconds for seconds in self.seconds[name]]

    def ratio(self, ours: str, other: str, unit: str = "MAC") -> Ratio:
        """How many times as much work per second `ours` does as `other`."""
        return Ratio(self, ours, other, unit)

    def excess(self, ours: str, other: str) -> Excess:
        """Seconds that a run of `ours` takes beyond one of `other`."""
        return Excess(self, ours, other)


class Ratio(Spread):
    """Median and quartiles of the ratios within the turns of one Alternation."""

    def __init__(self, alternation: Alternation, ours: str, other: str, unit: str) -> None:
        _require_alternation(alternation)
        pairs = zip(alternation.rates(ours, unit), alternation.rates(other, unit), strict=True)
        super().__init__([a / b for a, b in pairs])


class Excess(Spread):
    """Median and quartiles of the differences in seconds within the turns of one Alternation."""

    def __init__(self, alternation: Alternation, ours: str, other: str) -> None:
        _require_alternation(alternation)
        pairs = zip(alternation.seconds[ours], alternation.seconds[other], strict=True)
        super().__init__([a - b for a, b in pairs])


def _require_alternation(alternation: object) -> None:
    if type(alternation) is not Alternation:
        raise TypeError(f"a comparison needs an Alternation, got {type(alternation).__name__}")


def _time(contender: Contender, count: int, clock: Callable[[], float], settle: float = 0.0) -> float:
    run = contender.run
    with contender.within():
        if contender.single:
            time.sleep(settle)
        elif settle:
            ready = time.perf_counter() + settle
            while time.perf_counter() < ready:
                run()
        start = clock()
        for _ in range(count):
            run()
        return clock() - start


def _batch_size(contender: Contender, batch: float, clock: Callable[[], float]) -> int:
    """Runs in a batch; the trial runs also warm caches, pages and lazily built kernels."""
    first = _time(contender, 1, clock)
    if contender.single or first > 20 * batch:
        return 1
    return max(1, math.ceil(batch / max(_time(contender, 1, clock), 1e-9)))
