"""FlipOptimizer: flips for the codes, Adam for the scales, AdamW for the rest, as one torch optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import ops, planes
from .nn import BitLinear, layer_of, plane_list
from .planes import CONTROL, check, choose_rule, control_of, default_betas, field, new_planes, nonfinite, repool, rotate
from .stats import layer_stats

DEFAULT_CAP = 0.025


class _CodesGroup(dict[str, Any]):
    """The codes' param group.  What is written into it reaches the layers' controls at once: a scheduler writes lr
    after step(), and the next backward votes with it, compiled or not."""

    controls: list[np.ndarray[Any, Any]] = []

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        self.write()

    def update(self, *args: Any, **kwargs: Any) -> None:
        super().update(*args, **kwargs)
        self.write()

    def write(self) -> None:
        """Bring the controls of this group's layers up to date."""
        for control in self.controls:
            cap = self["flip_rate_cap"]
            control[CONTROL["eta"]] = float(self["lr"])
            control[CONTROL["cap"]] = DEFAULT_CAP if cap is None else cap
            control[CONTROL["beta1"]], control[CONTROL["beta2"]] = self["betas"]


class FlipOptimizer(torch.optim.Optimizer):
    """One optimizer for a model with BitLinear layers.

    Args:
        params: a model, its parameters, or groups of them.  A layer's codes come along with its scale.
        lr: eta, cells per step (param group 0, the codes).
        float_lr, weight_decay: AdamW of every other parameter; tensors of one dimension are not decayed.
        scale_lr: Adam of the scales (param group 1), relative to each layer's first scale.  0: codes only.
        betas: decays of both Adams, of a momentum plane (first) and the flip rule's factors (second).  None: (.9, .95),
            for codes and scales (.7, .95) if the rule has a momentum.
        recipe: "finetune" (residual), "pretrain" (momentum too; wants `wsd_schedule`), "frozen" (codes stay).
        residual_bits (16, 8, 4, 2), momentum_bits (0, 4, 8): override the recipe's.
        rule: a name of `onebit_ext.RULES` instead of bits.
        stripes, stripe_steps: block-cyclic training.  Only the rows n % stripes == stripe are in training and have
            planes; after stripe_steps steps of a layer the next stripe's turn comes.  None: a schedule of ours sets it.
        flip_rate_cap: share of codes a layer may flip per step before the guard slows it; None: 2.5 %; 0: no guard.
            With one, an lr beyond .06 counts as .06.
        seed: of all stochastic rounding.
        vote_plane: a step's votes meet in int16 and count as one vote in step(), so that micro-batches and ranks train
            as one batch, by any rule; that plane is zero between steps, and not in state_dict() then.
        on_nonfinite: "raise" FloatingPointError in step() before any write, or "skip" what is not finite and count it
            in `nonfinite_skipped`.

    Backward votes, `step()` flips.  A layer's first step only measures.  All training state is in `state`: planes and
    control under the codes, Adam moments under scales and floats, so `state_dict()` resumes to the bit.
    With a GradScaler a skipped step moves no code; if `scaler.unscale_` is used, set `grad_scaler` to the scaler.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float = 0.03,
        float_lr: float = 1e-3,
        scale_lr: float = 2e-3,
        betas: tuple[float, float] | None = None,
        recipe: str = "finetune",
        weight_decay: float = 0.0,
        residual_bits: int | None = None,
        momentum_bits: int | None = None,
        flip_rate_cap: float | None = None,
        seed: int = 0,
        on_nonfinite: str = "raise",
        rule: str | None = None,
        stripes: int = 1,
        stripe_steps: int | None = None,
        vote_plane: bool = False,
    ) -> None:
        rates = {"lr": lr, "float_lr": float_lr, "scale_lr": scale_lr, "weight_decay": weight_decay}
        for name, value in {**rates, "flip_rate_cap": flip_rate_cap or 0.0}.items():
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"FlipOptimizer: {name!r} must be finite and not negative, got {value!r}")
        if betas is not None and (len(betas) != 2 or not all(0 <= beta < 1 for beta in betas)):
            raise ValueError(f"FlipOptimizer: 'betas' must be two numbers in [0, 1), got {betas!r}")
        if on_nonfinite not in ("raise", "skip"):
            raise ValueError(f"FlipOptimizer: 'on_nonfinite' must be 'raise' or 'skip', got {on_nonfinite!r}")
        if not 0 <= seed < 2**53:
            raise ValueError(f"FlipOptimizer: 'seed' must be in [0, 2^53), got {seed!r}")
        if stripes < 1 or (stripe_steps is not None and stripe_steps < 1):
            raise ValueError(
                f"FlipOptimizer: 'stripes' and 'stripe_steps' must be at least 1, got {stripes!r}, {stripe_steps!r}"
            )
        self.rule = self._choose_rule(recipe, residual_bits, momentum_bits, rule)
        self.stripes, self._stripe_steps = stripes, stripe_steps
        self.vote_plane = vote_plane
        self.seed, self.on_nonfinite = seed, on_nonfinite
        self.nonfinite_skipped = 0
        self.grad_scaler: torch.amp.GradScaler | None = None
        self._rates, self._betas = rates, tuple(betas or default_betas(self.rule))
        self._layers: list[BitLinear] = []
        self._names: dict[BitLinear, str] = {}
        self._adamw = torch.optim.AdamW([torch.zeros(1)])
        ours = {"betas": tuple(betas or default_betas(None)), "weight_decay": 0.0, "flip_rate_cap": flip_rate_cap}
        super().__init__(self._groups(params), self._adamw.defaults | ours)

    def _choose_rule(self, *given: Any) -> str | None:
        return choose_rule(*given)

    # ------------------------------------------------------------------ parameters
    def _groups(self, params: nn.Module | Iterable[Any]) -> list[dict[str, Any]]:
        """Codes, scales, then the float groups."""
        if isinstance(params, nn.Module):
            found = [(name, layer) for name, layer in params.named_modules() if isinstance(layer, BitLinear)]
            self._names.update({layer: name for name, layer in found})
            owned = [tensor for _, layer in found for tensor in (layer.weight, layer.scale)]
            params = owned + [parameter for parameter in params.parameters() if parameter.requires_grad]
        entries: list[Any] = [entry[1] if isinstance(entry, tuple) else entry for entry in params]
        if not entries:
            raise ValueError("FlipOptimizer: got no parameters")
        given = entries if isinstance(entries[0], dict) else [{"params": entries}]
        codes: dict[int, Tensor] = {}
        scales: dict[int, Tensor] = {}
        floats: list[dict[str, Any]] = []
        for group in given:
            rest = self._split(group, codes, scales)
            decay = group.get("weight_decay", self._rates["weight_decay"])
            parts = [(rest, decay)]
            if decay and "weight_decay" not in group:
                parts = [([p for p in rest if p.ndim > 1], decay), ([p for p in rest if p.ndim <= 1], 0.0)]
            options = {"lr": self._rates["float_lr"]} | {k: v for k, v in group.items() if k != "params"}
            floats += [options | {"params": p, "weight_decay": d, "kind": "floats"} for p, d in parts if p]
        ours = {"params": [*codes.values()], "lr": self._rates["lr"], "kind": "codes", "betas": self._betas}
        scaling = {"params": [*scales.values()], "lr": self._rates["scale_lr"], "kind": "scales", "betas": self._betas}
        return [ours | {"stripe_steps": self._stripe_steps}, scaling, *floats]

    @staticmethod
    def _split(group: dict[str, Any], codes: dict[int, Tensor], scales: dict[int, Tensor]) -> list[Tensor]:
        """Sort a group's ternary layers into codes and scales; the float parameters that remain."""
        members = [group["params"]] if isinstance(group["params"], Tensor) else group["params"]
        rest: dict[int, Tensor] = {}
        for parameter in (entry[1] if isinstance(entry, tuple) else entry for entry in members):
            layer = layer_of(parameter)
            if layer is None:
                rest[id(parameter)] = parameter
            else:
                codes[id(layer.weight)], scales[id(layer.scale)] = layer.weight, layer.scale
        return [*rest.values()]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; the ternary layers among the parameters get a group of codes and one of scales."""
        if "kind" not in param_group:
            for group in self._groups([param_group]):
                if group["params"]:
                    self.add_param_group(group)
            return
        codes = param_group["kind"] == "codes"
        super().add_param_group(_CodesGroup(param_group) if codes else param_group)
        self._share_with_adamw()
        if codes:
            for weight in self.param_groups[-1]["params"]:
                self._attach(weight)
            self._refresh_controls()

    def _share_with_adamw(self) -> None:
        self._adamw.state = self.state
        self._adamw.param_groups = [group for group in self.param_groups if group["kind"] == "floats"]

    def _attach(self, weight: Tensor) -> None:
        layer = layer_of(weight)
        assert layer is not None
        control = ops.array(layer.control)
        control[CONTROL["seed"]], control[CONTROL["layer"]] = self.seed, len(self._layers)
        control[CONTROL["scale_init"]] = float(layer.scale.detach().mean())
        self._layers.append(layer)
        self._names.setdefault(layer, f"layer {len(self._layers) - 1}")
        self.state[weight]["draws"] = layer.control
        layer.attach(None)
        if layer.scale.requires_grad and self.rule is not None:
            self._make_planes(layer)

    def _group_of(self, layer: BitLinear) -> _CodesGroup:
        return next(group for group in self._codes_groups() if any(p is layer.weight for p in group["params"]))

    def _make_planes(self, layer: BitLinear) -> None:
        assert self.rule is not None
        group = self._group_of(layer)
        options: dict[str, Any] = {"seed": self.seed, "layer": self._layers.index(layer), "stripes": self.stripes}
        options["vote_plane"] = self.vote_plane
        state = self.state[layer.weight]
        state.update(new_planes(layer, self.rule, betas=group["betas"], eta=float(group["lr"]), **options))
        layer.attach(state, self.rule)

    def _codes_groups(self) -> list[_CodesGroup]:
        return [group for group in self.param_groups if isinstance(group, _CodesGroup)]

    def _refresh_controls(self) -> None:
        for group in self._codes_groups():
            layers = [layer_of(weight) for weight in group["params"]]
            group.controls = [control_of(layer) for layer in layers if layer is not None]
            group.write()

    # ------------------------------------------------------------------ the step
    @property
    def flip_rate(self) -> float:
        """Share of all codes that the last step moved."""
        total = sum(layer.in_features * layer.out_features for layer in self._layers) or 1
        return sum(field(control_of(layer), "moved") for layer in self._layers) / total

    def stats(self) -> list[dict[str, Any]]:
        """What a logger wants to know of each layer; see `layer_stats`."""
        return [layer_stats(layer, self._names[layer]) for layer in self._layers]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Scales, floats, then flips.  Raises before any write if a layer met a non-finite gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_links()
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and float(found_inf) > 0:
            self.discard()
            return loss
        bad = self._nonfinite()
        unscale = self._follow_scaler(found_inf is not None)
        self._step_floats(unscale, bool(bad))
        self._step_scales(bad, scaled=unscale != 1.0)
        self._flip(bad)
        return loss

    def discard(self) -> None:
        """Give up this step's gradients of the codes: sums, non-finite flags and what a vote plane holds go, other
        votes stay, no code moves."""
        for layer in self._layers:
            self._discard(layer)

    def _check_links(self) -> None:
        for layer in self._layers:
            state = self.state.get(layer.weight, {})
            if "draws" not in state or not self._linked(layer, state):
                raise RuntimeError(
                    f"FlipOptimizer: {self._names[layer]!r} is no longer this optimizer's: its codes were replaced "
                    "(load_state_dict(assign=True)?) or another optimizer took the layer"
                )
        if any(group["stripe_steps"] is None for group in self._codes_groups()) and self.stripes > 1:
            raise RuntimeError(f"FlipOptimizer: stripes={self.stripes} needs stripe_steps, or a schedule of ours")

    @staticmethod
    def _linked(layer: BitLinear, state: dict[str, Any]) -> bool:
        return "control" not in state or layer._planes is state

    @staticmethod
    def _discard(layer: BitLinear) -> None:
        if layer._planes is not None:
            ops.discard(layer._planes["control"], plane_list(layer._planes))

    def _follow_scaler(self, active: bool) -> float:
        """The loss scale that float gradients still contain; the flip rule's sums are freed of it."""
        left = getattr(self, "grad_scale", None)
        unscale = 1.0 if left is None else float(left)
        scale = unscale
        if active and left is None:
            if self.grad_scaler is None:
                raise RuntimeError(
                    "FlipOptimizer: scaler.unscale_() hides the loss scale that the votes contain; "
                    "set optimizer.grad_scaler = scaler"
                )
            scale = self.grad_scaler.get_scale()
        for layer in self._layers:
            control = control_of(layer)
            assumed = field(control, "grad_scale")
            if assumed != scale and layer._planes is not None:
                for name in ("row_sum", "col_sum"):
                    layer._planes[name].mul_((assumed / scale) ** 2)
                if "votes" in layer._planes:
                    planes.rescale_votes(layer._planes["votes"], assumed / scale)
            control[CONTROL["grad_scale"]] = scale
        return unscale

    def _nonfinite(self) -> list[BitLinear]:
        bad = [layer for layer in self._layers if nonfinite(layer)]
        if bad and self.on_nonfinite == "raise":
            names = ", ".join(repr(self._names[layer]) for layer in bad)
            raise FloatingPointError(
                f"FlipOptimizer: non-finite gradient in {names}; nothing was changed (discard() gives this step up)"
            )
        self.nonfinite_skipped += len(bad)
        return bad

    def _step_floats(self, unscale: float, check_finite: bool) -> None:
        for group in self._adamw.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if unscale != 1.0:
                    parameter.grad.div_(unscale)
                if check_finite and not bool(torch.isfinite(parameter.grad).all()):
                    parameter.grad = None
        self._adamw.step()

    def _step_scales(self, bad: list[BitLinear], scaled: bool) -> None:
        """`scaled`: the scales' gradients still contain the loss scale, which is in control."""
        for group in (group for group in self.param_groups if group["kind"] == "scales"):
            for scale in group["params"]:
                layer = layer_of(scale)
                if scale.grad is None or layer is None or layer in bad:
                    continue
                state = self.state[scale]
                if not state:
                    state.update(exp_avg=torch.zeros_like(scale), exp_avg_sq=torch.zeros_like(scale))
                tensor = layer.control if layer._planes is None else layer._planes["control"]
                control = ops.array(tensor)
                loss_scale = field(control, "grad_scale")
                control[CONTROL["beta1"]], control[CONTROL["beta2"]] = group["betas"]
                control[CONTROL["grad_scale"]] = loss_scale if scaled else 1.0
                ops.scale_step(scale, scale.grad, state["exp_avg"], state["exp_avg_sq"], tensor, float(group["lr"]))
                control[CONTROL["grad_scale"]] = loss_scale
        for codes in self._codes_groups():
            codes.write()

    def _flip(self, bad: list[BitLinear]) -> None:
        grown = False
        for layer in self._layers:
            if self.state[layer.weight].keys() == {"draws"}:
                if self.rule is not None and layer.scale.requires_grad:  # thawed after the optimizer was made
                    self._make_planes(layer)
                    grown = True
            elif layer in bad:
                self._discard(layer)
            else:
                control_of(layer)[CONTROL["moved"]] = 0
                self._flip_layer(layer)
        if grown:
            self._refresh_controls()

    def _flip_layer(self, layer: BitLinear) -> None:
        state = self.state[layer.weight]
        ops.flip(layer.weight, state["control"], plane_list(state))
        if self.stripes > 1:
            rotate(layer, state, self._group_of(layer)["stripe_steps"])

    # ------------------------------------------------------------------ saving
    def state_dict(self) -> dict[str, Any]:
        """As torch's, without vote planes that are zero."""
        saved = super().state_dict()
        saved["state"] = {key: planes.without_empty_votes(value) for key, value in saved["state"].items()}
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, after checking every plane; the layers vote into the loaded planes from here on."""
        self._check_state(state_dict)
        super().load_state_dict(state_dict)
        self.param_groups = [_CodesGroup(group) if group["kind"] == "codes" else group for group in self.param_groups]
        self._share_with_adamw()
        for state in self.state.values():  # torch keeps the caller's tensors, and we write in place
            state.update({name: value.clone() for name, value in state.items() if isinstance(value, Tensor)})
        for layer in self._layers:
            self._link(layer, self.state[layer.weight])
        self._refresh_controls()

    def _link(self, layer: BitLinear, state: dict[str, Any]) -> None:
        """The layer votes into loaded planes."""
        trains = "control" in state
        if trains:
            state.update(repool(layer, state, self.vote_plane))
        layer.control = state["draws"]
        layer.attach(state if trains else None, self.rule)

    def _check_state(self, state_dict: dict[str, Any]) -> None:
        kinds = [group.get("kind") for group in state_dict["param_groups"]]
        if kinds != [group["kind"] for group in self.param_groups]:
            raise ValueError(f"FlipOptimizer: the state has param groups {kinds}, not this optimizer's")
        for mine, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            if mine["kind"] != "codes" or len(mine["params"]) != len(saved["params"]):
                continue  # torch names a wrong length
            for weight, key in zip(mine["params"], saved["params"], strict=True):
                layer = layer_of(weight)
                assert layer is not None
                where = f"FlipOptimizer: state of {self._names[layer]!r}"
                self._check_planes(layer, state_dict["state"].get(key, {}), where)

    def _check_planes(self, layer: BitLinear, state: dict[str, Any], where: str) -> None:
        check(layer, state, self.rule, self.stripes, where, self.vote_plane)
