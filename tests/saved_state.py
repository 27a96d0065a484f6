"""Looks at checkpoints of runs whose state is in memory."""

from __future__ import annotations

from pathlib import Path

from offload_rt.checkpoint.state import _read_marker
from offload_rt.errors import CheckpointError


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds a whole one, by its marker and the files' sizes."""
    try:
        return all((folder / name).stat().st_size == size for name, (size, _) in _read_marker(folder).items())
    except (OSError, CheckpointError):
        return False
