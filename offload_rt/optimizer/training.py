"""One step of full fine-tuning: gradients arrive, blocks are stepped, the norm decides, a commit makes it real.

[Note: stepping before the norm is known]
A block whose state rests in the log can be stepped as soon as its gradients are complete, behind the backward pass of
the next block: the committed state stays whole in the other slot. When the last gradient is there, the norm is known:

    within bounds          what was stepped stands, and is committed
    clipping is needed     the log drops it, and every block is stepped again with the right scale
    not finite             the log drops it, and the step is left out

So the result is that of clipping first, to the bit. It takes a commit each step (with two slots an extent there is one
state to go back to), and gradients that stay until the commit, unless no clipping was declared. State that rests in
memory has one copy and is stepped when the norm is known. After a step that clipped, the next one waits for its norm:
clipping comes in runs, and doing a step twice costs more than waiting.

[Note: when a step is committed]
A loop steps its schedulers after `step` has returned, and draws its next batch before the next forward. So a commit has
everything as it was when `step` returned, but schedulers and learning rates as they are when the next forward begins,
which is when it is made (or by `close`, or by whoever saves or loads before).

The first step always waits: so a loop is seen that clips, changes the learning rate or accumulates between backward and
step without having declared it; such a loop goes on waiting, and the report says why.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from offload_rt.checkpoint.values import pack_values, rng_state
from offload_rt.cpu_adam import clip_scale
from offload_rt.errors import ConfigError, IntegrityError, OffloadError
from offload_rt.optimizer.gradients import Gradients, is_finite
from offload_rt.optimizer.pieces import TrainedBlock
from offload_rt.optimizer.state import StateHome
from offload_rt.optimizer.stepper import Progress, Stepper
from offload_rt.optimizer.tiered import AbsentGradient, TieredOptimizer
from offload_rt.optimizer.writes import bytes_written_per_step
from planners.placement import UpdateMode

logger = logging.getLogger("offload_rt")

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
    num_commits: int = 0
    commit_seconds: float = 0.0


class FullTraining:
    """What an engine does between backward passes where all parameters train. Used by one thread."""

    def __init__(
        self,
        blocks: Sequence[TrainedBlock],
        home: StateHome,
        gradients: Gradients,
        stepper: Stepper,
        progress: Progress,
        made: torch.optim.Optimizer,
        *,
        mode: UpdateMode,
        accumulation_steps: int,
        max_grad_norm: float | None,
        commit_every: int | None,
        before_weights_change: Callable[[], None],
        more_to_come: Callable[[], bool],
        commit_folder: Path | None,
        on_close: Callable[[], None],
    ) -> None:
        """`before_weights_change` makes sure that nobody reads weights ahead; `more_to_come` is whether the next to
        arrive are another micro-batch's gradients of the same block.
        """
        self.blocks = tuple(blocks)
        self.home = home
        self.gradients = gradients
        self.stepper = stepper
        self.progress = progress
        self.counters = StepCounters()
        self.optimizer = TieredOptimizer(made, self.step, self.forget)
        self.step_number = 0
        self.grad_norm: float | None = None
        """Of the last step, before clipping."""
        self.waits_because: str | None = None
        """Why blocks are not stepped before the norm is known, although the plan says so."""
        self._mode = mode
        self._declared = accumulation_steps
        self._max_grad_norm = max_grad_norm
        self._commit_every = commit_every
        self._before_weights_change = before_weights_change
        self._more_to_come = more_to_come
        self.commit_folder = commit_folder
        """Where commits are; None without a log."""
        self.found_step: int | None = None
        """The step of an earlier run that the log goes on from, until somebody says that this is wanted."""
        if home.log is not None and home.log.committed.step:
            self.found_step = home.log.committed.step
        self._on_close = on_close
        self._broken: str | None = None
        self._can_go_back = False
        """Whether what is committed is the state that this step begins with."""
        self._names = [trained.name for block in blocks for trained in block.parameters]
        self._trained_in = {id(t.parameter): (b, i) for b in blocks for i, t in enumerate(b.parameters)}
        self._group_by_name: dict[str, dict[str, Any]] = {
            name: group
            for group, names in zip(self.optimizer.param_groups, self._names_by_group(), strict=True)
            for name in names
        }
        self._ahead: list[TrainedBlock] = []
        self._options: Any = None
        self._grad_scale: float | None = None
        self._last_clipped = False
        self._skipped_in_a_row = 0
        self._order = tuple(reversed(self.blocks))
        in_memory: list[Any] = [t.parameter for block in blocks for t in block.parameters if t.streamed is None]
        self._handles = [parameter.register_post_accumulate_grad_hook(self._take) for parameter in in_memory]
        self._handles += [parameter.register_hook(partial(self._make_way, parameter)) for parameter in in_memory]
        self._extra: Callable[[], Mapping[str, Any]] = dict
        self._amend: Callable[[dict[str, Any]], dict[str, Any]] = dict
        self._due: dict[str, Any] | None = None
        """What the commit of the last step carries; None where it is made, or not wanted."""
        gradients.wait_for_room = stepper.wait_for_one

    def group_of(self, name: str) -> dict[str, Any]:
        """The param group that the parameter `name` is in."""
        return self._group_by_name[name]

    def commits_with(
        self, extra: Callable[[], Mapping[str, Any]], amend: Callable[[dict[str, Any]], dict[str, Any]]
    ) -> None:
        """Sets what a commit carries besides: plain values and tensors. `amend` replaces what follows a step."""
        self._extra = extra
        self._amend = amend

    def taker(self, name: str) -> Callable[[Mapping[int, Tensor]], None]:
        """`deliver` for the block `name`."""
        block = next(block for block in self.blocks if block.name == name)
        return lambda gradients: self.deliver(block, gradients)

    def deliver(self, block: TrainedBlock, gradients: Mapping[int, Tensor]) -> None:
        """Takes one micro-batch's gradients of `block`. May step the block, see the note above."""
        if not gradients:
            return
        if self._options is None:
            self._options = self._current_options()
        if any(block is other for other in self._ahead):
            why = f"{block.name} received gradients once more after accumulation_steps={self._declared} of them"
            self._wait_from_now_on(why)
            self.forget()
            raise ConfigError(
                f"{why}, and had been updated by then, so that later ones were taken with new weights. This step was "
                f"dropped; the next ones wait for step(). Declare engine(accumulation_steps=)"
            )
        last = self.gradients.num_arrivals(block) + 1 >= self._declared
        self.gradients.add(block, gradients, with_norms=last)
        for index in gradients:
            trained = block.parameters[index]
            if trained.parameter.grad is None:
                trained.parameter.grad = AbsentGradient.of(trained.parameter)
        if last and self._steps_ahead(block):
            self.stepper.submit(block)
            self._ahead.append(block)
            self.counters.num_ahead_of_norm += 1
            if self._mode is UpdateMode.BACKWARD:
                self.gradients.keep_norms_only(block)
                return
        if not self._more_to_come():
            self.gradients.put_away(block)

    def before_forward(self, why: str = "the model was called between backward and step") -> None:
        """Undoes what was stepped ahead of a step that has not come: a forward in between sees the old weights.

        So does whoever saves them, and says `why`.
        """
        self._check_usable()
        self.finish_commit()
        self._follow_zero_grad()
        if self._ahead:
            self._undo_because(why)

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Makes the coming step scale its gradients to `max_norm`; returns their norm. Blocks for gradients on NVMe."""
        if self._grad_scale is not None:
            raise ConfigError("clip_grad_norm_: was called for this step already")
        if self._max_grad_norm != max_norm:
            self._undo_because(f"gradients were clipped to {max_norm:g}, and max_grad_norm was not declared so")
        total, self._grad_scale = self._norm(max_norm)
        return torch.tensor(total)

    def gradient_items(self) -> Iterator[tuple[str, Tensor]]:
        """Name and gradient of every parameter that has one, a copy that is the caller's."""
        if any(self.gradients.is_gone(block) for block in self.gradients.blocks):
            self._undo_because("gradients were looked at between backward and step")
        for block in self.gradients.blocks:
            for index in sorted(self.gradients.present(block)):
                yield (
                    block.parameters[index].name,
                    self.gradients.of(block, self.gradients.load(block), index).clone(),
                )
            self.gradients.release(block)

    def step(self) -> None:
        """Updates everything that has gradients, and commits if it is time. Blocks."""
        self._check_usable()
        self.finish_commit()
        self._follow_zero_grad()
        if not self.gradients.blocks:
            raise IntegrityError("step: no gradient has arrived; call engine.backward(loss) first")
        try:
            self._step()
        except BaseException:
            self._abandon()
            raise
        if self._commit_every is not None and self.step_number % self._commit_every == 0 and not self._skipped_in_a_row:
            self._due = copy.deepcopy(self.all_values())
        self._expect_next()

    def forget(self) -> None:
        """Drops the gradients of this step and what was stepped with them, or failed to be."""
        if self._ahead:
            self.stop()
            self._expect_next()
        self._clear()

    def finish_commit(self) -> None:
        """Makes the commit of the last step, where it is due. Blocks. See [Note: when a step is committed]."""
        if self._due is not None and self._broken is None:
            self._commit(self._amend({**self._due, "groups": self._groups()}))

    def commit(self) -> None:
        """Makes the state as it is now real and durable, wherever it rests. Blocks. Needs a log."""
        self._commit(self.all_values())

    def _commit(self, values: Mapping[str, Any]) -> None:
        log = self.home.log
        if log is None:
            raise ConfigError("commit: state is committed on NVMe; give nvme= a folder")
        self._check_usable()
        if self._ahead:
            self._undo_because("state was saved between backward and step")
        begin = time.perf_counter()
        weights = [block.name for block in self.blocks if self.home.streams_weights(block)]
        payload = pack_values({**values, "weights": weights}, of="a commit")
        self._broken = f"the commit of step {self.step_number} failed"
        self.home.write_what_rests_in_memory(self.blocks)
        log.commit(self.step_number, payload)
        self._broken = self._due = None
        self._can_go_back = True
        self.counters.num_commits += 1
        self.counters.commit_seconds += time.perf_counter() - begin

    def stop(self) -> None:
        """Drops the gradients of this step and what was stepped with them, and reads nothing ahead. Blocks."""
        self.stepper.forget()
        if self._ahead:
            self._drop()
        self._clear()

    def all_values(self) -> dict[str, Any]:
        """What is saved besides masters and moments: plain values and tensors, the owner's included."""
        return {**self._values(), **self._extra()}

    def break_because(self, why: str) -> None:
        """Refuses everything from now on, until a checkpoint was loaded."""
        self._broken = why

    def _groups(self) -> list[dict[str, Any]]:
        return [
            {**options, "params": names}
            for options, names in zip(self._current_options(), self._names_by_group(), strict=True)
        ]

    def _values(self) -> dict[str, Any]:
        return {
            "step": self.step_number, "steps": dict(self.progress.steps),
            "scalars": {name: dict(scalars) for name, scalars in self.progress.scalars.items() if scalars},
            "groups": self._groups(), "rng": rng_state(),
        }  # fmt: skip

    def load_values(self, values: Mapping[str, Any]) -> None:
        """Takes over what `all_values` gave. ConfigError where param groups are not those of this run."""
        if self._names_by_group() != [group["params"] for group in values["groups"]]:
            raise ConfigError("the saved optimizer's parameter groups are not those of this run")
        for group, saved in zip(self.optimizer.param_groups, values["groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})
        self.progress.steps = dict(values["steps"])
        self.progress.scalars = dict(values["scalars"])
        self.step_number = int(values["step"])

    def begin_again(self, weights: Sequence[str], *, from_log: bool = True) -> None:
        """After state was loaded: brings what rests in memory there, rounds masters into weights, and reads ahead anew.

        `weights` names blocks whose weights in the log are those of the state. Without `from_log`, state is in memory
        already. Blocks.
        """
        self._before_weights_change()
        for block in self.blocks:
            if from_log:
                self.stepper.load_what_rests_in_memory(block)
            if block.name not in weights or not self.home.streams_weights(block):
                self.stepper.rebuild_weights(block)
        log = self.home.log
        self._can_go_back = log is not None and log.committed.step == self.step_number and not log.dirty
        self.found_step = None
        self._broken = self._due = None
        self._last_clipped = False
        self._skipped_in_a_row = 0
        self._expect_next()

    def report(self) -> dict[str, Any]:
        """Counts and seconds since the start, bytes at rest."""
        passes = self._declared - (self._mode is UpdateMode.BACKWARD) if self.gradients.on_drive else 0
        return {
            **asdict(self.counters), **asdict(self.stepper.counters), "mode": self._mode.value,
            "waits_because": self.waits_because, "grad_norm": self.grad_norm,
            "state_bytes": sum(block.state_bytes for block in self.blocks),
            "state_in_memory_bytes": sum(slot.num_bytes for slot in self.home.pieces.values()),
            "expected_bytes_written_per_step": bytes_written_per_step(
                self.blocks, self.home, commit_every=self._commit_every, gradient_passes=passes
            ),
        }  # fmt: skip

    def close(self) -> None:
        """Ends the updates; what was not committed is not part of the state. The log is the caller's to close."""
        for handle in self._handles:
            handle.remove()
        try:
            if self._due is not None and self._broken is None:
                self.stop()
                self.finish_commit()
        finally:
            self.stepper.close()
            with suppress(OffloadError):
                self.gradients.clear()
            self._on_close()

    def _make_way(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Nothing can be added to a stand-in: it goes before the next gradient comes."""
        if isinstance(parameter.grad, AbsentGradient):
            parameter.grad = None

    def _take(self, parameter: nn.Parameter) -> None:
        """Moves the gradient of a parameter that stays in memory to where gradients wait."""
        block, index = self._trained_in[id(parameter)]
        gradient = parameter.grad
        if gradient is not None:
            parameter.grad = None
            self.deliver(block, {index: gradient})

    def _follow_zero_grad(self) -> None:
        """A model's own zero_grad takes the stand-ins away and does not know of the gradients that they stand for."""
        stand_ins = {
            block.parameters[index].name: block.parameters[index].parameter.grad
            for block in self.gradients.blocks
            for index in self.gradients.present(block)
        }
        if stand_ins and all(stand_in is None for stand_in in stand_ins.values()):
            self.forget()
            return
        for name, stand_in in stand_ins.items():
            if not isinstance(stand_in, AbsentGradient):
                raise ConfigError(
                    f"the gradient of {name} was {'removed' if stand_in is None else 'replaced'} between backward and "
                    f"step, which would have no effect: it rests in a tier. Drop all by optimizer.zero_grad()"
                )

    def _steps_ahead(self, block: TrainedBlock) -> bool:
        return (
            self._mode in (UpdateMode.BACKWARD, UpdateMode.SPECULATIVE)
            and self.waits_because is None
            and not self._last_clipped
            and self.step_number > 0
            and self.gradients.num_arrivals(block) == self._declared
            and self._can_go_back
            and not self.home.rests_in_memory(block)
        )

    def _norm(self, max_norm: float | None) -> tuple[float, float]:
        """The norm of all gradients, and the scale that clips it, in the order of the model's parameters."""
        norms = self.gradients.norms()
        ordered = [norms[name] for name in self._names if name in norms]
        total, scale = clip_scale(ordered, max_norm if max_norm is not None else float("inf"))
        if not is_finite(norms):
            total = float("nan")
        return total, scale if max_norm is not None else 1.0

    def _step(self) -> None:
        self._before_weights_change()
        self.stepper.finish()
        total, scale = self._norm(self._max_grad_norm)
        if self._grad_scale is not None:
            scale = self._grad_scale
        self.grad_norm = total
        arrived = self.gradients.blocks
        self._check_first(arrived)
        if not total < float("inf"):
            self._skip()
            return
        if self._options != self._current_options():
            self.counters.num_redone += bool(self._ahead)
            self._undo_because("options of the optimizer were changed between backward and step")
        if self._ahead and scale != 1.0:
            self.counters.num_redone += 1
            self._undo()
        ahead = {block.name for block in self._ahead}
        left = [block for block in arrived if block.name not in ahead]
        self._ahead += [block for block in left if not self.home.rests_in_memory(block)]
        if len(self._ahead) < len(arrived):
            self._broken = "half a step was made of what rests in memory"
        if left:
            self.stepper.expect(left)
        for block in left:
            self.stepper.submit(block, grad_scale=scale)
            self.gradients.release(block)
        self.stepper.finish()
        for block in arrived:
            for index in self.gradients.present(block):
                name = block.parameters[index].name
                self.progress.steps[name] = self.progress.steps.get(name, 0) + 1
        self.progress.scalars.update(self.stepper.new_scalars)
        self._order = tuple(arrived)
        self._broken = None
        self._ahead.clear()
        self._clear()
        self._skipped_in_a_row = 0
        self._last_clipped = scale != 1.0
        self._can_go_back = False
        self.step_number += 1
        self.counters.num_steps += 1
        self.counters.num_clipped += self._last_clipped

    def _expect_next(self) -> None:
        """Reads the first state of the next step while its forward runs."""
        if self.home.log is not None:
            self.stepper.expect(self._order)

    def _skip(self) -> None:
        self._undo()
        self._clear()
        self.counters.num_skipped += 1
        self._skipped_in_a_row += 1
        logger.warning("step %d was left out: a gradient is not finite", self.step_number + 1)
        if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise IntegrityError(
                f"{self._skipped_in_a_row} steps in a row had gradients that are not finite; the state is that of step "
                f"{self.step_number}. Usual causes: a learning rate that is too high, broken data, fp16 overflow"
            )

    def _undo_because(self, why: str) -> None:
        """Takes back what was stepped ahead, and steps nothing ahead from now on. ConfigError where it is too late."""
        self._wait_from_now_on(why)
        if self._ahead and self._mode is UpdateMode.BACKWARD:
            self.forget()
            raise ConfigError(
                f"{why}; this step's updates ran behind its backward pass, as declared, and its gradients are gone. It "
                f"was dropped; the next ones wait for step(). Declare engine(accumulation_steps=, max_grad_norm=)"
            )
        self._undo()

    def _undo(self) -> None:
        """Takes back what was stepped ahead; gradients stay."""
        if self._ahead:
            self.stepper.finish()
            self._drop()

    def _drop(self) -> None:
        log = self.home.log
        self._broken = "a step could not be taken back"
        if log is not None:
            log.drop()
        for block in self._ahead:
            if not self.home.streams_weights(block):
                self.stepper.rebuild_weights(block)
        self.stepper.new_scalars.clear()
        self._ahead.clear()
        self._before_weights_change()
        self._broken = None

    def _abandon(self) -> None:
        """After an error in a step: nothing of it stands, where the log has what was before."""
        with suppress(OffloadError):
            self.stepper.forget()
        if self._ahead and self._broken is None:
            if self._can_go_back:
                self._drop()
            else:
                self._broken = f"step {self.step_number + 1} failed, and the one before it was not committed"
        self._clear()

    def _check_usable(self) -> None:
        if self._broken is not None:
            raise OffloadError(f"{self._broken}; go on from the last commit or checkpoint by engine.load_checkpoint")
        if self.found_step is not None:
            raise ConfigError(
                f"{self.commit_folder} holds step {self.found_step} of an earlier run of this model: go on with it by "
                f"engine.load_checkpoint(engine.commit_folder), or remove it with `offload-rt clean --state`"
            )

    def _clear(self) -> None:
        self._ahead.clear()
        self.gradients.clear()
        self.stepper.new_scalars.clear()
        self._grad_scale = None
        self._options = None
        for block in self.blocks:
            for trained in block.parameters:
                trained.parameter.grad = None

    def _wait_from_now_on(self, why: str) -> None:
        if self.waits_because is None and self._mode is not UpdateMode.AFTER:
            self.waits_because = why
            logger.warning("updates wait for step() from now on, and do not run behind the backward pass: %s", why)

    def _current_options(self) -> list[dict[str, Any]]:
        """Copies: a learning rate may be a tensor, which schedulers change in place."""
        return [
            {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
            for group in self.optimizer.param_groups
        ]

    def _names_by_group(self) -> list[list[str]]:
        """Of the parameters of each group. Those without elements have no state and no name here."""
        return [
            [
                block.parameters[index].name
                for parameter in group["params"]
                for block, index in [self._trained_in.get(id(parameter), (None, 0))]
                if block is not None
            ]
            for group in self.optimizer.param_groups
        ]

    def _check_first(self, arrived: Sequence[TrainedBlock]) -> None:
        """In the first step, something must train, and all of it but experts without tokens."""
        if self.step_number:
            return
        present = {block.parameters[i].name for block in arrived for i in self.gradients.present(block)}
        missing = [name for name in self._names if name not in present and ".experts." not in name]
        if missing:
            raise IntegrityError(
                f"{len(missing)} of {len(self._names)} trainable tensors received no gradient in step 1 (first: "
                f"{missing[0]}). Usual causes: a module that the forward skips; freeze what does not train"
            )
        if self.grad_norm == 0:
            raise IntegrityError(f"step 1: all {len(self._names)} gradients are zero; the loss does not reach them")
