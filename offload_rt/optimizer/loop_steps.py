"""The steps of a run, whoever takes them; each counts once.

    engine.step()              by `take`
    engine.optimizer.step()    a loop's own, seen by hooks of that optimizer
    another_optimizer.step()   a loop's own, by an optimizer that it has made: followed, or refused (`others`)

What a step does is the training's part.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from offload_rt.optimizer.interface import Training
from offload_rt.optimizer.others import OtherOptimizers
from offload_rt.running.steps import StepMeter, weak_hook

logger = logging.getLogger("offload_rt")


class LoopSteps:
    """Takes steps and sees those that others take, until `remove`. Used by one thread."""

    def __init__(
        self,
        training: Callable[[], Training],
        trainable: Iterable[nn.Parameter],
        meter: StepMeter,
        *,
        accumulation_steps: int,
        is_over: Callable[[], None],
    ) -> None:
        """`training` gives what trains now, whose optimizer stays the same but for `follow`. `accumulation_steps` are
        those that were declared. `is_over` is called behind every step that did not fail.
        """
        self.num_backwards = 0
        """Backward passes since the last step."""
        self._training, self._meter = training, meter
        self._accumulation_steps, self._is_over = accumulation_steps, is_over
        self._has_warned = False
        self._takes_step = False
        """Whether an optimizer's step is one of `take`: others are a loop's own."""
        self._others = OtherOptimizers(trainable, lambda: self._training().optimizer, self._follow)
        self._handles = self._watch()

    def backward(self, loss: torch.Tensor) -> None:
        """`loss.backward()`, counted."""
        loss.backward()  # type: ignore[no-untyped-call]
        self.num_backwards += 1

    def take(self) -> None:
        """Makes one step by what trains. Blocks."""
        with self._meter.updating():
            self._begin()
            self._takes_step = True
            try:
                self._training().take_step()
            finally:
                self._takes_step = False
        self._is_over()

    def remove(self) -> None:
        """Takes the hooks out. May be called twice."""
        self._others.remove()
        while self._handles:
            self._handles.pop().remove()

    def _watch(self) -> list[RemovableHandle]:
        """Puts hooks into the optimizer, around those of what trains."""
        optimizer = self._training().optimizer
        if optimizer is None:
            return []
        return [
            optimizer.register_step_pre_hook(weak_hook(self._loop_steps)),
            *self._training().watch(),
            optimizer.register_step_post_hook(weak_hook(self._loop_has_stepped)),
        ]

    def _follow(self, optimizer: torch.optim.Optimizer) -> None:
        """A loop steps by an optimizer that it has made itself. Raises `ConfigError` where that is not sound."""
        self._training().follow(optimizer)
        while self._handles:
            self._handles.pop().remove()
        self._handles = self._watch()
        logger.info(
            "steps are those of the loop's own %s, which is engine.optimizer from now on", type(optimizer).__name__
        )

    def _loop_steps(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """A loop has called the optimizer's own `step`; once more where that calls its base's."""
        if not self._takes_step:
            self._begin()
            self._meter.begin_update()

    def _loop_has_stepped(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not self._takes_step and self._meter.end_update():
            self._is_over()

    def _begin(self) -> None:
        if self.num_backwards not in (0, self._accumulation_steps) and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "accumulation_steps=%d was declared, step() came after %d",
                self._accumulation_steps, self.num_backwards,
            )  # fmt: skip
        self.num_backwards = 0
