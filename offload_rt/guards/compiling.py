"""Refuses calls of a model that an engine manages from compiled code: `torch.compile` of it, or of what calls it.

The compiler would follow how an engine moves weights, and ends somewhere in it. It runs hooks as it runs the model: so
one that it cannot look into finds that a compiler is at work in this thread, before anything else is called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from offload_rt.errors import ConfigError

_REFUSAL = (
    "compile: the compiler would trace how an engine moves weights; call the model itself, from code that is not "
    "compiled (torch.compiler.disable)"
)
_compiler: Callable[[], Any] = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", lambda: None)
"""What looks at each of this thread's frames before it runs; None and False stand for nothing."""


class CompileGuard:
    """A hook of some modules until `remove`."""

    def __init__(self, *modules: nn.Module) -> None:
        self._handles: list[RemovableHandle] = [
            module.register_forward_pre_hook(_refuse_compiled, prepend=True) for module in modules
        ]

    def remove(self) -> None:
        """May be called twice."""
        while self._handles:
            self._handles.pop().remove()


def _refuse_compiled(module: nn.Module, args: object) -> None:
    if torch.compiler.is_compiling() or _compiler() not in (None, False):
        raise ConfigError(_REFUSAL)


# As `torch.compiler.disable` marks a function, which imports all of the compiler.
_refuse_compiled._torchdynamo_disable = True  # type: ignore[attr-defined]
_refuse_compiled._torchdynamo_disable_msg = _REFUSAL  # type: ignore[attr-defined]
