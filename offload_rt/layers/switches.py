"""What users may switch at any time: a layer that runs again in backward is switched as it was in forward.

    loss = model(...) | model.eval(), set_adapter(...), requires_grad_(False) | loss.backward()

Plain autograd looks at none of these in backward: the gradients are those of the call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn

_NAMES = ("training", "_disable_adapters", "_active_adapter")
"""torch's, and peft's of a module with adapters."""


class Switches:
    """Those of some modules as they are when this is made. Looked at twice a layer and step: by one call for all."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = modules
        switched = [(vars(module), name) for module in modules for name in _NAMES if _has(module, name)]
        self._own = [own for own, _ in switched]
        self._names = [name for _, name in switched]
        self._values = self._now()

    def are_still(self) -> bool:
        """Whether the modules have not been switched."""
        return self._now() == self._values

    def put_back(self, trained: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        """Inside, modules are switched as they were, and `trained` require gradients. Enter it at once."""
        now = self._now()
        frozen = [parameter for parameter in trained if not parameter.requires_grad]
        return self._switched(now, frozen) if frozen or now != self._values else nullcontext()

    @contextmanager
    def _switched(self, now: list[Any], frozen: Sequence[nn.Parameter]) -> Iterator[None]:
        try:
            self._switch(self._values)
            for parameter in frozen:
                parameter.requires_grad_(True)
            yield
        finally:
            self._switch(now)
            for parameter in frozen:
                parameter.requires_grad_(False)

    def _now(self) -> list[Any]:
        """None for what a module has of its class."""
        return [*map(dict.get, self._own, self._names)]

    def _switch(self, values: Sequence[Any]) -> None:
        for own, name, value in zip(self._own, self._names, values, strict=True):
            if value is not None:
                own[name] = value
            else:
                own.pop(name, None)


def _has(module: nn.Module, name: str) -> bool:
    return name in vars(module) or hasattr(type(module), name)
