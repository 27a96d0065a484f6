"""What users may switch at any time: a layer that runs again in backward is switched as it was in forward.

    loss = model(...) | model.eval(), set_adapter(...), requires_grad_(False) | loss.backward()

Plain autograd looks at none of these in backward: the gradients are those of the call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

_NAMES = ("training", "_disable_adapters", "_active_adapter")
"""torch's, and peft's of a module with adapters."""
_TRAINING, _DISABLED, _ACTIVE = _NAMES


class Switches:
    """Those of some modules as they are when this is made."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules
        self._values = _values(modules)

    def are_still(self, modules: Sequence[nn.Module]) -> bool:
        """Whether `modules`, which are these, have not been switched."""
        return modules is self._modules and _values(modules) == self._values

    @contextmanager
    def put_back(self, trained: Sequence[nn.Parameter]) -> Iterator[None]:
        """Inside, modules are switched as they were, and `trained` require gradients."""
        now = _values(self._modules)
        frozen = [parameter for parameter in trained if not parameter.requires_grad]
        if not frozen and now == self._values:
            yield
            return
        try:
            _switch(self._modules, self._values)
            for parameter in frozen:
                parameter.requires_grad_(True)
            yield
        finally:
            _switch(self._modules, now)
            for parameter in frozen:
                parameter.requires_grad_(False)


def _values(modules: Sequence[nn.Module]) -> list[tuple[Any, ...]]:
    """Of each; None for what a module has of its class."""
    own = [vars(module) for module in modules]
    return [(each.get(_TRAINING), each.get(_DISABLED), each.get(_ACTIVE)) for each in own]


def _switch(modules: Sequence[nn.Module], values: Sequence[tuple[Any, ...]]) -> None:
    for module, its in zip(modules, values, strict=True):
        for name, value in zip(_NAMES, its, strict=True):
            if value is not None:
                vars(module)[name] = value
            else:
                vars(module).pop(name, None)
