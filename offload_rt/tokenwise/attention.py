"""Finds the attention call in the middle of a layer's forward, while someone in this thread wants to know of it.

Two doors lead to attention: the function that transformers' `AttentionInterface` hands out, which is that of every
implementation (eager ones too), and `torch.nn.functional.scaled_dot_product_attention` for modules that call it
themselves. Both are replaced only while a layer is being cut; other threads pass through unchanged.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.nn import functional

QKV_TOKEN_DIM = -2
"""Queries, keys and values are [batch, heads, tokens, width] in both doors."""


@dataclass(frozen=True)
class AttentionCall:
    """One call: its operands, and how to make it with others in their place."""

    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    """Everything else it was given: masks, scales, parameters."""
    run: Callable[..., torch.Tensor]
    """run(q, k, v, args, kwargs) -> the result, without weights."""
    out_token_dim: int


Handler = Callable[[AttentionCall], torch.Tensor]
"""Gives the result that the layer goes on with."""

_thread = threading.local()
_lock = threading.Lock()
_num_users = 0
_undo: list[Callable[[], None]] = []
_originals: dict[str, Any] = {}
"""What stood at each door that is replaced now."""


@contextlib.contextmanager
def intercepted(handler: Handler | None) -> Iterator[None]:
    """Inside, attention calls of this thread go to `handler`; with None they run as they are."""
    previous = getattr(_thread, "handler", None)
    if handler is not None:
        _install()
    _thread.handler = handler
    try:
        yield
    finally:
        _thread.handler = previous
        if handler is not None:
            _uninstall()


def _install() -> None:
    global _num_users
    with _lock:
        _num_users += 1
        if _num_users == 1:
            _replace(functional, "scaled_dot_product_attention", _through_sdpa)
            transformers = sys.modules.get("transformers.modeling_utils")
            if transformers is not None and hasattr(transformers.AttentionInterface, "get_interface"):
                _replace(transformers.AttentionInterface, "get_interface", _through_interface)


def _uninstall() -> None:
    global _num_users
    with _lock:
        _num_users -= 1
        if not _num_users:
            while _undo:
                _undo.pop()()


def _replace(owner: Any, name: str, make: Callable[[], Any]) -> None:
    original = _originals[name] = getattr(owner, name)
    # Where nothing is compiled, it need not be disabled: importing what does that takes a second.
    setattr(owner, name, _replacement(make, "torch._dynamo" in sys.modules))

    def put_back() -> None:
        setattr(owner, name, original)
        del _originals[name]

    _undo.append(put_back)


def _original(owner: Any, name: str) -> Any:
    """What a replacement stands for; if it outlives its place in another thread, what is there again."""
    found = _originals.get(name)
    return getattr(owner, name) if found is None else found


@lru_cache  # one for each door, for all layers; what it stands for may be a user's, and is not kept
def _replacement(make: Callable[[], Any], may_be_compiled: bool) -> Any:
    return torch.compiler.disable(make()) if may_be_compiled else make()  # type: ignore[no-untyped-call]


def _through_sdpa() -> Any:
    def scaled_dot_product_attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        original = _original(functional, "scaled_dot_product_attention")

        def run(q: Any, k: Any, v: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
            result: torch.Tensor = original(q, k, v, *args, **kwargs)
            return result

        handler: Handler | None = getattr(_thread, "handler", None)
        if handler is None:
            return run(query, key, value, args, kwargs)
        return handler(AttentionCall((query, key, value), (args, kwargs), run, -2))

    return scaled_dot_product_attention


def _through_interface() -> Any:
    def get_interface(self: Any, name: Any, default: Any) -> Any:
        function = _original(type(self), "get_interface")(self, name, default)
        if getattr(_thread, "handler", None) is None:
            return function

        def attend(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
            handler: Handler | None = getattr(_thread, "handler", None)
            if handler is None:
                return function(module, query, key, value, *args, **kwargs)

            def run(q: Any, k: Any, v: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
                result: torch.Tensor = function(module, q, k, v, *args, **kwargs)[0]
                return result

            return handler(AttentionCall((query, key, value), (args, kwargs), run, 1)), None

        return attend

    return get_interface
