"""How large each run of the study is: one table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """Steps of `batch` windows; eta: the middle of what every arm's dial is tried at, in cells per step.

    schedule: a name in ..schedule.SHAPES; "linear" to fine-tune and "wsd" from scratch help every arm.
    """

    steps: int
    batch: int
    eta: float
    schedule: str = "cosine"


@dataclass(frozen=True)
class Size:
    """The model and the budgets of the tasks; `pretrain` makes the checkpoint that fine-tuning starts from."""

    width: int
    layers: int
    heads: int
    hidden: int
    context: int
    windows: int  # held-out windows behind every loss
    facts: int
    budgets: dict[str, Budget]
    float_lr: float  # AdamW of embedding, head and norms, from scratch; fine-tuning takes a quarter
    seeds: int
    all_packages: bool  # texts of everything installed (site_text.py), or those of tools.text
    student: tuple[int, int]  # outputs and inputs of the layer that meets a teacher
    scale_lr: float = 2e-3  # relative to the first scale


SIZES = {
    "tiny": Size(
        width=64,
        layers=1,
        heads=2,
        hidden=192,
        context=48,
        windows=80,
        facts=8,
        budgets={
            "pretrain": Budget(700, 16, 0.03),
            "short": Budget(80, 8, 0.05, "linear"),
            "long": Budget(110, 8, 0.05, "linear"),
            "scratch": Budget(130, 8, 0.04, "wsd"),
            "copy": Budget(100, 8, 0.08, "wsd"),
            "teacher": Budget(120, 32, 0.05),
            "facts": Budget(80, 8, 0.05, "linear"),
        },
        float_lr=4e-3,
        seeds=2,
        all_packages=False,
        student=(64, 128),
    ),
    "small": Size(
        width=512,
        layers=8,
        heads=8,
        hidden=1408,
        context=256,
        windows=256,
        facts=1000,
        budgets={
            "pretrain": Budget(2500, 64, 0.08),
            "short": Budget(400, 64, 0.04, "linear"),
            "long": Budget(2000, 16, 0.03, "linear"),
            "scratch": Budget(1000, 64, 0.05, "wsd"),
            "copy": Budget(400, 64, 0.05, "wsd"),
            "teacher": Budget(1000, 64, 0.03),
            "facts": Budget(400, 64, 0.03, "linear"),
        },
        float_lr=2e-3,
        seeds=3,
        all_packages=True,
        student=(512, 512),
    ),
}
