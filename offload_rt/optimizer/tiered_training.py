"""What training all parameters and training adapters have in common where their state rests in tiers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from offload_rt.checkpoint.values import rng_state, unpack_values
from offload_rt.closing import all_close
from offload_rt.config import NO_COMMIT_FOLDER
from offload_rt.errors import ConfigError
from offload_rt.memory.arena import Slot
from offload_rt.optimizer.commits import Commits
from offload_rt.optimizer.interface import Values
from offload_rt.optimizer.log_commit import OpenLog
from offload_rt.optimizer.others import refusal
from offload_rt.optimizer.param_groups import ParamGroups
from offload_rt.optimizer.pieces import TrainedBlock
from offload_rt.optimizer.rules import UpdateRule
from offload_rt.optimizer.state import StateHome
from offload_rt.optimizer.stepper import Progress, Stepper
from offload_rt.optimizer.tiered import TieredOptimizer


@dataclass(frozen=True, kw_only=True)
class TieredParts:
    """What a training is made of, whatever trains. It belongs to the training from then on."""

    blocks: tuple[TrainedBlock, ...]
    """In the order of the model's parameters."""
    rule: UpdateRule
    home: StateHome
    stepper: Stepper
    progress: Progress
    """The stepper's."""
    made: torch.optim.Optimizer
    """The user's, or what the run before has made of it."""
    commit_every: int | None
    """Steps between commits; None makes none by itself."""
    commit_folder: Path | None
    """Where commits are; None without a drive."""
    open_log: OpenLog
    """Opens what another run has committed."""
    on_close: Callable[[], None]
    """Closes what state rests in."""


class TieredTraining(ABC):
    """State in pieces, the optimizer that the user sees of it, and what a commit carries."""

    state_name: str
    """See `interface.Training`."""

    def __init__(self, parts: TieredParts) -> None:
        self.step_number = 0
        self.blocks = parts.blocks
        self.rule = parts.rule
        self.open_log = parts.open_log
        self.home = parts.home
        self.stepper = parts.stepper
        self.progress = parts.progress
        made, given = parts.made, (self.step, self.forget, lambda: self.step_number)
        self.optimizer = made if isinstance(made, TieredOptimizer) else TieredOptimizer(made, *given)
        self.optimizer.serve(*given)
        names = {id(trained.parameter): trained.name for block in self.blocks for trained in block.parameters}
        self._names = tuple(names.values())
        self.groups = ParamGroups(self.optimizer, names)
        self.commits = Commits(
            self.blocks, self.home, self._values, self.groups.values, every=parts.commit_every,
            folder=parts.commit_folder,
        )  # fmt: skip
        self._on_close = parts.on_close

    @abstractmethod
    def step(self) -> None:
        """What the optimizer's `step` does: updates everything that has gradients. Blocks."""

    @abstractmethod
    def forget(self) -> None:
        """What the optimizer's `zero_grad` does besides."""

    @abstractmethod
    def before_forward(self) -> None:
        """See `interface.Training`."""

    @abstractmethod
    def stop(self) -> None:
        """Drops what was stepped ahead, and reads nothing ahead any more. Blocks."""

    @abstractmethod
    def begin_again(self, weights: Sequence[str], *, from_log: bool) -> None:
        """After state was loaded: brings what rests in memory there, rounds masters into weights, and reads ahead anew.

        `weights` names blocks whose weights in the log are those of the state. Without `from_log`, state is in memory
        already. Blocks.
        """

    def go_on_from(self, before: TieredTraining) -> None:
        """Takes over the run of `before`, which is closed, and whose state is what this log has committed, or, without
        one, in the memory that it left. Blocks.
        """
        self.commits.carry(*before.commits.carried)
        self.commits.counters = before.commits.counters
        self.stepper.go_on_counting(before.stepper)
        self.progress.steps |= before.progress.steps
        self.progress.scalars |= before.progress.scalars
        self.step_number = before.step_number
        in_log = self.home.log is not None
        self.begin_again((self.committed or {}).get("weights", ()), from_log=in_log)

    @property
    def only_copies(self) -> Mapping[str, Slot]:
        """State that memory alone has, by piece: all of it without a log."""
        return {} if self.home.log is not None else self.home.pieces

    @property
    def committed(self) -> Values | None:
        """See `interface.Training`."""
        return None if self.home.log is None else unpack_values(self.home.log.committed.payload)

    @property
    def commit_folder(self) -> Path:
        """See `interface.Training`."""
        if self.commits.folder is None:
            raise ConfigError(NO_COMMIT_FOLDER)
        return self.commits.folder

    def is_commit_folder(self, folder: Path) -> bool:
        """Whether `folder` is where the commits of this run are."""
        return self.commits.folder is not None and folder.resolve() == self.commits.folder.resolve()

    def carry(self, extra: Callable[[], Values], amend: Callable[[Values], Values]) -> None:
        """See `interface.Training`."""
        self.commits.carry(extra, amend)

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Refused: its state would be in memory beside the plan, and weights others than what the tiers have."""
        raise refusal(optimizer, f"the {self.state_name} rest in tiers, where the engine steps them")

    def watch(self) -> list[RemovableHandle]:
        """None: the optimizer's steps are this training's own."""
        return []

    def commit_next(self) -> None:
        """See `interface.Training`."""
        self.commits.commit_next()

    def settled(self) -> bool:
        """See `interface.Training`."""
        self.before_forward()
        return self.home.log is None or self.commits.can_go_back

    def have_changed(self, parameters: Iterable[Tensor]) -> None:
        """Tells autograd, which does not see what the stepper writes: graphs that have saved these are of no use now,
        nor calls of layers that would run again with them.
        """
        torch.autograd.graph.increment_version(list(parameters))

    def load_values(self, values: Mapping[str, Any]) -> None:
        """Takes over what was saved of `commits.all_values`. ConfigError where these are other param groups."""
        self.groups.load(values["groups"])
        self.progress.steps = dict(values["steps"])
        self.progress.scalars = dict(values["scalars"])
        self.step_number = int(values["step"])

    def abandon(self) -> None:
        """See `interface.Training`."""
        self.commits.abandon()

    def close(self) -> None:
        """Makes the commit that is due; what was not committed is lost. Ends the updates and closes the log."""
        all_close(self._commit_what_is_due, self.stepper.close, self._let_go)

    def _commit_what_is_due(self) -> None:
        if self.commits.is_due:
            self.stop()
            self.commits.finish()

    def _let_go(self) -> None:
        self._on_close()

    def _values(self) -> Values:
        return {
            "step": self.step_number, "steps": dict(self.progress.steps),
            "scalars": {name: dict(scalars) for name, scalars in self.progress.scalars.items() if scalars},
            "groups": self.groups.values(), "rng": rng_state(),
        }  # fmt: skip
