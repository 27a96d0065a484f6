"""Rows of a matrix that rests in HOST or on NVMe, brought to DEVICE memory by their numbers, through a bounded room.

From NVMe whole pages are read, neighbours with one request. Gaps between rows are read along where another request
would cost more than their bytes: so rows that lie close together become few large reads, and a batch that needs most of
a table reads it from end to end. See `planners.plans.vocabulary` for the rooms on the way.

[Note: pages are verified]
A store knows the checksum of a whole block. When an engine is made the block is read and verified once, piece by piece,
and each page's own checksum is noted; a page is held against it on its first read of the run.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch

from offload_rt.checksum import crc32c
from offload_rt.dtypes import torch_dtype
from offload_rt.errors import OffloadError
from offload_rt.memory.arena import Arena, Slot
from offload_rt.storage.store import Store
from offload_rt.tensor_spec import IO_ALIGNMENT_BYTES, TensorSpec, align_up
from offload_rt.transfers.links import Links
from offload_rt.transfers.recording import HOST, RETURNED
from offload_rt.transfers.transfer import Transfer

GAP_BYTES = 64 << 10
"""Of pages that nobody wants, read along between two that are: at 3 GB/s they take 20 us, as long as starting another
request does."""


@dataclass
class RowCounters:
    """What lookups did since the start."""

    num_rows: int = 0
    """Distinct ones, of each lookup."""
    num_pieces: int = 0
    """Tables that they were put into."""
    num_requests: int = 0
    page_bytes: int = 0
    """Read from NVMe."""
    num_verified_pages: int = 0


@dataclass(frozen=True)
class PageRange:
    """The half-open range [begin_bytes, end_bytes) of a block, whole pages, that has rows `first` to `last` in it."""

    begin_bytes: int
    end_bytes: int
    first: int
    last: int


@dataclass(frozen=True)
class Piece:
    """What is read at a time for the wanted rows [begin, end): counted along the sorted list of them."""

    begin: int
    end: int
    ranges: tuple[PageRange, ...]

    @property
    def num_bytes(self) -> int:
        return sum(pages.end_bytes - pages.begin_bytes for pages in self.ranges)


def pieces_of(
    rows_U: Sequence[int], spec: TensorSpec, *, most_rows: int, most_bytes: int, gap_bytes: int = GAP_BYTES
) -> Iterator[Piece]:
    """Cuts the ascending, distinct `rows_U` of `spec` into pieces of at most `most_rows` and `most_bytes` of pages.

    Each row's pages are read in the piece that it is in. ValueError where the pages of one row are more than that.
    """
    row_bytes = spec.stored_bytes // spec.shape[0]
    begin, ranges, held = 0, list[PageRange](), 0
    for at, row in enumerate(rows_U):
        start = spec.offset_bytes + row * row_bytes
        first_byte = start // IO_ALIGNMENT_BYTES * IO_ALIGNMENT_BYTES
        end_byte = align_up(start + row_bytes, IO_ALIGNMENT_BYTES)
        if end_byte - first_byte > most_bytes:
            raise ValueError(f"{spec.name}: the pages of a row are {end_byte - first_byte} of {most_bytes} bytes")
        joins = bool(ranges) and first_byte - ranges[-1].end_bytes <= gap_bytes
        more = end_byte - (ranges[-1].end_bytes if joins else first_byte)
        if at - begin == most_rows or held + more > most_bytes:
            yield Piece(begin, at, tuple(ranges))
            begin, ranges, held, joins, more = at, [], 0, False, end_byte - first_byte
        if joins:
            ranges[-1] = PageRange(ranges[-1].begin_bytes, end_byte, ranges[-1].first, row)
        else:
            ranges.append(PageRange(first_byte, end_byte, row, row))
        held += more
    if ranges:
        yield Piece(begin, len(rows_U), tuple(ranges))


class PageSums:
    """Checksums of a block's pages, see [Note: pages are verified]. Whoever reads the block shows it to `see`."""

    def __init__(self, store: Store, block: str, num_bytes: int) -> None:
        self._store = store
        self._block = block
        self._crc32c = np.zeros(num_bytes // IO_ALIGNMENT_BYTES, dtype=np.uint32)
        self._is_verified = np.zeros(num_bytes // IO_ALIGNMENT_BYTES, dtype=np.bool_)

    def see(self, offset_bytes: int, piece: Slot) -> None:
        """Takes note of the pages in `piece`, which begins at `offset_bytes` of the block; both whole pages."""
        buffer, first = piece.buffer(), offset_bytes // IO_ALIGNMENT_BYTES
        for page in range(piece.num_bytes // IO_ALIGNMENT_BYTES):
            at = page * IO_ALIGNMENT_BYTES
            self._crc32c[first + page] = crc32c(buffer[at : at + IO_ALIGNMENT_BYTES])

    def verify(self, offset_bytes: int, piece: Slot) -> int:
        """Checks those pages in `piece` that are read for the first time, or all with OFFLOAD_RT_VERIFY=all.

        Returns how many. Raises `StoreCorrupt`.
        """
        buffer, first = piece.buffer(), offset_bytes // IO_ALIGNMENT_BYTES
        known = self._is_verified[first : first + piece.num_bytes // IO_ALIGNMENT_BYTES]
        fresh = range(len(known)) if self._store.verifies_every_read else np.flatnonzero(~known).tolist()
        for page in fresh:
            at = page * IO_ALIGNMENT_BYTES
            found, expected = crc32c(buffer[at : at + IO_ALIGNMENT_BYTES]), int(self._crc32c[first + page])
            if found != expected:
                begin = offset_bytes + at
                raise self._store.other_bytes(
                    self._block, begin, begin + IO_ALIGNMENT_BYTES, found=found, expected=expected
                )
            known[page] = True
        return len(fresh)


Pieces = Generator[tuple[int, int, "Gather"], None, None]
"""[begin, end) of the rows that were asked for, and what puts these where they are wanted."""


class RowSource(Protocol):
    """Where the rows of one matrix rest."""

    spec: TensorSpec

    def pieces(self, rows_U: torch.Tensor, most_rows: int, counters: RowCounters) -> Pieces:
        """The ascending, distinct `rows_U`, at most `most_rows` at a time, in their order.

        Blocks until they are in HOST. A `Gather` serves until the next piece is asked for.
        """


class Gather(Protocol):
    """Rows that have arrived in HOST."""

    @property
    def memory(self) -> Slot:
        """What they lie in, besides others."""

    def into(self, rows_MD: torch.Tensor) -> None:
        """Copies them there."""


class HostRows:
    """Rows of a matrix in a block that rests in HOST, in `slot`, as a whole."""

    def __init__(self, spec: TensorSpec, slot: Slot) -> None:
        self.spec = spec
        self._slot = slot

    def pieces(self, rows_U: torch.Tensor, most_rows: int, counters: RowCounters) -> Pieces:
        for begin in range(0, rows_U.numel(), most_rows):
            end = min(begin + most_rows, rows_U.numel())
            yield begin, end, _InHost(self.spec, self._slot, rows_U[begin:end])


@dataclass(frozen=True)
class _InHost:
    spec: TensorSpec
    memory: Slot
    rows_M: torch.Tensor

    def into(self, rows_MD: torch.Tensor) -> None:
        whole_VD = self.memory.tensor(torch_dtype(self.spec.dtype), self.spec.shape, self.spec.offset_bytes)
        torch.index_select(whole_VD, 0, self.rows_M, out=rows_MD)


class StoredRows:
    """Rows of a matrix in a block that rests on NVMe. `pages` has room for two pieces, the next one is read ahead."""

    def __init__(self, spec: TensorSpec, block: str, store: Store, sums: PageSums, pages: Arena, links: Links) -> None:
        self.spec = spec
        self._block = block
        self._store = store
        self._sums = sums
        self._pages = pages
        self._links = links

    def pieces(self, rows_U: torch.Tensor, most_rows: int, counters: RowCounters) -> Pieces:
        most_bytes = self._pages.num_bytes // 2
        todo = pieces_of(rows_U.tolist(), self.spec, most_rows=most_rows, most_bytes=most_bytes)
        under_way: deque[_Reading] = deque()
        try:
            self._start(todo, under_way, counters)
            while under_way:
                self._start(todo, under_way, counters)
                reading = under_way[0]
                self._links.wait(reading.transfer)
                for begin, pages in reading.places():
                    part = reading.memory.part(begin, pages.end_bytes - pages.begin_bytes)
                    counters.num_verified_pages += self._sums.verify(pages.begin_bytes, part)
                    del part
                rows_M = rows_U[reading.piece.begin : reading.piece.end]
                yield reading.piece.begin, reading.piece.end, _Arrived(self.spec, reading.memory, reading, rows_M)
                under_way.popleft()
                del reading  # its memory is the one after next's
        finally:
            for reading in under_way:  # the error that is told is the one that stopped it
                with contextlib.suppress(OffloadError):
                    self._links.finish(reading.transfer)

    def _start(self, todo: Iterator[Piece], under_way: deque[_Reading], counters: RowCounters) -> None:
        piece = next(todo, None)
        if piece is None:
            return
        memory = self._pages.acquire(self._pages.num_bytes // 2, self._block)  # all alike: no gaps too small
        reads, begin = [], 0
        for pages in piece.ranges:
            num_bytes = pages.end_bytes - pages.begin_bytes
            reads.append(self._store.read_range(self._block, pages.begin_bytes, memory.part(begin, num_bytes)))
            begin += num_bytes
        under_way.append(_Reading(piece, memory, self._links.join(f"rows of {self._block}", reads)))
        counters.num_requests += len(reads)
        counters.page_bytes += piece.num_bytes


@dataclass(frozen=True)
class _Reading:
    """A piece on its way to `memory`, its ranges one behind the other."""

    piece: Piece
    memory: Slot
    transfer: Transfer

    def places(self) -> Iterator[tuple[int, PageRange]]:
        """Each range, and where in `memory` it begins."""
        begin = 0
        for pages in self.piece.ranges:
            yield begin, pages
            begin += pages.end_bytes - pages.begin_bytes


@dataclass(frozen=True)
class _Arrived:
    spec: TensorSpec
    memory: Slot
    reading: _Reading
    rows_M: torch.Tensor

    def into(self, rows_MD: torch.Tensor) -> None:
        row_bytes = self.spec.stored_bytes // self.spec.shape[0]
        firsts = torch.tensor([pages.first for pages in self.reading.piece.ranges])
        cuts = [*torch.searchsorted(self.rows_M, firsts).tolist(), self.rows_M.numel()]
        for (begin, pages), (start, end) in zip(self.reading.places(), pairwise(cuts), strict=True):
            offset = begin + self.spec.offset_bytes + pages.first * row_bytes - pages.begin_bytes
            shape = (pages.last - pages.first + 1, *self.spec.shape[1:])
            there_RD = self.memory.tensor(torch_dtype(self.spec.dtype), shape, offset)
            torch.index_select(there_RD, 0, self.rows_M[start:end] - pages.first, out=rows_MD[start:end])


class RowReader:
    """Brings rows of any matrix to `table`, DEVICE memory for as many as are there at a time. For one thread at a time.

    staging: HOST memory of the same size that they are gathered in; None where `table` is HOST memory itself.
    """

    def __init__(self, table: Arena, staging: Arena | None, links: Links) -> None:
        self.counters = RowCounters()
        self._table = table
        self._staging = staging
        self._links = links

    def tables(self, source: RowSource, rows_U: torch.Tensor) -> Generator[tuple[int, int, torch.Tensor], None, None]:
        """For the ascending, distinct `rows_U`: [begin, end) of them, and these rows, in DEVICE memory.

        They may be used until the next ones are asked for. Blocks until they are there, or, on a device with streams,
        puts its compute stream behind them. Raises what reading raised, and `StoreCorrupt`.
        """
        dtype, (num_rows, *rest) = torch_dtype(source.spec.dtype), source.spec.shape
        most_rows = self._table.num_bytes // (source.spec.stored_bytes // num_rows)
        recorder = self._links.recorder
        self.counters.num_rows += rows_U.numel()
        with contextlib.closing(source.pieces(rows_U, most_rows, self.counters)) as pieces:
            for begin, end, gather in pieces:
                self.counters.num_pieces += 1
                shape = (end - begin, *rest)
                num_bytes = source.spec.stored_bytes // num_rows * (end - begin)
                table = self._table.acquire(num_bytes, source.spec.name).part(0, num_bytes)
                place = table
                if self._staging is not None:
                    place = self._staging.acquire(num_bytes, source.spec.name).part(0, num_bytes)
                gather.into(place.tensor(dtype, shape))
                if recorder is not None:
                    recorder.use(
                        f"rows of {source.spec.name}", reads=[gather.memory.range], writes=[place.range],
                        lane=HOST, also=RETURNED,
                    )  # fmt: skip
                del gather
                if place is not table:
                    self._links.wait(self._links.copy(place, table, inward=True))
                del place
                if recorder is not None:
                    recorder.use(f"look up in {source.spec.name}", reads=[table.range])
                yield begin, end, table.tensor(dtype, shape)
                del table
