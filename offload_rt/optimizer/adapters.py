"""Adapters whose optimizer state rests in tiers (QLoRA's paged optimizer, arXiv 2305.14314).

Weights and gradients stay in memory, where autograd and torch's own tools find them. Only the update differs: state is
read piece by piece, many small parameters to a piece, stepped by the user's own optimizer, and written back. Parameters
are stepped themselves, in their dtype, so that every bit is that of the optimizer in memory. The copy of the weights in
the pieces is what a commit holds of them: what somebody changes by hand is in a commit from the next step on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offload_rt.checkpoint.values import rng_state
from offload_rt.optimizer.arrivals import Arrival
from offload_rt.optimizer.commits import Commits
from offload_rt.optimizer.param_groups import ParamGroups
from offload_rt.optimizer.pieces import TrainedBlock
from offload_rt.optimizer.rules import UpdateRule
from offload_rt.optimizer.state import StateHome
from offload_rt.optimizer.stepper import Progress, Stepper
from offload_rt.optimizer.tiered import TieredOptimizer
from offload_rt.optimizer.writes import state_report
from planners.placement import UpdateMode


class ParameterGradients:
    """Gradients where autograd puts them."""

    def submitted(self, block: TrainedBlock) -> tuple[None, tuple[Arrival, ...]]:
        """No slot holds them, and nothing is under way."""
        return None, ()

    def present(self, block: TrainedBlock) -> set[int]:
        return {index for index, trained in enumerate(block.parameters) if trained.parameter.grad is not None}

    def of(self, block: TrainedBlock, slot: None, index: int, begin: int = 0, end: int | None = None) -> Tensor:
        trained = block.parameters[index]
        if trained.parameter.grad is None:
            raise RuntimeError(f"{trained.name} has no gradient")
        return trained.parameter.grad.detach().reshape(-1)[begin:end]


class AdapterTraining:
    """The updates of one engine, and their commits. Used by one thread."""

    def __init__(
        self,
        blocks: Sequence[TrainedBlock],
        rule: UpdateRule,
        home: StateHome,
        stepper: Stepper,
        progress: Progress,
        made: torch.optim.Optimizer,
        *,
        commit_every: int | None,
        commit_folder: Path | None,
        on_close: Callable[[], None],
    ) -> None:
        self.blocks = tuple(blocks)
        self.rule = rule
        self.home = home
        self.stepper = stepper
        self.progress = progress
        self.optimizer = TieredOptimizer(made, self.step, lambda: None)
        names = {id(trained.parameter): trained.name for block in blocks for trained in block.parameters}
        self.groups = ParamGroups(self.optimizer, names)
        self.commits = Commits(blocks, home, self._values, self.groups.values, every=commit_every, folder=commit_folder)
        self.step_number = 0
        self._on_close = on_close

    def before_forward(self) -> None:
        """Makes the commit of the last step, where it is due. Blocks."""
        self.commits.check_usable()
        self.commits.finish()

    def step(self) -> None:
        """Updates every parameter that has a gradient. Blocks."""
        self.before_forward()
        present = [
            trained.name for block in self.blocks for trained in block.parameters if trained.parameter.grad is not None
        ]
        with self.commits.broken_unless_done(f"step {self.step_number + 1} failed half-way"):
            self._expect_next()  # of what is not on its way yet
            for block in self.blocks:
                self.stepper.submit(block)
            self.stepper.finish()
        for name in present:
            self.progress.steps[name] = self.progress.steps.get(name, 0) + 1
        self.progress.scalars.update(self.stepper.new_scalars)
        self.stepper.new_scalars.clear()
        self.step_number += 1
        self.commits.step_taken(self.step_number)
        self._expect_next()

    def stop(self) -> None:
        """Reads nothing ahead any more. Blocks."""
        self.stepper.forget()
        self.stepper.new_scalars.clear()

    def load_values(self, values: Mapping[str, Any]) -> None:
        """Takes over what a commit carries. ConfigError where param groups are not those of this run."""
        self.groups.load(values["groups"])
        self.progress.steps = dict(values["steps"])
        self.progress.scalars = dict(values["scalars"])
        self.step_number = int(values["step"])

    def begin_again(self, weights: Sequence[str] = (), *, from_log: bool = True) -> None:
        """After state was loaded: brings what rests in memory there, and weights to where they are used. Blocks.

        Without `from_log`, both are there already.
        """
        if from_log:
            for block in self.blocks:
                self.stepper.load_what_rests_in_memory(block)
                self.stepper.rebuild_weights(block)
        self.commits.begin_again(self.step_number)
        self._expect_next()

    def report(self) -> dict[str, Any]:
        """Counts and seconds since the start, bytes at rest."""
        return {
            "num_steps": self.step_number, **asdict(self.commits.counters), **asdict(self.stepper.counters),
            "mode": UpdateMode.AFTER.value,
            **state_report(
                self.blocks, self.home, mode=UpdateMode.AFTER, commit_every=self.commits.every, gradient_passes=0
            ),
        }  # fmt: skip

    def close(self) -> None:
        """Makes the commit that is due; what was not committed is lost. The log is the caller's to close."""
        try:
            if self.commits.is_due:
                self.stop()
                self.commits.finish()
        finally:
            self.stepper.close()
            self._on_close()

    def _expect_next(self) -> None:
        """Reads the first state of the next step while its forward runs."""
        if self.home.log is not None:
            self.stepper.expect(self.blocks)

    def _values(self) -> dict[str, Any]:
        return {
            "step": self.step_number, "steps": dict(self.progress.steps),
            "scalars": {name: dict(scalars) for name, scalars in self.progress.scalars.items() if scalars},
            "groups": self.groups.values(), "rng": rng_state(),
        }  # fmt: skip
