"""Adapters whose optimizer state rests in tiers (QLoRA's paged optimizer, arXiv 2305.14314).

Weights and gradients stay in memory, where autograd and torch's own tools find them. Only the update differs: state is
read piece by piece, many small parameters to a piece, stepped by the user's own optimizer, and written back; on a
device see `paged`. Parameters are stepped themselves, in their dtype, so that every bit is that of the optimizer in
memory. The copy of the weights in the pieces is what a commit holds of them: what somebody changes by hand is in a
commit from the next step on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from offload_rt.checkpoint.state import load_state, restore, save_state
from offload_rt.checkpoint.values import restore_rng
from offload_rt.guards.frozen_weights import State, states
from offload_rt.guards.integrity import Reached
from offload_rt.optimizer.adapter_saving import TieredState
from offload_rt.optimizer.arrivals import Arrival
from offload_rt.optimizer.in_memory import AdapterSteps
from offload_rt.optimizer.interface import Check, Values
from offload_rt.optimizer.log_commit import is_log
from offload_rt.optimizer.pieces import TrainedBlock
from offload_rt.optimizer.saving import load_commit
from offload_rt.optimizer.tiered_training import TieredParts, TieredTraining
from offload_rt.optimizer.writes import state_report
from offload_rt.transfers.links import Links
from planners.plans.placement import UpdateMode


class ParameterGradients:
    """Gradients where autograd puts them, and where they are stepped; or an emulated link is between the two."""

    def __init__(self, links: Links) -> None:
        self._links = links

    def submitted(self, block: TrainedBlock) -> tuple[None, tuple[Arrival, ...]]:
        """No slot holds them. Over an emulated link all of them are on their way to HOST from now on."""
        present = self.present(block)
        num_bytes = sum(block.parameters[index].parameter.nbytes for index in present)
        out = self._links.pace(f"gradients of {block.name}", num_bytes, inward=False)
        return None, () if out is None else (Arrival(out, lambda: None),)

    def present(self, block: TrainedBlock) -> set[int]:
        return {index for index, trained in enumerate(block.parameters) if trained.parameter.grad is not None}

    def of(self, block: TrainedBlock, slot: None, index: int, begin: int = 0, end: int | None = None) -> Tensor:
        trained = block.parameters[index]
        if trained.parameter.grad is None:
            raise RuntimeError(f"{trained.name} has no gradient")
        return trained.parameter.grad.detach().reshape(-1)[begin:end]


class AdapterTraining(TieredTraining):
    """An `interface.Training`. The updates of one engine, and their commits. Used by one thread."""

    state_name = "optimizer state of adapters"

    def __init__(self, parts: TieredParts, steps: AdapterSteps) -> None:
        super().__init__(parts)
        self._steps = steps
        self._as_stepped: list[State] = []

    @property
    def trainable(self) -> Mapping[str, nn.Parameter]:
        """What trains, by name, in the model's order."""
        return self._steps.trainable

    def check_by(self, reached: Reached) -> None:
        self._steps.reached = reached

    def before_forward(self) -> None:
        self.commits.check_usable()
        if torch.is_grad_enabled() or not self.commits.is_due or self._as_stepped == states(self.trainable.values()):
            self.commits.finish()  # else it is an evaluation of other weights, which are put back

    def _finish_commit(self) -> None:
        self.commits.check_usable()
        self.commits.finish()

    def before_weights_are_read(self) -> None:
        """They are in memory, always."""

    def take_step(self) -> None:
        self._steps.take(self.optimizer, self.step_number + 1)

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        return self._steps.clip(max_norm)

    def gradient_items(self) -> Iterator[tuple[str, Tensor]]:
        return self._steps.gradients()

    def step(self) -> None:
        """Updates every parameter that has a gradient. Blocks. Raises as `AdapterSteps` says."""
        self._finish_commit()
        self._steps.begins(self.optimizer, self.step_number + 1)
        present = [
            trained for block in self.blocks for trained in block.parameters if trained.parameter.grad is not None
        ]
        with self.commits.broken_unless_done(f"step {self.step_number + 1} failed half-way"):
            self._expect_next()  # of what is not on its way yet
            for block in self.blocks:
                self.stepper.submit(block)
            self.stepper.finish()
        for trained in present:
            self.progress.steps[trained.name] = self.progress.steps.get(trained.name, 0) + 1
        self.have_changed(trained.parameter for trained in present)
        self.progress.scalars.update(self.stepper.new_scalars)
        self.stepper.new_scalars.clear()
        self.step_number += 1
        self.commits.step_taken(self.step_number)
        self._as_stepped = states(self.trainable.values())
        self._expect_next()
        self._steps.is_over(self.optimizer)

    def forget(self) -> None:
        """Nothing: gradients are where the optimizer forgets them itself."""

    def stop(self) -> None:
        self.stepper.forget()
        self.stepper.new_scalars.clear()

    def save(self, folder: Path) -> None:
        """The folder is that of `checkpoint.state`, whose errors these are."""
        self._finish_commit()
        if self.is_commit_folder(folder):
            self.commits.commit()
            return
        values = {"step": self.step_number, **self.commits.extra()}
        save_state(folder, self._steps.trainable, self.optimizer, values, state=TieredState(self))

    def load(self, folder: Path, check: Check) -> Values:
        """Raises as `load_state` does."""
        self.commits.finish()
        if self.is_commit_folder(folder):
            values = load_commit(self, check)
            for block in self.blocks:
                self.stepper.load_what_rests_in_memory(block)
                self.stepper.rebuild_weights(block)
                self.have_changed(trained.parameter for trained in block.parameters)
            self.begin_again((), from_log=False)
            restore_rng(values["rng"])
            return values
        trainable, state = self._steps.trainable, TieredState(self)
        if is_log(folder):
            with self.open_log(folder) as commit:
                values = restore(commit.saved_run(self.rule.name), trainable, self.optimizer, check, state=state)
        else:
            values = load_state(folder, trainable, self.optimizer, check, state=state)
        self.step_number = int(values["step"])
        self.begin_again((), from_log=False)
        return values

    def report(self) -> Values:
        """Counts and seconds since the start, bytes at rest."""
        return {
            "num_steps": self.step_number, **asdict(self.commits.counters), **self.stepper.report(),
            "mode": UpdateMode.AFTER.value,
            **state_report(
                self.blocks, self.home, mode=UpdateMode.AFTER, commit_every=self.commits.every, gradient_passes=0
            ),
        }  # fmt: skip

    def begin_again(self, weights: Sequence[str], *, from_log: bool) -> None:
        for block in self.blocks if from_log else ():  # weights are where they were, whatever was written into them
            self.stepper.load_what_rests_in_memory(block)
        self.commits.begin_again(self.step_number)
        self._expect_next()

    def _expect_next(self) -> None:
        """Reads the first state of the next step while its forward runs."""
        if self.home.log is not None:
            self.stepper.expect(self.blocks)
