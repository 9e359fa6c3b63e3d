"""Training, held-out loss, and what is measured on the live arrays: for demo and study."""

from __future__ import annotations

import hashlib
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..memory import gradient_bytes, state_bytes, weight_count
from .model import ByteTransformer

BATCH = 8  # windows per step
POINTS = 10  # of every curve, fewer if it has less than 20 steps for each
Watch = Callable[[int, float, float | None], None]  # step, training loss, flip rate


@dataclass
class Run:
    """What a training run leaves: held-out losses in nats per byte, seconds, live bytes."""

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    step_seconds: float = 0.0
    seconds: float = 0.0
    worst_flip_rate: float | None = None
    state_bytes_per_weight: float = 0.0
    gradient_bytes_per_weight: float = 0.0


def windows(text: Tensor, count: int, context: int) -> Tensor:
    """(count, context + 1) int64: evenly spaced windows of text (bytes,) uint8, always the same."""
    start = torch.linspace(0, len(text) - context - 1, count).long()
    return text[start[:, None] + torch.arange(context + 1)].long()


@torch.no_grad()
def held_out_loss(model: ByteTransformer, held_out: Tensor) -> float:
    """Mean nats per byte over windows (W, T + 1)."""
    return sum(model.loss(part).item() * len(part) for part in held_out.split(32)) / len(held_out)


@dataclass
class Plan:
    """What to train on: text (bytes,) uint8, held_out (W, T + 1) int64; `clip`: norm at most 1."""

    text: Tensor
    held_out: Tensor
    steps: int
    warmup: int
    seed: int
    clip: list[nn.Parameter] = field(default_factory=list)


def training(
    loss_of: Callable[[int], Tensor],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    steps: int,
    clip: list[nn.Parameter],
    after_backward: Callable[[int], None],
) -> Iterator[tuple[int, Tensor]]:
    """(steps done, loss) after each step; nothing here waits for a device."""
    for step in range(steps):
        loss = loss_of(step)
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(clip, 1.0)
        after_backward(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        yield step + 1, loss.detach()


def train(model: ByteTransformer, optimizer: torch.optim.Optimizer, plan: Plan, watch: Watch) -> Run:
    """Train on random windows with warmup and cosine; measure at the start and POINTS times."""
    text, steps = plan.text, plan.steps
    run, generator = Run(), torch.Generator().manual_seed(plan.seed)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / plan.warmup) * 0.5 * (1 + math.cos(math.pi * step / steps)),
    )
    offsets, smooth, times, start = torch.arange(model.context + 1), math.nan, [], time.perf_counter()
    points = max(1, min(POINTS, steps // 20))
    measured = {round(steps * point / points) for point in range(points + 1)}

    def loss_of(step: int) -> Tensor:
        first = torch.randint(len(text) - model.context, (BATCH,), generator=generator)
        return model.loss(text[first[:, None] + offsets].long())

    def after_backward(step: int) -> None:
        if step == 0:
            run.gradient_bytes_per_weight = gradient_bytes(model) / weight_count(model)

    def measure(step: int) -> None:
        run.steps.append(step)
        run.losses.append(held_out_loss(model, plan.held_out))

    measure(0)
    begun = time.perf_counter()
    for step, loss in training(loss_of, optimizer, schedule, steps, plan.clip, after_backward):
        times.append(time.perf_counter() - begun)
        value, rate = loss.item(), getattr(optimizer, "flip_rate", None)
        smooth = value if math.isnan(smooth) else 0.95 * smooth + 0.05 * value
        if rate is not None:
            run.worst_flip_rate = max(run.worst_flip_rate or 0.0, rate)
        watch(step, smooth, rate)
        if step in measured:
            measure(step)
        begun = time.perf_counter()
    run.step_seconds, run.seconds = statistics.median(times), time.perf_counter() - start
    run.state_bytes_per_weight = state_bytes(model, optimizer) / weight_count(model)
    return run


def fingerprints(model: nn.Module) -> dict[str, str]:
    """SHA-256 of every tensor of the state_dict that is not packed codes."""
    return {
        name: hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()
        for name, tensor in model.state_dict().items()
        if tensor.dtype != torch.uint8
    }


def codes(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the packed 2-bit codes in the state_dict, uint8."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if tensor.dtype == torch.uint8}


def codes_changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> int:
    """Codes that differ; four to a byte."""
    differ = torch.cat([(before[name] ^ after[name]).flatten() for name in before])
    return sum(int((differ >> shift & 3).count_nonzero()) for shift in (0, 2, 4, 6))
