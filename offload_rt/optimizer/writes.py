"""What state takes, and what a step writes of it to the drive, known before it runs."""

from __future__ import annotations

from collections.abc import Sequence

from offload_rt.optimizer.pieces import TrainedBlock
from offload_rt.optimizer.state import Part, StateHome
from planners.plans.placement import UpdateMode


def state_report(
    blocks: Sequence[TrainedBlock],
    home: StateHome,
    *,
    mode: UpdateMode,
    commit_every: int | None,
    gradient_passes: int,
) -> dict[str, int]:
    """Bytes at rest, and those of a mean step; see `_bytes_written_per_step`."""
    return {
        "state_bytes": sum(block.state_bytes for block in blocks),
        "state_in_memory_bytes": sum(slot.num_bytes for slot in home.pieces.values()),
        "expected_bytes_written_per_step": _bytes_written_per_step(
            blocks, home, mode=mode, commit_every=commit_every, gradient_passes=gradient_passes
        ),
    }


def _bytes_written_per_step(
    blocks: Sequence[TrainedBlock],
    home: StateHome,
    *,
    mode: UpdateMode,
    commit_every: int | None,
    gradient_passes: int,
) -> int:
    """Bytes of a mean step that is not done twice; a commit's own records, some KiB, are left out.

    State that rests in the log is written in every step, with the weights that stream from there: twice of a block that
    is stepped in two parts, ahead of the norm and after it. State in memory is written by commits alone.
    `gradient_passes`: how often a step's gradients come, 0 where they wait in memory; the last ones of a block that is
    stepped behind the backward pass are not written.
    """
    total = 0.0
    for block in blocks:
        in_memory, in_log = home.part(block, Part.IN_MEMORY), home.part(block, Part.IN_LOG)
        ahead = mode is not UpdateMode.AFTER and bool(in_log)
        for piece in block.pieces:
            if piece.name not in home.pieces:
                total += piece.num_bytes
            elif commit_every is not None:
                total += piece.num_bytes / commit_every
        total += home.log_weights_bytes(block) * (2 if ahead and in_memory else 1)
        gone = mode is UpdateMode.BACKWARD and ahead and not in_memory
        total += max(0, gradient_passes - gone) * block.gradients.stored_bytes
    return round(total)
