"""The stub says what the module has: names, parameters, kinds, defaults."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest

from onebit_ext import _core

STUB = Path(_core.__file__).with_name("_core.pyi")
TREE = ast.parse(STUB.read_text())
CLASSES = {node.name: node for node in TREE.body if isinstance(node, ast.ClassDef)}
Parameter = tuple[str, Any, Any]  # name, kind, default


def public(names: Any) -> set[str]:
    return {name for name in names if not name.startswith("_")}


def declared(node: ast.FunctionDef) -> list[Parameter]:
    """Parameters of a stub function, without self or cls."""
    empty, args = inspect.Parameter.empty, node.args
    names = [a.arg for a in args.args]
    defaults = [empty] * (len(names) - len(args.defaults)) + [ast.literal_eval(d) for d in args.defaults]
    found: list[Parameter] = [
        (name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default) for name, default in zip(names, defaults, strict=True)
    ]
    for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        value = empty if default is None else ast.literal_eval(default)
        found.append((arg.arg, inspect.Parameter.KEYWORD_ONLY, value))
    return [parameter for parameter in found if parameter[0] not in ("self", "cls")]


def actual(function: Any) -> list[Parameter]:
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, p.default) for p in parameters if p.name not in ("self", "type")]


def functions(body: list[ast.stmt]) -> dict[str, ast.FunctionDef]:
    found = {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
    return {name: node for name, node in found.items() if "property" not in marks(node)}


def marks(node: ast.FunctionDef) -> set[str]:
    return {mark.id for mark in node.decorator_list if isinstance(mark, ast.Name)}


def test_the_same_names() -> None:
    constants = {n.target.id for n in TREE.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    assert constants | set(functions(TREE.body)) | set(CLASSES) == public(dir(_core))


@pytest.mark.parametrize("name", sorted(functions(TREE.body)))
def test_functions(name: str) -> None:
    assert actual(getattr(_core, name)) == declared(functions(TREE.body)[name])


@pytest.mark.parametrize("name", sorted(functions(CLASSES["reference"].body)))
def test_twins(name: str) -> None:
    node = functions(CLASSES["reference"].body)[name]
    assert public(dir(_core.reference)) == set(functions(CLASSES["reference"].body))
    assert marks(node) == {"staticmethod"}
    assert actual(getattr(_core.reference, name)) == declared(node)
    if name != "weight_gradient":
        assert declared(node) == declared(functions(TREE.body)[name])


@pytest.mark.parametrize("name", ["TernaryLinear", "FlipOptimizer"])
def test_types(name: str) -> None:
    node, kind = CLASSES[name], getattr(_core, name)
    methods = functions(node.body)
    assert actual(kind) == declared(methods.pop("__init__"))
    properties = {n.name for n in node.body if isinstance(n, ast.FunctionDef) and "property" in marks(n)}
    variables = {n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    assert set(methods) | properties | variables == public(vars(kind))
    for method, stub in methods.items():
        assert actual(getattr(kind, method)) == declared(stub), method
        assert isinstance(vars(kind)[method], type(vars(dict)["fromkeys"])) == ("classmethod" in marks(stub))
    for member in properties | variables:
        assert inspect.isgetsetdescriptor(vars(kind)[member]) and vars(kind)[member].__doc__
    with pytest.raises(TypeError):
        type("Sub", (kind,), {})  # @final


def test_constants() -> None:
    assert list(_core.CONTROL.values()) == list(range(22))
    assert _core.RULES[:3] == ("residual8", "residual8_momentum4", "residual8_momentum8")
    assert set(_core.RULES_MOVING_IN_VOTE) == {"residual4", "residual2", "stochastic"}
    assert _core.FORMATS[:3] == ("tile16", "seq2", "rows4")
    assert _core.MAX_K * 127 < 2**31 <= (_core.MAX_K + 1) * 127
    assert _core.TOKENS_PER_VOTE == 65536
