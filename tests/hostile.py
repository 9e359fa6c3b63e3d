"""Wrong values for every argument of every public function, with the error each must raise.

A Target is one function with arguments that it accepts; `cases` derives the wrong ones from the kind
of each argument.  Sizes are those at which one more or half as many never fits by accident.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

import onebit_ext as ob
from onebit_ext import _core

M, N, K = 6, 64, 256
FLOAT = frozenset({"float32", "bfloat16", "uint16"})
HUGE = 10**5000  # too long to print: int -> str is limited


@dataclass(frozen=True)
class Arr:
    """An array argument: its legal dtypes and what else may vary."""

    dtypes: frozenset[str]
    out: bool = False
    leading: bool = False  # further dimensions in front are legal
    free: bool = False  # any size is legal
    tokens: bool = False  # any length of the first axis is legal
    aligned: bool = False
    optional: bool = False


@dataclass(frozen=True)
class Number:
    low: float = 0
    integer: bool = False


Text, Flag, Pair, Betas, Planes, Content = "text", "flag", "pair", "betas", "planes", "content"
TritsPair = "pair of trits5"  # whose columns are padded to 20, so that K + 1 fits too


@dataclass(frozen=True)
class Target:
    name: str  # as messages name it
    call: Callable[..., Any]
    make: Callable[[], dict[str, Any]]  # fresh legal arguments
    kinds: dict[str, Any]


@dataclass(frozen=True)
class Case:
    argument: str
    label: str
    change: Callable[[dict[str, Any]], None]
    errors: tuple[type[Exception], ...]
    named: bool = True  # the message names this argument


# ------------------------------------------------------------------ arrays
class Liar:
    """Claims memory that is not its own."""

    __array_interface__ = {"shape": (1 << 40,), "typestr": "<f4", "data": (64, False), "version": 3}


class Arrayish:
    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return np.zeros((M, K), np.float32)


def aligned(array: np.ndarray) -> np.ndarray:
    copy = ob.empty(array.shape, array.dtype)
    copy[...] = array
    return copy


def unaligned(array: np.ndarray, shift: int) -> np.ndarray:
    """The same values `shift` bytes off a multiple of 64."""
    block = ob.empty(array.nbytes + 64, np.uint8)[shift : shift + array.nbytes]
    copy = np.frombuffer(block.data, array.dtype, array.size).reshape(array.shape)
    copy[...] = array
    return copy


def strangers(array: np.ndarray) -> list[Any]:
    """Things that are no ndarray."""
    return [
        *(1, 1.5, True, "text", b"bytes", [], (), {}, set(), object(), object, len, ..., HUGE, float("nan")),
        *(array.tolist(), memoryview(array.view(np.uint8)), bytearray(8), np.float32(1), np.dtype("f4")),
        *(Liar(), Arrayish(), iter([1.0]), range(3), type("Array", (), {"shape": array.shape, "dtype": array.dtype})()),
    ]


def other_dtypes(array: np.ndarray, legal: frozenset[str]) -> Iterator[tuple[str, np.ndarray]]:
    names = [*"?bBhHiIlLqQefdgFDGO", "S4", "U4", "M8[s]", "m8[s]", "V2", "V4"]
    types = [np.dtype(name) for name in names]
    types += [np.dtype(t) for t in (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.int4)]
    types.append(np.dtype([("a", "f4")]))
    for dtype in types:
        if dtype.name not in legal:
            yield str(dtype), np.zeros(array.shape, dtype)
    if array.dtype.itemsize > 1 and array.dtype.kind != "V":
        yield "byte order", array.astype(array.dtype.newbyteorder())


def shapes(array: np.ndarray, kind: Arr) -> Iterator[tuple[str, np.ndarray]]:
    dims = array.shape
    wanted = [("0-d", ())] + ([] if kind.leading else [("one more dimension", (1, *dims)), ("two more", (1, 1, *dims))])
    if len(dims) > 1 and not kind.leading:
        wanted += [("flat", (array.size,)), ("no columns", (*dims[:-1],))]
    for axis in range(len(dims) if kind.free else int(kind.tokens), len(dims)):
        for length in (dims[axis] + 1, dims[axis] // 2 if dims[axis] > 1 else 7, 0):
            if not (dims == (1,) and length == N):
                wanted.append((f"axis {axis} of {length}", (*dims[:axis], length, *dims[axis + 1 :])))
    for label, shape in wanted:
        yield label, aligned(np.zeros(shape, array.dtype))


def layouts(array: np.ndarray, kind: Arr) -> Iterator[tuple[str, np.ndarray]]:
    wide = np.repeat(array, 2, axis=-1)
    yield "every second", wide[..., ::2]
    yield "reversed", array[..., ::-1].copy()[..., ::-1]
    yield "zero stride", np.broadcast_to(array.ravel()[:1].reshape((1,) * array.ndim), array.shape)
    if array.ndim > 1:
        yield "F order", np.asfortranarray(array)
        yield "reversed rows", array[::-1].copy()[::-1]
        if array.shape[0] > 1:
            yield "every second row", np.repeat(array, 2, axis=0)[::2]
    for shift in (1, 16, 32) if kind.aligned else ((1,) if array.itemsize > 1 else ()):
        yield f"{shift} bytes off", unaligned(array, shift)


def put(argument: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda arguments: arguments.__setitem__(argument, value)


def array_cases(argument: str, array: np.ndarray, kind: Arr) -> Iterator[Case]:
    others = strangers(array) if kind.optional else [None, *strangers(array)]
    for value in others:
        yield Case(argument, f"kind {type(value).__name__}", put(argument, value), (TypeError,))
    for label, value in other_dtypes(array, kind.dtypes):
        yield Case(argument, f"dtype {label}", put(argument, value), (TypeError,))
    for label, value in shapes(array, kind):
        yield Case(argument, f"shape {label}", put(argument, value), (ValueError,), named=False)
    for label, value in layouts(array, kind):
        if not value.flags.c_contiguous or "off" in label:
            yield Case(argument, f"layout {label}", put(argument, value), (ValueError, BufferError))
    if kind.out:
        frozen = aligned(array)
        frozen.flags.writeable = False
        yield Case(argument, "read-only", put(argument, frozen), (BufferError,))


def overlap_cases(target: Target) -> Iterator[Case]:
    """Each output laid over each other array: exactly, and by one element at either end."""
    legal = target.make()
    arrays = {name: legal[name] for name, kind in target.kinds.items() if isinstance(kind, Arr)}
    arrays |= {f"planes.{name}": a for name, a in legal.get("planes", {}).items() if legal["planes"] is not None}

    def store(arguments: dict[str, Any], name: str, value: np.ndarray) -> None:
        if name.startswith("planes."):
            arguments["planes"][name[7:]] = value
        else:
            arguments[name] = value

    def lay(output: str, other: str, place: str) -> Callable[[dict[str, Any]], None]:
        def change(arguments: dict[str, Any]) -> None:
            a, b = arrays[output], arrays[other]
            fine = 64 if "packed" in (output, other) else max(a.itemsize, b.itemsize)
            first = (b.nbytes - 1) // fine * fine if place == "head" else 0
            second = (a.nbytes - 1) // fine * fine if place == "tail" else 0
            block = ob.empty(a.nbytes + b.nbytes + 128, np.uint8)
            for name, array, at in ((output, a, first), (other, b, second)):
                view = np.frombuffer(block.data, array.dtype, array.size, at).reshape(array.shape)
                view[...] = array
                store(arguments, name, view)

        return change

    for output in arrays:
        if output.startswith("planes.") or target.kinds[output].out:
            for other in arrays:
                for place in ("exact", "head", "tail"):
                    if other != output:  # a control that is written over may hold a bad value or another rule first
                        errors = (BufferError, ValueError, TypeError)
                        yield Case(output, f"{place} {other}", lay(output, other, place), errors, False)


# ------------------------------------------------------------------ the rest
def number_cases(argument: str, kind: Number) -> Iterator[Case]:
    wrong: list[Any] = [None, "3", b"3", [3], (3,), {}, object(), True, 1j, np.array(3), np.array([3]), Liar(), int]
    bad: list[Any] = [-1, -HUGE, HUGE, 2**63, 2**64, -(2**63), 10**30]
    if kind.integer:
        wrong += [1.0, 1.5, float("nan"), float("inf"), np.float32(3), np.bool_(True)]
        bad += [np.int64(-1), 2**54] + ([0] if kind.low else [])
    else:
        bad += [float("nan"), float("inf"), -float("inf"), np.float32("nan"), -1e-300, 1e300, np.float64("inf")]
    for value in wrong:
        yield Case(argument, f"kind {value!r:.20}", put(argument, value), (TypeError,))
    for value in bad:
        yield Case(argument, "value", put(argument, value), (ValueError,))


def text_cases(argument: str) -> Iterator[Case]:
    for value in (None, 3, 1.0, b"tile16", ["tile16"], ("a",), object(), True, np.zeros(2), str):
        yield Case(argument, f"kind {type(value).__name__}", put(argument, value), (TypeError,))
    for value in ("", "TILE16", "tile16 ", "tile16\0", "residual", "x" * 10**6, "\ud800", "ﬀ", "%s%n", "None"):
        yield Case(argument, f"value {value[:9]!r}", put(argument, value), (ValueError,))


def pair_cases(argument: str, more: int = 1) -> Iterator[Case]:
    for value in (
        None,
        5,
        "ab",
        {1: 2},
        {1, 2},
        np.array([N, K]),
        iter((N, K)),
        (1.0, 2),
        (None, 2),
        ("1", 2),
        (True, 2),
    ):
        yield Case(argument, f"kind {value!r:.20}", put(argument, value), (TypeError,))
    for value in (
        (),
        (N,),
        (N, K, 1),
        (-1, K),
        (N, -1),
        (2**70, 1),
        (HUGE, 1),
        (_core.MAX_K + 1, 1),
        (N + 1, K),
        (N, K + more),
    ):
        yield Case(
            argument, "value", put(argument, value), (ValueError,), named=value not in ((N + 1, K), (N, K + more))
        )


def betas_cases(argument: str) -> Iterator[Case]:
    for value in (0.9, "ab", {0.9: 0.9}, np.array([0.9, 0.9]), ("a", 0.9), (None, 0.9), (0.9, True), (0.9, 1j)):
        yield Case(argument, f"kind {value!r:.20}", put(argument, value), (TypeError,))
    for value in ((), (0.9,), (0.9, 0.9, 0.9), (1.0, 0.9), (0.9, 1), (-0.1, 0.9), (0.9, float("nan")), (HUGE, 0)):
        yield Case(argument, "value", put(argument, value), (ValueError,))


def flag_cases(argument: str) -> Iterator[Case]:
    for value in (None, 0, 1, 1.0, "True", [], np.array(True), np.int8(1), object(), HUGE, bool):
        yield Case(argument, f"kind {value!r:.20}" if value is not HUGE else "huge", put(argument, value), (TypeError,))


def control_cases(argument: str, edit: Callable[[dict[str, Any]], np.ndarray]) -> Iterator[Case]:
    integers = {"seed", "layer", "step", "micro", "nonfinite", "moved", "stripes", "stripe", "vote_moved", "rule"}

    def spoil(index: int, value: float) -> Callable[[dict[str, Any]], None]:
        return lambda arguments: edit(arguments).__setitem__(index, value)

    for field, index in _core.CONTROL.items():
        values = [float("nan"), -1.0, -float("inf"), -(2.0**70)] + ([0.5, 2.0**53, 1e300] if field in integers else [])
        values += [float("inf")] if field != "sketch_energy" else []
        for value in values:
            yield Case(argument, f"{field} = {value}", spoil(index, value), (ValueError,))


def planes_cases(argument: str, planes: dict[str, np.ndarray], optional: bool) -> Iterator[Case]:
    wrong = [0, "planes", [], list(planes.items()), object(), Liar(), np.zeros(3), tuple(planes)]
    for value in wrong if optional else [None, *wrong]:
        yield Case(argument, f"kind {type(value).__name__}", put(argument, value), (TypeError,))
    for key in ("extra", "Residual", 3, None, (), b"residual", "residual\0"):
        yield Case(
            argument, f"key {key!r}", lambda a, key=key: a["planes"].__setitem__(key, np.zeros(3)), (ValueError,)
        )
    for name, array in planes.items():
        if name == "votes":  # the one plane that is optional
            continue
        yield Case(argument, f"without {name}", lambda a, name=name: a["planes"].pop(name), (ValueError,))
        names = {"uint16", "bfloat16"} if name == "momentum_scale" else {array.dtype.name}
        kind = Arr(frozenset(names), out=True, free=name in ("row_factor", "col_factor"))
        for case in array_cases(name, array, kind):

            def change(arguments: dict[str, Any], case: Case = case) -> None:
                case.change(arguments["planes"])

            yield Case(case.argument, case.label, change, case.errors, case.named)
    yield from control_cases("control", lambda arguments: arguments["planes"]["control"])


def cases(target: Target) -> Iterator[Case]:
    """Every wrong argument of a target."""
    for argument, kind in target.kinds.items():
        legal = target.make()
        if isinstance(kind, Arr):
            yield from array_cases(argument, legal[argument], kind)
            if argument == "control":
                yield from control_cases(argument, lambda arguments: arguments["control"])
        elif isinstance(kind, Number):
            yield from number_cases(argument, kind)
        elif kind == Planes:
            yield from planes_cases(argument, legal[argument], target.name.endswith("vote"))
        else:
            simple = {
                Text: text_cases,
                Flag: flag_cases,
                Pair: pair_cases,
                TritsPair: partial(pair_cases, more=5),
                Betas: betas_cases,
            }
            yield from simple[kind](argument)
    yield from overlap_cases(target)
