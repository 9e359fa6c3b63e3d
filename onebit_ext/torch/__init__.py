"""Ternary linear layers for PyTorch that train without a float copy of their weights.

model = replace_linear(model)  # nn.Linear and the packed layers of transformers -> BitLinear
optimizer = FlipOptimizer(model)  # flips the codes, AdamW for everything else
schedule = linear_schedule(optimizer, steps)  # or any of torch's
"""

from . import distributed, guard, threads  # noqa: F401 (two install a hook, threads shares torch's)
from .auto import AutoFlip
from .memory import bits_per_weight, state_bytes
from .methods import Bop, LatentAdam, ShadowLinear, eta_from_hybrid, prepare
from .nn import BitLinear
from .ops import no_votes
from .optim import FlipOptimizer
from .schedule import cosine_schedule, linear_schedule, wsd_schedule
from .swap import replace_linear

__all__ = [
    "AutoFlip",
    "BitLinear",
    "Bop",
    "FlipOptimizer",
    "LatentAdam",
    "ShadowLinear",
    "bits_per_weight",
    "cosine_schedule",
    "eta_from_hybrid",
    "linear_schedule",
    "no_votes",
    "prepare",
    "replace_linear",
    "state_bytes",
    "wsd_schedule",
]
