"""Refuses `model.to`, `half`, `cuda` and their like while an engine manages the model, where they would change it.

torch would make each absent weight a whole tensor of the new dtype, all of the model at once, and the layers would go
on with the old one. A call that changes nothing goes through: trainers begin with `model.to(device)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from offload_rt.errors import ConfigError


class ConversionGuard:
    """Stands before `_apply`, which all of torch's conversions go through, of some modules until `remove`."""

    def __init__(self, *modules: nn.Module) -> None:
        self._modules = modules
        for module in modules:
            module._apply = _guarded(module)  # type: ignore[method-assign]

    def remove(self) -> None:
        for module in self._modules:
            module.__dict__.pop("_apply", None)


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
