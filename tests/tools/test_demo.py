"""The torch demo, four steps of it, and the parts that measure."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from onebit_ext.tools import demo_report  # noqa: E402
from onebit_ext.tools.demo_plot import spread  # noqa: E402
from onebit_ext.torch.demo import train as training  # noqa: E402
from onebit_ext.torch.demo.model import ByteTransformer  # noqa: E402


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str, Path]:
    out = tmp_path_factory.mktemp("demo")
    command = ["demo", "--steps", "4", "--threads", "1", "--seed", "3", "--json", "--out", str(out)]
    done = subprocess.run([sys.executable, "-m", "onebit_ext", *command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr, out


def test_exact_promises_hold_in_four_steps(tiny: tuple[dict, str, Path]) -> None:
    result, _, out = tiny
    assert result["passed"] and result["other_tensors_equal"]
    assert result["reloaded_loss"] == result["arms"]["flip"]["losses"][-1]
    assert result["seed"] == 3 and result["steps"] == [4, 2] and result["threads"] == 1
    assert result["weights"] == 425_984
    assert json.loads((out / "demo.json").read_text()) == result


def test_live_state_is_what_the_planes_weigh(tiny: tuple[dict, str, Path]) -> None:
    result, _, _ = tiny
    flip, hybrid = result["arms"]["flip"], result["arms"]["hybrid"]
    assert 0.25 <= result["nothing_bytes_per_weight"] < 0.26  # 2 bits and a scale
    assert 1.25 <= flip["state_bytes_per_weight"] < 1.45  # codes, residual; factors weigh at width 128
    assert flip["gradient_bytes_per_weight"] < 0.001
    assert hybrid["state_bytes_per_weight"] >= 12 and hybrid["gradient_bytes_per_weight"] == 4


def test_it_shows_progress_and_writes_files(tiny: tuple[dict, str, Path]) -> None:
    result, shown, out = tiny
    for words in ("Stage 1", "bits/byte", "flips", "s left", "zlib -9", "----", "PASS", "before:"):
        assert words in shown
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG") and result["picture"] == str(out / "demo.png")
    assert not list(out.glob("*.tmp"))


def example(**changes: float) -> dict:
    values = {"stage1": 1.47, "nothing": 2.08, "wrong": 2.02, "flip": 1.62, "hybrid": 1.61, "changed": 0.2} | changes
    arms = {name: {"losses": [9.0, values[name]]} for name in ("wrong", "flip", "hybrid")}
    return {
        "arms": arms,
        "nothing_loss": values["nothing"],
        "stage1": {"losses": [5.0, values["stage1"]]},
        "code": {"baselines": {"trigram": 1.79}},
        "codes_changed": int(1000 * values["changed"]),
        "weights": 1000,
        "other_tensors": 7,
        "other_tensors_equal": True,
        "reloaded_loss": values["flip"],
    }


def test_bars_hold_and_fall_one_by_one() -> None:
    assert all(bar.holds for bar in demo_report.bars(example()))
    for i, change in enumerate(
        [{"stage1": 1.65}, {"nothing": 1.99}, {"wrong": 1.91}, {"hybrid": 1.585}, {"changed": 0.049}]
    ):
        fallen = [bar.holds for bar in demo_report.bars(example(**change))]
        assert fallen == [j != i for j in range(7)], change
    for i, change in enumerate([{"other_tensors_equal": False}, {"reloaded_loss": 1.6200001}], start=5):
        assert [bar.holds for bar in demo_report.bars(example() | change)] == [j != i for j in range(7)]


def test_codes_changed_counts_codes_not_bytes() -> None:
    a = {"w": torch.tensor([[0b00_01_10_00, 0b01_01_01_01]], dtype=torch.uint8)}
    b = {"w": torch.tensor([[0b10_01_01_00, 0b01_01_01_01]], dtype=torch.uint8)}
    assert training.codes_changed(a, a) == 0
    assert training.codes_changed(a, b) == 2


def test_windows_are_even_and_inside() -> None:
    text = torch.arange(200, dtype=torch.uint8)
    got = training.windows(text, 5, 16)
    assert got.shape == (5, 17) and got.dtype == torch.int64
    assert got[0, 0] == 0 and got[-1, -1] == 199


def test_model_is_causal_and_counts_its_layers() -> None:
    torch.manual_seed(5)
    model = ByteTransformer(width=32, layers=1, heads=2, hidden=48)
    tokens = torch.randint(256, (2, 19))
    changed = tokens.clone()
    changed[:, 11:] ^= 1
    a, b = model(tokens), model(changed)
    assert torch.equal(a[:, :11], b[:, :11]) and not torch.equal(a[:, 11], b[:, 11])
    assert [(p.shape[0], p.shape[1]) for p in (layer.weight for layer in model.linears())] == [
        (96, 32), (32, 32), (96, 32), (32, 48),
    ]  # fmt: skip
    assert {id(p) for p in model.parameters()} == {id(p) for p in model.float_parameters()} | {
        id(p) for layer in model.linears() for p in layer.parameters()
    }


def test_labels_keep_their_distance_and_order() -> None:
    placed = spread([1.0, 1.01, 5.0, 1.005], 0.2)
    assert placed[2] == 5.0
    assert placed[0] < placed[3] < placed[1]
    assert min(placed[3] - placed[0], placed[1] - placed[3]) > 0.199
