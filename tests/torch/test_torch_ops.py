"""torch's own check of every operator: schema, fakes, autograd registration, AOT dispatch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from onebit_ext import _core
from onebit_ext.torch import BitLinear, dense, ops
from onebit_ext.torch.nn import plane_list
from onebit_ext.torch.planes import new_planes

M, N, K = 12, 70, 37


def control(rule: str | None = None) -> Tensor:
    fields = torch.from_numpy(_core.new_control(seed=5, layer=2))
    fields[_core.CONTROL["step"]] = 3
    fields[_core.CONTROL["rule"]] = 0 if rule is None else _core.RULES.index(rule)
    return fields


def planes(rule: str | None) -> list[Tensor]:
    return [] if rule is None else plane_list(new_planes(BitLinear(K, N), rule))


def cases() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    torch.manual_seed(0)
    layer = BitLinear(K, N)
    weight, scale = layer.weight.data, layer.scale.detach()
    rows = scale.repeat(N).requires_grad_()
    x, dy = torch.randn(3, 4, K), torch.randn(3, 4, N)
    y, xq, sx = ops.linear(x, weight, scale, None, N, True, control(), [], None)
    found: dict[str, tuple[Any, tuple[Any, ...]]] = {}
    for rule in (None, *_core.RULES):
        for dtype in (torch.float32, torch.bfloat16):
            name = f"{rule}-{dtype}"
            xd = x.to(dtype).requires_grad_()
            bias = torch.randn(N, requires_grad=True)
            s = scale.clone().requires_grad_()
            moves = rule in _core.RULES_MOVING_IN_VOTE
            position = ops.position_of(control(rule)) if moves else None
            found[f"linear-{name}"] = ops.linear, (xd, weight, s, bias, N, True, control(rule), planes(rule), position)
            if dtype == torch.float32:
                found[f"linear-rows-{name}"] = (
                    ops.linear,
                    (xd, weight, rows, None, N, True, control(rule), planes(rule), position),
                )
            args = (dy.to(dtype), xq, sx, weight, scale, K, control(rule), planes(rule), dtype == torch.float32)
            if moves:
                codes = (*args[:3], weight.clone(), *args[4:], ops.position_of(args[6]))
                found[f"vote_codes-{name}"] = ops.vote_codes, codes
            else:
                found[f"vote-{name}"] = ops.vote, args
        if rule is not None:
            found[f"flip-{rule}"] = ops.flip, (weight.clone(), control(rule), planes(rule))
            found[f"discard-{rule}"] = ops.discard, (control(rule), planes(rule))
    found["linear-keeps-nothing"] = ops.linear, (x, weight, scale, None, N, False, control(), [], None)
    found["linear_backward_input"] = ops.linear_backward_input, (dy, weight, scale, control(), K)
    moments = torch.zeros(1), torch.zeros(1)
    found["scale_step"] = ops.scale_step, (scale.clone(), torch.ones(1), *moments, control(), 1e-3)
    latent = torch.randn(N, K, requires_grad=True)
    x = x.requires_grad_()
    bias = torch.randn(N, requires_grad=True)
    for name, factor in (("", scale.clone().requires_grad_()), ("-rows", rows)):
        found["dense_linear" + name] = dense.dense_linear, (x, weight, factor, bias, latent, control())
        found["scale_gradient" + name] = dense.scale_gradient, (latent.detach(), weight, factor.detach())
    found["absmean"] = dense.absmean, (latent.detach(),)
    return found


CASES = cases()


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name: str) -> None:
    operator, args = CASES[name]
    torch.library.opcheck(operator, args)


def test_functional_operators_write_nothing_even_where_gradients_are_not_finite() -> None:
    layer, before = BitLinear(K, N), control()
    after = before.clone()
    dx = ops.linear_backward_input(torch.full((2, N), torch.inf), layer.weight, layer.scale, after, K)
    assert dx.isnan().all() and torch.equal(before, after)


def test_every_operator_is_checked() -> None:
    checked = {operator._opoverload._schema.name for operator, _ in CASES.values()}
    registered = {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("onebit::")}
    assert checked == registered
