"""Parses the header of a safetensors file: names, shapes, dtypes and where the bytes lie.

An own parser of the format (https://github.com/huggingface/safetensors, "Format"), as strict as the
library's, so that every broken file is a `CheckpointError` that says what is wrong with which bytes. It
opens no file and knows no torch.

    | 8 bytes: N, little endian | N bytes: JSON header | tensor bytes, without holes or overlaps |
                                                       0 = where the header's data_offsets start
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offload_rt.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
"""The bound of the safetensors library itself; a longer header is not a header."""

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
"""Every dtype of the format, with the bits of one element."""

_MAX_U64 = 2**64 - 1


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """Where one tensor lies: bytes `[begin, end)` of `file`, counted from the start of the file."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """As safetensors names it: `"BF16"`."""
    file: Path
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.begin


def parse_header(header: bytes, *, file: Path, data_bytes: int) -> dict[str, TensorEntry]:
    """The tensors that `header` (the JSON bytes) declares over `data_bytes` bytes of data behind it."""
    if not header.startswith(b"{"):
        raise CheckpointError(f"{file}: not a safetensors file: its header starts with {header[:8]!r}, not '{{'")
    declared = parse_json(header, file)
    metadata = declared.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{file}: __metadata__ is not a map of texts")
    first = 8 + len(header)
    entries = [_parse_tensor(name, value, file, first) for name, value in declared.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    position, before = first, "the start"
    for entry in entries:
        if entry.begin != position:
            what = "overlaps" if entry.begin < position else "leaves a hole behind"
            raise CheckpointError(
                f"{file}: {entry.name} starts at byte {entry.begin - first} of the data and {what} {before}, "
                f"which ends at {position - first}"
            )
        position, before = entry.end, entry.name
    if position - first != data_bytes:
        what = "truncated" if position - first > data_bytes else "longer than its header says"
        raise CheckpointError(
            f"{file}: {what}: its header declares {position - first} bytes ({len(entries)} tensors, the "
            f"last is {before}), the file holds {data_bytes}"
        )
    return {entry.name: entry for entry in entries}


def _parse_tensor(name: str, value: Any, file: Path, first: int) -> TensorEntry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{file}: {name}: expected dtype, shape and data_offsets, got {str(value)[:80]}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(f"{file}: {name}: unknown dtype {dtype!r}; known: {', '.join(DTYPE_BITS)}")
    if not _are_sizes(shape):
        raise CheckpointError(f"{file}: {name}: bad shape {str(shape)[:80]}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{file}: {name}: bad data_offsets {str(offsets)[:80]}")
    bits = DTYPE_BITS[dtype]
    for size in [0] if 0 in shape else shape:
        bits *= size
        if bits > 8 * _MAX_U64:  # before a long product of large numbers takes minutes
            raise CheckpointError(f"{file}: {name}: shape {str(shape)[:80]} overflows")
    if bits != 8 * (offsets[1] - offsets[0]):
        raise CheckpointError(
            f"{file}: {name}: shape {shape} of {dtype} is {bits / 8:g} bytes, its data_offsets {offsets} "
            f"span {offsets[1] - offsets[0]}"
        )
    return TensorEntry(
        name=name,
        shape=tuple(shape),
        dtype=dtype,
        file=file,
        begin=first + offsets[0],
        end=first + offsets[1],
    )


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= _MAX_U64 for n in value)


def parse_json(data: bytes, file: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a name is given twice")
        return result

    def refuse(text: str) -> Any:
        raise ValueError(f"{text} is not JSON")

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
        # An unpaired surrogate escape parses, but is no text that could be printed or hashed later.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: the header is not valid JSON: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: the JSON is not an object")
    return value
