"""Gradient checkpointing runs a forward twice and votes once."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torchkit import batch, net, same, snapshot

from onebit_ext.torch import FlipOptimizer


def run(mode: bool | None) -> tuple[dict[str, torch.Tensor], int]:
    model = net()
    optimizer = FlipOptimizer(model, lr=0.1)
    forwards = [0]
    model.down.register_forward_pre_hook(lambda *_: forwards.__setitem__(0, forwards[0] + 1))
    for step in range(4):
        x, target = batch(step)
        hidden = model.embedding(x)

        def block(h: torch.Tensor) -> torch.Tensor:
            return model.down(torch.tanh(model.up(h)))

        hidden = block(hidden) if mode is None else checkpoint(block, hidden, use_reentrant=mode)
        torch.nn.functional.cross_entropy(model.lm_head(hidden).flatten(0, 1), target.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return snapshot(model, optimizer), forwards[0]


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_same_bits(reentrant: bool) -> None:
    plain, once = run(None)
    again, twice = run(reentrant)
    assert (once, twice) == (4, 8) and same(plain, again)
