"""The ternary linear layer and the stateless functions under it.

For M tokens, N outputs, K inputs (arXiv 2402.17764 for the quantisation, csrc/README.md for every
rounding)::

    xq, sx = int8 of x per token             y  = (xq . T^T) * (sx * scale) + bias
    dyq, d = int8 of dy * scale per token    dx = (dyq . T) * d
    hq, h  = int8 of dy * sx per output      dW = (hq^T . xq) * h, in registers only: its votes

Gradients are rounded stochastically, keyed by a layer's control array (seed, layer, step, micro),
so the same state gives the same bits on every machine and thread count.  Activations and gradients
are float32 or bfloat16 (an ml_dtypes array, or uint16 as raw bits), C-contiguous, of any leading
shape.  Arrays given are used in place; an output must not share memory with another argument
(BufferError).  A gradient with a non-finite entry: TernaryLinear.backward raises FloatingPointError
and changes nothing; linear_backward_input and vote give NaN and count it in control['nonfinite'].

packing="trits5" (TernaryLinear, its constructors, repack(), linear_forward) holds a weight in 1.6
bits in place of 2, for inference: the forward gives the same bits, and there is no backward.  It is
faster for one token whose weights come from DRAM on processors with AVX-512 VNNI and VBMI (Intel
since Ice Lake, AMD since Zen 4), and slower elsewhere.
"""

from ._core import MAX_K, TOKENS_PER_VOTE, TernaryLinear, linear_backward_input, linear_forward, vote

__all__ = ["MAX_K", "TOKENS_PER_VOTE", "TernaryLinear", "linear_backward_input", "linear_forward", "vote"]
