"""AutoFlip: codes that flip under whatever torch optimizer the user's script makes."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from . import ops
from .nn import BitLinear, plane_list
from .optim import DEFAULT_CAP, FlipOptimizer
from .planes import CONTROL, check, choose_rule, default_betas, field, kinds, new_planes, repool, rotate
from .schedule import cosine

PREFIX = "onebit_"
CONTROLS = ("control", "draws")  # float64: saved as bytes
MOMENTS = ("exp_avg", "exp_avg_sq")
FOREIGN_LIMIT = 64  # steps of other optimizers while our gradients wait


class AutoFlip:
    """Global optimizer hooks that flip the codes of `model` after each step of the optimizer that owns its scales.

    The planes are made after that optimizer's first step and live in its `state`, under the scale, so they are saved
    and restored with it.  eta = flip_lr * lr / initial_lr (lr / initial_lr is the schedule).  Our Adam steps the scale
    with scale_lr on the same schedule, in place of the optimizer's own update.  `remove()` ends it.

    The flip rule's arguments are FlipOptimizer's.  With stripes > 1, which need stripe_steps, eta follows a warmup and
    cosine of its own in every stripe instead of the optimizer's schedule.  A vote plane is never saved: a state taken
    between micro-batches is refused.
    """

    def __init__(
        self,
        model: nn.Module,
        flip_lr: float = 0.03,
        scale_lr: float = 2e-3,
        recipe: str = "finetune",
        residual_bits: int | None = None,
        momentum_bits: int | None = None,
        flip_rate_cap: float | None = None,
        betas: tuple[float, float] | None = None,
        seed: int = 0,
        rule: str | None = None,
        stripes: int = 1,
        stripe_steps: int | None = None,
        vote_plane: bool = False,
    ) -> None:
        chosen = choose_rule(recipe, residual_bits, momentum_bits, rule)
        if chosen is None:
            raise ValueError("AutoFlip: recipe 'frozen' flips nothing")
        if stripes < 1 or (stripes > 1 and (stripe_steps is None or stripe_steps < 1)):
            raise ValueError(
                f"AutoFlip: stripes={stripes!r} must be 1, or more with stripe_steps, got {stripe_steps!r}"
            )
        self.flip_lr, self.scale_lr, self.rule = flip_lr, scale_lr, chosen
        self.stripes, self.stripe_steps = stripes, stripe_steps or 0
        cap = DEFAULT_CAP if flip_rate_cap is None else flip_rate_cap
        self._options: dict[str, Any] = {
            "seed": seed,
            "eta": flip_lr,
            "cap": cap,
            "betas": betas or default_betas(chosen),
            "stripes": stripes,
            "vote_plane": vote_plane,
        }
        found = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, BitLinear)]
        self._layers = [(name, weakref.ref(layer)) for name, layer in found]
        self._before: list[tuple[BitLinear, Tensor]] = []
        self._foreign = 0
        self.flip_rate = 0.0
        for index, (_, layer) in enumerate(found):
            layer._auto = weakref.ref(self)
            draws = ops.array(layer.control)
            draws[CONTROL["seed"]], draws[CONTROL["layer"]], draws[CONTROL["micro"]] = seed, index, 0
        _hooks.active.append(self)
        _hooks.install()

    @staticmethod
    def of(model: nn.Module) -> AutoFlip | None:
        """The handle that flips this model, if any."""
        for layer in model.modules():
            if isinstance(layer, BitLinear) and layer._auto is not None:
                handle: AutoFlip | None = layer._auto()
                return handle
        return None

    def remove(self) -> None:
        """Unhook; the layers keep their codes and stop voting."""
        if self in _hooks.active:
            _hooks.active.remove(self)
        if not _hooks.active:
            _hooks.uninstall()
        for _, reference in self._layers:
            layer = reference()
            if layer is not None:
                layer.attach(None)
                layer._sync = None
                layer._auto = lambda: None  # ended on purpose: scales may train alone

    # ------------------------------------------------------------------ who owns what
    def _owned(self, optimizer: torch.optim.Optimizer) -> list[tuple[int, str, BitLinear, int]]:
        """Index, name, layer and index of the param group of every layer of ours whose scale is in the optimizer."""
        groups = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        live = [(i, name, reference()) for i, (name, reference) in enumerate(self._layers)]
        if all(layer is None for _, _, layer in live) and self in _hooks.active:
            _hooks.active.remove(self)  # the model is gone
        return [
            (i, name, layer, groups[id(layer.scale)])
            for i, name, layer in live
            if layer is not None and id(layer.scale) in groups
        ]

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Pre-step hook: refuse what is not finite, remember the scales."""
        owned = [] if isinstance(optimizer, FlipOptimizer) else self._owned(optimizer)
        bad = [name for _, name, layer, _ in owned if _nonfinite(layer) and not _skipped(optimizer)]
        if bad:
            names = ", ".join(map(repr, bad))
            raise FloatingPointError(f"AutoFlip: non-finite gradient in {names}; nothing was changed")
        self._before = [(layer, layer.scale.detach().clone()) for _, _, layer, _ in owned]

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Post-step hook: scales by our Adam, then flips."""
        owned = self._owned(optimizer)
        if not owned:
            self._count_foreign()
            return
        self._foreign = 0
        if isinstance(optimizer, FlipOptimizer):
            return
        for layer, before in self._before:
            layer.scale.copy_(before)
        moved = total = 0.0
        for index, _, layer, group in owned:
            state = optimizer.state[layer.scale]
            if PREFIX + "control" not in state:
                planes = new_planes(layer, self.rule, layer=index, **self._options)
                planes |= {name: torch.zeros_like(layer.scale) for name in MOMENTS} | {"draws": layer.control}
                self._link(optimizer, group, layer, planes)
            if not _skipped(optimizer):
                self._step(optimizer, group, layer)
            moved += field(ops.array(layer._planes["control"]), "moved")  # type: ignore[index]
            total += layer.in_features * layer.out_features
        self.flip_rate = moved / max(total, 1)

    def _count_foreign(self) -> None:
        layers = [layer for _, reference in self._layers if (layer := reference()) is not None]
        waiting = any(layer.scale.grad is not None for layer in layers)
        self._foreign = self._foreign + 1 if waiting else 0
        if self._foreign >= FOREIGN_LIMIT:
            raise RuntimeError(
                f"AutoFlip: {FOREIGN_LIMIT} optimizer steps, none of an optimizer that owns the scales of the ternary "
                "layers, so no code flips; make the optimizer after replace_linear, or call remove()"
            )

    # ------------------------------------------------------------------ one layer
    def _link(self, optimizer: torch.optim.Optimizer, group: int, layer: BitLinear, planes: dict[str, Tensor]) -> None:
        """Into the optimizer's state, controls as bytes: torch casts what it loads to the scale's float32."""
        for name in planes.keys() - {"votes"}:
            value = planes[name]
            optimizer.state[layer.scale][PREFIX + name] = value.view(torch.uint8) if name in CONTROLS else value
        layer.attach(planes, self.rule)
        layer.control, layer._start = planes["draws"], None
        owner, eta = weakref.ref(optimizer), self._eta
        control = ops.array(planes["control"])

        def sync() -> None:
            live = owner()
            if live is not None:
                control[CONTROL["eta"]] = eta(live, group, control)

        layer._sync = sync
        sync()

    def _eta(self, optimizer: torch.optim.Optimizer, group: int, control: Any) -> float:
        if self.stripes == 1:
            return self.flip_lr * _ratio(optimizer, group)
        return self.flip_lr * cosine(int(field(control, "step")), self.stripe_steps)

    def _step(self, optimizer: torch.optim.Optimizer, group: int, layer: BitLinear) -> None:
        planes, ratio = layer._planes, _ratio(optimizer, group)
        assert planes is not None
        control = planes["control"]
        ops.array(control)[CONTROL["eta"]] = self._eta(optimizer, group, ops.array(control))
        if layer.scale.grad is not None:
            moments = [planes[name] for name in MOMENTS]
            ops.scale_step(layer.scale, layer.scale.grad, *moments, control, self.scale_lr * ratio)
        ops.flip(layer.weight, control, plane_list(planes))
        if rotate(layer, planes, self.stripe_steps):
            self._link(optimizer, group, layer, planes)

    def restore(self, optimizer: torch.optim.Optimizer) -> None:
        """After load_state_dict: back from float32, layer by layer, and on with the votes."""
        for _, name, layer, group in self._owned(optimizer):
            state = optimizer.state.get(layer.scale, {})
            saved = {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}
            if not saved:
                continue
            planes = {name: saved.pop(name).to(torch.float32, copy=True) for name in MOMENTS if name in saved}
            for key in CONTROLS:
                if key in saved:
                    saved[key] = saved[key].to(torch.uint8, copy=True).view(torch.float64)
            wanted = kinds(layer, self.rule)
            saved = {k: v if k in CONTROLS or k not in wanted else v.to(wanted[k][1]) for k, v in saved.items()}
            held = self._options["vote_plane"]
            check(layer, saved, self.rule, self.stripes, f"AutoFlip: state of {name!r}", held)
            planes |= repool(layer, saved, held)
            self._link(optimizer, group, layer, planes)


class _Hooks:
    """The global hooks while an AutoFlip is active: two of torch's, and ours around load_state_dict."""

    def __init__(self) -> None:
        self.active: list[AutoFlip] = []
        self._handles: list[Any] = []
        self._load: Any = None

    def install(self) -> None:
        """Once."""
        if self._handles:
            return
        self._handles = [
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        ]
        self._load = original = torch.optim.Optimizer.load_state_dict

        @functools.wraps(original)
        def load_state_dict(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
            original(optimizer, state_dict)
            for auto in [*self.active]:
                auto.restore(optimizer)

        torch.optim.Optimizer.load_state_dict = load_state_dict  # type: ignore[method-assign, assignment]

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for auto in [*self.active]:
            auto.before_step(optimizer)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for auto in [*self.active]:
            auto.after_step(optimizer)

    def uninstall(self) -> None:
        """Leave torch as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._load is not None:
            torch.optim.Optimizer.load_state_dict = self._load  # type: ignore[method-assign]
            self._load = None


_hooks = _Hooks()


def _ratio(optimizer: torch.optim.Optimizer, group: int) -> float:
    """Where the schedule of a param group stands: lr / initial_lr, 1 without a scheduler."""
    options = optimizer.param_groups[group]
    initial = float(options.get("initial_lr", options["lr"]))
    return float(options["lr"]) / initial if initial else 0.0


def _nonfinite(layer: BitLinear) -> bool:
    if layer._planes is None or field(ops.array(layer._planes["control"]), "nonfinite") == 0:
        return False
    return layer.scale.grad is not None and not bool(torch.isfinite(layer.scale.grad).all())


def _skipped(optimizer: torch.optim.Optimizer) -> bool:
    """A fused optimizer is stepped by GradScaler even where it must do nothing."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and float(found_inf) > 0
