"""Tensors by name that somebody has saved, read a range at a time wherever they lie."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from offload_rt.checkpoint.safetensors_reader import open_checkpoint
from offload_rt.checkpoint.safetensors_writer import Outline
from offload_rt.dtypes import torch_dtype


class SavedTensors(Protocol):
    """A safetensors file, or a commit on NVMe."""

    path: Path
    """Names it in errors."""
    outline: Outline
    """What there is, in an order in which it is well read."""

    def read_into(self, name: str, begin_bytes: int, buffer: memoryview) -> None:
        """Fills `buffer`, which is the caller's, with the tensor's bytes from `begin_bytes` on. Blocks."""


class FileTensors:
    """The tensors of a safetensors file. A context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open_checkpoint(path)
        self.outline: Outline = {
            name: torch.empty(entry.shape, dtype=torch_dtype(entry.dtype), device="meta")
            for name, entry in self._file.tensors.items()
        }

    def read_into(self, name: str, begin_bytes: int, buffer: memoryview) -> None:
        self._file.read_into(self._file.tensors[name], begin_bytes, buffer)

    def __enter__(self) -> FileTensors:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


def read_tensor(saved: SavedTensors, name: str) -> Tensor:
    """A whole tensor, the caller's. Blocks."""
    tensor = torch.empty_like(saved.outline[name], device="cpu")
    saved.read_into(name, 0, bytes_of(tensor))
    return tensor


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy().data)
