"""Blocks that are stepped before the norm of all gradients is known, and how that is taken back.

[Note: stepping before the norm is known]
A block whose state rests in the log can be stepped as soon as its gradients are complete, behind the backward pass of
the next block: the committed state stays whole in the other slot. When the last gradient is there, the norm is known:

    within bounds          what was stepped stands, and is committed
    clipping is needed     the log drops it, and every block is stepped again with the right scale
    not finite             the log drops it, and the step is left out

So the result is that of clipping first, to the bit. It takes a commit each step (with two slots an extent there is one
state to go back to), and gradients that stay until the commit, unless no clipping was declared. Pieces that rest in
memory have one copy and are stepped when the norm is known, those of a block whose other pieces rest in the log too.
After a step that clipped, the next one waits for its norm: clipping comes in runs, and doing a step twice costs more
than waiting.

The first step always waits: so a loop is seen that clips, changes the learning rate or accumulates between backward and
step without having declared it; such a loop goes on waiting, and the report says why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from offload_rt.optimizer.commits import Commits
from offload_rt.optimizer.pieces import TrainedBlock
from offload_rt.optimizer.state import Part, StateHome
from offload_rt.optimizer.stepper import Stepper
from offload_rt.optimizer.written_weights import WrittenWeights
from planners.plans.placement import UpdateMode

logger = logging.getLogger("offload_rt")


class Ahead:
    """What of the step under way was stepped in the log, and may still be taken back. Used by one thread."""

    def __init__(
        self,
        home: StateHome,
        stepper: Stepper,
        commits: Commits,
        written: WrittenWeights,
        before_weights_change: Callable[[], None],
        *,
        mode: UpdateMode,
    ) -> None:
        """`before_weights_change` makes sure that nobody reads weights ahead."""
        self.mode = mode
        self.blocks: list[TrainedBlock] = []
        self.waits_because: str | None = None
        """Why blocks are not stepped before the norm is known, although the plan says so."""
        self._home = home
        self._stepper = stepper
        self._commits = commits
        self._written = written
        self._before_weights_change = before_weights_change

    def may_step(self, block: TrainedBlock) -> bool:
        """Whether `block` can be stepped now, if its gradients are complete and the step before did not clip."""
        return (
            self.mode in (UpdateMode.BACKWARD, UpdateMode.SPECULATIVE)
            and self.waits_because is None
            and self._commits.can_go_back
            and bool(self._home.part(block, Part.IN_LOG))
        )

    def step(self, block: TrainedBlock) -> None:
        """Steps what of `block` rests in the log, behind the backward pass. Does not block."""
        self._stepper.submit(block, Part.IN_LOG)
        self.blocks.append(block)

    def wait_from_now_on(self, why: str) -> None:
        """Steps nothing ahead any more, and says so once."""
        if self.waits_because is None and self.mode is not UpdateMode.AFTER:
            self.waits_because = why
            logger.warning("updates wait for step() from now on, and do not run behind the backward pass: %s", why)

    def undo(self) -> None:
        """Takes back what was stepped; gradients stay. Blocks."""
        if self.blocks:
            self._stepper.finish()
            self.drop()

    def drop(self) -> None:
        """The same, where nothing is under way any more. The state is broken if it fails half-way."""
        log = self._home.log
        with self._commits.broken_unless_done("a step could not be taken back"):
            if log is not None:
                log.drop()
            self._written.are_overwritten(self.blocks)
            for block in self.blocks:
                if not self._home.streams_weights(block):
                    self._stepper.rebuild_weights(block)
            self._stepper.new_scalars.clear()
            self.blocks.clear()
            self._before_weights_change()
