"""The C module. Arrays are C-contiguous and native-endian; bfloat16 is an ml_dtypes array or uint16 (raw bits)."""

from collections.abc import Sequence
from typing import Any, final

from numpy.typing import NDArray

Array = NDArray[Any]
# [residual], [momentum, momentum_scale], row_factor, col_factor, row_sum, col_sum, sketch, control
Planes = dict[str, Array]

CONTROL: dict[str, int]  # field name -> index into a control array, e.g. {"seed": 0, ...}
RULES: tuple[str, ...]
RULES_MOVING_IN_VOTE: tuple[str, ...]  # of them, those whose vote writes codes
FORMATS: tuple[str, ...]
MAX_K: int
ETA_LIMIT: float  # the guard takes a larger eta as this
TOKENS_PER_VOTE: int

# -- stateless functions
def linear_forward(
    x: Array,
    packed: Array,
    scale: Array,
    out_features: int,
    bias: Array | None = None,
    *,
    out: Array | None = None,
    xq: Array | None = None,
    sx: Array | None = None,
    packing: str = "tile16",
) -> Array: ...
def new_kept(tokens: int, in_features: int) -> tuple[Array, Array]: ...  # xq, sx
def linear_backward_input(
    dy: Array, packed: Array, scale: Array, in_features: int, control: Array, *, out: Array | None = None
) -> Array: ...
def vote(
    dy: Array,
    xq: Array,
    sx: Array,
    packed: Array,
    scale: Array,
    in_features: int,
    planes: Planes | None = None,
    *,
    control: Array | None = None,
    ds: Array | None = None,
    db: Array | None = None,
) -> None: ...
def flip(packed: Array, planes: Planes) -> int: ...
def discard(planes: Planes) -> None: ...
def scale_step(scale: Array, grad: Array, exp_avg: Array, exp_avg_sq: Array, control: Array, lr: float) -> None: ...
def new_planes(
    out_features: int,
    in_features: int,
    rule: str = "residual8",
    *,
    packed: Array | None = None,
    stripes: int = 1,
    stripe: int = 0,
    seed: int = 0,
    layer: int = 0,
    eta: float = 0.03,
    cap: float = 0.025,
    clip: float = 3.0,
    betas: tuple[float, float] | None = None,
    scale_init: float = 1.0,
    vote_plane: bool = False,
) -> Planes: ...
def plane_specs(
    out_features: int,
    in_features: int,
    rule: str = "residual8",
    *,
    stripes: int = 1,
    stripe: int = 0,
    vote_plane: bool = False,
) -> dict[str, tuple[tuple[int, ...], Any]]: ...  # name -> (shape, dtype)
def rule_spec(rule: str) -> dict[str, Any]: ...  # residual_bits, momentum_bits, units, dead_zone, betas
def saturated(packed: Array, planes: Planes) -> int: ...
def new_control(
    *,
    seed: int = 0,
    layer: int = 0,
    eta: float = 0.03,
    cap: float = 0.025,
    clip: float = 3.0,
    betas: tuple[float, float] | None = None,
    scale_init: float = 1.0,
) -> Array: ...
def absmean(w: Array) -> tuple[Array, Array]: ...  # (packed, scale (1,))
def average_residuals(parts: Array, first: int, columns: int, control: Array, *, out: Array) -> None: ...
def random_codes(out_features: int, in_features: int, seed: int = 0) -> Array: ...  # packed
def pack(codes: Array, format: str = "tile16") -> Array: ...
def unpack(packed: Array, shape: tuple[int, int], format: str = "tile16") -> Array: ...
def convert(packed: Array, shape: tuple[int, int], source: str, target: str) -> Array: ...
def validate(packed: Array, shape: tuple[int, int], format: str = "tile16") -> None: ...
def empty(shape: int | Sequence[int], dtype: Any) -> Array: ...  # zeroed, 64-byte aligned, huge pages advised

# -- run time
def isa() -> str: ...
def isas() -> list[dict[str, Any]]: ...  # name, supported, active, tiles; worst first
def force_isa(name: str) -> None: ...
def num_threads() -> int: ...
def set_num_threads(threads: int) -> None: ...
def share_threads(openmp: str | None) -> None: ...
def memory() -> dict[str, int]: ...  # live, peak, largest bytes of the C allocator
def reset_peak_memory() -> None: ...
def fail_allocation(after: int) -> None: ...  # tests: the n-th allocation from now fails; -1 never

# -- the machine's limits, for the benchmark
def limit_multiply(rounds: int) -> int: ...  # int8 multiply-adds done; 0: unknown for this instruction set
def limit_read(data: Array) -> None: ...
def limit_update(data: Array) -> None: ...

# -- naive twins, for tests; a module at run time
class reference:
    @staticmethod
    def linear_forward(
        x: Array,
        packed: Array,
        scale: Array,
        out_features: int,
        bias: Array | None = None,
        *,
        out: Array | None = None,
        xq: Array | None = None,
        sx: Array | None = None,
        packing: str = "tile16",
    ) -> Array: ...
    @staticmethod
    def linear_backward_input(
        dy: Array, packed: Array, scale: Array, in_features: int, control: Array, *, out: Array | None = None
    ) -> Array: ...
    @staticmethod
    def vote(
        dy: Array,
        xq: Array,
        sx: Array,
        packed: Array,
        scale: Array,
        in_features: int,
        planes: Planes | None = None,
        *,
        control: Array | None = None,
        ds: Array | None = None,
        db: Array | None = None,
    ) -> None: ...
    @staticmethod
    def flip(packed: Array, planes: Planes) -> int: ...
    @staticmethod
    def absmean(w: Array) -> tuple[Array, Array]: ...
    @staticmethod
    def weight_gradient(
        dy: Array, xq: Array, sx: Array, packed: Array, scale: Array, in_features: int, control: Array
    ) -> Array: ...

@final
class TernaryLinear:
    name: str | None
    paused: bool
    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...
    @property
    def packing(self) -> str: ...
    @property
    def packed(self) -> Array: ...
    @property
    def scale(self) -> Array: ...
    @property
    def bias(self) -> Array | None: ...
    @property
    def scale_grad(self) -> Array: ...
    @property
    def bias_grad(self) -> Array | None: ...
    @property
    def planes(self) -> Planes | None: ...
    @property
    def residual(self) -> Array | None: ...
    def __init__(
        self,
        in_features: int,
        out_features: int,
        scale: str = "tensor",
        bias: bool = False,
        seed: int = 0,
        packing: str = "tile16",
    ) -> None: ...
    @classmethod
    def from_float(cls, w: Array, bias: Array | None = None, packing: str = "tile16") -> TernaryLinear: ...
    @classmethod
    def from_codes(
        cls, codes: Array, scale: float | Array, bias: Array | None = None, packing: str = "tile16"
    ) -> TernaryLinear: ...
    @classmethod
    def from_packed(
        cls,
        packed: Array,
        scale: float | Array,
        shape: tuple[int, int],
        bias: Array | None = None,
        packing: str = "tile16",
    ) -> TernaryLinear: ...
    def forward(self, x: Array, keep: bool = True) -> Array: ...
    def backward(self, dy: Array, input_grad: bool = True) -> Array: ...  # None without input_grad
    def codes(self) -> Array: ...
    def repack(self, packing: str) -> TernaryLinear: ...

@final
class FlipOptimizer:
    lr: float
    scale_lr: float
    bias_lr: float
    @property
    def flip_rate(self) -> float: ...
    @property
    def layers(self) -> tuple[TernaryLinear, ...]: ...
    @property
    def rule(self) -> str: ...
    @property
    def stripes(self) -> int: ...
    @property
    def stripe(self) -> int: ...
    @property
    def vote_plane(self) -> bool: ...
    def __init__(
        self,
        layers: Sequence[TernaryLinear],
        lr: float = 0.03,
        scale_lr: float = 2e-3,
        betas: tuple[float, float] | None = None,
        recipe: str = "finetune",
        residual_bits: int | None = None,
        momentum_bits: int | None = None,
        flip_rate_cap: float | None = None,
        seed: int = 0,
        bias_lr: float = 1e-3,
        rule: str | None = None,
        stripes: int = 1,
        vote_plane: bool = False,
    ) -> None: ...
    def rotate(self) -> None: ...
    def step(self) -> None: ...
    def zero_grad(self) -> None: ...
    def detach(self) -> None: ...
    def stats(self) -> list[dict[str, Any]]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...
