"""A run of training: how far it is, what goes on with it, and from where.

What a resumed run needs (engine state, the schedule, the place in the data, the step) is saved together by the engine,
as tracked objects. They agree only between two steps: nothing but `Run.take_step` moves them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from offload_rt.errors import ConfigError, NonFiniteLoss
from offload_rt.training.events import TensorBoard, WeightsAndBiases, Writer
from offload_rt.training.options import TrainingOptions, lr_factor
from offload_rt.training.run_folder import RunFolder, low_memory_text
from offload_rt.training.saves import Progress, Save, Saves, SavingEngine


class TrainingEngine(SavingEngine, Protocol):
    """What the loop needs of `offload_rt.Engine`."""

    @property
    def optimizer(self) -> torch.optim.Optimizer | None: ...
    @property
    def step_number(self) -> int: ...
    def train_batch(self, batches: list[dict[str, Any]], /) -> float: ...
    def track(self, name: str, tracked: Any, /) -> None: ...
    def load_checkpoint(self, folder: Any, /) -> object: ...
    def report(self) -> Mapping[str, Any]: ...


class ResumableBatches(Protocol):
    """An endless iterator over micro-batches that knows its place, such as `training.batches.Batches`."""

    @property
    def epoch(self) -> int: ...
    def num_batches(self, epoch: int, /) -> int: ...
    def __next__(self) -> dict[str, Any]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any], /) -> None: ...


class Run:
    """One that takes the steps of `options` with an engine. It is begun, or goes on, before its first step is taken."""

    def __init__(
        self,
        engine: TrainingEngine,
        optimizer: torch.optim.Optimizer,
        batches: ResumableBatches,
        options: TrainingOptions,
        folder: RunFolder,
        *,
        drives: Sequence[Path] = (),
    ) -> None:
        """Gives the engine what it is to track, and `optimizer`, which is the engine's, the schedule of `options`."""
        self.engine, self.batches, self.options, self.folder = engine, batches, options, folder
        self.total_steps = num_steps(options, batches)
        self._optimizer = optimizer
        self._progress = Progress(folder.run_id, options.out)
        self._scheduler = _schedule(optimizer, options, self.total_steps)
        for name, tracked in (("progress", self._progress), ("batches", batches), ("scheduler", self._scheduler)):
            engine.track(name, tracked)
        self.saves = Saves(engine, folder, self._progress, keep_last=options.keep_last, drives=drives)
        if options.copy_every is not None and not self.saves.commits:
            raise ConfigError("copy_every: without commits on NVMe every save is a copy; give save_every")
        self._found: Save | None = None
        """Where it goes on from."""
        self._saved_at = self._done_before = 0
        self.loss: float | None = None
        """Of the step that the engine was last asked for; None before the first one of this object."""

    @property
    def step(self) -> int:
        """Steps taken in all."""
        return self._progress.step

    @property
    def steps_left(self) -> int:
        return self.total_steps - self.step

    @property
    def lr(self) -> float:
        """Of the coming step, in the optimizer's first group."""
        return float(self._scheduler.get_last_lr()[0])

    def start(self, settings: Mapping[str, Any]) -> list[Writer]:
        """Begins the run, or goes on from its newest save, which is loaded; returns what its events are written with.

        `settings` are kept in the run's folder: they must be the same when it goes on.
        """
        if self.options.resume:
            self._go_on()
        else:
            self.saves.require_free()
            self.folder.be_new()
            self._progress.belong_to(self.folder.run_id)
        self._done_before = self.folder.last_step()
        writers: list[Writer] = []
        if self.options.logdir is not None:
            writers.append(TensorBoard(self.options.logdir, at_step=self.step))
        commits = self.engine.commit_folder if self.saves.commits else None
        self.folder.begin(at_step=self.step, settings=settings, commits=commits)
        self.folder.prune(keep_last=self.options.keep_last)  # who was killed behind a save may not have come to it
        if self.options.wandb:
            writers.append(WeightsAndBiases(self.folder.run_id, self.folder.path, settings))
        return writers

    def _go_on(self) -> None:
        self._found = self.saves.find()
        if self._found is None:
            return
        progress, scheduler = self._progress, self._scheduler
        self.engine.load_checkpoint(self._found.folder)
        if progress.in_step:
            progress.in_step = False
            progress.step += 1
        while scheduler.last_epoch < progress.step:  # who ended between the step that was committed and this
            _advance(scheduler)
        self._saved_at = progress.step
        for group, lr in zip(self._optimizer.param_groups, scheduler.get_last_lr(), strict=True):
            group["lr"] = lr

    def past(self) -> list[str]:
        """Sentences on where a run that is resumed goes on from; none for one that is begun."""
        if not self.options.resume:
            return []
        place = self._found.describe if self._found is not None else "the beginning: there is no checkpoint yet"
        again = max(0, self._done_before - self.step)
        steps_again = f"; {again} step(s) after it are taken again" if again else ""
        low_memory = [f"before, {low_memory_text(line)}" for line in self.folder.low_memory()[-1:]]
        return [f"resuming from {place}{steps_again}", *low_memory]

    def take_step(self, micro_batches: list[dict[str, Any]]) -> float | None:
        """Trains with them; returns the loss. None where the engine has left the step out, and said so: the next
        batches take it. Raises `NonFiniteLoss`.
        """
        self._progress.in_step = True
        steps_before = self.engine.step_number
        self.loss = self.engine.train_batch(micro_batches)
        self._progress.in_step = False
        if not math.isfinite(self.loss):
            newest = self.saves.newest()
            raise NonFiniteLoss(
                f"step {self.step + 1}: the loss is {self.loss}; "
                + (f"the last good state is {newest.folder}" if newest else "no checkpoint was saved yet")
            )
        if self.engine.step_number == steps_before:
            return None
        _advance(self._scheduler)
        self._progress.step += 1
        return self.loss

    def save(self) -> None:
        """Makes the state behind the last step durable, unless it is. Blocks."""
        self.saves.save()
        self._saved_at = self.step

    def saved(self) -> Save | None:
        """The newest save, which is of the last step: it is made unless it was. None of a run without a step."""
        return self.saves.save() if self._saved_at != self.step else self.saves.newest()


def num_steps(options: TrainingOptions, batches: ResumableBatches) -> int:
    """Optimizer steps of the whole run."""
    if options.steps is not None:
        return options.steps
    num_batches = sum(batches.num_batches(epoch) for epoch in range(options.epochs or 0))
    return math.ceil(num_batches / options.accumulation_steps)


def _schedule(
    optimizer: torch.optim.Optimizer, options: TrainingOptions, total_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    if options.lr is not None:
        for group in optimizer.param_groups:
            group["lr"] = options.lr
            group.pop("initial_lr", None)

    def factor(step: int) -> float:
        return lr_factor(step, total_steps=total_steps, warmup_ratio=options.warmup_ratio, schedule=options.schedule)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _advance(scheduler: torch.optim.lr_scheduler.LambdaLR) -> None:
    with warnings.catch_warnings():
        # torch looks whether `optimizer.step` was called; an engine steps each block where its state lies.
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        scheduler.step()
