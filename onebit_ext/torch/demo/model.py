"""The model of demo and study: a byte-level transformer with a norm before each linear layer."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 256  # bytes
CONTEXT = 128


class RMSNorm(nn.Module):
    """x / rms(x), with a weight per feature if it is learned."""

    def __init__(self, width: int, learned: bool) -> None:
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.ones(width)) if learned else None

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (self.width,), self.weight, 1e-6)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=1 / math.sqrt(inputs))
    return layer


class Block(nn.Module):
    """Attention with rotary positions, then SwiGLU; x (B, T, width)."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_qkv, self.qkv = RMSNorm(width, True), _linear(width, 3 * width)
        self.norm_out, self.out = RMSNorm(width, False), _linear(width, width)
        self.norm_up, self.gate_up = RMSNorm(width, True), _linear(width, 2 * hidden)
        self.norm_down, self.down = RMSNorm(hidden, False), _linear(hidden, width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, time, width = x.shape
        qkv = self.qkv(self.norm_qkv(x)).view(batch, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = _rotate(qkv[:2], cos.to(qkv.dtype), sin.to(qkv.dtype))
        y = F.scaled_dot_product_attention(q, k, qkv[2], is_causal=True)
        x = x + self.out(self.norm_out(y.transpose(1, 2).reshape(batch, time, width)))
        gate, up = self.gate_up(self.norm_up(x)).chunk(2, -1)
        return x + self.down(self.norm_down(F.silu(gate) * up))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class ByteTransformer(nn.Module):
    """Bytes (B, T) int64 -> logits (B, T, 256).

    Built with `nn.Linear`; `replace_linear` makes the blocks' layers ternary and leaves `lm_head`.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self, width: int = 128, layers: int = 2, heads: int = 4, hidden: int = 384, context: int = CONTEXT
    ) -> None:
        super().__init__()
        self.context = context  # longest T
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width, heads, hidden) for _ in range(layers))
        self.norm = RMSNorm(width, True)
        self.lm_head = nn.Linear(width, VOCABULARY, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.lm_head.weight, std=0.02)
        half = width // heads // 2
        angle = torch.arange(context)[:, None] * 10000 ** (-torch.arange(half) / half)[None]
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.lm_head(self.norm(x))

    def loss(self, window: Tensor) -> Tensor:
        """window (B, T + 1) int64 -> mean cross entropy in nats per byte."""
        logits = self(window[:, :-1])
        return F.cross_entropy(logits.reshape(-1, VOCABULARY), window[:, 1:].reshape(-1))

    def linears(self) -> list[Any]:
        """The layers that are ternary in the demo: modules with in_features and out_features."""
        return [layer for block in self.blocks for layer in (block.qkv, block.out, block.gate_up, block.down)]

    def float_parameters(self) -> list[nn.Parameter]:
        """Embedding, head and norms: everything outside `linears()`."""
        inside = {id(p) for layer in self.linears() for p in layer.parameters()}
        return [p for p in self.parameters() if id(p) not in inside]

    @torch.no_grad()
    def sample(self, prompt: bytes, length: int, temperature: float, seed: int) -> bytes:
        """prompt and `length` more bytes."""
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.tensor(list(prompt))[None]
        for _ in range(length):
            weights = F.softmax(self(tokens[:, -self.context :])[0, -1] / temperature, -1)
            tokens = torch.cat([tokens, torch.multinomial(weights, 1, generator=generator)[None]], 1)
        return bytes(tokens[0].tolist())
