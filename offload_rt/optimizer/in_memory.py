"""Adapters that train in memory, with torch's own optimizer; and how a step of adapters is taken wherever they rest.

Their optimizer is torch's, which any loop may step itself. So steps are seen by the optimizer's own hooks, those of
`engine.step` too, and each is checked, counted and committed once, whoever takes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from offload_rt.checkpoint.state import FolderCommits, load_state, restore, save_state
from offload_rt.config import NO_COMMIT_FOLDER
from offload_rt.errors import ConfigError, IntegrityError
from offload_rt.guards.frozen_weights import State, states
from offload_rt.guards.integrity import (
    CHECKED_STEPS,
    Reached,
    check_gradients,
    check_moved,
    check_norm,
    check_optimizer,
)
from offload_rt.optimizer.interface import Check, Values
from offload_rt.optimizer.log_commit import OpenLog, is_log
from offload_rt.optimizer.others import refusal
from offload_rt.optimizer.rules import rule_for
from offload_rt.running.steps import weak_hook


class AdapterSteps:
    """Steps of adapters whose weights and gradients are where torch put them, checked while they are the first."""

    def __init__(self, trainable: Mapping[str, nn.Parameter], max_grad_norm: float | None) -> None:
        """`trainable` is in the model's order, in which norms are summed. `max_grad_norm`: as declared."""
        self.trainable = trainable
        self._max_grad_norm = max_grad_norm
        self.reached: Reached | None = None
        """See `interface.Training.check_by`."""
        self._flat_steps: set[int] = set()
        """Of the first ones, those whose loss depended on no output, so that nothing could be seen: later ones are
        checked in their place.
        """
        self._before: dict[str, Tensor] = {}
        """Of a first step that is under way, what it is to change."""

    def take(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Clips as declared, takes the step number `step`, from 1, and forgets the gradients. The optimizer's step
        calls `begins` and `is_over`, whose errors these are.
        """
        if self._max_grad_norm is not None:
            self._check(optimizer, step)  # clipping spreads what is not finite
            check_norm(self.clip(self._max_grad_norm), step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def begins(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Raises `IntegrityError`, before anything is updated."""
        self._check(optimizer, step)
        is_first = step == 1 + len(self._flat_steps)
        self._before = {name: p.detach().clone() for name, p in self.trainable.items()} if is_first else {}

    def is_over(self, optimizer: torch.optim.Optimizer) -> None:
        """Raises `IntegrityError` where a first step has changed nothing."""
        before, self._before = self._before, {}
        if self.reached is not None:
            self.reached.forget()
        if before:
            check_moved(before, self.trainable, optimizer)

    def _check(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        if step in self._flat_steps and self._is_flat():  # it was looked at before it was clipped
            return
        if step > CHECKED_STEPS + len(self._flat_steps):
            if self.reached is not None:
                self.reached.remove()
            return
        try:
            check_gradients(self.trainable, step, self.reached)
        except IntegrityError:
            if self.reached is not None:
                self.reached.forget()
            raise
        if self._is_flat():
            self._flat_steps.add(step)
        check_optimizer(optimizer, self.trainable)

    def _is_flat(self) -> bool:
        return self.reached is not None and self.reached.is_flat

    def clip(self, max_norm: float) -> Tensor:
        """As torch does, by torch."""
        return torch.nn.utils.clip_grad_norm_(list(self.trainable.values()), max_norm)

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Of every parameter that has one, the tensor itself."""
        for name, parameter in self.trainable.items():
            if parameter.grad is not None:
                yield name, parameter.grad


class MemoryTraining:
    """An `interface.Training`. Without an optimizer nothing trains, and steps, saves and loads are refused."""

    state_name = "optimizer state of adapters"

    def __init__(
        self,
        steps: AdapterSteps,
        optimizer: torch.optim.Optimizer | None,
        *,
        commit_every: int | None,
        commit_folder: Path | None,
        open_log: OpenLog,
    ) -> None:
        """`commit_every`: steps between commits to `commit_folder`, which is None without a drive."""
        self.optimizer = optimizer
        self.step_number = 0
        self._is_stepping = False
        """Whether a step has begun that is not counted: an optimizer's `step` may call that of its base, hooks too."""
        self._steps = steps
        self._extra: Callable[[], Values] = dict
        self._amend: Callable[[Values], Values] = dict
        self._commit_folder = commit_folder
        self._commit_every = commit_every
        self.open_log = open_log
        self._as_stepped: list[State] = []
        self._commits = self._committing()

    def _committing(self) -> FolderCommits | None:
        """Commits of what the optimizer steps, where there are to be some."""
        if self.optimizer is None or self._commit_every is None:
            return None
        return FolderCommits(
            self._steps.trainable, self.optimizer, self._values, lambda values: self._amend(values),
            every=self._commit_every, folder=self.commit_folder,
        )  # fmt: skip

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        if self.optimizer is not None and (self.step_number or self.optimizer.state):
            raise refusal(
                optimizer,
                f"{type(self.optimizer).__name__}, which is, has state of this run, from steps or from a checkpoint",
            )
        self.optimizer = optimizer
        self._count_on(optimizer)
        self._commits = self._committing()

    @property
    def committed(self) -> None:
        """None: there is no log."""
        return None

    @property
    def commit_folder(self) -> Path:
        if self._commit_folder is None:
            raise ConfigError(NO_COMMIT_FOLDER)
        return self._commit_folder

    def carry(self, extra: Callable[[], Values], amend: Callable[[Values], Values]) -> None:
        self._extra, self._amend = extra, amend

    def check_by(self, reached: Reached) -> None:
        self._steps.reached = reached

    def before_forward(self) -> None:
        if self._commits is None or not self._commits.is_due:
            return
        if torch.is_grad_enabled() or self._as_stepped == states(self._steps.trainable.values()):
            self._commits.finish()  # else it is an evaluation of other weights, which are put back

    def _commit_what_is_due(self) -> None:
        if self._commits is not None:
            self._commits.finish()

    def before_weights_are_read(self) -> None:
        """They are, always."""

    def commit_next(self) -> None:
        """Nothing: what trains stays where it is, whatever runtime comes."""

    def settled(self) -> bool:
        self._commit_what_is_due()
        return True

    def take_step(self) -> None:
        optimizer = self._training("step: nothing trains; give adapters=, or leave some parameters requires_grad")
        self._commit_what_is_due()
        self._steps.take(optimizer, self.step_number + 1)

    def watch(self) -> list[RemovableHandle]:
        """See `interface.Training`."""
        if self.optimizer is None:
            return []
        return [
            self.optimizer.register_step_pre_hook(weak_hook(self._step_begins)),
            self.optimizer.register_step_post_hook(weak_hook(self._step_is_over)),
            self.optimizer.register_load_state_dict_post_hook(weak_hook(self._count_on)),
        ]

    def _count_on(self, optimizer: torch.optim.Optimizer) -> None:
        """State was loaded, by a loop that goes on with what it has saved itself: so do steps, where the optimizer has
        counted them.
        """
        steps = [int(state["step"]) for state in optimizer.state.values() if "step" in state]
        self.step_number = max(steps, default=self.step_number)

    def _step_begins(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._commit_what_is_due()  # of a loop that takes two steps without a forward in between
        if all(argument is None for argument in (*args[1:], *kwargs.values())):  # a closure has yet to take gradients
            self._steps.begins(optimizer, self.step_number + 1)
        self._is_stepping = True

    def _step_is_over(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not self._is_stepping:
            return
        self._is_stepping = False
        self._steps.is_over(optimizer)
        self.step_number += 1
        if self._commits is not None:
            self._commits.step_taken(self.step_number)
            self._as_stepped = states(self._steps.trainable.values())

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        return self._steps.clip(max_norm)

    def gradient_items(self) -> Iterator[tuple[str, Tensor]]:
        return self._steps.gradients()

    def save(self, folder: Path) -> None:
        optimizer = self._training("save_checkpoint: nothing trains")
        self._commit_what_is_due()
        save_state(folder, self._steps.trainable, optimizer, self._values())

    def load(self, folder: Path, check: Check) -> Values:
        optimizer = self._training("load_checkpoint: nothing trains")
        self._commit_what_is_due()
        if is_log(folder):
            with self.open_log(folder) as commit:
                saved = commit.saved_run(rule_for(optimizer, in_place=True).name)
                values = restore(saved, self._steps.trainable, optimizer, check)
        else:
            values = load_state(folder, self._steps.trainable, optimizer, check)
        self.step_number = int(values["step"])
        return values

    def report(self) -> None:
        """None: there is nothing that torch does not know."""
        return None

    def abandon(self) -> None:
        if self._commits is not None:
            self._commits.abandon()

    def close(self) -> None:
        self._commit_what_is_due()

    def _values(self) -> Values:
        return {"step": self.step_number, **self._extra()}

    def _training(self, otherwise: str) -> torch.optim.Optimizer:
        """The optimizer. ConfigError, which says `otherwise`, where nothing trains."""
        if self.optimizer is None:
            raise ConfigError(otherwise)
        return self.optimizer
