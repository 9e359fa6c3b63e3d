"""Small models and loops that the torch tests share; also run as a script by the test of resuming."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

import onebit_ext.torch as ot
from onebit_ext.torch import BitLinear

OPTIONS: dict[str, Any] = {
    "lr": 0.07,
    "float_lr": 2e-3,
    "scale_lr": 3e-3,
    "betas": (0.8, 0.9),
    "weight_decay": 0.01,
    "flip_rate_cap": 0.04,
    "seed": 11,
}


class Net(nn.Module):
    """Two ternary layers with an embedding before and a float head after; K, N, M all different."""

    def __init__(self, scale: str = "tensor") -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, 20)
        self.up = BitLinear(20, 72, bias=True, scale=scale)
        self.down = BitLinear(72, 36, scale=scale)
        self.lm_head = nn.Linear(36, 13)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.nn.functional.silu(self.up(self.embedding(tokens)))
        return self.lm_head(self.down(hidden))


def net(seed: int = 3, **options: Any) -> Net:
    torch.manual_seed(seed)
    return Net(**options)


def batch(step: int, tokens: int = 31) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randint(0, 13, (2, tokens), generator=generator)
    return x, (x * 5 + 1) % 13


def loss_of(model: nn.Module, step: int) -> Tensor:
    x, target = batch(step)
    return torch.nn.functional.cross_entropy(model(x).flatten(0, 1).float(), target.flatten())


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int, scheduler: Any = None
) -> list[float]:
    losses = []
    for step in range(first, last):
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.item())
    return losses


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Tensor]:
    """Every bit of a model and its optimizer, copied."""
    found = {f"model.{name}": value.detach().clone() for name, value in model.named_parameters()}
    if optimizer is not None:
        for index, state in optimizer.state_dict()["state"].items():
            found |= {f"state.{index}.{name}": value.clone() for name, value in state.items()}
    return found


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def scheduled(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 40)


def setup(recipe: str) -> tuple[Net, ot.FlipOptimizer, torch.optim.lr_scheduler.LambdaLR]:
    model = net()
    model.down.scale.requires_grad_(recipe != "finetune")  # one arm with a frozen layer
    optimizer = ot.FlipOptimizer(model, recipe=recipe, **OPTIONS)
    return model, optimizer, scheduled(optimizer)


def resume(source: str, target: str) -> None:
    """In a fresh process: for every recipe load, train steps 10 to 20, save."""
    torch.set_num_threads(1)
    ends = {}
    for recipe, saved in torch.load(source, weights_only=True).items():
        model, optimizer, scheduler = setup(recipe)
        model.load_state_dict(saved["model"])
        scheduler.load_state_dict(saved["scheduler"])
        optimizer.load_state_dict(saved["optimizer"])
        train(model, optimizer, 10, 20, scheduler)
        ends[recipe] = snapshot(model, optimizer)
    torch.save(ends, target)


if __name__ == "__main__":
    resume(*sys.argv[1:])
