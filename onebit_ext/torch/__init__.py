"""Ternary linear layers for PyTorch that train without a float copy of their weights.

model = replace_linear(model)  # nn.Linear and the packed layers of transformers -> BitLinear
optimizer = FlipOptimizer(model)  # flips the codes, AdamW for everything else
"""

from . import distributed, guard  # noqa: F401 (both install a hook)
from .auto import AutoFlip
from .methods import ShadowLinear, prepare
from .nn import BitLinear
from .ops import no_votes
from .optim import FlipOptimizer
from .swap import replace_linear

__all__ = ["AutoFlip", "BitLinear", "FlipOptimizer", "ShadowLinear", "no_votes", "prepare", "replace_linear"]
