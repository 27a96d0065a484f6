"""One step of full fine-tuning: gradients arrive, blocks are stepped, the norm decides, a commit makes it real.

Where state rests in a log, blocks are stepped before the norm is known: [Note: stepping before the norm is known] in
`ahead`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offload_rt.adamw.cpu_adam import clip_scale
from offload_rt.checkpoint.values import restore_rng
from offload_rt.closing import all_close
from offload_rt.errors import ConfigError, IntegrityError, OffloadError
from offload_rt.guards.integrity import Reached
from offload_rt.optimizer.ahead import Ahead
from offload_rt.optimizer.gradients import Gradients, is_finite
from offload_rt.optimizer.interface import Check, Values
from offload_rt.optimizer.pieces import TrainedBlock
from offload_rt.optimizer.saving import load_commit, load_training, save_training
from offload_rt.optimizer.stand_ins import StandIns
from offload_rt.optimizer.state import Part, laid_weights
from offload_rt.optimizer.step import MAX_SKIPPED_IN_A_ROW, Step, StepCounters, check_first, check_skipped
from offload_rt.optimizer.tiered_training import TieredParts, TieredTraining
from offload_rt.optimizer.writes import state_report
from offload_rt.optimizer.written_weights import WrittenWeights
from planners.plans.placement import UpdateMode

logger = logging.getLogger("offload_rt")


class FullTraining(TieredTraining):
    """An `interface.Training`. What happens between backward passes where all parameters train. Used by one thread."""

    state_name = "masters and moments"

    def __init__(
        self,
        parts: TieredParts,
        gradients: Gradients,
        *,
        mode: UpdateMode,
        accumulation_steps: int,
        max_grad_norm: float | None,
        before_weights_change: Callable[[], None],
        make_room: Callable[[], None],
        more_to_come: Callable[[], bool],
    ) -> None:
        """`before_weights_change` makes sure that nobody reads weights ahead; `make_room` is called before memory is
        taken for what is as large as a vocabulary; `more_to_come` is whether the next to arrive are another
        micro-batch's gradients of the same block.
        """
        super().__init__(parts)
        self.gradients = gradients
        self.counters = StepCounters()
        self.grad_norm: float | None = None
        """Of the last step, before clipping."""
        self.rehearse: Callable[[TrainedBlock, Mapping[int, Tensor]], None] | None = None
        """What takes gradients in place of `deliver`; see `rehearsed`."""
        self.num_micro_batches = accumulation_steps
        """Of a step, as declared."""
        self._max_grad_norm = max_grad_norm
        self._before_weights_change = before_weights_change
        self._make_room = make_room
        self._more_to_come = more_to_come
        self._now = Step(order=tuple(reversed(self.blocks)))
        self._reached: Reached | None = None
        self._stand_ins = StandIns(self.blocks, self.deliver)
        self._written = WrittenWeights(self.blocks, self.home, self.stepper)
        self.ahead = Ahead(self.home, self.stepper, self.commits, self._written, before_weights_change, mode=mode)
        gradients.wait_for_room = self.stepper.wait_for_one
        gradients.in_background = self.stepper.settle

    def taker(self, name: str) -> Callable[[Mapping[int, Tensor]], None]:
        """`deliver` for the block `name`."""
        block = next(block for block in self.blocks if block.name == name)
        return lambda gradients: self.deliver(block, gradients)

    def deliver(self, block: TrainedBlock, gradients: Mapping[int, Tensor]) -> None:
        """Takes one micro-batch's gradients of `block`. May step the block, see the note above."""
        if not gradients:
            return
        if self.rehearse is not None:
            self.rehearse(block, gradients)
            return
        if block in self.ahead.blocks:
            why = f"{block.name} received gradients once more after accumulation_steps={self.num_micro_batches} of them"
            self.ahead.wait_from_now_on(why)
            self.forget()
            raise ConfigError(
                f"{why}, and had been updated by then, so that later ones were taken with new weights. This step was "
                f"dropped; the next ones wait for step(). Declare engine(accumulation_steps=)"
            )
        if (this_pass := torch._C._current_graph_task_id()) not in self._now.passes:
            self._forget_if_zeroed()
            self._now.passes.add(this_pass)
        if self._now.options is None:
            self._now.options = self.groups.options()
        if block.weights is None:
            self._make_room()
        last = self.gradients.num_arrivals(block) + 1 >= self.num_micro_batches
        self.gradients.add(block, gradients, with_norms=last)
        self._stand_ins.put(block, gradients)
        if last and self._steps_ahead(block):
            self.ahead.step(block)
            self.counters.num_ahead_of_norm += 1
            if self.ahead.mode is UpdateMode.BACKWARD and not self.home.part(block, Part.IN_MEMORY):
                self.gradients.keep_norms_only(block)
                return
        if not self._more_to_come():
            self.gradients.put_away(block)

    def before_forward(self) -> None:
        """Undoes what was stepped ahead of a step that has not come: a forward in between sees the old weights."""
        self._between_steps("the model was called between backward and step")
        if torch.is_grad_enabled():  # an evaluation may be one of other weights
            self.check_written("forward")

    def check_by(self, reached: Reached) -> None:
        self._reached = reached

    def settled(self) -> bool:
        return not self.gradients.blocks and super().settled() and not self._written

    def have_changed(self, parameters: Iterable[Tensor]) -> None:
        changed = list(parameters)
        super().have_changed(changed)
        self._written.are_known(changed)

    def weights_are_in_place(self) -> None:
        """The engine has made the parameters of the model: what is written into them from now on is somebody else's."""
        self._written.all_are_known()

    def check_written(self, asked: str) -> None:
        """Raises `ConfigError` where somebody has written into weights; see `written_weights`."""
        if self._written:
            self.stepper.finish()
            self._written.check(asked, self.ahead.blocks)

    def before_weights_are_read(self) -> None:
        self._between_steps("the model was saved between backward and step")

    def _between_steps(self, why: str) -> None:
        """Makes state that of the last step, and its commit. `why` that is wanted, where the next has begun already."""
        self.commits.check_usable()
        self.commits.finish()
        self._forget_if_zeroed()
        if self.ahead.blocks:
            self._undo_because(why)

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Makes the coming step scale its gradients to `max_norm`; returns their norm. Blocks for gradients on NVMe."""
        self._forget_if_zeroed()
        if self._now.grad_scale is not None:
            raise ConfigError("clip_grad_norm_: was called for this step already")
        if self._max_grad_norm != max_norm:
            self._undo_because(f"gradients were clipped to {max_norm:g}, and max_grad_norm was not declared so")
        total, self._now.grad_scale = self._norm(max_norm)
        return torch.tensor(total)

    def gradient_items(self) -> Iterator[tuple[str, Tensor]]:
        """Name and gradient of every parameter that has one, a copy that is the caller's."""
        self._forget_if_zeroed()
        if any(self.gradients.is_gone(block) for block in self.gradients.blocks):
            self._undo_because("gradients were looked at between backward and step")
        yield from self.gradients.copies()

    def step(self) -> None:
        """Updates everything that has gradients, and commits if it is time. Blocks."""
        self.commits.check_usable()
        self.commits.finish()
        self._forget_if_zeroed()
        if not self.gradients.blocks:
            raise IntegrityError("step: no gradient has arrived; call engine.backward(loss) first")
        try:
            taken = self._step()
        except BaseException:
            self._abandon()
            raise
        if taken:
            self.commits.step_taken(self.step_number)
        self._expect_next()

    def forget(self) -> None:
        """Drops the gradients of this step and what was stepped with them, or failed to be."""
        if self.ahead.blocks:
            self.stop()
            self._expect_next()
        self._forget_all()

    def _forget_if_zeroed(self) -> None:
        """Drops the gradients that the model's own zero_grad has taken away, which does not say so."""
        if self._stand_ins.were_zeroed(self.gradients):
            self.forget()

    def stop(self) -> None:
        """Drops the gradients of this step and what was stepped with them, and reads nothing ahead. Blocks."""
        self.stepper.forget()
        if self.ahead.blocks:
            self.ahead.drop()
        self._forget_all()

    def take_step(self) -> None:
        self.optimizer.step()

    def save(self, folder: Path) -> None:
        """A copy of the state, a clone where the file system can; of the commit folder, none."""
        self._between_steps("state was saved between backward and step")
        self.check_written("save_checkpoint")
        save_training(self, folder)

    def load(self, folder: Path, check: Check) -> Values:
        self.commits.finish()
        if self.is_commit_folder(folder):
            values = load_commit(self, check)
            self.begin_again(values["weights"], from_log=True)
        else:
            values = load_training(self, folder, check)
            self.begin_again((), from_log=self.home.log is not None)
        restore_rng(values["rng"])
        return values

    def begin_again(self, weights: Sequence[str], *, from_log: bool) -> None:
        self._before_weights_change()
        for block in self.blocks:
            if from_log:
                self.stepper.load_what_rests_in_memory(block)
            if laid_weights(block) not in weights or not self.home.streams_weights(block):
                self.stepper.rebuild_weights(block)
            self.have_changed(trained.parameter for trained in block.parameters)
        self._written.forget()
        self.commits.begin_again(self.step_number)
        self._now = Step(order=self._now.order)
        self.ahead.blocks.clear()
        self._expect_next()

    def go_on_from(self, before: TieredTraining) -> None:
        super().go_on_from(before)
        if isinstance(before, FullTraining):
            self.counters, self.grad_norm = before.counters, before.grad_norm
            self.ahead.waits_because, self._now = before.ahead.waits_because, before._now.again()

    def report(self) -> dict[str, Any]:
        """Counts and seconds since the start, bytes at rest."""
        return {
            **asdict(self.counters), **asdict(self.commits.counters), **self.stepper.report(),
            "mode": self.ahead.mode.value,
            "waits_because": self.ahead.waits_because, "grad_norm": self.grad_norm,
            **state_report(
                self.blocks, self.home, mode=self.ahead.mode, commit_every=self.commits.every,
                gradient_passes=self.num_micro_batches if self.gradients.on_drive else 0,
            ),
        }  # fmt: skip

    def close(self) -> None:
        self._stand_ins.close()
        super().close()

    def _let_go(self) -> None:
        all_close(self._let_go_of_gradients, super()._let_go)

    def _let_go_of_gradients(self) -> None:
        with suppress(OffloadError):
            self.gradients.clear()

    def _steps_ahead(self, block: TrainedBlock) -> bool:
        return (
            self.step_number > 0
            and not self._now.follows_clipped
            and self.gradients.num_arrivals(block) == self.num_micro_batches
            and self.ahead.may_step(block)
        )

    def _norm(self, max_norm: float | None) -> tuple[float, float]:
        """The norm of all gradients, and the scale that clips it, in the order of the model's parameters."""
        norms = self.gradients.norms()
        ordered = [norms[name] for name in self._names if name in norms]
        total, scale = clip_scale(ordered, max_norm if max_norm is not None else float("inf"))
        if not is_finite(norms):
            total = float("nan")
        return total, scale if max_norm is not None else 1.0

    def _step(self) -> bool:
        """Whether the step was taken; False where it was left out."""
        now = self._now
        self._before_weights_change()
        self.stepper.finish()
        self.check_written("step")
        total, scale = self._norm(self._max_grad_norm)
        if now.grad_scale is not None:
            scale = now.grad_scale
        self.grad_norm = total
        arrived = self.gradients.blocks
        if not self.step_number:
            present = {block.parameters[i].name for block in arrived for i in self.gradients.present(block)}
            check_first(self._names, present, total, self._reached)
        elif self._reached is not None:
            self._reached.remove()
        if not total < float("inf"):
            self._skip()
            return False
        if now.options != self.groups.options():
            self.counters.num_redone += bool(self.ahead.blocks)
            self._undo_because("options of the optimizer were changed between backward and step")
        if self.ahead.blocks and scale != 1.0:
            self.counters.num_redone += 1
            self.ahead.undo()
        left = [(block, Part.IN_MEMORY if block in self.ahead.blocks else Part.ALL) for block in arrived]
        left = [(block, part) for block, part in left if self.home.part(block, part)]
        whole = [block for block, part in left if part is Part.ALL]
        self.ahead.blocks += [block for block in whole if self.home.part(block, Part.IN_LOG)]
        half = "half a step was made of what rests in memory"
        in_memory = any(self.home.part(block, Part.IN_MEMORY) for block in arrived)
        with self.commits.broken_unless_done(half) if in_memory else nullcontext():
            if whole:
                self.stepper.expect(whole)
            for block, part in left:
                self.stepper.submit(block, part, grad_scale=scale)
                self.gradients.release(block)
            self.stepper.finish()
            for block in arrived:
                changed = [block.parameters[index] for index in self.gradients.present(block)]
                for trained in changed:
                    self.progress.steps[trained.name] = self.progress.steps.get(trained.name, 0) + 1
                self.have_changed(trained.parameter for trained in changed)
            self.progress.scalars.update(self.stepper.new_scalars)
        clipped = scale != 1.0
        self._forget_all(then=Step(order=tuple(arrived), follows_clipped=clipped))
        self.step_number += 1
        self.counters.num_steps += 1
        self.counters.num_clipped += clipped
        return True

    def _expect_next(self) -> None:
        """Reads the first state of the next step while its forward runs."""
        if self.home.log is not None:
            self.stepper.expect(self._now.order)

    def _skip(self) -> None:
        self.ahead.undo()
        num_skipped = self._now.num_skipped_before + 1
        self._forget_all(then=replace(self._now.again(), num_skipped_before=num_skipped))
        self.counters.num_skipped += 1
        logger.warning(
            "step %d was left out: a gradient is not finite (%d in a row, of %d that end the run)",
            self.step_number + 1, num_skipped, MAX_SKIPPED_IN_A_ROW,
        )  # fmt: skip
        check_skipped(num_skipped, self.step_number)

    def _undo_because(self, why: str) -> None:
        """Takes back what was stepped ahead, and steps nothing ahead from now on. ConfigError where it is too late."""
        self.ahead.wait_from_now_on(why)
        if self.ahead.blocks and self.ahead.mode is UpdateMode.BACKWARD:
            self.forget()
            raise ConfigError(
                f"{why}; this step's updates ran behind its backward pass, as declared, and its gradients are gone. It "
                f"was dropped; the next ones wait for step(). Declare engine(accumulation_steps=, max_grad_norm=)"
            )
        self.ahead.undo()

    def _abandon(self) -> None:
        """After an error in a step: nothing of it stands, where the log has what was before."""
        with suppress(OffloadError):
            self.stepper.forget()
        if self.ahead.blocks and self.commits.broken is None:
            if self.commits.can_go_back:
                self.ahead.drop()
            else:
                self.commits.broken = f"step {self.step_number + 1} failed, and the one before it was not committed"
        self._forget_all()

    def _forget_all(self, *, then: Step | None = None) -> None:
        """Ends this step; `then` is the next one, the same again without."""
        if self._reached is not None:
            self._reached.forget()
        self._now = then if then is not None else self._now.again()
        self.ahead.blocks.clear()
        self.gradients.clear()
        self.stepper.new_scalars.clear()
        self._stand_ins.clear()
