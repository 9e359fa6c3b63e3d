"""`onebit-ext study`: methods x seeds on tasks, each method tuned on an equal budget; then the report."""

from __future__ import annotations

import argparse
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import UserError
from .cli import integer
from .console import Console
from .study_report import Entry, best, draw, report, table

if TYPE_CHECKING:
    from onebit_ext.torch.study.arms import Arm
    from onebit_ext.torch.study.library import Library
    from onebit_ext.torch.study.run import Engine
    from onebit_ext.torch.study.tasks import Task

HELP = "every training method on every task, tuned on equal budgets, with table and plots"
DESCRIPTION = """\
Compares what this package offers (residuals of 16 to 2 bits, momentum, one byte, block-cyclic, stochastic rounding,
Bop, codes frozen, float shadows in float32 and bfloat16, a float residual in the optimizer) on tasks:

  short, long   a checkpoint made on Python code learns English docstrings, C++ headers
  scratch       code from random weights          copy      a pattern over and over; the best loss is 0
  facts         sentences with codes, beside the old text    teacher   a known ternary layer behind noise

Every method is tried at three rates with seed 0 on validation text; the best one runs with other seeds and is
reported on test text, which tuning never sees. Every run is a JSON record in --out: run the same command again and it
goes on where it was. Writes study.json, study.md and pictures.

  onebit-ext study                          tiny models, every method and task
  onebit-ext study --tasks short --arms frozen,shadow32,residual8
  onebit-ext study --size small --device cuda --tasks short,long,scratch
                                            25 M ternary weights on every GPU of the machine, by the same rule on dense
                                            tensors (Bop, the optimizer's residual and teacher need the C kernels)

Exit code 0: done. 2: it could not run.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--size", choices=("tiny", "small"), default="tiny", help="of models and runs (default tiny)")
    parser.add_argument("--tasks", type=_words, help="some of them, with commas (default: all)")
    parser.add_argument("--arms", type=_words, help="methods, e.g. frozen,shadow32,residual8 (default: all)")
    parser.add_argument(
        "--seeds", type=integer(1, 100), metavar="N", help="runs that are reported (default: the size's)"
    )
    parser.add_argument("--steps", type=integer(1, 10**6), metavar="N", help="of every run, for a first look")
    parser.add_argument("--out", type=Path, default=Path("out/study"), metavar="FOLDER", help="default %(default)s")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="C kernels, or GPUs (default cpu)")
    parser.add_argument(
        "--jobs",
        type=integer(1, 256),
        help=f"runs at a time, a thread each (default: the CPUs, {cores}; or the GPUs)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout; what you watch goes to stderr")


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


@dataclass(frozen=True)
class Job:
    """One training run."""

    task: str
    arm: str
    purpose: str
    seed: int
    eta: float


def run(args: argparse.Namespace) -> int:
    if find_spec("torch") is None:
        raise UserError("torch is missing: pip install 'onebit-ext[torch]'")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a run is one thread; several runs go at a time
    console = Console(to_stderr=args.json)
    started = time.perf_counter()
    try:
        study = Study(args, console)
        records = study.records()
        found = {"size": args.size, "seeds": study.seeds, "tasks": list(study.tasks), "arms": list(study.arms)}
        rows = table(records, study.order())
        result = found | {"engine": study.engine.name, "rows": [asdict(row) for row in rows], "records": records}
        report(console, rows, records, args.out)
        result["plots"] = draw(console, rows, records, study.labels, args.out)
        (args.out / "study.json").write_text(json.dumps(result, allow_nan=False))
    except OSError as error:
        raise UserError(f"cannot write to {args.out}: {error.strerror}; choose another folder with --out") from None
    console.say(f"{args.out}: study.json, study.md; {time.perf_counter() - started:.0f} s")
    if args.json:
        print(json.dumps(result, allow_nan=False))
    return 0


class Study:
    """Which runs there are, and their records."""

    def __init__(self, args: argparse.Namespace, console: Console) -> None:
        from onebit_ext.torch.study.arms import BY_NAME
        from onebit_ext.torch.study.library import TASKS, Library

        self.args, self.console = args, console
        self.engine = _engine(args.device)
        self.gpus = _count_gpus() if args.device == "cuda" else 0
        names = _chosen("task", args.tasks, list(TASKS), lambda task: self.engine.refuses(BY_NAME["frozen"], task))
        arms = _chosen("arm", args.arms, list(BY_NAME), lambda arm: self.engine.refuses(BY_NAME[arm], names[0]))
        self.arms = {name: BY_NAME[name] for name in arms}
        args.out.mkdir(parents=True, exist_ok=True)
        self.library = Library(args.out, args.size, args.steps)
        self.seeds = args.seeds or self.library.size.seeds
        console.heading("Texts and checkpoint")
        self.library.gather(names, self.engine, console.say)
        self.tasks = {name: self.library.task(name) for name in names}
        self.labels = {name: arm.label for name, arm in self.arms.items()}

    def order(self) -> list[Entry]:
        """What the report shows, in its order."""
        return [
            Entry(task.name, task.unit, task.scratch, arm.name, arm.label, arm.bits)
            for task in self.tasks.values()
            for arm in self.arms.values()
        ]

    def records(self) -> list[dict[str, Any]]:
        console = self.console
        pairs = [(task, arm) for task in self.tasks.values() for arm in self.arms.values()]
        tune = [
            Job(task.name, arm.name, "tune", 0, eta)
            for task, arm in pairs
            for eta in arm.candidates(task.eta, task.scale_lr)
        ]
        steps = [self.tasks[job.task].steps for job in tune] + [task.steps for task, _ in pairs] * self.seeds
        progress = _Progress(console, len(steps), sum(steps))
        console.heading(f"Tuning: {len(tune)} runs with seed 0, on validation text")
        tuned = self.train(tune, progress)
        chosen = best(tuned)
        final = [
            Job(task.name, arm.name, "final", seed, chosen[task.name, arm.name])
            for task, arm in pairs
            for seed in range(1, self.seeds + 1)
        ]
        console.heading(f"Reported: {len(final)} runs at the best rates, on test text")
        return tuned + self.train(final, progress)

    def train(self, jobs: list[Job], progress: _Progress) -> list[dict[str, Any]]:
        """The records of jobs in their order; those of an earlier run are read."""
        records: dict[Job, dict[str, Any]] = {}
        for job in jobs:
            settings = self.library.settings(job.task, self.arms[job.arm], self.engine.name)
            record = self.library.read(self.library.path(**asdict(job)), settings)
            if record is not None:
                records[job] = record
                progress.skip(self.tasks[job.task].steps)
        missing = [job for job in jobs if job not in records]
        for job, record in self._run(missing):
            records[job] = record
            progress.done(job, self.arms[job.arm], record, self.tasks[job.task].steps)
        return [records[job] for job in jobs]

    def _run(self, jobs: list[Job]) -> Iterator[tuple[Job, dict[str, Any]]]:
        workers = min(self.args.jobs or self.gpus or len(os.sched_getaffinity(0)), len(jobs))
        setting = (self.args.out, self.args.size, self.args.steps, self.args.device)
        if workers <= 1:
            _begin(*setting)
            for job in jobs:
                yield job, _train(job)
            return
        with _pool(workers, setting, self.gpus) as pool:
            futures: dict[Future[dict[str, Any]], Job] = {pool.submit(_train, job): job for job in jobs}
            for future in as_completed(futures):
                yield futures[future], future.result()


@contextmanager
def _pool(workers: int, setting: tuple[Any, ...], gpus: int) -> Iterator[ProcessPoolExecutor]:
    context = get_context("spawn")
    turn = context.Value("i", 0)  # workers take the GPUs in turn
    pool = ProcessPoolExecutor(workers, context, _begin_worker, (gpus, turn, *setting))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _engine(device: str) -> Engine:
    if device == "cuda":
        from onebit_ext.torch.study import gpu

        return gpu.Engine()
    from onebit_ext.torch.study import engine

    return engine.Engine()


def _count_gpus() -> int:
    import torch

    count = torch.cuda.device_count()
    if not count:
        raise UserError("--device cuda: torch sees no GPU; leave the option out to run the C kernels on this CPU")
    return count


class _Progress:
    """A line per run: what it reached and how long the rest will take."""

    def __init__(self, console: Console, runs: int, steps: int) -> None:
        self.console, self.runs, self.left = console, runs, steps
        self.count, self.spent, self.start = 0, 0, time.perf_counter()

    def skip(self, steps: int) -> None:
        self.count += 1
        self.left -= steps
        self.start = time.perf_counter() if not self.spent else self.start

    def done(self, job: Job, arm: Arm, record: dict[str, Any], steps: int) -> None:
        self.count += 1
        self.left, self.spent = self.left - steps, self.spent + steps
        seconds = (time.perf_counter() - self.start) / self.spent * self.left
        loss = record["test" if job.purpose == "final" else "val"]
        reached = "diverged" if loss is None else f"{loss:8.4f}"
        what = f"{job.task:<8} {arm.label:<26} {job.purpose:<5} seed {job.seed} eta {job.eta:<8g}"
        self.console.say(f"  {self.count:>4}/{self.runs}  {what} {reached}  {_time(seconds)} left")


def _time(seconds: float) -> str:
    return f"{seconds:3.0f} s" if seconds < 100 else f"{seconds / 60:3.0f} min"


# ------------------------------------------------------------------ in a worker
_worker: tuple[Library, Engine, dict[str, Task]]


def _begin(out: Path, size: str, steps: int | None, device: str) -> None:
    """Once per process."""
    global _worker
    import torch

    import onebit_ext as ob
    from onebit_ext.torch.study.library import Library

    torch.set_num_threads(1)
    ob.set_num_threads(1)
    _worker = Library(out, size, steps), _engine(device), {}


def _begin_worker(gpus: int, turn: Any, *setting: Any) -> None:
    """A Ctrl-C reaches the whole group: the runs in hand end and are kept, and the parent stops."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with turn.get_lock():
        if gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = str(turn.value % gpus)
        turn.value += 1
    _begin(*setting)


def _end_with_parent() -> None:
    """A parent that was killed tells its workers nothing."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _train(job: Job) -> dict[str, Any]:
    from onebit_ext.torch.study.arms import BY_NAME
    from onebit_ext.torch.study.run import train_arm

    library, engine, tasks = _worker
    if job.task not in tasks:
        tasks[job.task] = library.task(job.task)
    arm = BY_NAME[job.arm]
    record = train_arm(arm, tasks[job.task], job.seed, job.eta, engine, job.purpose)
    record["settings"] = library.settings(job.task, arm, engine.name)
    library.write(library.path(**asdict(job)), record)
    return record


def _chosen(kind: str, given: list[str] | None, known: list[str], refusal: Callable[[str], str]) -> list[str]:
    """The names given, or all that the engine has, in our order."""
    for name in given or []:
        if name not in known:
            raise UserError(f"no {kind} {name!r}; there are {', '.join(known)}")
        if reason := refusal(name):
            raise UserError(reason)
    return [name for name in known if (not refusal(name) if given is None else name in given)]
