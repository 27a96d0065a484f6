"""What is known of the step under way, what was done in all of them, and when they train nothing."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from offload_rt.errors import IntegrityError
from offload_rt.guards.integrity import Reached, check_present, check_slope
from offload_rt.optimizer.param_groups import Options
from offload_rt.optimizer.pieces import TrainedBlock

MAX_SKIPPED_IN_A_ROW = 5
"""Steps whose gradients are not finite, after which something is broken."""


@dataclass(kw_only=True)
class StepCounters:
    """What happened to steps since the start."""

    num_steps: int = 0
    num_clipped: int = 0
    num_ahead_of_norm: int = 0
    """Blocks that were stepped before the norm was known."""
    num_redone: int = 0
    """Steps that were done again, because the norm asked for clipping or options had changed."""
    num_skipped: int = 0
    """Steps left out, because a gradient was not finite."""


@dataclass(kw_only=True)
class Step:
    """What is known of one step, made anew for each: how it began, and what came before it."""

    order: tuple[TrainedBlock, ...]
    """That of the last step's gradients: so state is read ahead."""
    follows_clipped: bool = False
    num_skipped_before: int = 0
    """Steps in a row right before this one that were left out."""
    options: list[Options] | None = None
    """The optimizer's when the first gradient arrived."""
    passes: set[int] = field(default_factory=set)
    """Backward passes, by torch's number, that have brought gradients."""
    grad_scale: float | None = None
    """What the caller has asked for by `clip_grad_norm_`."""

    def again(self) -> Step:
        """The same step as it was before its first gradient."""
        return Step(order=self.order, follows_clipped=self.follows_clipped, num_skipped_before=self.num_skipped_before)


def check_first(names: Sequence[str], present: Collection[str], norm: float, reached: Reached | None) -> None:
    """In the first step, something must train, and all of `names` that the forward came to. IntegrityError if not."""
    check_present(present, names, 1, reached)
    if norm == 0:
        check_slope(len(names), 1, reached)


def check_skipped(num_skipped: int, step: int) -> None:
    """Raises IntegrityError where too many steps in a row, the last ones behind `step`, were left out."""
    if num_skipped >= MAX_SKIPPED_IN_A_ROW:
        raise IntegrityError(
            f"{num_skipped} steps in a row had gradients that are not finite; the state is that of step {step}. Usual "
            f"causes: a learning rate that is too high, broken data, fp16 overflow"
        )
