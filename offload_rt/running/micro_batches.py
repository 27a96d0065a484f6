"""One step of several micro-batches, which are all at hand when it begins: one after the other, or layer by layer.

A loop of one's own adds up gradients call by call; here the plan may have every layer serve all micro-batches while its
weights are there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from offload_rt.errors import ConfigError, IntegrityError
from offload_rt.guards.integrity import check_loss
from offload_rt.optimizer.loop_steps import LoopSteps
from offload_rt.running.changes import Changes


class MicroBatches:
    """Steps of several micro-batches. Used by the thread that steps."""

    def __init__(
        self, call: Callable[..., Any], changes: Changes, steps: LoopSteps, *, accumulation_steps: int
    ) -> None:
        """`call` calls the model with a batch's values by name, wherever those are. `accumulation_steps` are those that
        were declared: of no more micro-batches is there room for the inputs of a layer.
        """
        self._call, self._changes, self._steps = call, changes, steps
        self._accumulation_steps = accumulation_steps

    def step(self, batches: Sequence[dict[str, Any]]) -> float:
        """One step by the gradients of the mean of the losses, which it returns. Where it is refused, there are none.

        Blocks; a device is waited for once a micro-batch, for its loss. Raises `ConfigError` for what is no list of
        batches, and as the model's call, the backward pass and `LoopSteps.take` do.
        """
        total = self._accumulate(batches)
        try:
            self._steps.take()
        except IntegrityError:
            self._drop_gradients()
            raise
        return total

    def _accumulate(self, batches: Sequence[dict[str, Any]]) -> float:
        if not batches:
            raise ConfigError("train_batch: needs at least one micro-batch")
        if isinstance(batches, Mapping) or not all(isinstance(batch, Mapping) for batch in batches):
            got = type(batches if isinstance(batches, Mapping) else batches[0]).__name__
            raise ConfigError(f"train_batch: expected a list of batches, each the model's arguments by name, got {got}")
        try:
            total = self._sum_of_losses(batches)
        except BaseException:
            self._drop_gradients()
            raise
        self._steps.num_backwards = self._accumulation_steps
        return total

    def _drop_gradients(self) -> None:
        """Those of a step, or half of one, must not leak into the next."""
        optimizer = self._changes.runtime.training.optimizer
        if optimizer is not None:
            optimizer.zero_grad(set_to_none=True)
        self._steps.num_backwards = 0

    def _sum_of_losses(self, batches: Sequence[dict[str, Any]]) -> float:
        num = len(batches)

        def loss_of(batch: dict[str, Any]) -> tuple[torch.Tensor, float]:
            loss: torch.Tensor = self._call(**batch).loss / num
            return loss, check_loss(loss, self._changes.step_number + 1)

        self._changes.begin_call(begins_step=not self._steps.num_backwards)
        if self._changes.rehearsal.is_due:
            self._changes.rehearse(*self._changes.runtime.on_device((), batches[0]))
        runtime = self._changes.runtime
        if runtime.plan.layer_major and 1 < num <= self._accumulation_steps:
            losses = runtime.run_together([partial(loss_of, batch) for batch in batches])
            runtime.run_together([partial(self._steps.backward, loss) for loss, _ in losses])
            return sum(value for _, value in losses)
        total = 0.0
        for batch in batches:
            loss, value = loss_of(batch)
            self._steps.backward(loss)
            total += value
        return total
