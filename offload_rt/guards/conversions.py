"""Refuses `model.to`, `half`, `cuda` and their like while an engine manages the model, where they would change it, and
peft's `merge_and_unload` and its like, larger embeddings, and `model.compile`.

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
_MERGE_FIRST = (
    "Save the adapter (engine.save_pretrained), and merge its files into the base model's: python -m "
    "offload_rt.checkpoint.merge BASE ADAPTER OUT"
)
_STAY = "the frozen weights of a model that an engine manages stay as they are."
_REFUSED = dict.fromkeys(_MERGES, f"{_STAY} {_MERGE_FIRST}") | {
    "resize_token_embeddings": f"{_STAY} Resize it before engine(...)",
    "compile": "the compiler would trace how an engine moves weights; train without it",
}
"""What would change weights at rest, or not see them move, and why not, and what to do."""


class Guard:
    """Stands before methods of some modules until `remove`."""

    def __init__(self) -> None:
        self._guarded: list[tuple[nn.Module, str, Callable[..., Any], Any]] = []

    def remove(self) -> None:
        """Puts back what the modules had of their own. May be called twice: what somebody else has put there since
        stays.
        """
        while self._guarded:
            module, name, function, own = self._guarded.pop()
            if vars(module).get(name) is not function:
                continue
            if own is None:
                del vars(module)[name]
            else:
                vars(module)[name] = own

    def guard(self, module: nn.Module, name: str, function: Callable[..., Any]) -> None:
        """Has `function` called in place of the module's method `name`, which may be one that a user has put there."""
        self._guarded.append((module, name, function, vars(module).get(name)))
        vars(module)[name] = function


class ConversionGuard(Guard):
    """Stands before `_apply`, which all of torch's conversions go through, and before what merges adapters, or makes
    embeddings larger, until `remove`: of some modules, and of each module within them that has parameters. A part of a
    model is converted like the whole, and what is under a PeftModel is the model to whoever has made both.
    """

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        for inner in {inner for module in modules for inner in module.modules()}:
            if next(inner.parameters(), None) is not None:
                self.guard(inner, "_apply", _guarded(inner))
            for name, why in _REFUSED.items():
                if hasattr(type(inner), name):
                    self.guard(inner, name, _refused(name, why))


def check_unmanaged(model: nn.Module) -> None:
    """Raises `ConfigError` where an engine manages the model, or a part of it, already, or where it is compiled."""
    for name, module in model.named_modules():
        if "_apply" in vars(module):
            raise ConfigError("model: an engine that is not closed manages it; close that one, or make another model")
        if module._compiled_call_impl is not None or type(module).__module__.startswith("torch._dynamo."):
            raise ConfigError(
                f"model: {name or 'it'} is compiled, and the compiler would trace how an engine moves weights; give "
                f"the model itself, and do not compile engine.model"
            )


def _refused(name: str, why: str) -> Callable[..., Any]:
    def refused(*_: Any, **__: Any) -> Any:
        raise ConfigError(f"{name}: {why}")

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
