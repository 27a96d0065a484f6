"""What a stored tensor is: name, shape, dtype, how it is encoded, and where it lies inside its block.

    one block, one contiguous extent, read with a few large requests
    0        64 KiB                          n * 4 KiB
    | tensor | tensor | ... | expert 0 | expert 1 | ... |
      each tensor starts at a multiple of 256 bytes, each expert of a stack at one of 4 KiB

No torch: dtypes are named as safetensors names them (`"BF16"`, `"F32"`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import Enum
from functools import cached_property
from typing import Any

from offload_rt.quantized.nf4_layout import nf4_layout

IO_ALIGNMENT_BYTES = 4096
"""What O_DIRECT needs of offsets, lengths and addresses on every drive that was met."""
TENSOR_ALIGNMENT_BYTES = 256
"""More than any vector load needs: cuBLASLt's choice of a kernel looks at addresses up to so much, and must be the one
that it makes for a tensor in an allocation of its own, or the bits differ."""

ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


class Encoding(str, Enum):
    """How a tensor's bytes are stored."""

    RAW = "raw"
    """As in memory, row-major, in `dtype`."""
    NF4 = "nf4"
    """QLoRA's 4-bit NormalFloat with double quantization, over the row-major matrix of a linear."""
    NF4_TRANSPOSED = "nf4_transposed"
    """The same over the transposed matrix: GPT-2's `Conv1D` holds (in, out), bitsandbytes quantizes (out, in)."""
    NF4_EXPERTS = "nf4_experts"
    """A stack of experts, shape (experts, ...): each expert is an NF4 tensor, at a 4 KiB boundary of its own."""


def align_up(num_bytes: int, alignment_bytes: int) -> int:
    """The smallest multiple of `alignment_bytes` that is not below `num_bytes`."""
    return -(-num_bytes // alignment_bytes) * alignment_bytes


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One tensor of a block. `dtype` is the one it computes in; `offset_bytes` is relative to its block."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    encoding: Encoding = Encoding.RAW
    offset_bytes: int = 0

    @cached_property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @cached_property
    def compute_bytes(self) -> int:
        """Bytes of the decoded tensor."""
        return self.num_elements * ITEM_BYTES[self.dtype]

    @cached_property
    def expert_stride_bytes(self) -> int:
        """Bytes from one expert's NF4 blob to the next, for NF4_EXPERTS."""
        per_expert = math.prod(self.shape[1:])
        return align_up(nf4_layout(per_expert).total_bytes, IO_ALIGNMENT_BYTES)

    @cached_property
    def stored_bytes(self) -> int:
        """Bytes at rest, paddings inside the tensor included."""
        if self.encoding is Encoding.RAW:
            return self.compute_bytes
        if self.encoding is Encoding.NF4_EXPERTS:
            return self.shape[0] * self.expert_stride_bytes
        return nf4_layout(self.num_elements).total_bytes

    @property
    def is_quantized(self) -> bool:
        return self.encoding is not Encoding.RAW

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "shape": list(self.shape), "encoding": self.encoding.value}

    @staticmethod
    def from_json(data: dict[str, Any]) -> TensorSpec:
        fields = {**data, "shape": tuple(data["shape"]), "encoding": Encoding(data["encoding"])}
        return TensorSpec(**fields)


@dataclass(frozen=True, kw_only=True)
class BlockSpec:
    """The unit that is streamed: its tensors, laid out in one contiguous extent of `stored_bytes`."""

    name: str
    tensors: tuple[TensorSpec, ...]

    @cached_property
    def stored_bytes(self) -> int:
        """Length of the extent, a multiple of 4 KiB."""
        end = max((t.offset_bytes + t.stored_bytes for t in self.tensors), default=0)
        return align_up(end, IO_ALIGNMENT_BYTES)

    @cached_property
    def compute_bytes(self) -> int:
        return sum(t.compute_bytes for t in self.tensors)

    @cached_property
    def cuts_bytes(self) -> tuple[int, ...]:
        """How many of its first bytes can stay in DEVICE memory while the rest streams, ascending.

        What streams begins with a tensor, at the page that this begins in.
        """
        starts = {t.offset_bytes // IO_ALIGNMENT_BYTES * IO_ALIGNMENT_BYTES for t in self.tensors}
        return tuple(sorted({0, *starts, self.stored_bytes}))

    def first_streamed_bytes(self, device_bytes: int) -> int:
        """Where the first tensor begins that streams, if `device_bytes`, one of the cuts, stay. ValueError if not one.

        The end of the block if all of it stays.
        """
        if device_bytes not in self.cuts_bytes:
            below = max((cut for cut in self.cuts_bytes if cut <= device_bytes), default=0)
            raise ValueError(f"block {self.name}: cannot be cut at {device_bytes} bytes; below it, at {below}")
        return min((t.offset_bytes for t in self.tensors if t.offset_bytes >= device_bytes), default=self.stored_bytes)

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "tensors": [t.to_json() for t in self.tensors]}

    @staticmethod
    def from_json(data: dict[str, Any]) -> BlockSpec:
        return BlockSpec(name=data["name"], tensors=tuple(TensorSpec.from_json(t) for t in data["tensors"]))


def layout_block(
    name: str, tensors: Iterable[TensorSpec], *, alignment_bytes: int = TENSOR_ALIGNMENT_BYTES
) -> BlockSpec:
    """Places `tensors` one behind the other; the order given is kept."""
    placed = []
    offset = 0
    for tensor in tensors:
        experts = tensor.encoding is Encoding.NF4_EXPERTS
        offset = align_up(offset, IO_ALIGNMENT_BYTES if experts else alignment_bytes)
        placed.append(
            TensorSpec(
                name=tensor.name, shape=tensor.shape, dtype=tensor.dtype, encoding=tensor.encoding,
                offset_bytes=offset,
            )
        )  # fmt: skip
        offset += tensor.stored_bytes
    return BlockSpec(name=name, tensors=tuple(placed))
