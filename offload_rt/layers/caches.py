"""Caches of keys and values, which a layer is called with for generation: left out of calls that are gone back through.

A layer updates its cache: in the recompute it would do so a second time.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch.utils import _pytree as pytree

from offload_rt.errors import UnsupportedModule

_CACHE_ARGUMENTS = ("past_key_values", "past_key_value", "layer_past")
"""Keyword arguments that are caches, of whatever type."""


def has_cache(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether `without_cache` would change anything."""
    if kwargs.get("use_cache") or any(kwargs.get(name) is not None for name in _CACHE_ARGUMENTS):
        return True
    return any(map(_is_cache, args)) or any(map(_is_cache, kwargs.values()))


def without_cache(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """As transformers' own checkpointing does: a cache serves generation, and a recompute would fill it again.

    Of a layer that is not gone back through it would only take memory until the step's loss is there.
    """
    named = {id(value): value for name, value in kwargs.items() if name in _CACHE_ARGUMENTS and value is not None}
    caches = named | {id(value): value for value in (*args, *kwargs.values()) if _is_cache(value)}
    if any(_holds_keys(cache) for cache in caches.values()):
        raise UnsupportedModule(
            "past_key_values: a layer is called with keys and values of earlier tokens, which are not kept for its "
            "recompute. Prefix tuning is not supported; generate under torch.no_grad()"
        )
    kwargs = {name: None if id(value) in caches else value for name, value in kwargs.items()}
    if kwargs.get("use_cache"):
        kwargs["use_cache"] = False
    return tuple(None if id(value) in caches else value for value in args), kwargs


def _holds_keys(cache: Any) -> bool:
    """Whether something is in it: a layer with an empty one computes what it does without."""
    layers, parts = getattr(cache, "layers", ()), ("keys", "conv_states", "recurrent_states")
    held = [getattr(layer, part, None) for layer in layers for part in parts] or cache
    return any(isinstance(leaf, torch.Tensor) and leaf.numel() for leaf in pytree.tree_leaves(held))


def _is_cache(value: Any) -> bool:
    kind: Any = type(value)
    return _is_cache_type(kind)


@lru_cache(maxsize=256)  # asked for each argument of each layer
def _is_cache_type(of: Any) -> bool:
    return any(kind.__module__ == "transformers.cache_utils" and kind.__name__ == "Cache" for kind in of.__mro__)
