"""Finds the native core, once. Without it the plain twins serve; `why_not` says what kept it out."""

from __future__ import annotations

import importlib
import os
from functools import lru_cache
from types import ModuleType


@lru_cache(maxsize=1)
def _load() -> tuple[ModuleType | None, str]:
    if os.environ.get("OFFLOAD_RT_NATIVE") == "0":
        return None, "switched off by OFFLOAD_RT_NATIVE=0"
    try:
        return importlib.import_module("_offload_rt_native"), ""
    except ImportError as error:
        return None, f"{type(error).__name__}: {error}"


def native_core() -> ModuleType | None:
    """The extension module `_offload_rt_native`, or None."""
    return _load()[0]


def why_not() -> str:
    """Why `native_core` is None; empty where it is not."""
    return _load()[1]
