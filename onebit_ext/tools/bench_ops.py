"""The rows of `onebit-ext bench`: each operation through the public Python calls, beside its rivals and its limits.

A row is one Alternation and the bars that its contenders are held to.  M tokens, N outputs, K inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import onebit_ext as ob
from onebit_ext import _core

from .bench_timing import Alternation, Contender, Spread

if TYPE_CHECKING:
    from onebit_ext.torch.bench.rivals import Rivals

Array = NDArray[Any]
DRAM_BYTES = 128 << 20  # weights that no last-level cache holds
PEAK, READ, UPDATE = "int8 peak", "plain read", "plain read+write"


@dataclass(frozen=True)
class Shape:
    """One line of shapes.txt."""

    model: str
    layer: str
    n: int
    k: int
    default: bool

    @property
    def text(self) -> str:
        return f"{self.n}x{self.k}"


def read_shapes() -> list[Shape]:
    shapes = []
    for line in Path(__file__).with_name("shapes.txt").read_text().splitlines():
        words = line.removeprefix("*").split()
        if words and not words[0].startswith("#"):
            model, layer, n, k, _ = words
            shapes.append(Shape(model, layer, int(n), int(k), line.startswith("*")))
    return shapes


@dataclass(frozen=True)
class Bar:
    """A comparison and, if SPEED asks for one, its target; the median decides."""

    text: str
    value: Spread
    target: float | None = None
    at_most: bool = False
    in_us: bool = False  # seconds, shown as microseconds

    @property
    def verdict(self) -> str:
        if self.target is None:
            return ""
        reached = self.value.median <= self.target if self.at_most else self.value.median >= self.target
        return "PASS" if reached else "MISS"


@dataclass
class Row:
    name: str
    shape: str
    tokens: int
    threads: int
    alternation: Alternation
    unit: str = "MAC"
    bars: list[Bar] = field(default_factory=list)

    def hold(
        self, text: str, ours: str, other: str, target: float | None = None, unit: str = "", **options: Any
    ) -> None:
        """Add a bar on the ratio `ours` / `other`, if both took part."""
        if ours in self.alternation.work and other in self.alternation.work:
            ratio = self.alternation.ratio(ours, other, unit or self.unit)
            self.bars.append(Bar(text, ratio, target, **options))


@dataclass(frozen=True)
class Setting:
    """How a run is made: threads now, repetitions, the rivals (None: torch is not there), the machine's vendor, the
    clock (None: the wall's)."""

    threads: int
    repetitions: int = 9
    rivals: Rivals | None = None
    amd: bool = False
    clock: Callable[[], float] | None = None

    def alternate(self, contenders: list[Contender | None], repetitions: int | None = None) -> Alternation:
        present = [contender for contender in contenders if contender is not None]
        settle = 0.01 if self.threads > 1 else 0.0
        return Alternation(present, repetitions or self.repetitions, clock=self.clock, settle=settle)


@contextmanager
def using(threads: int | None = None, isa: str | None = None) -> Iterator[None]:
    """Another thread count or instruction set for our calls."""
    before, active = ob.num_threads(), ob.isa()
    ob.set_num_threads(threads or before)
    ob.force_isa(isa or active)
    if threads:
        _core.limit_multiply(1)  # starts the workers
    try:
        yield
    finally:
        ob.set_num_threads(before)
        ob.force_isa(active)


class Layer:
    """One ternary layer's arrays, allocated once; `copies` planes of codes to cycle through.

    Gradients of both signs take turns in `step`, so that residuals stay where those of a training layer are, and half a
    percent of the codes move: one gradient alone would drive every residual beyond its threshold.
    """

    def __init__(self, n: int, k: int, m: int, copies: int = 1) -> None:
        self.n, self.k, self.m, self.copies = n, k, m, copies
        self.macs = float(m) * n * k
        generator = np.random.default_rng(n + k + m)
        self.codes = generator.integers(-1, 2, (n, k), dtype=np.int8)
        first = ob.pack(self.codes)
        planes = ob.empty((copies, *first.shape), np.uint8)  # one block, so that small planes get huge pages too
        planes[...] = first
        self.packed = list(planes)
        self.scale = np.array([0.02], np.float32)
        self.x = generator.standard_normal((m, k), np.float32)
        self.dy = generator.standard_normal((m, n), np.float32) * np.float32(1e-3)
        self.y, self.dx = ob.empty((m, n), np.float32), ob.empty((m, k), np.float32)
        self.xq, self.sx = ob.empty((m, (k + 15) // 16 * 16), np.int8), ob.empty((m,), np.float32)
        self.ds = np.zeros(1, np.float32)
        self.opposite = -self.dy
        self.planes = ob.new_planes(n, k, eta=0.015, scale_init=0.02)
        self.planes["residual"][...] = generator.integers(-64, 65, (n, k), dtype=np.int8)
        self.control = self.planes["control"]

    def forward(self) -> None:
        for packed in self.packed:
            ob.linear_forward(self.x, packed, self.scale, self.n, out=self.y, xq=self.xq, sx=self.sx)

    def backward_input(self) -> None:
        ob.linear_backward_input(self.dy, self.packed[0], self.scale, self.k, self.control, out=self.dx)

    def vote(self) -> None:
        ob.vote(self.dy, self.xq, self.sx, self.packed[0], self.scale, self.k, self.planes, ds=self.ds)

    def step(self) -> None:
        self.forward()
        self.backward_input()
        self.vote()
        ob.flip(self.packed[0], self.planes)
        self.dy, self.opposite = self.opposite, self.dy

    def start(self) -> Layer:
        """The first step only measures: take it, so that the next ones vote."""
        self.step()
        self.step()
        return self


def ours(layer: Layer, run: Callable[[], object], products: int = 1, name: str = "ours", **options: Any) -> Contender:
    return Contender(name, run, {"MAC": products * layer.copies * layer.macs}, **options)


def peak(rounds: int = 200_000) -> Contender | None:
    """The int8 multiply-add peak of the instruction set in use; None where it is unknown."""
    done = _core.limit_multiply(rounds)
    return Contender(PEAK, lambda: _core.limit_multiply(rounds), {"MAC": float(done)}) if done else None


def of_vnni(target: float | None) -> float | None:
    """Shares of the peak are asked of dot products of four; AMX multiplies eight times as fast as it could be fed."""
    return None if ob.isa() == "amxint8" else target


def stream(name: str, call: Callable[[Array], None], planes: list[Array]) -> Contender:
    """A plain pass over the same planes in calls of the same size."""
    flat = [plane.reshape(-1).view(np.uint8) for plane in planes]

    def run() -> None:
        for plane in flat:
            call(plane)

    return Contender(name, run, {"B": float(sum(plane.nbytes for plane in flat))})


def dram_copies(bytes_each: int) -> int:
    return math.ceil(DRAM_BYTES / bytes_each) + 1


# ------------------------------------------------------------------ rows
def forward(setting: Setting, n: int, k: int, m: int) -> Row:
    """Quantise and multiply; below 32 tokens the weights come from DRAM, for everybody."""
    cold = m < 32
    layer = Layer(n, k, m, dram_copies(n * k // 4) if cold else 1)
    work = {"MAC": layer.copies * layer.macs, "B": layer.copies * n * k / 4}
    contenders = [Contender("ours", layer.forward, work), peak()]
    if m == 1:
        contenders.append(stream(READ, _core.limit_read, layer.packed))
    if setting.rivals:
        contenders += setting.rivals.forward(layer.x, layer.codes, DRAM_BYTES if cold else 0)
    name = f"forward M={m}" if m > 1 else "GEMV"
    row = Row(name + ", weights from DRAM" * cold, f"{n}x{k}", m, setting.threads, setting.alternate(contenders))
    if m == 1:
        row.hold("of a plain read", "ours", READ, 0.90 if setting.threads == 1 else 0.80, "B")
    else:
        row.hold("of int8 peak", "ours", PEAK, of_vnni(0.70 if m < 32 else 0.80))
    row.hold("x torch bf16", "ours", "torch bf16", 2.0 if m >= 128 else None)
    row.hold("x torch f32", "ours", "torch f32", 3.5 if m >= 128 else None)
    row.hold("x torch int8", "ours", "torch int8")
    return row


def trits(setting: Setting, n: int, k: int) -> Row:
    """One token on weights of 1.6 bits beside ours of 2 bits, both from DRAM, and beside a plain read of the former."""
    layer = Layer(n, k, 1, dram_copies(n * k // 4))
    first = ob.pack(layer.codes, "trits5")
    block = ob.empty((dram_copies(first.nbytes), *first.shape), np.uint8)
    block[...] = first
    planes, y = list(block), ob.empty((1, n), np.float32)

    def run() -> None:
        for packed in planes:
            ob.linear_forward(layer.x, packed, layer.scale, n, out=y, packing="trits5")

    limit = stream(READ, _core.limit_read, planes)
    work = {"MAC": len(planes) * layer.macs, **limit.work}
    two = ours(layer, layer.forward, name="2 bits")
    row = Row(
        "GEMV, 1.6 bits, weights from DRAM",
        f"{n}x{k}",
        1,
        setting.threads,
        setting.alternate([Contender("ours", run, work), two, limit]),
    )
    row.hold("x ours of 2 bits", "ours", "2 bits", 1.15 if setting.threads == 1 else None)
    row.hold("of a plain read", "ours", READ, unit="B")
    return row


def backward_input(setting: Setting, n: int, k: int, m: int) -> Row:
    layer = Layer(n, k, m)
    contenders = [ours(layer, layer.backward_input), peak()]
    if setting.rivals:
        contenders += setting.rivals.backward_input(layer.dy, layer.codes)
    row = Row(f"dX M={m}", f"{n}x{k}", m, setting.threads, setting.alternate(contenders))
    row.hold("of int8 peak", "ours", PEAK, of_vnni(0.75 if m >= 128 else None))
    row.hold("x torch bf16", "ours", "torch bf16", 2.0 if m >= 128 else None)
    row.hold("x torch f32", "ours", "torch f32", 3.5 if m >= 128 else None)
    return row


def vote(setting: Setting, n: int, k: int, m: int) -> Row:
    layer = Layer(n, k, m).start()
    contenders = [ours(layer, layer.vote), peak()]
    if setting.rivals:
        contenders += setting.rivals.weight_gradient(layer.dy, layer.x)
    row = Row(f"dW and vote M={m}", f"{n}x{k}", m, setting.threads, setting.alternate(contenders))
    row.hold("of int8 peak", "ours", PEAK, of_vnni(0.65 if m >= 512 else None))
    row.hold("x torch bf16", "ours", "torch bf16", 1.7 if m >= 512 else None)
    row.hold("x torch f32", "ours", "torch f32")
    return row


def whole_step(setting: Setting, n: int, k: int, m: int) -> Row:
    """Forward, dX, dW with votes, flips; torch does forward and backward, and no optimizer."""
    layer = Layer(n, k, m).start()
    contenders = [ours(layer, layer.step, 3), peak()]
    if setting.rivals:
        contenders += setting.rivals.whole_step(layer.x, layer.dy, layer.codes)
    row = Row(f"layer step M={m}", f"{n}x{k}", m, setting.threads, setting.alternate(contenders))
    held = m == 512
    row.hold("of int8 peak", "ours", PEAK, of_vnni(0.65 if held else None))
    row.hold("x torch bf16", "ours", "torch bf16", 2.0 if held else None)
    row.hold("x torch f32", "ours", "torch f32", (4.0 if setting.amd else 3.2) if held else None)
    return row


def flip(setting: Setting, n: int, k: int, moving: float) -> Row:
    """The flip step, a share `moving` of the residuals beyond the threshold, planes from DRAM, beside a plain read and
    write of the same planes.  A healthy run moves 0.1 % a step, in its worst step 1 %."""
    start = ob.random_codes(n, k, 3)
    block = ob.empty((dram_copies(n * k * 5 // 4), *start.shape), np.uint8)
    layers = [(packed, ob.new_planes(n, k)) for packed in block]
    generator = np.random.default_rng(1)
    votes = generator.integers(-60, 61, (n, k), dtype=np.int8)
    beyond = generator.random((n, k), np.float32) < moving
    votes[beyond] = np.where(votes[beyond] < 0, -90, 90)

    @contextmanager
    def fresh() -> Iterator[None]:
        for packed, state in layers:
            packed[...], state["residual"][...] = start, votes
            state["control"][ob.CONTROL["step"]] = state["control"][ob.CONTROL["micro"]] = 1
        yield

    def run() -> None:
        for packed, state in layers:
            ob.flip(packed, state)

    limit = stream(UPDATE, _core.limit_update, [plane for p, state in layers for plane in (p, state["residual"])])
    contenders: list[Contender | None] = [Contender("ours", run, limit.work, fresh, single=True), limit]
    name = f"flip, {moving:.1%} beyond the threshold"
    row = Row(name, f"{n}x{k}", 0, setting.threads, setting.alternate(contenders), "B")
    row.hold("of a plain read+write", "ours", UPDATE, 0.6 if moving <= 0.001 else None)
    return row


def absmean(setting: Setting, n: int, k: int) -> Row:
    """Float weights to codes, the start of a fine-tuning run."""
    w = ob.empty((n, k), np.float32)
    w[...] = np.random.default_rng(2).standard_normal((n, k), np.float32)
    limit = stream(READ, _core.limit_read, [w])
    contenders: list[Contender | None] = [Contender("ours", lambda: ob.absmean(w), limit.work), limit]
    row = Row("absmean", f"{n}x{k}", 0, setting.threads, setting.alternate(contenders), "B")
    row.hold("of a plain read", "ours", READ)
    return row


def thread_scaling(setting: Setting, n: int, k: int, m: int, product: str) -> Row:
    """One thread against two, for the forward or the whole step."""
    layer = Layer(n, k, m).start()
    run, products = (layer.forward, 1) if product == "forward" else (layer.step, 3)
    contenders: list[Contender | None] = [
        ours(layer, run, products, name, within=partial(using, t)) for name, t in (("1 thread", 1), ("2 threads", 2))
    ]
    row = Row(f"{product} M={m}, 2 threads", f"{n}x{k}", m, 2, setting.alternate(contenders))
    row.hold("x 1 thread", "2 threads", "1 thread", 1.8 if m >= 128 else None)
    return row


def forced_isa(setting: Setting, isa: str, n: int, k: int, m: int) -> Row:
    """The forward of another instruction set against torch f32, which keeps this machine's."""
    layer = Layer(n, k, m)
    contenders: list[Contender | None] = [ours(layer, layer.forward, name=isa, within=partial(using, isa=isa))]
    with using(isa=isa):
        limit = peak()
    if limit:
        contenders.append(Contender(PEAK, limit.run, limit.work, partial(using, isa=isa)))
    if setting.rivals:
        contenders += setting.rivals.forward(layer.x, layer.codes, 0)
    row = Row(f"forward M={m}, {isa} forced", f"{n}x{k}", m, setting.threads, setting.alternate(contenders))
    row.hold("of int8 peak", isa, PEAK)
    row.hold("x torch f32", isa, "torch f32", 1.0 if m >= 128 and isa == "avx2" else None)
    row.hold("x torch bf16", isa, "torch bf16")
    return row


def overhead(setting: Setting, n: int, k: int, m: int, training: bool) -> Row:
    """BitLinear over the bare C calls: the forward without gradients, or forward and backward with votes."""
    assert setting.rivals is not None
    layer = Layer(n, k, m).start()

    def c_training() -> None:
        layer.forward()
        layer.backward_input()
        layer.vote()

    run = setting.rivals.bitlinear(layer.x, layer.dy, layer.packed[0], training)
    # a model enters no_grad once for all its layers
    options: dict[str, Any] = {} if training else {"within": setting.rivals.no_grad}
    pair: list[Contender | None] = [
        ours(layer, run, name="BitLinear", **options),
        ours(layer, c_training if training else layer.forward, name="C calls"),
    ]
    alternation = setting.alternate(pair, 21)
    row = Row(f"BitLinear {'training' if training else 'inference'} M={m}", f"{n}x{k}", m, setting.threads, alternation)
    row.hold("time over the C calls", "C calls", "BitLinear", 1.05 if m == 512 else None, at_most=True)
    excess = alternation.excess("BitLinear", "C calls")
    row.bars.append(Bar("us beyond the C calls", excess, 30e-6 if m == 1 else None, at_most=True, in_us=True))
    return row
