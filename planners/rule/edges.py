"""How blocks outside the layers come to DEVICE memory by the fixed rule: resident, by rows, whole, or by tiles."""

from __future__ import annotations

from enum import Enum

from planners.plans.plan import Tier
from planners.plans.vocabulary import HeadTiles, Lookups
from planners.rule.streaming_problem import BlockSize, StreamingProblem


class EdgesBy(Enum):
    """How blocks outside the layers come to DEVICE memory, the best choice first."""

    RESIDENT = 1
    """They stay there."""
    ROWS = 2
    """Embeddings by the rows that a lookup needs, all others through a slot."""
    WHOLE = 3
    """All through a slot."""
    TILES = 4
    """As by rows, but the largest linear by tiles, and the rows of an embedding that is tied to it. A cut."""


def edge_choices(problem: StreamingProblem, *, in_place: bool) -> list[list[EdgesBy]]:
    """The choices that there are, the best first; by tiles, which is a cut, only where nothing else fits, or where the
    run that goes on has them: then in place, too.
    """
    could: list[list[EdgesBy]] = [[choice for choice in EdgesBy if choice is not EdgesBy.TILES]]
    if tiled_block(problem) is None or (problem.training is not None and not problem.training.adapters):
        return could
    if problem.cuts is None:
        return could if in_place else [*could, [EdgesBy.TILES]]
    return could if problem.cuts.head_tile_rows is None else [[EdgesBy.TILES]]


def tiled_block(problem: StreamingProblem) -> BlockSize | None:
    """What a plan by tiles takes by tiles: the largest linear outside the layers, tied to an embedding or not."""
    linears = [
        block
        for block in problem.edges
        if block.product is not None and block.streams and (block.rows is None or block.rows.is_worth_it())
    ]
    return max(linears, key=lambda block: block.stored_bytes, default=None)


def head_tiles_of(block: BlockSize, rest: Tier, tile_tokens: int | None, tile_rows: int | None = None) -> HeadTiles:
    """Its tiles, of `tile_rows` in place of the rule's. tile_tokens: that go through it at once; None: all."""
    size = block.product
    if size is None:
        raise ValueError(f"{block.name}: is no linear that is taken by tiles")
    rows = size.tile_rows() if tile_rows is None else tile_rows
    return HeadTiles.of(
        block.name, size, rest, tile_rows=rows, num_tokens=tile_tokens or size.most_rows, batch_tokens=size.most_rows
    )


def looked_up_of(
    problem: StreamingProblem, edges: tuple[BlockSize, ...], tiled: BlockSize | None
) -> tuple[BlockSize, ...]:
    """Those of `edges` that are worth reading by rows; of those that are tied to a head, what is `tiled`, since another
    one is there as a whole. None where layers train: a whole model is saved block by block.
    """
    if problem.training is not None and not problem.training.adapters:
        return ()
    by_rows = (block for block in edges if block.product is None or block is tiled)
    return tuple(block for block in by_rows if block.rows is not None and block.rows.is_worth_it())


def lookups_of(blocks: tuple[BlockSize, ...], rest: Tier) -> Lookups | None:
    """The lookups of embeddings that rest there; None without any."""
    sizes = {block.name: block.rows for block in blocks if block.rows is not None}
    return Lookups.of(sizes, rest) if sizes else None
