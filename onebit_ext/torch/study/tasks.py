"""What the study trains on. A task makes float models and numbers; it knows no method and no engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..demo.model import VOCABULARY, ByteTransformer
from ..demo.train import windows
from .sizes import Size

SPLITS = ("val", "test")  # tuning sees the first, the report the second
State = dict[str, Tensor]


class Task(ABC):
    """steps batches from `stream(seed)`, a loss on one of them, held-out figures on a split."""

    unit = "nats/byte"
    scratch = False  # from random weights; otherwise there is a start to gain from

    def __init__(self, name: str, size: Size) -> None:
        self.name, self.size = name, size
        budget = size.budgets[name]
        self.steps, self.batch, self.eta, self.schedule = budget.steps, budget.batch, budget.eta, budget.schedule
        self.float_lr = size.float_lr if self.scratch else size.float_lr / 4
        self.scale_lr = size.scale_lr

    @abstractmethod
    def new_model(self, seed: int) -> Any:
        """A float model with `linears()`, whose absmean codes are where every arm starts."""

    @abstractmethod
    def stream(self, seed: int) -> Tensor:
        """(steps, batch, ...): all the training data of one run, the same for every arm."""

    def loss(self, model: Any, batch: Tensor) -> Tensor:
        return model.loss(batch.long())

    @abstractmethod
    def evaluate(self, model: Any, split: str) -> dict[str, float]:
        """ "loss" and whatever else the task measures on a split."""

    def finish(self, start: list[Tensor], codes: list[Tensor], positions: list[Tensor] | None) -> dict[str, Any]:
        """Figures from the codes at the start and the end, and from T + e in cells where a method has them."""
        moved = sum(int((a != b).sum()) for a, b in zip(start, codes, strict=True))
        return {"codes_changed": moved / sum(a.numel() for a in start)}


@dataclass
class Text:
    """Bytes (uint8) to train on, to tune on, to report on."""

    train: Tensor
    val: Tensor
    test: Tensor

    def windows(self, split: str, size: Size) -> Tensor:
        return windows(getattr(self, split), size.windows, size.context)

    def draw(self, shape: tuple[int, int], length: int, drawn: torch.Generator) -> Tensor:
        """(*shape, length) uint8: random windows of the training text."""
        first = torch.randint(len(self.train) - length, shape, generator=drawn)
        return self.train[first[..., None] + torch.arange(length)]


def absmean(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes as float32 (N, K) and scale () of a float weight, by the formula of `ob_absmean`; on any device, dense."""
    weight = weight.detach().float()
    scale = weight.abs().mean().clamp(min=1e-5)
    return (weight / scale).round().clamp(-1, 1), scale


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def new_transformer(size: Size, seed: int) -> ByteTransformer:
    torch.manual_seed(seed)
    return ByteTransformer(size.width, size.layers, size.heads, size.hidden, size.context)


@torch.no_grad()
def mean_loss(model: Any, held_out: Tensor, start: int = 0) -> float:
    """Nats per byte over windows (W, T + 1), of the bytes from `start` on."""
    device = model.lm_head.weight.device
    total = torch.zeros((), device=device)
    for part in held_out.split(64):
        total += byte_loss(model, part.to(device).long(), start) * len(part)
    return total.item() / len(held_out)


def byte_loss(model: Any, window: Tensor, start: int) -> Tensor:
    logits = model(window[:, :-1])[:, start:]
    return F.cross_entropy(logits.reshape(-1, VOCABULARY), window[:, 1 + start :].reshape(-1))


class Reading(Task):
    """The next byte of a text; from a checkpoint of another text, or from scratch if there is none."""

    def __init__(self, name: str, size: Size, text: Text, start: State | None) -> None:
        self.scratch = start is None
        super().__init__(name, size)
        self.text, self.start = text, start
        self.held_out = {split: text.windows(split, size) for split in SPLITS}

    def new_model(self, seed: int) -> ByteTransformer:
        model = new_transformer(self.size, seed)
        if self.start is not None:
            model.load_state_dict(self.start)
        return model

    def stream(self, seed: int) -> Tensor:
        length = self.size.context + 1
        return self.text.draw((self.steps, self.batch), length, generator(seed))

    def evaluate(self, model: Any, split: str) -> dict[str, float]:
        return {"loss": mean_loss(model, self.held_out[split])}


class Copying(Task):
    """A random pattern over and over; the loss is that of its repetitions, whose floor is 0."""

    scratch = True
    SYMBOLS = 32

    def __init__(self, name: str, size: Size) -> None:
        super().__init__(name, size)
        self.period = size.context // 8

    def new_model(self, seed: int) -> ByteTransformer:
        return new_transformer(self.size, seed)

    def stream(self, seed: int) -> Tensor:
        return self._patterns((self.steps, self.batch), seed)

    def _patterns(self, shape: tuple[int, ...], seed: int) -> Tensor:
        drawn = torch.randint(self.SYMBOLS, (*shape, self.period), generator=generator(seed), dtype=torch.uint8)
        return drawn[..., torch.arange(self.size.context + 1) % self.period]

    def loss(self, model: Any, batch: Tensor) -> Tensor:
        return byte_loss(model, batch.long(), self.period - 1)

    def evaluate(self, model: Any, split: str) -> dict[str, float]:
        held_out = self._patterns((self.size.windows,), 10**6 + SPLITS.index(split))
        return {"loss": mean_loss(model, held_out, self.period - 1)}


class Facts(Task):
    """Sentences "The code of NAME is DIGITS." put into a checkpoint, in batches whose other half is the old text.

    Every fact is trained on; half of them are asked for in `val`, the others in `test`. The loss is nats per byte of
    the digits plus that of the old text: recall that costs the old text is worth less.
    """

    HEAD, DIGITS, NAME = b"The code of ", 4, 6

    def __init__(self, name: str, size: Size, old: Text, start: State) -> None:
        super().__init__(name, size)
        self.start, self.text = start, old
        self.old = {split: old.windows(split, size) for split in SPLITS}
        self.facts = self._facts(size.facts)  # (facts, bytes) uint8

    def _facts(self, count: int) -> Tensor:
        drawn = generator(1234)
        letters = torch.randint(97, 123, (count, self.NAME), generator=drawn, dtype=torch.uint8)
        digits = torch.randint(48, 58, (count, self.DIGITS), generator=drawn, dtype=torch.uint8)
        fixed = [torch.tensor(list(part), dtype=torch.uint8).expand(count, -1) for part in (self.HEAD, b" is ", b".\n")]
        return torch.cat([fixed[0], letters, fixed[1], digits, fixed[2]], 1)

    def new_model(self, seed: int) -> ByteTransformer:
        model = new_transformer(self.size, seed)
        model.load_state_dict(self.start)
        return model

    def stream(self, seed: int) -> Tensor:
        length, half, drawn = self.size.context + 1, self.batch // 2, generator(seed)
        each = -(-length // self.facts.shape[1])
        facts = self.facts[torch.randint(len(self.facts), (self.steps, self.batch - half, each), generator=drawn)]
        return torch.cat([facts.flatten(2)[..., :length], self.text.draw((self.steps, half), length, drawn)], 1)

    @torch.no_grad()
    def evaluate(self, model: Any, split: str) -> dict[str, float]:
        facts = self.facts[SPLITS.index(split) :: 2].to(model.lm_head.weight.device).long()
        place = slice(-2 - self.DIGITS, -2)  # of the predictions of the digits
        logits = torch.cat([model(part[:, :-1])[:, place] for part in facts.split(64)])
        digits = facts[:, 1:][:, place]
        nats = F.cross_entropy(logits.reshape(-1, VOCABULARY), digits.reshape(-1)).item()
        recall = (logits.argmax(-1) == digits).float().mean().item()
        old = mean_loss(model, self.old[split])
        return {"loss": nats + old, "digits": nats, "recall": recall, "old_text": old}


class Student(nn.Module):
    """One ternary layer, twice: the twins see the same data and differ by their rounding alone."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.twins = nn.ModuleList(nn.Linear(weight.shape[1], weight.shape[0], bias=False) for _ in range(2))
        for twin in self.linears():
            twin.weight.data.copy_(weight)

    def linears(self) -> list[Any]:
        return list(self.twins)

    def float_parameters(self) -> list[nn.Parameter]:
        return []


class Teaching(Task):
    """Noisy outputs of a known ternary layer, from a start with a fifth of its codes drawn anew.

    The loss is the squared error of the clean output over its variance: 0 at the teacher. Half the twins' mean squared
    distance is the variance sigma^2 that rounding put into T + e.
    """

    unit = "relative error"
    NOISE, REDRAWN = 1.0, 0.2  # noise: relative to the output's standard deviation

    def __init__(self, name: str, size: Size) -> None:
        super().__init__(name, size)
        self.scale_lr = 0.0
        outputs, inputs = size.student
        drawn = generator(4321)
        self.codes = torch.randint(-1, 2, (outputs, inputs), generator=drawn).float()
        other = torch.randint(-1, 2, (outputs, inputs), generator=drawn).float()
        self.first = torch.where(torch.rand(outputs, inputs, generator=drawn) < self.REDRAWN, other, self.codes)
        self.scale = (1.5 / inputs) ** 0.5  # the clean output has variance 1

    def new_model(self, seed: int) -> Student:
        return Student(self.first * (self.scale / self.first.abs().mean()))

    def stream(self, seed: int) -> Tensor:
        """Inputs and noise side by side."""
        outputs, inputs = self.codes.shape
        drawn = torch.randn(self.steps, self.batch, inputs + outputs, generator=generator(seed))
        drawn[..., inputs:] *= self.NOISE
        return drawn

    def loss(self, model: Any, batch: Tensor) -> Tensor:
        x, noise = batch.split([self.codes.shape[1], self.codes.shape[0]], -1)
        y = x @ (self.codes.to(x.device) * self.scale).t() + noise
        return torch.stack([F.mse_loss(twin(x), y) for twin in model.linears()]).sum()

    @torch.no_grad()
    def evaluate(self, model: Any, split: str) -> dict[str, float]:
        device = next(model.parameters()).device
        x = torch.randn(512, self.codes.shape[1], generator=generator(10**6 + SPLITS.index(split)))
        y = (x @ (self.codes * self.scale).t()).to(device)
        errors = [F.mse_loss(twin(x.to(device)), y) / y.square().mean() for twin in model.linears()]
        return {"loss": torch.stack(errors).mean().item()}

    @staticmethod
    def law(quantum: float, etas: list[float], dead_zone: float = 0.0) -> dict[str, float]:
        """sigma^2 that rounding eta_t u_t to the quantum adds in a run, u a normal beyond its dead zone: q P, for steps
        well below a quantum, and without that condition."""
        normal = torch.special.ndtri((torch.arange(1000, dtype=torch.float64) + 0.5) / 1000)
        u = (normal.abs() - dead_zone).clamp(min=0)
        steps = torch.tensor(etas, dtype=torch.float64)[:, None] * u / quantum
        rounding = (steps.frac() * (1 - steps.frac())).mean(1).sum().item() * quantum**2
        return {"quantum": quantum, "path": steps.mean(1).sum().item() * quantum, "rounding": rounding}

    def finish(self, start: list[Tensor], codes: list[Tensor], positions: list[Tensor] | None) -> dict[str, Any]:
        figures = super().finish(start, codes, positions)
        figures["wrong"] = sum((c != self.codes).float().mean().item() for c in codes) / len(codes)
        if positions is not None:
            figures["sigma2"] = (positions[0] - positions[1]).square().mean().item() / 2
        return figures
