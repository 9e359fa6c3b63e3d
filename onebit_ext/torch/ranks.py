"""Which of several training processes this one is; what the ops and `distributed` share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

MICRO_PER_RANK = 2.0**32  # micro-batches of different ranks draw different random numbers


class _State:
    group: Any = None  # None: all processes
    check_every = 100
    independent = False
    combined = True  # False from a vote to the step that combines it


state = _State()


def configure(group: Any = None, check_every: int = 100) -> None:
    """Across which process group votes are combined (None: all), and how many steps lie between two comparisons of
    what the ranks hold."""
    if check_every < 1:
        raise ValueError(f"configure: 'check_every' must be at least 1, got {check_every}")
    state.group, state.check_every = group, check_every


@contextlib.contextmanager
def independent() -> Iterator[None]:
    """Inside, every process trains a model of its own: nothing is combined."""
    before, state.independent = state.independent, True
    try:
        yield
    finally:
        state.independent = before


def world_size() -> int:
    """Processes that train this model together."""
    if state.independent or not (dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size(state.group)


def first_micro() -> float:
    """Where this rank's micro-batches begin in the random streams."""
    return 0.0 if world_size() == 1 else MICRO_PER_RANK * dist.get_rank(state.group)


def voted() -> None:
    """A vote was cast."""
    state.combined = False


def check_combined() -> None:
    """RuntimeError if this rank's votes would move codes before the others' were heard."""
    if not state.combined and world_size() > 1:
        raise RuntimeError(
            f"the votes of {world_size()} ranks were never combined: the optimizer's step hooks did not run, or step() "
            "got a closure; call onebit_ext.torch.distributed.combine(layers) after backward, or use independent()"
        )
