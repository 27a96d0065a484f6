"""What a step of full fine-tuning writes to the drive, known before it runs."""

from __future__ import annotations

from collections.abc import Sequence

from offload_rt.optimizer.pieces import TrainedBlock
from offload_rt.optimizer.state import StateHome


def bytes_written_per_step(
    blocks: Sequence[TrainedBlock],
    home: StateHome,
    *,
    commit_every: int | None,
    gradient_passes: int,
) -> int:
    """Bytes of a mean step that is not done twice; a commit's own records, some KiB, are left out.

    State that rests in the log is written in every step, with the weights that stream from there; state in memory by
    commits alone. `gradient_passes`: how often a step writes all gradients, 0 where they wait in memory.
    """
    total = 0.0
    for block in blocks:
        for piece in block.pieces:
            if piece.name not in home.pieces:
                total += piece.num_bytes
            elif commit_every is not None:
                total += piece.num_bytes / commit_every
        if block.weights is not None and home.streams_weights(block):
            total += block.weights.stored_bytes
        total += gradient_passes * block.gradients.stored_bytes
    return round(total)
