"""What a training run is asked to do, checked once. Nothing here imports torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offload_rt.errors import ConfigError, nearest

SCHEDULES = ("linear", "cosine", "constant")


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """The loop's options. Exactly one of `steps` and `epochs` is given."""

    out: Path
    """The run's folder: checkpoints and metrics."""
    steps: int | None = None
    """Optimizer steps in all, those of a resumed run included."""
    epochs: int | None = None
    """Passes over the data; the last step may take its last micro-batches from the next pass."""
    lr: float | None = None
    """Peak learning rate; None keeps what the engine's optimizer has."""
    warmup_ratio: float = 0.0
    """Share of the steps, in [0, 1), over which the learning rate rises from near zero."""
    schedule: str = "linear"
    """"linear" and "cosine" fall towards zero after the warm-up, "constant" does not."""
    accumulation_steps: int = 1
    """Micro-batches per step; the engine must have been made for the same number."""
    save_every: int | None = None
    """Steps between saves at least; None saves at the end only (and when interrupted). Where an engine commits on NVMe,
    a save is a commit, and most engines commit every step anyway."""
    copy_every: int | None = None
    """Where an engine commits on NVMe: steps between copies of the state in `out`. None makes none."""
    keep_last: int = 2
    """Checkpoints that stay; older ones are removed after a newer one is complete."""
    eval_every: int | None = None
    """Steps between evaluations, where there is one; None makes one at the end only."""
    logdir: Path | None = None
    """TensorBoard's folder; None writes none."""
    wandb: bool = False
    """Report to Weights & Biases."""
    resume: bool = False
    """Continue from the newest checkpoint in `out`; without one, start from the beginning and say so."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", Path(self.out))
        if self.logdir is not None:
            object.__setattr__(self, "logdir", Path(self.logdir))
        if (self.steps is None) == (self.epochs is None):
            raise ConfigError(f"steps, epochs: give one of the two, got {self.steps!r} and {self.epochs!r}")
        optional = ("steps", "epochs", "save_every", "copy_every", "eval_every")
        for field in (*optional, "accumulation_steps", "keep_last"):
            value = getattr(self, field)
            if value is None and field in optional:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{field}: must be a whole number of at least 1, got {value!r}")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise ConfigError(f"lr: must be more than zero, got {self.lr!r}")
        if not 0 <= self.warmup_ratio < 1:
            raise ConfigError(f"warmup_ratio: must be at least 0 and below 1, got {self.warmup_ratio!r}")
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"schedule: {self.schedule!r}; {nearest(self.schedule, SCHEDULES)}")

    def settings(self) -> dict[str, Any]:
        """What must not change when the run is resumed. Plain values."""
        return {
            "lr": self.lr, "warmup_ratio": self.warmup_ratio, "schedule": self.schedule,
            "accumulation_steps": self.accumulation_steps,
        }  # fmt: skip


def lr_factor(step: int, *, total_steps: int, warmup_ratio: float, schedule: str) -> float:
    """Step `step`'s share (from 0) of the peak learning rate; above zero for every step of the run."""
    warmup_steps = math.ceil(warmup_ratio * total_steps)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    remaining = max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))
    return remaining if schedule == "linear" else 0.5 * (1.0 - math.cos(math.pi * remaining))
