"""Writes a safetensors file tensor by tensor: the header first, as all sizes are known, then each at its place.

The layout is the library's: wide dtypes first, then by name, so that every tensor is aligned to its items. Tensors may
come in any order. No page of the file stays in the page cache, which the budget does not know.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from offload_rt.checkpoint.safetensors_reader import open_checkpoint
from offload_rt.checksum import crc32c
from offload_rt.dtypes import dtype_name
from offload_rt.errors import CheckpointVerifyError

WRITE_BYTES = 32 << 20
"""Written before the drive is made to take it: about what of a file is in the page cache at any time."""
READ_BYTES = 4 << 20

Outline = Mapping[str, Tensor]
"""Names with tensors of the shapes and dtypes to be written, on the meta device."""


class SafetensorsWriter:
    """One file in the making. `close` gives the descriptor back."""

    def __init__(self, path: Path, outline: Outline) -> None:
        """Creates `path` and writes its header."""
        self.path = path
        header, self._begins = _header(outline)
        self._outline = dict(outline)
        self._checksums: dict[str, int] = {}
        self._done_bytes: dict[str, int] = {}
        self._cached_bytes = 0
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            self._write(0, memoryview(header))
        except OSError:
            self.close()
            raise

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes one tensor; its memory is the caller's again when this returns. Blocks.

        Raises OSError. Copies a tensor that is not contiguous or not on the CPU.
        """
        expected = self._outline[name]
        if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
            raise ValueError(
                f"{name}: {tuple(tensor.shape)} {tensor.dtype}, {tuple(expected.shape)} {expected.dtype} was announced"
            )
        self.write_next(name, tensor)

    def write_next(self, name: str, values: Tensor) -> None:
        """Writes the elements of one tensor, flat, that follow those that were written of it. Blocks."""
        data, done = _bytes_of(values), self._done_bytes.get(name, 0)
        if values.dtype != self._outline[name].dtype or done + len(data) > self._outline[name].nbytes:
            raise ValueError(
                f"{name}: {values.numel()} elements of {values.dtype} after {done} bytes were not announced"
            )
        self._checksums[name] = crc32c(data, self._checksums.get(name, 0))
        self._done_bytes[name] = done + len(data)
        for begin in range(0, len(data), WRITE_BYTES):
            self._write(self._begins[name] + done + begin, data[begin : begin + WRITE_BYTES])

    def finish(self) -> None:
        """Makes the file durable. Every tensor must have been written."""
        missing = sorted(name for name, t in self._outline.items() if self._done_bytes.get(name) != t.nbytes)
        if missing:
            raise ValueError(f"{self.path.name}: {len(missing)} tensors were never written, first: {missing[0]}")
        os.fsync(self._fd)
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        os.close(self._fd)

    def verify(self) -> None:
        """Reads the file back and compares every tensor by its checksum. Raises `CheckpointVerifyError`."""
        with open_checkpoint(self.path) as checkpoint:
            if set(checkpoint.tensors) != set(self._checksums):
                odd = sorted(set(checkpoint.tensors) ^ set(self._checksums))
                raise CheckpointVerifyError(f"{self.path}: holds other tensors than were written, first: {odd[0]}")
            buffer = bytearray(READ_BYTES)
            for name, entry in checkpoint.tensors.items():
                found = 0
                for begin in range(0, entry.num_bytes, READ_BYTES):
                    view = memoryview(buffer)[: min(READ_BYTES, entry.num_bytes - begin)]
                    checkpoint.read_into(entry, begin, view)
                    found = crc32c(view, found)
                if found != self._checksums[name]:
                    raise CheckpointVerifyError(
                        f"{self.path}: {name} reads back with checksum {found:08x}, written was "
                        f"{self._checksums[name]:08x}; the drive or the memory is faulty"
                    )

    def _write(self, offset: int, data: memoryview) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self._fd, data[done:], offset + done)
        self._cached_bytes += len(data)
        if self._cached_bytes >= WRITE_BYTES:
            os.fdatasync(self._fd)
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
            self._cached_bytes = 0


@contextmanager
def all_written(writers: Mapping[str, SafetensorsWriter]) -> Iterator[None]:
    """Inside, the caller makes `writers` and writes; then all are finished and verified. They are closed in any case.

    Blocks, and raises, as `finish` and `verify`.
    """
    try:
        yield
        for writer in writers.values():
            writer.finish()
    finally:
        for writer in writers.values():
            writer.close()
    for writer in writers.values():
        writer.verify()


def file_bytes(outline: Outline) -> int:
    """The size of the file that `outline` makes."""
    return len(_header(outline)[0]) + sum(tensor.nbytes for tensor in outline.values())


def _header(outline: Outline) -> tuple[bytes, dict[str, int]]:
    """The first bytes of the file, and where each tensor begins in it."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins: dict[str, int] = {}
    offset = 0
    for name, tensor in sorted(outline.items(), key=lambda item: (-item[1].element_size(), item[0])):
        num_bytes = math.prod(tensor.shape) * tensor.element_size()
        entries[name] = {
            "dtype": dtype_name(tensor.dtype, of=name), "shape": list(tensor.shape),
            "data_offsets": [offset, offset + num_bytes],
        }  # fmt: skip
        begins[name] = offset
        offset += num_bytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + begin for name, begin in begins.items()}


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return memoryview(flat.numpy().data).cast("B") if flat.numel() else memoryview(b"")
