"""What a run was begun with, by content: it goes on where model and data lie in other places, and only with them.

A model is not read as a whole: of each of its files the beginning, which has the header, and samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from offload_rt.storage.durable import os_error

_HEAD_BYTES = 1 << 20
_SAMPLE_BYTES = 4096
_NUM_SAMPLES = 8


def model_digest(folder: Path) -> str:
    """Of the configuration and the weights in `folder`: 16 hexadecimal digits. Raises `StorageError`."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("config.json"), *folder.glob("*.safetensors")]):
        try:
            size = path.stat().st_size
            digest.update(repr((path.name, size)).encode())
            with open(path, "rb") as file:
                digest.update(file.read(_HEAD_BYTES))
                for number in range(_NUM_SAMPLES):
                    file.seek(max(0, size - _SAMPLE_BYTES) * number // (_NUM_SAMPLES - 1))
                    digest.update(file.read(_SAMPLE_BYTES))
        except OSError as error:
            raise os_error("cannot be read", path, error) from None
    return digest.hexdigest()[:16]


def file_digest(path: Path) -> str:
    """Of all of a file: 16 hexadecimal digits. Raises `StorageError`."""
    try:
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while chunk := file.read(_HEAD_BYTES):
                digest.update(chunk)
        return digest.hexdigest()[:16]
    except OSError as error:
        raise os_error("cannot be read", path, error) from None


def place_and_content(name: str, place: str, content: str, before: Mapping[str, Any]) -> dict[str, str]:
    """Settings of a run: where `name` is and what. The place is that of `before`, where the content is."""
    key = f"{name} content"
    return {name: str(before[name]) if before.get(key) == content and name in before else place, key: content}
