"""What the ranks of test_torch_distributed.py do: `rankkit.py RANK WORLD FOLDER SCENARIO...`; results in FOLDER."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torchkit
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from onebit_ext import _core
from onebit_ext.torch import BitLinear, FlipOptimizer, LatentAdam, distributed, ops, replace_linear

C = _core.CONTROL
OPTIONS = torchkit.OPTIONS | {"lr": 0.2, "flip_rate_cap": 0.3}


def train(model: nn.Module, optimizer: Any, first: int, last: int, rank: int, parts: int = 1) -> list[float]:
    """Each rank on batches of its own; `parts` micro-batches a step."""
    losses = []
    for step in range(first, last):
        for part in range(parts):
            last_part = part == parts - 1
            batch = 1000 * rank + parts * step + part
            wait = model.no_sync() if isinstance(model, DistributedDataParallel) and not last_part else None
            if wait is not None:
                with wait:
                    (torchkit.loss_of(model, batch) / parts).backward()
            else:
                loss = torchkit.loss_of(model, batch) / parts
                loss.backward()
                losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def layers_of(model: nn.Module) -> list[BitLinear]:
    return [module for module in model.modules() if isinstance(module, BitLinear)]


def planes(model: nn.Module) -> list[dict[str, Tensor]]:
    return [{name: value.clone() for name, value in layer._planes.items()} for layer in layers_of(model)]  # type: ignore[union-attr]


def before_and_after(rank: int, world: int, folder: Path, **options: Any) -> Any:
    """The planes and scale gradients around one combination."""
    model = torchkit.net()
    optimizer = FlipOptimizer(model, **OPTIONS, **options)
    train(model, optimizer, 0, 3, rank)
    for part in range(2):
        torchkit.loss_of(model, 50 + 10 * rank + part).backward()
    grads = [layer.scale.grad.clone() for layer in layers_of(model)]  # type: ignore[union-attr]
    before = planes(model)
    distributed.combine(layers_of(model))
    again = [layer.scale.grad.clone() for layer in layers_of(model)]  # type: ignore[union-attr]
    return {"before": before, "after": planes(model), "grads": grads, "combined grads": again}


def same_data(rank: int, world: int, folder: Path) -> Any:
    """Residuals that ranks come to from the same batches: they differ by their rounding alone."""
    model = torchkit.net()
    optimizer = FlipOptimizer(model, **OPTIONS)
    train(model, optimizer, 0, 3, 0)
    loss = torchkit.loss_of(model, 4)
    embedded = model.embedding.weight
    loss.backward()
    return {"residual": planes(model)[0]["residual"], "input gradient": embedded.grad}


def flip_optimizer(rank: int, world: int, folder: Path, parts: int = 1, **options: Any) -> Any:
    distributed.configure(check_every=2)
    net = torchkit.net(3 + rank)  # DDP brings rank 0's parameters
    model = DistributedDataParallel(net)
    start = net.up.codes()
    optimizer = FlipOptimizer(net, **OPTIONS, **options)
    train(model, optimizer, 0, 12, rank, parts)
    return {"changed": not torch.equal(start, net.up.codes()), **torchkit.snapshot(net, optimizer)}


def accumulated(rank: int, world: int, folder: Path) -> Any:
    return flip_optimizer(rank, world, folder, 3)


def striped(rank: int, world: int, folder: Path) -> Any:
    return flip_optimizer(rank, world, folder, 2, rule="byte", stripes=3, stripe_steps=5)


def held(rank: int, world: int, folder: Path) -> Any:
    """Every rule combines its vote planes."""
    found = {}
    for rule in _core.RULES:
        options = {"rule": rule, "vote_plane": True}
        found[rule] = flip_optimizer(rank, world, folder, 2, **options)
    found["striped"] = flip_optimizer(
        rank, world, folder, 2, rule="residual4", stripes=3, stripe_steps=5, vote_plane=True
    )
    return found


def held_before_and_after(rank: int, world: int, folder: Path) -> Any:
    return before_and_after(rank, world, folder, vote_plane=True)


def held_resume(rank: int, world: int, folder: Path) -> Any:
    """The number of ranks may change between two steps."""
    model = torchkit.net()
    ddp = DistributedDataParallel(model)
    optimizer = FlipOptimizer(model, **OPTIONS, vote_plane=True)
    train(ddp, optimizer, 0, 6, rank)
    with distributed.independent():
        train(model, optimizer, 6, 9, 0)
    train(ddp, optimizer, 9, 12, rank)
    return torchkit.snapshot(model, optimizer)


def sixteen_bits(rank: int, world: int, folder: Path) -> Any:
    """The arithmetic of an int16 plane."""
    layer = torchkit.net().up
    FlipOptimizer(layer)
    torch.manual_seed(rank)
    plane = torch.randint(-16000, 16001, (layer.out_features, layer.in_features), dtype=torch.int16)
    assert layer._planes is not None
    layer._planes["residual"] = plane.clone()
    distributed._combine_plane(layer, "residual", world)
    return {"before": plane, "after": layer._planes["residual"], "control": layer._planes["control"]}


def auto(rank: int, world: int, folder: Path) -> Any:
    net = nn.Sequential(nn.Embedding(13, 20), nn.Linear(20, 72), nn.SiLU(), nn.Linear(72, 36))
    torch.manual_seed(5)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    net = replace_linear(net, auto=True, flip_lr=0.2)
    model = DistributedDataParallel(net)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=2e-3)
    start = [layer.codes() for layer in layers_of(net)]
    for step in range(14):
        x, target = torchkit.batch(100 * rank + step)
        nn.functional.cross_entropy(model(x).flatten(0, 1), target.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = any(not torch.equal(a, layer.codes()) for a, layer in zip(start, layers_of(net), strict=True))
    return {"changed": changed, **torchkit.snapshot(net, optimizer)}


def resume(rank: int, world: int, folder: Path) -> Any:
    """Ten steps, saved by rank 0, loaded by all, ten more; and twenty at once."""
    ends = []
    for split in (False, True):
        model = torchkit.net()
        optimizer = FlipOptimizer(model, **OPTIONS)
        ddp = DistributedDataParallel(model)
        train(ddp, optimizer, 0, 10, rank)
        if split:
            if rank == 0:
                torch.save([model.state_dict(), optimizer.state_dict()], folder / "half.pt")
            dist.barrier()
            model = torchkit.net(99)
            optimizer = FlipOptimizer(model, **OPTIONS)
            saved = torch.load(folder / "half.pt", weights_only=True)
            model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
            ddp = DistributedDataParallel(model)
        train(ddp, optimizer, 10, 20, rank)
        ends.append(torchkit.snapshot(model, optimizer))
    return ends


def _message(call: Callable[[], Any]) -> str:
    try:
        call()
    except (RuntimeError, FloatingPointError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def errors(rank: int, world: int, folder: Path) -> Any:
    """Everything that must be refused, on every rank."""
    found = {}
    distributed.configure(check_every=1)
    model = torchkit.net()
    optimizer = FlipOptimizer(model, **OPTIONS)
    train(model, optimizer, 0, 3, 0)
    saved = copy.deepcopy(optimizer.state_dict())
    if rank == 1:
        codes = model.down.codes()
        codes[0, 0] = (codes[0, 0] + 2) % 3 - 1
        model.down.weight.data = BitLinear.from_codes(codes, 1.0).weight.data
    found["diverged"] = _message(lambda: train(model, optimizer, 3, 4, 0))
    model = torchkit.net()
    optimizer = FlipOptimizer(model, **OPTIONS)
    with distributed.independent():  # as a run of one process
        train(model, optimizer, 0, 3, 0)
    found["more ranks"] = _message(lambda: train(model, optimizer, 3, 4, 0))
    optimizer.load_state_dict(saved)
    with distributed.independent():
        found["fewer ranks"] = _message(lambda: train(model, optimizer, 3, 4, 0))
    optimizer = FlipOptimizer(torchkit.net(), **OPTIONS, recipe="pretrain")
    found["momentum"] = _message(lambda: train(nn.Module(), optimizer, 0, 0, 0) or optimizer.step())
    for rule in ("residual4", "stochastic"):
        found[rule] = _message(FlipOptimizer(torchkit.net(), **OPTIONS, rule=rule).step)
    found["optimizer"] = _message(LatentAdam(torchkit.net()).step)
    model = torchkit.net()
    optimizer = FlipOptimizer(model, **OPTIONS)
    torchkit.loss_of(model, 0).backward()
    found["never combined"] = _message(
        lambda: ops.flip(model.up.weight, model.up._planes["control"], ops_planes(model.up))
    )
    optimizer.step()
    (torchkit.loss_of(model, 1) * (math.nan if rank == 1 else 1.0)).backward()
    before = torchkit.snapshot(model)
    found["non-finite"] = _message(optimizer.step)
    found["untouched"] = torchkit.same(before, torchkit.snapshot(model))
    return found


def ops_planes(layer: BitLinear) -> list[Tensor]:
    return [layer._planes[name] for name in ops.PLANES if name in layer._planes]  # type: ignore[index, operator]


def learn(rank: int, world: int, folder: Path) -> Any:
    """Final held-out losses of the fine-tuning task, each rank on its half of the batch."""
    from test_torch_microbatches import LR, SEEDS, fine_tune

    return [fine_tune(seed, LR, lambda tokens: [tokens.chunk(world)[rank]]) for seed in SEEDS]


def held_learn(rank: int, world: int, folder: Path) -> Any:
    """The same with vote planes, by a rule that has a residual and by one that has a momentum."""
    from test_torch_microbatches import LR, SEEDS, fine_tune

    def share(tokens: Tensor) -> list[Tensor]:
        return [tokens.chunk(world)[rank]]

    rules = ("residual8", "residual8_momentum4")
    return {rule: [fine_tune(seed, LR, share, rule=rule, vote_plane=True) for seed in SEEDS] for rule in rules}


def main() -> None:
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    _core.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    for name in sys.argv[4:]:
        distributed.configure()
        torch.manual_seed(7)
        torch.save(globals()[name](rank, world, folder), folder / f"{name}-{rank}.pt")
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
