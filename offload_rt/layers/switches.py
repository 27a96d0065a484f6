"""What users may switch at any time: a layer that runs again in backward is switched as it was in forward.

    loss = model(...) | model.eval(), set_adapter(...), requires_grad_(False) | loss.backward()

Plain autograd looks at none of these in backward: the gradients are those of the call. Hooks on modules in the layer
are among them: by hooks that are there for one call of the model, peft says where aLoRA begins, or what task it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from typing import Any

from torch import nn

_NAMES = ("training", "_disable_adapters", "_active_adapter")
"""torch's, and peft's of a module with adapters."""
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_HOOKS_ARE = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
"""torch's: hooks by number, which no other hook has had, and the numbers of those that are called in another way."""


class Switches:
    """Those of some modules as they are when this is made. Looked at twice a layer and step: by one call for all."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = modules
        switched = [(vars(module), name) for module in modules for name in _NAMES if _has(module, name)]
        self._own = [own for own, _ in switched]
        self._names = [name for _, name in switched]
        self._values = self._now()
        self._hooks = [vars(module)[name] for module in modules for name in _HOOKS]
        self._hooks_are = [vars(module)[name] for module in modules for name in _HOOKS_ARE]
        self._numbers = self._numbers_now()
        self._hooks_then = self._users_hooks()

    def are_still(self) -> bool:
        """Whether the modules have not been switched."""
        return self._now() == self._values and self._numbers_now() == self._numbers

    def put_back(self, trained: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        """Inside, modules are switched as they were, and `trained` require gradients. Enter it at once."""
        frozen = [parameter for parameter in trained if not parameter.requires_grad]
        if not frozen and self.are_still():
            return nullcontext()
        return self._switched(self._now(), self._users_hooks(), frozen)

    @contextmanager
    def _switched(self, now: list[Any], hooks: list[Any], frozen: Sequence[nn.Parameter]) -> Iterator[None]:
        try:
            self._switch(self._values)
            self._hook(self._hooks_then)
            for parameter in frozen:
                parameter.requires_grad_(True)
            yield
        finally:
            self._switch(now)
            self._hook(hooks)
            for parameter in frozen:
                parameter.requires_grad_(False)

    def _now(self) -> list[Any]:
        """None for what a module has of its class."""
        return [*map(dict.get, self._own, self._names)]

    def _numbers_now(self) -> list[int]:
        return [*chain.from_iterable(self._hooks)]

    def _ours(self) -> set[int]:
        """The numbers of the engine's own hooks, which stay as they are, and are held by nobody else."""
        return {number for each in self._hooks for number, hook in each.items() if _is_ours(hook)}

    def _users_hooks(self) -> list[dict[int, Any]]:
        ours = self._ours()
        return [
            {number: hook for number, hook in own.items() if number not in ours}
            for own in chain(self._hooks, self._hooks_are)
        ]

    def _hook(self, users: Sequence[dict[int, Any]]) -> None:
        """Handles know the dictionaries themselves, which so stay."""
        ours = self._ours()
        for own, then in zip(chain(self._hooks, self._hooks_are), users, strict=True):
            stay = {number: hook for number, hook in own.items() if number in ours}
            if own.keys() != then.keys() | stay.keys():
                own.clear()
                own.update(then)
                own.update(stay)

    def _switch(self, values: Sequence[Any]) -> None:
        for own, name, value in zip(self._own, self._names, values, strict=True):
            if value is not None:
                own[name] = value
            else:
                own.pop(name, None)


def _has(module: nn.Module, name: str) -> bool:
    return name in vars(module) or hasattr(type(module), name)


def _is_ours(hook: Any) -> bool:
    """Of the engine's own hooks. What says how a hook is called is none."""
    function = getattr(hook, "func", hook)  # a partial's
    owner = getattr(function, "__self__", None)
    home = getattr(function, "__module__", None) if owner is None else type(owner).__module__
    return str(home).partition(".")[0] == "offload_rt"
