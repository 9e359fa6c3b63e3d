"""Ternary (1.58-bit) linear layers that train without a float copy of their weights.

    import onebit_ext as ob
    layer = ob.TernaryLinear(in_features, out_features, bias=True, seed=1)
    optimizer = ob.FlipOptimizer([layer], lr=0.03)
    y = layer.forward(x)       # x (..., K) float32 or bfloat16
    dx = layer.backward(dy)    # the codes' votes are cast here
    optimizer.step()           # codes flip, scale and bias move
    optimizer.zero_grad()

Everything here needs numpy only.  `onebit_ext.torch` is the PyTorch level.
"""

from ._core import CONTROL, FORMATS, MAX_K, RULES, TOKENS_PER_VOTE
from .checkpoint import Checkpoint, CheckpointError, load, save
from .flip import FlipOptimizer, discard, flip, new_control, new_planes, no_votes, scale_step
from .formats import absmean, convert, empty, pack, random_codes, unpack, validate
from .linear import TernaryLinear, linear_backward_input, linear_forward, vote
from .runtime import (
    force_isa,
    isa,
    isas,
    kernels,
    memory,
    num_threads,
    reset_peak_memory,
    set_num_threads,
    share_threads,
    signature,
)

__version__ = "0.1.0"

__all__ = [
    "CONTROL",
    "FORMATS",
    "MAX_K",
    "RULES",
    "TOKENS_PER_VOTE",
    "Checkpoint",
    "CheckpointError",
    "FlipOptimizer",
    "TernaryLinear",
    "absmean",
    "convert",
    "discard",
    "empty",
    "flip",
    "force_isa",
    "isa",
    "isas",
    "kernels",
    "linear_backward_input",
    "linear_forward",
    "load",
    "memory",
    "new_control",
    "new_planes",
    "no_votes",
    "num_threads",
    "pack",
    "random_codes",
    "reset_peak_memory",
    "save",
    "scale_step",
    "set_num_threads",
    "share_threads",
    "signature",
    "unpack",
    "validate",
    "vote",
]
