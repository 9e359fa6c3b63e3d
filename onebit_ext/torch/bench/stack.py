"""A training step of a Falcon-E-1B-shaped stack: ours against the same model in torch with AdamW.

Blocks only: the embedding and the head are the same float tensors for every method.  The loss is a fixed projection of
the output, so that every layer gets a gradient.  `python -m onebit_ext.torch.bench.stack METHOD LAYERS TOKENS THREADS`
prints the peak of one method's resident memory as JSON: a process of its own, since memory once touched stays counted.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import onebit_ext as ob
from onebit_ext.torch import BitLinear, FlipOptimizer

WIDTH, HEADS, KEY_HEADS, HEAD, HIDDEN = 2048, 16, 2, 128, 8192
METHODS = {"ours": None, "torch bf16": torch.bfloat16, "torch f32": torch.float32}
_seeds = count()
TRAINING_BYTES = 26  # per weight, all three methods together: 1.3 + 8 + 16


class Block(nn.Module):
    """Grouped-query attention and SwiGLU, each behind an RMS norm; x (B, T, WIDTH)."""

    def __init__(self, linear: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.query, self.out = linear(WIDTH, WIDTH), linear(WIDTH, WIDTH)
        self.key, self.value = linear(WIDTH, KEY_HEADS * HEAD), linear(WIDTH, KEY_HEADS * HEAD)
        self.gate, self.up, self.down = linear(WIDTH, HIDDEN), linear(WIDTH, HIDDEN), linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm_attention(x)
        q, k, v = (layer(h).unflatten(-1, (-1, HEAD)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(y.transpose(1, 2).flatten(-2))
        h = self.norm_mlp(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def _float_linear(inputs: int, outputs: int) -> nn.Module:
    return nn.Linear(inputs, outputs, bias=False)


def _ternary_linear(inputs: int, outputs: int) -> nn.Module:
    codes = torch.from_numpy(ob.random_codes(outputs, inputs, next(_seeds)))  # no float copy, also not at the start
    return BitLinear.from_packed(codes, torch.tensor([(1.5 / inputs) ** 0.5]), (outputs, inputs))


def weights(layers: int) -> int:
    """Weights of the linear layers."""
    return layers * (2 * WIDTH * WIDTH + 2 * WIDTH * KEY_HEADS * HEAD + 3 * WIDTH * HIDDEN)


def layers_that_fit(gigabytes: float) -> int:
    """Blocks whose three training states fit side by side."""
    return max(1, int(gigabytes * 1e9 / (TRAINING_BYTES * weights(1))))


def training_step(method: str, layers: int, tokens: int) -> Callable[[], None]:
    """A model and its optimizer, as a function that takes one step on (1, tokens) inputs."""
    torch.manual_seed(1)
    linear = _ternary_linear if method == "ours" else _float_linear
    dtype = METHODS[method] or torch.float32
    model = nn.Sequential(*(Block(linear).to(dtype) for _ in range(layers)))
    adamw = torch.optim.AdamW
    optimizer = FlipOptimizer(model) if method == "ours" else adamw(model.parameters(), lr=1e-4)
    x, target = torch.randn(2, 1, tokens, WIDTH, generator=torch.Generator().manual_seed(2)).to(dtype)

    def step() -> None:
        optimizer.zero_grad()
        loss = (model(x) * target).mean()
        loss.backward()
        optimizer.step()

    step()  # ours only measures, AdamW makes its moments
    return step


def peak_bytes(method: str, layers: int, tokens: int, threads: int) -> int:
    """Growth of the resident set over two steps, in a new process."""
    words = [sys.executable, "-m", __name__, method, str(layers), str(tokens), str(threads)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout)["bytes"])


def _peak() -> int:
    """Peak of the resident set of this process image, bytes (getrusage's also knows the parent's)."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    method, (layers, tokens, threads) = sys.argv[1], map(int, sys.argv[2:5])
    torch.set_num_threads(threads)
    ob.set_num_threads(threads)
    warm = nn.Linear(8, 8)
    warm(torch.randn(2, 8)).sum().backward()  # torch's own start-up is not the model's
    before = _peak()
    training_step(method, layers, tokens)()
    print(json.dumps({"bytes": _peak() - before}))


if __name__ == "__main__":
    main()
