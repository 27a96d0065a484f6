"""The runtime of an engine, and those that follow it when the plan changes.

the first call in training ──► `rehearsal` ───┐
                                              ├──► change_over ──► the next runtime, of the same model
a step begins ──► `replanning` ───────────────┘
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from offload_rt.closing import all_close
from offload_rt.config import EngineConfig
from offload_rt.errors import ConfigError
from offload_rt.report import in_short
from offload_rt.running.rehearsal import Rehearsal
from offload_rt.running.replanning import Replanner
from offload_rt.running.steps import StepMeter
from offload_rt.running.tracing import Tracing
from offload_rt.wiring.assembly import change_over
from offload_rt.wiring.runtime import Runtime

logger = logging.getLogger("offload_rt")


class Changes:
    """Of one engine. Used by the thread that steps."""

    def __init__(
        self,
        runtime: Runtime,
        config: EngineConfig,
        model: nn.Module,
        *,
        base_bytes: int,
        followed_by: Callable[[Runtime], None],
        give_up: Callable[[], None],
    ) -> None:
        """`base_bytes` were resident before there was an engine. `followed_by` is called with each runtime that takes
        the place of another; `give_up` where a change has failed, half of the plan before being gone.
        """
        self.runtime = runtime
        """The one in effect."""
        self.rehearsal = Rehearsal()
        self.replanner = Replanner(runtime, base_bytes)
        self.meter = StepMeter(
            lambda: self.runtime.links.reading(),
            times=runtime.links.times,
            on_settled=lambda: logger.info("%s", in_short(self.runtime, self.meter)),
        )
        """Of steps under the plan in effect; for hooks of the model."""
        self.tracing = Tracing(lambda: self.runtime, self.meter)
        self._config, self._model = config, model
        self._base_bytes = base_bytes
        self._followed_by, self._give_up = followed_by, give_up

    def rehearse(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the first call in training, the longest one: see `rehearsal`. Blocks. Raises PlanInfeasible."""
        while self.rehearsal.is_due:
            change = self.rehearsal.run(self.runtime, self._config, self._model, args, kwargs)
            self.meter.begin_again()
            if change is None:
                return
            if written := self.runtime.frozen.written:
                raise ConfigError(
                    f"forward: {len(written)} frozen weights were written to (first: {written[0].spec.name}), and the "
                    f"plan has to change, which would lose that; change them before engine(...)"
                )
            with self._given_up_unless_done():
                self.go_on_with(change_over(self.runtime, change))
            self.replanner = Replanner(self.runtime, self._base_bytes)

    def begin_call(self, *, begins_step: bool) -> None:
        """Takes a plan that was made again, before a step begins: see `replanning`. A forward that adds to gradients
        begins none. Blocks. Raises `ConfigError` where a GPU's stream is another than the engine's, and where somebody
        has written to frozen weights that are not in the model.
        """
        self.runtime.frozen.check("forward")
        if self.runtime.device is not None:
            self.runtime.device.check_stream()
        if not begins_step or not self.replanner.is_due(self.runtime):
            return
        # Tensors that are made now are trained with, whoever calls.
        with self._given_up_unless_done(), torch.inference_mode(False):
            self.go_on_with(
                self.replanner.before_step(
                    self.runtime, self.meter, self.step_number, more_bytes=self.rehearsal.more_bytes
                )
            )

    def after_step(self) -> None:
        """Whether the plan is to be made again, by the step that was taken. Blocks as `Replanner.after_step` does, and
        where a trace ends.
        """
        self.tracing.step_is_over(self.step_number)
        self.replanner.after_step(self.runtime, self.meter, self.step_number, more_bytes=self.rehearsal.more_bytes)

    def before_weights_are_read(self) -> None:
        """Of all of the model, to be saved. Raises `ConfigError` where the file would not have what somebody wrote."""
        self.runtime.frozen.check_saved("save_pretrained")
        self.runtime.training.before_weights_are_read()

    def go_on_with(self, runtime: Runtime) -> None:
        """From now on `runtime` is in effect."""
        if runtime is not self.runtime:
            self.runtime = runtime
            self.tracing.plan_has_changed()
            self._followed_by(runtime)

    def close(self) -> None:
        """Ends the trace that is under way, and planning. The runtime stays."""
        all_close(self.tracing.close, self.replanner.close)

    @property
    def step_number(self) -> int:
        """Steps made since the run began."""
        return self.runtime.training.step_number

    @contextmanager
    def _given_up_unless_done(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._give_up()
            raise
