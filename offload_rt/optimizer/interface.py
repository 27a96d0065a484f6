"""What an engine asks of whatever trains, wherever its state rests.

    in_memory.MemoryTraining    adapters; torch's own optimizer holds their state
    adapters.AdapterTraining    adapters whose state rests in tiers
    training.FullTraining       all parameters

So whoever steps, saves or loads does not ask which of them it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from offload_rt.guards.integrity import Reached

Check = Callable[[Mapping[str, Any]], None]
"""May refuse what was saved besides the state, by raising, before anything is changed."""
Values = dict[str, Any]
"""Plain values and tensors."""


class Training(Protocol):
    """One run's optimizer, its steps and its commits. Used by one thread."""

    state_name: str
    """What is in its tiers, for a summary."""
    step_number: int
    """Steps made, those of the run that it goes on from included."""

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """What the user's schedulers work on; None where nothing trains."""

    @property
    def committed(self) -> Values | None:
        """What the newest commit holds besides the state, 0 as `step` where it was just made. None without a log."""

    @property
    def commit_folder(self) -> Path:
        """Where commits are. ConfigError without `nvme=`."""

    def carry(self, extra: Callable[[], Values], amend: Callable[[Values], Values]) -> None:
        """Sets what is saved besides; `amend` replaces of it what follows a step, see `commits`."""

    def check_by(self, reached: Reached) -> None:
        """What the first steps' gradients are checked by. It is removed when they have been."""

    def before_forward(self) -> None:
        """Makes the commit of the last step, where it is due, and the weights those of that step. Blocks."""

    def before_weights_are_read(self) -> None:
        """Makes the weights those of the last step. Blocks."""

    def commit_next(self) -> None:
        """The step that was just taken is committed when the next forward begins, however often others are."""

    def settled(self) -> bool:
        """Makes the commit that is due. Whether another runtime finds all of the last step, and nothing of the next has
        begun. Blocks.
        """

    def take_step(self) -> None:
        """Clips as declared, updates by the optimizer, and forgets the gradients. Blocks."""

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Steps are those of `optimizer` from now on, which a loop has made over all that trains. ConfigError where
        state would be lost.
        """

    def watch(self) -> list[RemovableHandle]:
        """Sees the steps that a loop takes by the optimizer itself. The caller removes the hooks."""

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scales the gradients so that their global norm is at most `max_norm`; returns the norm before."""

    def gradient_items(self) -> Iterator[tuple[str, Tensor]]:
        """Name and gradient of every parameter that has one."""

    def save(self, folder: Path) -> None:
        """Saves the state as it is now, atomically and durably; for the commit folder, by a commit. Blocks."""

    def load(self, folder: Path, check: Check) -> Values:
        """Goes on from what `folder` holds, and returns what was saved besides the state. Blocks.

        Raises `CheckpointError` where it does not fit, `CheckpointVerifyError` where its bytes have changed.
        """

    def report(self) -> Values | None:
        """Counts and seconds since the start, bytes at rest; None where torch's optimizer holds all."""

    def abandon(self) -> None:
        """Where the loop has failed since the last step, leaves that uncommitted: [Note: steps that a loop has not
        finished] in `closing`.
        """

    def close(self) -> None:
        """Makes the commit that is due, and lets go of everything. What was not committed is lost."""
