"""What a step takes, resource by resource: computing and updates by the clock, drives and links by their meter.

    caller     batch |-- forward --|-- backward --|-- step() --| batch ...
    model            |============================|                         less its waits: computing
    update                                        |============|            less its waits: updates where parameters lie
    outside    |-----|                                         |-----|      the caller's own

Forward begins and ends by hooks of the model; backward begins when the first gradient of an output is there, and ends
when autograd has gone through its graph, whoever called it. The update is `engine.step`, or the optimizer's own step
where a loop calls that, behind the closure that may run the model first. What is measured costs a few calls a step,
none a layer.
On an asynchronous device the host's clock says nothing of computing, nor of copies: what they took is what the device
noted itself, in the newest step that it was asked to (`device_times`).
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from offload_rt.meter import COMPUTE, DEVICE_UPDATE, Reading
from offload_rt.spans import Spans
from offload_rt.transfers.device_times import DeviceTimes, Times

WARM_STEPS = 2
"""Left out: they check what later ones trust, and touch memory for the first time."""
SETTLED_STEPS = 8
"""After so many that count, what a steady step takes is said once."""
KEPT_STEPS = 32
"""The newest, of which medians are taken."""


@dataclass(frozen=True, kw_only=True)
class StepReading:
    """One step, or the median of several, resource by resource."""

    seconds: float
    """Forward, backward and update."""
    outside_seconds: float
    """Between them and before, in the caller's hands."""
    resources: Reading


class StepMeter:
    """Watches the calls of one model. `read` gives the meters of drives and links; `clock` is in seconds."""

    def __init__(
        self,
        read: Callable[[], Reading],
        *,
        times: DeviceTimes | None = None,
        clock: Callable[[], float] = time.perf_counter,
        on_settled: Callable[[], None] = lambda: None,
    ) -> None:
        """`times` are those of an asynchronous device. `on_settled` is called once there are `SETTLED_STEPS`; once more
        when they have been dropped.
        """
        self.steps: deque[StepReading] = deque(maxlen=KEPT_STEPS)
        self.num_steps = 0
        self.spans: Spans | None = None
        """Who is told of forward, backward and update, while a step is traced."""
        self._end_phase: Callable[[], None] | None = None
        self._read, self._clock = read, clock
        self._times = times
        self._on_settled = on_settled
        self._lock = threading.RLock()
        self._num_open = 0
        self._backwards: set[int] = set()
        self._update: tuple[float, float] | None = None
        """When the update that is under way began, and the stalls until then."""
        self._restart()

    def attach(self, model: nn.Module) -> list[RemovableHandle]:
        """Puts hooks into `model`. To be the first ones, so that what others do counts as part of a step."""
        return [
            model.register_forward_pre_hook(self._forward_begins, prepend=True),
            model.register_forward_hook(self._forward_is_over, always_call=True),
        ]

    def forget(self) -> None:
        """Drops what has been measured of the step under way: it is none that should count."""
        with self._lock:
            self._is_clean = False

    def begin_again(self) -> None:
        """Drops all that was measured: what comes runs otherwise."""
        with self._lock:
            self._give_up_open()
            if self._times is not None:
                self._times.forget()
            self.steps.clear()
            self.num_steps = 0
            self._restart()

    @contextmanager
    def updating(self) -> Iterator[None]:
        """The update is made inside, and is the end of a step. A step that fails does not count."""
        self.begin_update()
        try:
            yield
        except BaseException:
            self.forget()
            raise
        finally:
            self.end_update()

    def begin_update(self) -> None:
        """The update is made from now on, until `end_update`; or again from now on, where one has failed."""
        with self._lock:
            self._give_up_open()
            self._update = self._clock(), self._stalls()
            if self.spans is not None:
                self._end_span()
                self._end_phase = self.spans.updating()

    def end_update(self) -> bool:
        """It was made, which is the end of a step. False where none had begun."""
        with self._lock:
            if self._update is None:
                return False
            (begin, stalls), self._update = self._update, None
            self._end_span()
            self._finish(self._clock() - begin, self._stalls() - stalls)
            return True

    def steady(self) -> StepReading | None:
        """The median of the newest steps, by resource; None while there is none."""
        steps = list(self.steps)
        if not steps:
            return None

        def medians(of: Callable[[Reading], Mapping[str, float]]) -> dict[str, float]:
            names = {name for step in steps for name in of(step.resources)}
            return {name: median(of(step.resources).get(name, 0.0) for step in steps) for name in sorted(names)}

        return StepReading(
            seconds=median(step.seconds for step in steps),
            outside_seconds=median(step.outside_seconds for step in steps),
            resources=Reading(
                busy_seconds=medians(lambda reading: reading.busy_seconds),
                moved_bytes={name: round(size) for name, size in medians(lambda reading: reading.moved_bytes).items()},
                stall_seconds=medians(lambda reading: reading.stall_seconds),
            ),
        )

    def _restart(self) -> None:
        """A step begins now."""
        self._begin, self._before = self._clock(), self._read()
        self._model_seconds = self._model_stalls = 0.0
        self._is_clean = True
        self._has_begun = self._is_aside = False

    def _stalls(self) -> float:
        return sum(self._read().stall_seconds.values())

    def _end_span(self) -> None:
        if self._end_phase is not None:
            self._end_phase()
            self._end_phase = None

    def _enter(self, phase: str) -> None:
        with self._lock:
            if not self._num_open:
                self._entered = self._clock(), self._stalls()
                if self.spans is not None:
                    self._end_span()
                    self._end_phase = self.spans.computing(phase)
            if self._times is not None and not self._is_aside:
                self._times.enter()
            self._num_open += 1

    def _leave(self) -> None:
        with self._lock:
            if not self._num_open:  # it was given up
                return
            self._num_open -= 1
            if not self._num_open:
                if self._times is not None:
                    self._times.leave()
                begin, stalls = self._entered
                self._end_span()
                now = self._clock(), self._stalls()
                self._model_seconds += now[0] - begin
                self._model_stalls += now[1] - stalls
                if self._update is not None:  # a closure ran the model
                    self._update = now
                elif self._is_aside:
                    self._restart()

    def _give_up_open(self) -> None:
        """A backward pass that failed never says that it is over."""
        self._backwards.clear()
        if self._num_open:
            self._num_open = 0
            self._is_clean = False
            self._end_span()
            if self._times is not None:
                self._times.leave()

    def _forward_begins(self, module: nn.Module, args: Any) -> None:
        with self._lock:
            if self._backwards:
                self._give_up_open()
            if torch.is_grad_enabled():
                self._has_begun, self._is_aside = True, False
            elif self._has_begun or self._update is not None or not self._is_clean:
                self._is_clean = False  # an evaluation is no part of a step: what it moved cannot be told from the rest
            else:
                self._is_aside = True  # between two steps: the next one begins when it is over
        self._enter("forward" if torch.is_grad_enabled() else "forward, no gradients")

    def _forward_is_over(self, module: nn.Module, args: Any, output: Any) -> None:
        self._leave()
        for tensor in _values(output):
            if isinstance(tensor, torch.Tensor) and tensor.grad_fn is not None:
                tensor.register_hook(self._backward_begins)  # type: ignore[no-untyped-call]

    def _backward_begins(self, gradient: torch.Tensor) -> None:
        number = torch._C._current_graph_task_id()
        with self._lock:
            if number in self._backwards:
                return
            self._backwards.add(number)
        self._enter("backward")
        torch.autograd.Variable._execution_engine.queue_callback(partial(self._backward_is_over, number))

    def _backward_is_over(self, number: int) -> None:
        with self._lock:
            if number in self._backwards:
                self._backwards.discard(number)
                self._leave()

    def _finish(self, update_seconds: float, update_stalls: float) -> None:
        found = self._read().since(self._before)
        busy = dict(found.busy_seconds)
        if self._times is not None:
            busy |= _device_seconds(self._times.step_ends(counts=self._is_clean), found.moved_bytes)
        else:
            busy[COMPUTE] = self._model_seconds - self._model_stalls
            busy[DEVICE_UPDATE] = update_seconds - update_stalls
        seconds = self._model_seconds + update_seconds
        step = StepReading(
            seconds=seconds,
            outside_seconds=self._clock() - self._begin - seconds,
            resources=Reading(
                busy_seconds=busy, moved_bytes=found.moved_bytes, stall_seconds=found.stall_seconds
            ),
        )  # fmt: skip
        if self._is_clean:
            self.num_steps += 1
            if self.num_steps > WARM_STEPS:
                self.steps.append(step)
            if self.num_steps == WARM_STEPS + SETTLED_STEPS:
                self._on_settled()
        self._restart()


def _device_seconds(newest: Times | None, moved_bytes: Mapping[str, int]) -> dict[str, float]:
    """Of a step that moved so many bytes, as far as the device's own times are known."""
    if newest is None:
        return {}
    per_byte = newest.seconds_per_byte.items()
    return {**newest.seconds, **{link: seconds * moved_bytes.get(link, 0) for link, seconds in per_byte}}


def _values(output: Any) -> list[Any]:
    """What a model's output is made of, whatever it is: a tensor, several, a mapping, an object with attributes."""
    if isinstance(output, torch.Tensor) or output is None:
        return [output]
    if isinstance(output, Mapping):
        return list(output.values())
    return list(output) if isinstance(output, (list, tuple)) else list(getattr(output, "__dict__", {}).values())


def weak_hook(method: Callable[..., None]) -> Callable[..., None]:
    """A hook of an optimizer: calls `method` as long as somebody else holds whose it is.

    A scheduler that outlives an engine holds the optimizer, and that its hooks.
    """
    held = weakref.WeakMethod(method)

    def called(*arguments: Any) -> None:
        if (living := held()) is not None:
            living(*arguments)

    return called
