"""Tensors as streams: a row-major tensor, one slab after the other, the whole of it never in memory.

What it is: what ingest reads from. A source knows shape and dtype, fills any range of its elements on demand,
and from that come slabs. Merged tensors (experts in one stack, gate and up in one matrix) are concatenations
of ranges of other sources, so that a stack of experts costs no more memory than one slab. What it is not: it
casts nothing and encodes nothing; a slab has the dtype of the file.

Memory: one slab, whatever the tensor. Two sources differ and say so: `TransposedSource` has a staging strip
of up to 1 MiB beside it, and `MaterialisedSource` (`streamed` is False) holds the whole tensor.
"""

from __future__ import annotations

import bisect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch

from offload_rt.checkpoint.safetensors_header import TensorEntry
from offload_rt.checkpoint.safetensors_reader import Checkpoint
from offload_rt.errors import CheckpointError

TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip
"""The safetensors dtypes that torch has, one element to an item."""

_STAGING_BYTES = 1 << 20
"""A strip: long enough to be read at the drive's speed, short enough to stay in a cache while it is turned."""


class TensorSource(Protocol):
    """A tensor that can be read in pieces, in row-major order."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored data, and of every slab."""
        ...

    @property
    def streamed(self) -> bool:
        """False where reading holds the whole tensor in memory."""
        ...

    def read(self, begin: int, out: torch.Tensor) -> None:
        """Fills `out` (1-d, contiguous, CPU, this dtype) with elements from `begin` on. Blocks."""
        ...

    def slabs(self, max_bytes: int, multiple: int = 1, *, boundary: int | None = None) -> Iterator[torch.Tensor]:
        """The flattened tensor in order, as 1-d contiguous pieces of at most `max_bytes`.

        Each is a multiple of `multiple` elements, but for the last. With `boundary`, no slab crosses a
        multiple of so many elements (say, those of one expert), multiples count from there, and the last slab
        before each may be shorter. One buffer is reused: a slab is valid until the next one is asked for. An
        empty tensor has none.
        """
        ...


class _Source(ABC):
    """Slabs on top of `read`."""

    streamed = True

    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        self._shape = tuple(shape)
        self._dtype = dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @abstractmethod
    def read(self, begin: int, out: torch.Tensor) -> None: ...

    def slabs(self, max_bytes: int, multiple: int = 1, *, boundary: int | None = None) -> Iterator[torch.Tensor]:
        ranges = _slab_ranges(self, max_bytes, multiple, boundary)
        return self._slabs(ranges)

    def _slabs(self, ranges: Sequence[range]) -> Iterator[torch.Tensor]:
        buffer = torch.empty(max(map(len, ranges), default=0), dtype=self.dtype)
        for piece in ranges:
            out = buffer[: len(piece)]
            self.read(piece.start, out)
            yield out


def _slab_ranges(source: TensorSource, max_bytes: int, multiple: int, boundary: int | None) -> list[range]:
    total = math.prod(source.shape)
    step = max_bytes // source.dtype.itemsize // max(multiple, 1) * max(multiple, 1)
    if multiple < 1 or step < 1:
        raise ValueError(f"max_bytes: {max_bytes} does not hold multiple={multiple} elements of {source.dtype}")
    if boundary is not None and boundary < 1:
        raise ValueError(f"boundary: must be at least 1 element, got {boundary}")
    part = boundary or max(total, 1)
    return [
        range(begin, min(begin + step, end, total))
        for start in range(0, total, part)
        for end in [start + part]
        for begin in range(start, min(end, total), step)
    ]


class EntrySource(_Source):
    """One tensor of a safetensors file."""

    def __init__(self, checkpoint: Checkpoint, entry: TensorEntry) -> None:
        if entry.dtype not in TORCH_DTYPES:
            raise CheckpointError(f"{entry.file}: {entry.name}: torch has no dtype for {entry.dtype}")
        super().__init__(entry.shape, TORCH_DTYPES[entry.dtype])
        self.entry = entry
        self._checkpoint = checkpoint

    def read(self, begin: int, out: torch.Tensor) -> None:
        if out.numel():
            raw = memoryview(out.view(torch.uint8).numpy().data)
            self._checkpoint.read_into(self.entry, begin * self.dtype.itemsize, raw)


class MemorySource(_Source):
    """A tensor that is in memory already, on any device. Slabs are copies: writing to one leaves it alone."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__(tensor.shape, tensor.dtype)
        self._tensor = tensor.detach()

    def read(self, begin: int, out: torch.Tensor) -> None:
        _copy_range(self._tensor, begin, out)


def _copy_range(tensor: torch.Tensor, begin: int, out: torch.Tensor) -> None:
    """Copies elements of `tensor` in row-major order without a copy of more, whatever its strides."""
    if not out.numel():
        return
    if tensor.is_contiguous():
        out.copy_(tensor.view(-1)[begin : begin + out.numel()])
        return
    # whole rows as one block; a row that is cut, at either end, by its own rows
    row = math.prod(tensor.shape[1:])
    done = 0
    while done < out.numel():
        first, skip = divmod(begin + done, row)
        whole = 0 if skip else (out.numel() - done) // row
        count = whole * row or min(row - skip, out.numel() - done)
        piece = out[done : done + count]
        if whole:
            piece.view(whole, *tensor.shape[1:]).copy_(tensor[first : first + whole])
        else:
            _copy_range(tensor[first], skip, piece)
        done += count


class SliceSource(_Source):
    """Elements `[begin, begin + prod(shape))` of another source, under a shape of their own."""

    def __init__(self, source: TensorSource, begin: int, shape: Sequence[int]) -> None:
        super().__init__(shape, source.dtype)
        if begin < 0 or begin + math.prod(shape) > math.prod(source.shape):
            raise ValueError(f"begin: {begin} with shape {tuple(shape)} is outside of {source.shape}")
        self._source = source
        self._begin = begin
        self.streamed = source.streamed

    def read(self, begin: int, out: torch.Tensor) -> None:
        self._source.read(self._begin + begin, out)


class ConcatSource(_Source):
    """The elements of several sources one behind the other, in row-major order, under one shape."""

    def __init__(self, sources: Sequence[TensorSource], shape: Sequence[int]) -> None:
        dtypes = {source.dtype for source in sources}
        if len(dtypes) != 1:
            raise ValueError(f"sources: expected one dtype, got {sorted(map(str, dtypes))}")
        super().__init__(shape, dtypes.pop())
        self._sources = [source for source in sources if math.prod(source.shape)]
        self._begins = [0]
        for source in self._sources:
            self._begins.append(self._begins[-1] + math.prod(source.shape))
        if self._begins[-1] != math.prod(shape):
            raise ValueError(f"shape: {tuple(shape)} is not the {self._begins[-1]} elements of the sources")
        self.streamed = all(source.streamed for source in sources)

    def read(self, begin: int, out: torch.Tensor) -> None:
        end = begin + out.numel()
        i = bisect.bisect_right(self._begins, begin) - 1
        position = begin
        while position < end:
            stop = min(self._begins[i + 1], end)
            self._sources[i].read(position - self._begins[i], out[position - begin : stop - begin])
            position = stop
            i += 1


class TransposedSource(_Source):
    """The transpose of a 2-d source of shape (R, C), as a (C, R) tensor.

    Cost: every slab reads the whole source, in strips of whole rows, and keeps its columns; a matrix of n slabs is
    read n times. (Reading only the columns was measured too: a piece of each row is a small read that waits for
    the drive, and took eight times as long at seven slabs.) Rows longer than a strip are read by pieces after all.
    Memory: the slab and a staging strip of up to 1 MiB.
    """

    def __init__(self, source: TensorSource) -> None:
        num_rows, num_columns = source.shape
        super().__init__((num_columns, num_rows), source.dtype)
        self._source = source
        self.streamed = source.streamed

    def read(self, begin: int, out: torch.Tensor) -> None:
        if not out.numel():
            return
        if not self.streamed:
            self._whole().read(begin, out)
            return
        num_columns, num_rows = self.shape
        end = begin + out.numel()
        first, last = begin // num_rows, -(-end // num_rows)
        budget = max(1, min(_STAGING_BYTES, out.nbytes) // self.dtype.itemsize)
        whole_rows = num_columns <= budget
        width = num_columns if whole_rows else min(last - first, budget)
        height = min(num_rows, max(1, budget // width))
        strip_buffer = torch.empty(height * width, dtype=self.dtype)
        for left in range(0, num_columns, width) if whole_rows else range(first, last, width):
            right = left + width if whole_rows else min(left + width, last)
            for top in range(0, num_rows, height):
                bottom = min(top + height, num_rows)
                strip_RC = strip_buffer[: (bottom - top) * (right - left)].view(bottom - top, right - left)
                if whole_rows:
                    self._source.read(top * num_columns, strip_RC.view(-1))
                else:
                    for row in range(top, bottom):
                        self._source.read(row * num_columns + left, strip_RC[row - top])
                self._scatter(strip_RC, top, left, begin, out)

    def _slabs(self, ranges: Sequence[range]) -> Iterator[torch.Tensor]:
        return super()._slabs(ranges) if self.streamed else self._whole()._slabs(ranges)

    def _whole(self) -> MemorySource:
        """For a source that is made whole anyway: made once, and not once for each row."""
        return MemorySource(materialise(self._source).T)

    def _scatter(self, strip_RC: torch.Tensor, top: int, left: int, begin: int, out: torch.Tensor) -> None:
        """Copies source rows from `top` and columns from `left` to where they lie in `out`."""
        num_rows = self.shape[1]
        bottom, right = top + strip_RC.shape[0], left + strip_RC.shape[1]
        end = begin + out.numel()
        # columns that `out` holds in full go as one block; at most one is cut at each end
        full_left, full_right = max(left, -(-begin // num_rows)), min(right, end // num_rows)
        if full_left < full_right:
            block = out[full_left * num_rows - begin : full_right * num_rows - begin].view(-1, num_rows)
            block[:, top:bottom].copy_(strip_RC[:, full_left - left : full_right - left].T)
        for column in {begin // num_rows, end // num_rows}:
            if left <= column < right and not full_left <= column < full_right:
                low = max(top, begin - column * num_rows)
                high = min(bottom, end - column * num_rows)
                if low < high:
                    piece = out[column * num_rows + low - begin : column * num_rows + high - begin]
                    piece.copy_(strip_RC[low - top : high - top, column - left])


class MaterialisedSource(_Source):
    """A tensor that only a function can make, whole: for conversions that do not stream.

    `load` runs once a pass. Peak memory: the tensor, and what `load` needs beside it.
    """

    streamed = False

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, load: Callable[[], torch.Tensor]) -> None:
        super().__init__(shape, dtype)
        self._load = load

    def _whole(self) -> torch.Tensor:
        tensor = self._load()
        if tuple(tensor.shape) != self.shape or tensor.dtype != self.dtype:
            raise CheckpointError(
                f"a conversion gave {tuple(tensor.shape)} of {tensor.dtype}, not {self.shape} of {self.dtype}"
            )
        return tensor.detach().contiguous().view(-1)

    def read(self, begin: int, out: torch.Tensor) -> None:
        out.copy_(self._whole()[begin : begin + out.numel()])

    def _slabs(self, ranges: Sequence[range]) -> Iterator[torch.Tensor]:
        whole = self._whole()
        for piece in ranges:
            yield whole[piece.start : piece.stop]


def cat(sources: Sequence[TensorSource], dim: int) -> TensorSource:
    """What `torch.cat` gives, as a stream: for each index of the outer dimensions, a range of each source."""
    shapes = [source.shape for source in sources]
    rank = len(shapes[0])
    dim = dim % rank
    if len({(*shape[:dim], *shape[dim + 1 :]) for shape in shapes}) != 1 or {len(s) for s in shapes} != {rank}:
        raise ValueError(f"sources: shapes {shapes} do not concatenate along dimension {dim}")
    shape = (*shapes[0][:dim], sum(s[dim] for s in shapes), *shapes[0][dim + 1 :])
    if len(sources) == 1:
        return sources[0]
    outer = math.prod(shape[:dim])
    pieces = [
        SliceSource(source, i * math.prod(source.shape[dim:]), source.shape[dim:])
        for i in range(outer)
        for source in sources
    ]
    return ConcatSource(pieces, shape) if pieces else MemorySource(torch.empty(shape, dtype=sources[0].dtype))


def stack(sources: Sequence[TensorSource], dim: int = 0) -> TensorSource:
    """What `torch.stack` gives, as a stream."""
    dim = dim % (len(sources[0].shape) + 1)
    return cat([SliceSource(s, 0, (*s.shape[:dim], 1, *s.shape[dim:])) for s in sources], dim)


def materialise(source: TensorSource) -> torch.Tensor:
    """The whole tensor, in memory: for small ones, and for tests."""
    tensor = torch.empty(source.shape, dtype=source.dtype)
    source.read(0, tensor.view(-1))
    return tensor
