"""Buffers of a layer that its forward writes to: running statistics, counts. A recompute finds them as its forward did.

A layer that is run again in backward would count each batch twice. So what its forward has changed is put back behind
the recompute, which reads what there was before: copies of that are kept with the call. A layer that was seen to write
to none has no copies until it is switched (by `train()`, say), but where its forward may have to be undone. What torch
counts says so; of running statistics it counts `num_batches_tracked` alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

State = list[tuple[int, int]]
"""Of each buffer which tensor it is, and how often torch has seen that written to."""
Values = list[tuple[dict[str, torch.Tensor | None], str, torch.Tensor, torch.Tensor]]
"""Where each buffer is, its name, itself, and a copy of what it had."""


class Buffers:
    """Of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        self._modules = [(path, module) for path, module in layer.named_modules() if module._buffers]
        self._are_written: bool | None = None
        """Whether a forward has; None before the first, as the layer is switched."""
        self._switched: object = None

    def before(self, switched: object, *, to_undo: bool = False) -> tuple[State, Values]:
        """A forward: for `written`. Values are nothing where none before, as `switched`, has written to any, unless the
        forward may have to be undone, by `put_back`.
        """
        if self._switched is not switched:
            self._switched = switched
            self._are_written = self._are_written or None
        return self._state(), [] if self._are_written is False and not to_undo else self._values()

    def written(self, before: tuple[State, Values]) -> Values:
        """What the forward's recompute is to find; nothing where it has written to none since `before`. Where nobody
        could know that it would, it finds what there is now; either way, buffers are written to once.
        """
        state, values = before
        now = self._state()
        if now == state:
            self._are_written = bool(self._are_written)
            return []
        self._are_written = True
        self._say(state, now)
        return values or self._values()

    def expect_writes(self) -> None:
        """The next forward writes to some, as far as is known: values are kept from before it."""
        self._are_written = True

    def put_back(self, before: tuple[State, Values]) -> None:
        """Undoes a forward, which `before` was asked for `to_undo`; the next one is known to write if this has."""
        self.written(before)
        self.put(before[1])

    @contextmanager
    def as_before(self, values: Values) -> Iterator[None]:
        """Inside they have `values`; afterwards what they have now."""
        now = self._values()
        self.put(values)
        try:
            yield
        finally:
            self.put(now)

    def _values(self) -> Values:
        return [
            (module._buffers, name, buffer, buffer.clone())
            for _, module in self._modules
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    def _state(self) -> State:
        buffers = [buffer for _, module in self._modules for buffer in module._buffers.values()]
        return [(id(buffer), 0 if buffer is None else buffer._version) for buffer in buffers]

    @staticmethod
    def put(values: Values) -> None:
        """Gives buffers these values, in themselves."""
        with torch.no_grad():
            for buffers, name, buffer, value in values:
                buffers[name] = buffer
                buffer.copy_(value)

    def _say(self, before: State, now: State) -> None:
        """Warns where one is written to that a state_dict has: once for all layers of a kind."""
        names = [(path, name, module) for path, module in self._modules for name in module._buffers]
        kept = [
            f"{path}.{name}"
            for (path, name, module), was, is_now in zip(names, before, now, strict=True)
            if was != is_now and name not in module._non_persistent_buffers_set
        ]
        if kept:
            warnings.warn(
                f"layers write to buffers in forward ({', '.join(kept)}), which are in no checkpoint of an engine, "
                f"unless it tracks their modules (engine.track)",
                stacklevel=2,
            )
