"""What stands around a model while an engine trains it: hooks, guards, and whoever sees its steps.

[Note: what an engine does to a model]
`engine.model` is the user's module. Its parameters keep their identity; those that do not stay in memory are absent
between uses. Its layers' `forward` goes through the engine. Refused are conversions of the model and merging adapters
into it (`guards.conversions`), copies, loads and saves that would miss weights (`guards.copies`), wrappers that spread
it over processes or GPUs (`guards.wrappers`), adapters that begin with weights at rest (`guards.late_adapters`), and
calls from compiled code (`guards.compiling`). Nothing else changes.
`Engine.close` takes all of this out again; but weights that were absent stay so, and saving their placeholders stays
refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from offload_rt.closing import all_close
from offload_rt.config import EngineConfig
from offload_rt.guards.batch_check import check_batch
from offload_rt.guards.compiling import CompileGuard
from offload_rt.guards.conversions import ConversionGuard, Guard
from offload_rt.guards.copies import CopyGuard
from offload_rt.guards.integrity import Reached
from offload_rt.guards.late_adapters import LateAdapterGuard
from offload_rt.guards.wrappers import WrapperGuard
from offload_rt.optimizer.loop_steps import LoopSteps
from offload_rt.running.changes import Changes


class Attachments:
    """Of one engine, from `attach` to `remove`. Used by the thread that steps."""

    def __init__(
        self,
        model: nn.Module,
        users_model: nn.Module,
        trainable: Mapping[str, nn.Parameter],
        config: EngineConfig,
        changes: Changes,
    ) -> None:
        """`users_model` is `model`, or what a PeftModel was made of."""
        self._model, self._trainable, self._config, self._changes = model, trainable, config, changes
        self._models = {model, users_model}
        self._handles: list[Guard | CompileGuard | RemovableHandle | Reached | LoopSteps] = []

    def attach(self) -> None:
        """Puts all of it into the model. Where this raises, `remove` takes out what is there."""
        runtime, meter = self._changes.runtime, self._changes.meter
        self.reached = Reached(self._model, self._trainable, [each.layer for each in runtime.layers])
        self._handles.append(self.reached)
        kept = runtime.made_of.workload.kept_elsewhere()
        for make in (ConversionGuard, partial(CopyGuard, kept=kept), WrapperGuard, LateAdapterGuard):
            self._handles.append(make(*self._models))
        self._handles.append(self._model.register_forward_pre_hook(self._before_forward, with_kwargs=True))
        self._handles += meter.attach(self._model)
        self.steps = LoopSteps(
            lambda: self._changes.runtime.training, self._trainable.values(), meter,
            accumulation_steps=self._config.accumulation_steps, is_over=self._changes.after_step,
        )  # fmt: skip
        self._handles.append(self.steps)
        self._handles.append(CompileGuard(*self._models))  # whose hooks come before all others

    def drop_step(self) -> None:
        """Forgets the step that is under way, with its gradients: the next forward begins one."""
        for parameter in self._trainable.values():
            parameter.grad = None
        self.reached.forget()
        self.steps.num_backwards = 0

    def remove(self) -> None:
        """Takes all of it out of the model, whatever becomes of single ones. May be called twice.

        Guards look at which weights are absent from then on: the runtime has given back what it will by then.
        """
        all_close(*[handle.remove for handle in self._handles])

    def _before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._changes.begin_call(begins_step=not self.steps.num_backwards)
        self._changes.rehearse(args, kwargs)
        runtime = self._changes.runtime
        runtime.training.before_forward()
        for layer in runtime.layers:
            layer.without_checkpointing()
        if runtime.device is not None and self._config.device_memory_bytes is not None:
            runtime.device.keep_within(self._config.device_memory_bytes)
        check_batch(model, args, kwargs, self._config, by_chunks=runtime.tokenwise is not None)
