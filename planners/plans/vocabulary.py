"""Data: what of an embedding or a head is in memory where it is read by rows, and how much room that takes.

A lookup needs the rows of a batch's distinct tokens, not the table: of Llama-3-70B's 2.1 GB, 4096 tokens need 64 MiB
at most. They pass through a bounded room, in pieces if a batch has more:

    NVMe --> |- pages -|- pages -|  HOST, the next piece is read while one is taken out
                  v rows
             |- rows -|              HOST, where DEVICE is other memory: what rests in HOST is gathered here
                  v
             |- rows -|              DEVICE, what the module looks up in

A head needs all of its rows, twice a batch, but not at the same time: tiles of them are blocks of a ring. A matrix
that is embedding and head at once, tied, is listed in both ways, and rests once: lookups read its rows, products its
tiles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd
from typing import Any

from planners.plans.placement import Tier, check_not_negative
from planners.units import PAGE_BYTES, whole_pages

TILE_BYTES = 64 << 20
TILES = 8
"""Of a head at least, of `TILE_BYTES` at most."""
TILE_SLOTS = 2
ROOM_BYTES = 8 << 20
"""The most rows that are in memory at a time; a drive is as fast with it as with more."""
PAGE_SLOTS = 2
"""Pieces of pages: one is taken out while the next is read."""
SOFTMAX_BYTES = 32
"""For each token: maximum, sum, the label's logit and loss in fp32; the label and its position."""
SUM_BYTES = 5
"""For each page on NVMe: its checksum, and whether it was verified."""


@dataclass(frozen=True, kw_only=True)
class RowsSize:
    """A matrix outside the layers as the planner sees it: an embedding, or the weight of a linear."""

    num_rows: int
    row_bytes: int
    most_rows: int
    """That the largest batch may look up: its tokens."""

    @property
    def num_bytes(self) -> int:
        return self.num_rows * self.row_bytes

    @property
    def looked_up_bytes(self) -> int:
        """Of the rows that the largest batch looks up, if no two of its tokens are the same."""
        return min(self.most_rows, self.num_rows) * self.row_bytes

    @property
    def read_bytes(self) -> int:
        """Of the pages that these rows lie in, wherever they are; gaps that are read along come on top."""
        return min(min(self.most_rows, self.num_rows) * self._pages_of_row, whole_pages(self.num_rows * self.row_bytes))

    @property
    def _pages_of_row(self) -> int:
        apart = self.row_bytes % PAGE_BYTES == 0 or PAGE_BYTES % self.row_bytes == 0  # no row is in a page too many
        return whole_pages(self.row_bytes) + (0 if apart else PAGE_BYTES)

    def room_bytes(self) -> int:
        """Of rows in memory at a time, whole pages: those of the largest batch, or as many as there is room for."""
        return whole_pages(max(self.row_bytes, min(self.looked_up_bytes, ROOM_BYTES)))

    def pages_bytes(self) -> int:
        """Of a piece of pages that such rows lie in, wherever they are, as far as there is room for them."""
        return max(self._pages_of_row, min(self.read_bytes, ROOM_BYTES))

    def tile_rows(self) -> int:
        """Of a tile: whole pages. It depends on nothing but the matrix, since it is a cut."""
        unit = PAGE_BYTES // gcd(PAGE_BYTES, self.row_bytes)
        wanted = min(TILE_BYTES // self.row_bytes, -(-self.num_rows // TILES))
        return max(unit, wanted // unit * unit)

    def is_worth_it(self) -> bool:
        """Whether rows take less memory than the table."""
        return self.room_bytes() + PAGE_SLOTS * self.pages_bytes() < self.num_rows * self.row_bytes


@dataclass(frozen=True, kw_only=True)
class Lookups:
    """Embeddings of which a lookup reads the rows that it needs, and nothing is in memory between lookups."""

    blocks: tuple[str, ...]
    rest: Tier
    """HOST or NVMe, as a whole."""
    room_bytes: int
    """Rows in DEVICE memory at a time, at most."""
    pages_bytes: int = 0
    """Of a piece of pages on their way from NVMe; 0 from HOST."""

    def __post_init__(self) -> None:
        check_not_negative(self, "lookups", ("room_bytes", "pages_bytes"))
        _check_names("lookups", self.blocks)
        if self.rest is Tier.DEVICE:
            raise ValueError("plan: lookups: rest is DEVICE; list blocks that stay there as resident")
        if not self.blocks or self.room_bytes < 1:
            raise ValueError(f"plan: lookups of {len(self.blocks)} blocks in {self.room_bytes} bytes; at least 1 each")
        if (self.pages_bytes > 0) != (self.rest is Tier.NVME) or self.pages_bytes % PAGE_BYTES:
            raise ValueError(f"plan: lookups from {self.rest.value} with pages_bytes {self.pages_bytes}")

    def sums_bytes(self, stored_bytes: int) -> int:
        """Of the checksums of the pages of blocks of so many bytes together."""
        return SUM_BYTES * (stored_bytes // PAGE_BYTES) if self.rest is Tier.NVME else 0

    @property
    def most_room_bytes(self) -> int:
        """Of all that rows pass through, in whatever memory."""
        return self.room_bytes + self.staging_bytes(unified=False)

    def staging_bytes(self, *, unified: bool) -> int:
        """HOST memory that rows pass through."""
        return PAGE_SLOTS * self.pages_bytes + (0 if unified else whole_pages(self.room_bytes))

    @staticmethod
    def of(sizes: Mapping[str, RowsSize], rest: Tier) -> Lookups:
        """With rooms for the largest of these embeddings, by their blocks."""
        return Lookups(
            blocks=tuple(sizes),
            rest=rest,
            room_bytes=max(size.room_bytes() for size in sizes.values()),
            pages_bytes=max(size.pages_bytes() for size in sizes.values()) if rest is Tier.NVME else 0,
        )

    @staticmethod
    def from_json(data: dict[str, Any]) -> Lookups:
        """Reads what `dataclasses.asdict` gave. KeyError, TypeError or ValueError for anything else."""
        data = dict(data)
        blocks, rest = data.pop("blocks"), Tier(data.pop("rest"))
        return Lookups(blocks=tuple(blocks), rest=rest, **data)


@dataclass(frozen=True, kw_only=True)
class HeadTiles:
    """A head whose weight is never in DEVICE memory as a whole: products are taken by tiles of its rows. A cut."""

    block: str
    rest: Tier
    """HOST or NVMe, as a whole."""
    tile_rows: int
    tile_bytes: int
    """Whole pages."""
    num_slots: int = TILE_SLOTS
    product_bytes: int
    """What products need beside the logits: in fp32 a tile, gradients of its logits and of all inputs; softmax sums."""

    def __post_init__(self) -> None:
        check_not_negative(self, "head_tiles", ("tile_rows", "tile_bytes", "num_slots", "product_bytes"))
        _check_names("head_tiles", (self.block,))
        if self.rest is Tier.DEVICE:
            raise ValueError("plan: head_tiles: rest is DEVICE; list a block that stays there as resident")
        if min(self.tile_rows, self.num_slots) < 1 or self.tile_bytes < PAGE_BYTES or self.tile_bytes % PAGE_BYTES:
            raise ValueError(
                f"plan: head_tiles: {self.num_slots} slots for {self.tile_rows} rows, {self.tile_bytes} bytes"
            )

    @property
    def slots_bytes(self) -> int:
        return self.num_slots * self.tile_bytes

    @staticmethod
    def of(block: str, size: RowsSize, rest: Tier, *, tile_rows: int, num_tokens: int, batch_tokens: int) -> HeadTiles:
        """With what products need; see `check_products`."""
        return HeadTiles(
            block=block, rest=rest, tile_rows=tile_rows, tile_bytes=tile_rows * size.row_bytes,
            product_bytes=_product_bytes(size.row_bytes, tile_rows, num_tokens, batch_tokens),
        )  # fmt: skip

    def check_products(self, size: RowsSize, *, num_tokens: int, batch_tokens: int) -> None:
        """Raises ValueError where less is planned for products than they need.

        num_tokens: that go through the head at once. batch_tokens: whose gradients are summed.
        """
        least = _product_bytes(size.row_bytes, self.tile_rows, min(num_tokens, batch_tokens), batch_tokens)
        if self.product_bytes < least:
            raise ValueError(
                f"plan: head_tiles: product_bytes {self.product_bytes}; products by {self.tile_rows} rows need {least}"
            )

    @staticmethod
    def from_json(data: dict[str, Any]) -> HeadTiles:
        """Reads what `dataclasses.asdict` gave. KeyError, TypeError or ValueError for anything else."""
        return HeadTiles(**{**data, "rest": Tier(data["rest"])})


def _product_bytes(row_bytes: int, tile_rows: int, num_tokens: int, batch_tokens: int) -> int:
    """See `HeadTiles.product_bytes`. A row has at least two bytes to an element, so in fp32 twice as many at most."""
    return 2 * (tile_rows + batch_tokens) * row_bytes + 8 * num_tokens * tile_rows + SOFTMAX_BYTES * batch_tokens


def _check_names(what: str, names: tuple[str, ...]) -> None:
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"plan: {what}: {name!r} is no block's name")
