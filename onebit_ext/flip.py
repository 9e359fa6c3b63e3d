"""The optimizer of the codes: votes collect in a small residual, a full cell flips a code.

A residual is a fraction of a cell, the distance between two codes, in 1/128 of it by default (RULES
names the others); `lr` (eta) is in cells per step for a vote of size 1.  Planes are a dict of
arrays (see new_planes); their float64 `control` array holds what the rule reads and remembers,
CONTROL names its entries.  The first step of a layer only measures its gradient.  Votes that no
step has consumed stay in the residual.

Block-cyclic training (stripes G): planes for every G-th row only, one stripe of rows after the
other; `FlipOptimizer.rotate` goes on to the next.  Rules with less than 8 bits and no momentum move
codes in the backward, so no other backward of a layer may come between its forward and its
backward.

With vote_plane=True the votes of a step meet in an int16 plane first and count as one vote in
step(), by any rule: micro-batches then train as one batch, and no code moves in a backward.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from ._core import (
    CONTROL,
    RULES,
    FlipOptimizer,
    TernaryLinear,
    discard,
    flip,
    new_control,
    new_planes,
    scale_step,
)

__all__ = [
    "CONTROL",
    "RULES",
    "FlipOptimizer",
    "discard",
    "flip",
    "new_control",
    "new_planes",
    "no_votes",
    "scale_step",
]


@contextmanager
def no_votes(layers: Iterable[TernaryLinear]) -> Iterator[None]:
    """Inside the block, backward of these layers gives gradients but casts no votes."""
    before = [(layer, layer.paused) for layer in layers]
    try:
        for layer, _ in before:
            layer.paused = True
        yield
    finally:
        for layer, paused in before:
            layer.paused = paused
