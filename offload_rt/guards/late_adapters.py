"""Refuses an adapter that is put on a model while an engine manages it, and begins with what weights at rest would say.

peft takes DoRA's magnitudes, decompositions and copies of modules from weights. One that is at rest is NaN, and so is
what is made of it: that is looked for behind peft's call. What an adapter's file has takes the place of such values, so
that `load_adapter` of a DoRA works. An adapter that is added late is computed with, and never trained.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from itertools import chain
from typing import Any

from torch import Tensor, nn

from offload_rt.errors import ConfigError
from offload_rt.guards.adapter_kinds import chooses_by_weights
from offload_rt.guards.conversions import Guard

_INSTEAD = (
    "weights at rest are not in memory for it. Add it before engine(...), or load one that was saved (load_adapter)"
)


class LateAdapterGuard(Guard):
    """Stands before `add_adapter` and `load_adapter` of some modules until `remove`; loading adds."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self._is_inside = False
        for module in {inner for outer in modules for inner in outer.modules()}:
            for name in ("add_adapter", "load_adapter"):
                if callable(own := getattr(type(module), name, None)) and not isinstance(own, property):
                    self.guard(module, name, self._checked(module, name, getattr(module, name)))

    def _checked(self, module: nn.Module, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def checked(*arguments: Any, **options: Any) -> Any:
            if self._is_inside:
                return function(*arguments, **options)
            known = {id(tensor) for tensor in _tensors(module).values()}
            names = set(_configs(module))
            self._is_inside = True
            try:
                found = function(*arguments, **options)
            except RuntimeError as error:  # a decomposition of NaN
                _delete(module, set(_configs(module)) - names)
                raise ConfigError(f"{name}: the adapter could not be made ({error}); {_INSTEAD}") from error
            finally:
                self._is_inside = False
            new = set(_configs(module)) - names
            without = [
                path
                for path, tensor in _tensors(module).items()
                if id(tensor) not in known and tensor.is_floating_point() and bool(tensor.to_dense().isnan().any())
            ]
            if name == "add_adapter" and any(chooses_by_weights(_configs(module)[each]) for each in new):
                without.append("its places")
            if without:
                _delete(module, new)
                raise ConfigError(
                    f"{name}: the adapter begins with values of weights (first: {without[0]}); {_INSTEAD}"
                )
            return found

        return checked


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(chain(module.named_parameters(), module.named_buffers()))


def _configs(module: nn.Module) -> dict[str, Any]:
    found = getattr(module, "peft_config", None)
    return found if isinstance(found, dict) else {}


def _delete(module: nn.Module, names: set[str]) -> None:
    """Best effort: peft may have come to a part of the modules alone."""
    for name in names:
        with suppress(Exception):
            module.delete_adapter(name)  # type: ignore[operator]
