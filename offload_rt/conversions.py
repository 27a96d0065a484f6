"""Refuses `model.to`, `half`, `cuda` and their like while an engine manages the model, where they would change it, and
peft's `merge_and_unload` and its like.

torch would make each absent weight a whole tensor of the new dtype, all of the model at once, and the layers would go
on with the old one. A call that changes nothing goes through: trainers begin with `model.to(device)`. peft would add
its product to what stands for an absent weight, after it had changed those that are in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from offload_rt.errors import ConfigError

_MERGES = ("merge_and_unload", "unload", "merge_adapter", "unmerge_adapter")


class ConversionGuard:
    """Stands before `_apply`, which all of torch's conversions go through, of some modules until `remove`; and before
    what merges adapters, of any module within them.
    """

    def __init__(self, *modules: nn.Module) -> None:
        self._guarded: list[tuple[nn.Module, str]] = []
        for module in modules:
            self._guard(module, "_apply", _guarded(module))
        for inner in {inner for module in modules for inner in module.modules()}:
            for name in _MERGES:
                if hasattr(type(inner), name):
                    self._guard(inner, name, _refused(name))

    def remove(self) -> None:
        """May be called twice: what another guard has put there since stays."""
        while self._guarded:
            module, name = self._guarded.pop()
            module.__dict__.pop(name, None)

    def _guard(self, module: nn.Module, name: str, function: Callable[..., Any]) -> None:
        module.__dict__[name] = function
        self._guarded.append((module, name))


def _refused(name: str) -> Callable[..., Any]:
    def refused(*_: Any, **__: Any) -> Any:
        raise ConfigError(
            f"{name}: the frozen weights of a model that an engine manages stay as they are. Save the adapter "
            f"(engine.save_pretrained), and merge it into the base model, loaded without an engine"
        )

    return refused


def _guarded(module: nn.Module) -> Callable[..., nn.Module]:
    apply: Callable[..., nn.Module] = module._apply

    def guarded(change: Callable[[Tensor], Tensor], *arguments: Any, **options: Any) -> nn.Module:
        for dtype, device in sorted({(p.dtype, p.device) for p in module.parameters()}, key=str):
            probe = torch.empty(0, dtype=dtype, device=device)
            if change(probe) is not probe:
                raise ConfigError(
                    f"the dtype and device of a model that an engine manages stay as they are (it has {dtype} on "
                    f"{device}): convert it before engine(...), or after close()"
                )
        return apply(change, *arguments, **options)

    return guarded
