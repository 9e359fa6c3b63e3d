"""`python -m onebit_ext.torch.study.small --out FOLDER`: the study's 25.7 M weight model on the GPUs of a machine.

Every arm on three tasks (short and long fine-tuning, from scratch), one training run a job, jobs dealt out to the GPUs.
The rules are those of emulation.cu, which the tests hold to the C core bit for bit.  One line of JSON per run goes to
FOLDER/records.jsonl; a second call goes on where the first stopped.  `report` writes the table of what is there.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
import traceback
from pathlib import Path
from typing import Any

WIDTH, LAYERS, HEADS, HIDDEN, CONTEXT = 512, 8, 8, 1408, 256
WARMUP, POINTS = 0.05, 8
TASKS: dict[str, dict[str, Any]] = {
    "pretrain": {"steps": 2500, "batch": 64, "text": "code", "float_lr": 2e-3, "scale_lr": 2e-4},
    "scratch": {"steps": 1000, "batch": 64, "text": "code", "float_lr": 2e-3, "scale_lr": 2e-4},
    "short": {"steps": 400, "batch": 64, "text": "docs", "float_lr": 1e-3, "scale_lr": 1e-4},
    "long": {"steps": 2000, "batch": 16, "text": "cpp", "float_lr": 1e-3, "scale_lr": 1e-4},
}
# arm -> how it trains, and by task its rate: eta in cells per step, or AdamW's; each the best of three or four on `val`
ARMS: dict[str, dict[str, Any]] = {
    "frozen": {"method": "rule", "rule": None, "rates": {"short": 0.0, "long": 0.0}},
    "shadow32": {"method": "shadow", "dtype": "float32", "rates": {"short": 2e-3, "long": 1e-3, "scratch": 2e-3}},
    "shadow16": {"method": "shadow", "dtype": "bfloat16", "rates": {"short": 2e-3, "long": 2e-3}},
    "residual8_momentum4": {"rule": "residual8_momentum4", "rates": {"short": 0.05, "long": 0.03, "scratch": 0.05}},
    "residual8": {"rule": "residual8", "rates": {"short": 0.04, "long": 0.02, "scratch": 0.05}},
    "residual4_momentum4": {"rule": "residual4_momentum4", "rates": {"short": 0.05, "long": 0.03, "scratch": 0.05}},
    "byte": {"rule": "byte", "rates": {"short": 0.04, "long": 0.018}},
    "cyclic2": {"rule": "residual8", "stripes": 2, "rates": {"short": 0.055, "long": 0.035}},
    "residual4": {"rule": "residual4", "rates": {"short": 0.03, "long": 0.02}},
    "cyclic4": {"rule": "residual8", "stripes": 4, "rates": {"short": 0.07, "long": 0.05}},
    "residual2": {"rule": "residual2", "rates": {"short": 0.02}},
    "stochastic": {"rule": "stochastic", "rates": {"short": 0.01}},
}
Job = dict[str, Any]


def jobs(seeds: int) -> list[Job]:
    """Every run, seed by seed."""
    found = [{"task": "pretrain", "arm": "shadow32", "eta": 2e-3, "seed": 0}]
    for seed in range(seeds):
        for task in ("scratch", "long", "short"):
            rates = {arm: options["rates"].get(task) for arm, options in ARMS.items()}
            found += [
                {"task": task, "arm": arm, "eta": eta, "seed": seed} for arm, eta in rates.items() if eta is not None
            ]
    return found


def key(record: Job) -> tuple[str, str, float, int]:
    """Which run a record is of."""
    return record["task"], record["arm"], round(record["eta"], 7), record["seed"]


def read(folder: Path) -> list[Job]:
    """The records so far."""
    path = folder / "records.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Worker:
    """What one GPU keeps between jobs."""

    def __init__(self, folder: Path) -> None:
        import torch

        from . import site_text

        torch.backends.cuda.matmul.allow_tf32 = True
        self.torch, self.checkpoint = torch, folder / "pretrained.pt"
        texts = site_text.load(folder / "texts")
        self.texts = {
            (name, split): self._on_device(data, split) for name, text in texts.items() for split, data in text.items()
        }

    def _on_device(self, data: Any, split: str) -> Any:
        torch = self.torch
        text = torch.from_numpy(data.copy()).cuda()
        if split == "train":
            return text
        first = torch.linspace(0, len(text) - CONTEXT - 2, 384 if split == "test" else 256).long().cuda()
        return text[first[:, None] + torch.arange(CONTEXT + 1).cuda()]

    def run(self, job: Job) -> Job:
        """Train one arm on one task; its record."""
        torch = self.torch
        from ..demo.model import ByteTransformer
        from . import gpu

        task, arm = TASKS[job["task"]], {"method": "rule"} | ARMS[job["arm"]]
        if "dtype" in arm:
            arm["dtype"] = getattr(torch, arm["dtype"])
        torch.manual_seed(job["seed"])
        model = ByteTransformer(WIDTH, LAYERS, HEADS, HIDDEN, CONTEXT).cuda()
        state = None
        if job["task"] in ("short", "long"):
            state = torch.load(self.checkpoint, map_location="cuda")
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name in state["floats"]:
                        parameter.copy_(state["floats"][name])
        gpu.emulate(model, state, arm, job["seed"])
        splits = {split: self.texts[task["text"], split] for split in ("val", "test")}
        plan = task | splits | {"text": self.texts[task["text"], "train"], "warmup": WARMUP}
        trainer = gpu.Trainer(model, plan | {"eta": job["eta"], "seed": job["seed"]})
        record = job | trainer.run(POINTS)
        if job["task"] == "pretrain":
            aside = self.checkpoint.with_suffix(".tmp")
            torch.save(gpu.codes_and_floats(model), aside)
            os.replace(aside, self.checkpoint)
        elif state is not None:
            record["code_after"] = trainer.held_out(self.texts["code", "test"])
        return record


def work(index: int, folder: Path, pipe: Any) -> None:
    """A process for one GPU: jobs in, records out."""
    os.environ["CUDA_VISIBLE_DEVICES"] = str(index)
    worker = Worker(folder)
    while (job := pipe.recv()) is not None:
        try:
            pipe.send(worker.run(job))
        except Exception:
            pipe.send(job | {"error": traceback.format_exc()})


def deal(folder: Path, gpus: int, todo: list[Job]) -> None:
    """Run the jobs; fine-tuning waits for the checkpoint."""
    context, begun = multiprocessing.get_context("spawn"), time.monotonic()
    ends = [context.Pipe() for _ in range(gpus)]
    for index, (_, end) in enumerate(ends):
        context.Process(target=work, args=(index, folder, end), daemon=True).start()
    busy: dict[int, Job] = {}
    with (folder / "records.jsonl").open("a") as log:
        while todo or busy:
            for index in set(range(gpus)) - set(busy):
                ready = [j for j in todo if j["task"] in ("pretrain", "scratch") or (folder / "pretrained.pt").exists()]
                if ready:
                    todo.remove(ready[0])
                    busy[index] = ready[0]
                    ends[index][0].send(ready[0])
            for index in [*busy]:
                if ends[index][0].poll(0.05):
                    record, label = ends[index][0].recv(), busy.pop(index)
                    if "error" in record:
                        raise RuntimeError(f"{label}: {record['error']}")
                    log.write(json.dumps(record) + "\n")
                    log.flush()
                    name = f"{record['task']:9}{record['arm']:20} seed {record['seed']}"
                    losses = f"{record['start']:.4f} -> {record['test']:.4f} nats/byte"
                    print(f"{time.monotonic() - begun:6.0f} s  {name}  {losses}, {len(todo)} left", flush=True)
    for near, _ in ends:
        near.send(None)


def table(records: list[Job]) -> str:
    """Markdown: bits, and by task the test loss (mean, spread over seeds) and the share of frozen -> best shadow32."""
    from .measured import bits_of

    found: dict[tuple[str, str], list[float]] = {}
    for record in records:
        if ARMS.get(record["arm"], {}).get("rates", {}).get(record["task"]) == record["eta"]:
            found.setdefault((record["task"], record["arm"]), []).append(record["test"])
    mean = {place: sum(values) / len(values) for place, values in found.items()}
    lines = ["| arm | bits, measured | short | long | from scratch |", "|---|---|---|---|---|"]
    for arm in ARMS:
        cells = []
        for task in ("short", "long", "scratch"):
            values = found.get((task, arm))
            if not values:
                cells.append("")
                continue
            text = f"{mean[task, arm]:.4f}" + (f" ± {(max(values) - min(values)) / 2:.4f}" if len(values) > 1 else "")
            start, end = mean.get((task, "frozen")), mean.get((task, "shadow32"))
            if task == "scratch" and end is not None:
                text += f" ({mean[task, arm] - end:+.4f})"
            elif start is not None and end is not None:
                text += f" ({(start - mean[task, arm]) / (start - end):.3f})"
            cells.append(text + f" n={len(values)}")
        lines.append(f"| {arm} | {bits_of(ARMS[arm]):.2f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m onebit_ext.torch.study.small", description=__doc__)
    parser.add_argument("action", nargs="?", choices=("run", "report"), default="run")
    parser.add_argument("--out", type=Path, default=Path("out/study-small"), metavar="FOLDER")
    parser.add_argument("--seeds", type=int, default=3, help="of every arm (default %(default)s)")
    args = parser.parse_args()
    if args.action == "run":
        import torch

        gpus = torch.cuda.device_count()
        if not gpus:
            raise SystemExit(
                "the small study needs a GPU: torch sees none; `onebit-ext study` runs the tiny one on a CPU"
            )
        args.out.mkdir(parents=True, exist_ok=True)
        from . import site_text

        site_text.load(args.out / "texts")  # once, before the processes start
        done = {key(record) for record in read(args.out)}
        deal(args.out, gpus, [job for job in jobs(args.seeds) if key(job) not in done])
    print(table(read(args.out)))


if __name__ == "__main__":
    main()
