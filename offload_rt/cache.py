"""What was measured once and is good for a while: small JSON files in the user's cache folder.

Nothing here raises: what cannot be read, or is not what was written, is not there, and what cannot be written is
measured again next time. Whether a value still holds is the caller's to judge.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any


def recall(name: str) -> dict[str, Any] | None:
    """What `remember` kept under `name`, or None."""
    try:
        data = json.loads((cache_folder() / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


def remember(name: str, data: dict[str, Any]) -> None:
    """Keeps `data` under `name`, replacing what was there in one step."""
    place = cache_folder() / f"{name}.json"
    partial = place.with_suffix(f".{os.getpid()}")
    with contextlib.suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_text(json.dumps(data, indent=1), encoding="utf-8")
            os.replace(partial, place)
        finally:
            partial.unlink(missing_ok=True)


def cache_folder() -> Path:
    """`$OFFLOAD_RT_CACHE`, or `offload_rt` in the user's cache folder."""
    if chosen := os.environ.get("OFFLOAD_RT_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "offload_rt"
