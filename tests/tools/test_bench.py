"""`onebit-ext bench`: ratios come from alternated runs alone, rows hold what SPEED asks, limits do what they say."""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import onebit_ext as ob
from onebit_ext import _core
from onebit_ext.tools import bench, bench_growth, bench_ops, bench_timing
from onebit_ext.tools.bench_ops import PEAK, READ, UPDATE, Layer, Setting
from onebit_ext.tools.bench_timing import Alternation, Contender, Excess, Ratio, Spread
from onebit_ext.tools.cli import main


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """A clock that only the contenders move: clock[0] is the time, clock[1] the machine's slowness."""
    now = [0.0, 1.0]
    monkeypatch.setattr(bench_timing.time, "perf_counter", lambda: now[0])
    yield now


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark at a size where it takes seconds."""
    monkeypatch.setattr(bench_ops, "DRAM_BYTES", 1 << 15)
    monkeypatch.setattr(bench, "MAIN", (96, 80))
    monkeypatch.setattr(bench, "TOKENS", (1, 8, 130, 140))
    monkeypatch.setattr(bench_growth, "TOKENS", [1, 2, 3])
    monkeypatch.setattr(bench_growth, "WIDTHS", [64, 100])
    monkeypatch.setattr(bench_growth, "BASE", 64)


# ------------------------------------------------------------------ timing
def test_pairs_cancel_what_the_machine_does(clock: list[float]) -> None:
    turns: list[str] = []

    def work(name: str, seconds: float) -> Contender:
        def run() -> None:
            turns.append(name)
            clock[0] += seconds * clock[1]
            clock[1] += 0.02  # ever slower: the last turn takes several times the first one's time

        return Contender(name, run, {"MAC": 6.0})

    made = Alternation([work("a", 1.0), work("b", 2.0), work("c", 4.0)], repetitions=31, batch=0.5)
    assert turns[6:] == ["a", "b", "c", "b", "c", "a", "c", "a", "b"] * 10 + ["a", "b", "c"]  # after two trials each
    assert made.time("a").high > 1.3 * made.time("a").low
    for ours, other, truth in (("a", "b", 2.0), ("b", "a", 0.5), ("a", "c", 4.0)):
        ratio = made.ratio(ours, other)
        assert ratio.low <= truth <= ratio.high and ratio.high < 1.1 * ratio.low
    assert made.excess("c", "c").as_list() == [0, 0, 0]


def test_a_ratio_compares_work_per_second(clock: list[float]) -> None:
    def run() -> None:
        clock[0] += 0.25

    made = Alternation([Contender("a", run, {"MAC": 6.0, "B": 1.0}), Contender("b", run, {"MAC": 2.0, "B": 4.0})], 7)
    assert made.ratio("a", "b").as_list() == [3, 3, 3]
    assert made.ratio("a", "b", "B").median == 0.25
    assert made.rates("b", "B") == [16.0] * 7
    assert made.time("a").median == 0.25


def test_batches_fill_their_time_and_contexts_are_free(clock: list[float]) -> None:
    entered = [0]

    @contextmanager
    def costly() -> Iterator[None]:
        clock[0] += 100.0
        entered[0] += 1
        yield
        clock[0] += 100.0

    def run() -> None:
        clock[0] += 0.125

    calls = [0, 0]

    def counted(i: int) -> None:
        calls[i] += 1
        run()

    many = Contender("many", lambda: counted(0), {"MAC": 1.0}, costly)
    one = Contender("one", lambda: counted(1), {"MAC": 1.0}, costly, single=True)
    made = Alternation([many, one], 8, batch=1.0)
    assert calls == [2 + 8 * 8, 1 + 8]
    assert entered[0] == 2 + 8 + 1 + 8
    assert made.seconds == {"many": [0.125] * 8, "one": [0.125] * 8}


def test_no_ratio_without_an_alternation() -> None:
    made = Alternation([Contender("a", lambda: None, {"MAC": 1.0}), Contender("b", lambda: None, {"MAC": 1.0})], 7)

    class Lookalike(Alternation):
        def __init__(self) -> None:
            self.__dict__ = dict(made.__dict__)

    for kind in (lambda source: Ratio(source, "a", "b", "MAC"), lambda source: Excess(source, "a", "b")):
        assert kind(made).median is not None
        for source in (Lookalike(), {"a": [1.0], "b": [2.0]}, None):
            with pytest.raises(TypeError, match="needs an Alternation, got"):
                kind(source)
    with pytest.raises(ValueError, match="at least 7, got 6"):
        Alternation([Contender("a", lambda: None, {"MAC": 1.0})], 6)
    with pytest.raises(ValueError, match="same name"):
        Alternation([Contender("a", lambda: None, {}), Contender("a", lambda: None, {})], 7)


def test_contenders_settle_before_they_are_timed(clock: list[float]) -> None:
    calls = [0]

    def run() -> None:
        calls[0] += 1
        clock[0] += 5.0 if calls[0] % 4 == 1 else 1.0  # slow after the others' turn

    made = Alternation([Contender("a", run, {"MAC": 1.0})], 7, 0.5, settle=6.0)
    assert made.seconds == {"a": [1.0] * 7}


def test_another_clock() -> None:
    ticks = iter(range(1000))
    made = Alternation([Contender("a", lambda: None, {"MAC": 4.0})], 7, 0.5, lambda: 2.0 * next(ticks))
    assert made.seconds == {"a": [2.0] * 7}


def test_quartiles() -> None:
    values = np.random.default_rng(3).random(40)
    assert np.allclose(Spread(list(values)).as_list(), np.quantile(values, [0.5, 0.25, 0.75]))


# ------------------------------------------------------------------ limits
@pytest.mark.parametrize("threads", [1, 2])
def test_limits(threads: int) -> None:
    wide = {"scalar": 0, "avx2": 32, "avxvnni": 32, "avx512vnni": 64, "amxint8": 16 * 16 * 64}
    wide |= {"neon": 8, "neondot": 16, "neoni8mm": 32}
    for entry in ob.isas():
        if entry["supported"] and entry["name"] in wide:
            with bench_ops.using(threads, entry["name"]):
                assert _core.limit_multiply(1000) == 12000 * wide[entry["name"]] * threads
    with bench_ops.using(threads):
        for size in (0, 63, 64, (1 << 18) + 64, (1 << 20) + 5):
            data = ob.empty((size,), np.uint8)
            data[...] = np.arange(size, dtype=np.uint8)
            before = data.copy()
            _core.limit_read(data)
            _core.limit_update(data)
            assert np.array_equal(data, before)


def test_limits_refuse_what_they_cannot_stream() -> None:
    data = ob.empty((4096,), np.uint8)
    for bad, error in (
        (data[1:], ValueError),
        (data.reshape(64, 64), ValueError),
        (data.view(np.float32), TypeError),
        ([1], TypeError),
    ):
        for call in (_core.limit_read, _core.limit_update):
            with pytest.raises(error, match=rf"{call.__name__}\(\): 'data' must be"):
                call(bad)
    data.flags.writeable = False
    _core.limit_read(data)
    with pytest.raises(BufferError, match="data"):
        _core.limit_update(data)
    for rounds in (0, -1, 1.0, None):
        with pytest.raises((TypeError, ValueError), match="rounds"):
            _core.limit_multiply(rounds)


# ------------------------------------------------------------------ rows
def test_the_table_of_shapes() -> None:
    shapes = bench_ops.read_shapes()
    assert {shape.model for shape in shapes} == {"Falcon-E-1B", "Falcon-E-3B", "BitNet-2B-4T", "Llama3-8B"}
    assert len({(shape.model, shape.layer) for shape in shapes}) == len(shapes)
    assert any(shape.default for shape in shapes) and not all(shape.default for shape in shapes)
    assert bench.MAIN in [(shape.n, shape.k) for shape in shapes]


def test_a_layer_runs_the_public_operations() -> None:
    layer = Layer(70, 90, 33, copies=3).start()
    y = ob.linear_forward(layer.x, layer.packed[1], layer.scale, 70)
    layer.forward()
    assert np.array_equal(layer.y, y) and layer.macs == 33 * 70 * 90
    assert layer.control[ob.CONTROL["step"]] == 2 and layer.control[ob.CONTROL["micro"]] == 0
    assert np.any(layer.planes["residual"])
    before = layer.dx.copy()
    layer.dx[...] = 0
    layer.step()
    assert np.any(layer.dx) and not np.array_equal(before, layer.dx)


def test_bars_and_their_targets(small: None) -> None:
    one, two = Setting(1, 7), Setting(2, 7)
    targets = {
        (one, 1): (READ, 0.90),
        (two, 1): (READ, 0.80),
        (one, 8): (PEAK, 0.70),
        (two, 130): (PEAK, 0.80),
    }
    for (setting, m), (limit, target) in targets.items():
        row = bench_ops.forward(setting, 96, 80, m)
        if limit in row.alternation.work:
            unit = "B" if limit == READ else "MAC"
            assert row.bars[0].target == target
            assert row.bars[0].value.median == row.alternation.ratio("ours", limit, unit).median
            assert row.bars[0].verdict == ("PASS" if row.bars[0].value.median >= target else "MISS")
    assert bench_ops.Bar("", Spread([1.0, 3.0]), 2.0).verdict == "PASS"
    assert bench_ops.Bar("", Spread([1.0, 3.0]), 2.1).verdict == "MISS"
    assert bench_ops.Bar("", Spread([1.0, 3.0]), 2.0, at_most=True).verdict == "PASS"
    assert bench_ops.Bar("", Spread([1.0, 3.0]), 1.9, at_most=True).verdict == "MISS"
    assert bench_ops.Bar("", Spread([1.0, 3.0])).verdict == ""


def test_the_flip_row_moves_its_share(small: None) -> None:
    moved: list[int] = []
    flip = ob.flip

    def counting(packed: np.ndarray, planes: dict[str, np.ndarray]) -> int:
        moved.append(flip(packed, planes))
        return moved[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ob, "flip", counting)
        row = bench_ops.flip(Setting(1, 7), 128, 256, 0.01)
    assert min(moved) == max(moved)  # every run starts from the same votes and codes
    assert 0.004 < moved[0] / (128 * 256) < 0.009  # a third of the 1 % is saturated
    ours, limit = row.alternation.work["ours"], row.alternation.work[UPDATE]
    assert ours == limit and ours["B"] % (128 * 256 * 5 // 4) == 0


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    code = main(["bench", "--json", *arguments])
    result = json.loads(capsys.readouterr().out)
    verdicts = [bar["verdict"] for row in result["rows"] for bar in row["bars"]]
    assert code == ("MISS" in verdicts)
    return result


def test_without_torch(small: None, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    threads = ob.num_threads()
    result = run_json(capsys, "--quick", "--no-torch", "--plot", str(tmp_path))
    names = [row["name"] for row in result["rows"]]
    assert names[:2] == ["GEMV, weights from DRAM", "forward M=8, weights from DRAM"]
    assert {"dX M=512", "dW and vote M=512", "layer step M=512", "absmean"} <= set(names)
    assert result["machine"]["torch"] is None and result["model"] is None
    for row in result["rows"]:
        assert not any("torch" in name for name in row["contenders"])
        for contender in row["contenders"].values():
            median, low, high = contender["seconds"]
            assert 0 < low <= median <= high
    assert {(curve["variable"], curve["operation"]) for curve in result["growth"]} >= {
        ("M", "forward"),
        ("K", "layer step"),
    }
    assert [Path(path).name for path in result["plots"]] == ["roofline.png", "growth.png"]
    for path in result["plots"]:
        assert Path(path).read_bytes().startswith(b"\x89PNG")
    assert ob.num_threads() == threads


def test_with_torch(small: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    from onebit_ext.torch.bench import stack

    before = torch.get_num_threads()
    for name, value in {"WIDTH": 64, "HIDDEN": 96, "HEAD": 8, "HEADS": 8}.items():
        monkeypatch.setattr(stack, name, value)
    monkeypatch.setattr(stack, "peak_bytes", lambda method, layers, tokens, threads: 1000 * layers * tokens)
    try:
        result = run_json(capsys, "--quick", "--tokens", "1,130", "--shape", "100x72")
    finally:
        torch.set_num_threads(before)
    rows = {row["name"]: row for row in result["rows"]}
    forward = rows["forward M=130"]
    assert forward["shape"] == "100x72" and {"torch f32", "torch bf16"} <= set(forward["contenders"])
    held = {bar["text"]: bar["target"] for bar in forward["bars"]}
    assert held["x torch bf16"] == 2.0 and held["x torch f32"] == 3.5
    step = {bar["text"]: bar["target"] for bar in rows["layer step M=512"]["bars"]}
    assert step["x torch f32"] == (4.0 if "AMD" in result["machine"]["vendor"] else 3.2)
    overhead = {bar["text"]: bar for bar in rows["BitLinear inference M=1"]["bars"]}
    assert overhead["us beyond the C calls"]["target"] == 30e-6
    model = rows["training step, 1 Falcon-E-1B block"]
    assert set(model["contenders"]) == {"ours", "torch bf16", "torch f32"}
    assert result["model"]["peak_bytes"]["ours"] == 128000


def test_the_table_says_pass_or_miss(small: None, capsys: pytest.CaptureFixture[str]) -> None:
    main(["bench", "--quick", "--no-torch", "--tokens", "8"])
    shown = capsys.readouterr().out
    assert "forward M=8" in shown and "bars passed" in shown and ("PASS" in shown or "MISS" in shown)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--repetitions", "6"], "--repetitions must be in 7..1001, got 6"),
        (["--threads", "300"], "--threads must be in 1..256, got 300"),
        (["--threads", "1,2", "--cpu-time"], "--cpu-time sees one thread only"),
        (["--memory", "0"], "--memory must be in"),
        (["--plot", "/proc/nothing"], "cannot write to /proc/nothing"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("parse, text", [(bench._numbers, "1,0"), (bench._numbers, "a"), (bench._shape, "12")])
def test_malformed_numbers(parse: object, text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="got"):
        parse(text)  # type: ignore[operator]


@pytest.mark.slow
def test_our_training_state_is_the_smallest() -> None:
    pytest.importorskip("torch")
    from onebit_ext.torch.bench import stack

    peaks = [stack.peak_bytes(method, 1, 64, 1) for method in ("ours", "torch bf16", "torch f32")]
    bits = [peak * 8 / stack.weights(1) for peak in peaks]
    assert bits[0] < 32 and 64 < bits[1] < 128 < bits[2] < 256
    assert stack.layers_that_fit(0.1) == 1 and stack.layers_that_fit(8) >= 4
