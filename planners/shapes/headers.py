"""Names and shapes of the tensors in safetensors files: as much of the format as sizes need. No byte of data is read.

    | 8 bytes: N, little endian | N bytes: JSON header | tensor bytes |

The runtime has a stricter parser, for files whose bytes it will trust.
"""

from __future__ import annotations

import re
from pathlib import Path

from planners.units import JsonFile, ProblemError

MAX_HEADER_BYTES = 100_000_000
_FLOATS = ("F", "BF")
_SHARD = re.compile(r"-(\d+)-of-(\d+)\.safetensors$")
_PACKED = (".quant_state.", ".absmax", ".qweight", ".qzeros", ".weight_packed")


def read_headers(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the floating-point tensors of a safetensors file, or of all in a folder, by name.

    `ProblemError` for what is no such file, a shard alone, shards that are missing, packed weights.
    """
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise ProblemError(f"{path}: no config.json and no safetensors file in this folder")
    part = _SHARD.search(files[0].name)
    if part is not None and len(files) != int(part.group(2)):
        place = "give the folder with all" if path.is_file() else "download the others"
        raise ProblemError(f"{files[0]}: {len(files)} of {int(part.group(2))} shards; {place}")
    found: dict[str, tuple[int, ...]] = {}
    for file in files:
        for name, shape in _read(file).items():
            if name in found:
                raise ProblemError(f"{file}: {name} is in another file of the folder, too")
            found[name] = shape
    return found


def _read(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        with path.open("rb") as file:
            start = file.read(8)
            size = int.from_bytes(start, "little")
            if len(start) < 8 or not 2 <= size <= MAX_HEADER_BYTES:
                raise ProblemError(f"{path}: not a safetensors file: it starts with {start!r}")
            text = file.read(size)
    except OSError as error:
        raise ProblemError(f"{path}: {error.strerror}") from error
    if len(text) < size:
        raise ProblemError(f"{path}: truncated: {len(text)} of {size} bytes of its header")
    header = JsonFile(path, text.decode("utf-8", errors="replace"))
    found = {}
    for name, entry in header.data.items():
        if name == "__metadata__":
            continue
        if any(mark in name for mark in _PACKED):
            raise ProblemError(f"{path}: {name}: packed weights do not say their shapes; give the model's config.json")
        shape = entry.get("shape") if isinstance(entry, dict) else None
        sizes = isinstance(shape, list) and all(type(n) is int and 0 <= n < 1 << 48 for n in shape)
        if not isinstance(entry, dict) or not sizes or not isinstance(entry.get("dtype"), str):
            raise header.error((name,), f"expected a dtype and a shape, got {entry!r:.60}")
        if entry["dtype"].startswith(_FLOATS):
            found[name] = tuple(entry["shape"])
    return found
