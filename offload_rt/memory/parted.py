"""A block's bytes as whoever computes with them sees them: one range, whether it lies in one slot or in two.

    the block      |== stays in DEVICE ==|======= streams =======|
                   0                     ^ first tensor that streams
    resident slot  |=====================|
    ring slot                         |==========================|
                                      ^ `streamed_from_bytes`, the page that this tensor begins in

A tensor lies in one of the two as a whole. What the two slots have both, less than a page, is used from neither twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from offload_rt.memory.arena import Slot


class BlockBytes(Protocol):
    """What holds a block: a slot, or parts."""

    def tensor(self, dtype: torch.dtype, shape: Sequence[int], offset_bytes: int = 0) -> torch.Tensor:
        """A contiguous tensor over the bytes from `offset_bytes` of the block on. Holds their lease."""

    def offset_of(self, tensor: torch.Tensor) -> int | None:
        """Where in the block `tensor` begins; None if it begins elsewhere."""


class PartedBytes:
    """A block whose first tensors, all of `resident`, stay in DEVICE memory while the others are in a ring's slot."""

    def __init__(self, resident: Slot, streamed: BlockBytes, streamed_from_bytes: int) -> None:
        self._resident = resident
        self._streamed = streamed
        self._streamed_from_bytes = streamed_from_bytes

    def tensor(self, dtype: torch.dtype, shape: Sequence[int], offset_bytes: int = 0) -> torch.Tensor:
        if offset_bytes < self._resident.num_bytes:
            return self._resident.tensor(dtype, shape, offset_bytes)
        return self._streamed.tensor(dtype, shape, offset_bytes - self._streamed_from_bytes)

    def offset_of(self, tensor: torch.Tensor) -> int | None:
        offset = self._resident.offset_of(tensor)
        if offset is not None:
            return offset
        offset = self._streamed.offset_of(tensor)
        return None if offset is None else offset + self._streamed_from_bytes
