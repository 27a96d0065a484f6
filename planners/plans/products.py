"""By which way products with frozen NF4 weights are taken, for how many tokens. Data only: a cut of a plan.

    {"4096x14336": ((1, "bitsandbytes"), (16, "fused"))}      a weight of 4096 rows: one token, 2 to 16 tokens, more

Shapes and token counts that are not named decode the weight and multiply, which is what plain PyTorch does with the
decoded weight. Other ways sum in another order. What ways there are is the runtime's to say (`nf4_products`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

DECODED = "decoded"
"""The way that is no cut. Named only between others."""

PackedProducts = dict[str, tuple[tuple[int, str], ...]]
"""By shape, "ROWSxCOLUMNS": the most tokens and the way, ascending."""


def shape_key(rows: int, columns: int) -> str:
    return f"{rows}x{columns}"


def shape_of(key: str) -> tuple[int, int]:
    """The inverse of `shape_key`. ValueError for anything else."""
    if re.fullmatch(r"\d+x\d+", key) is None:
        raise ValueError(f"plan: packed_products: {key!r} is no shape; expected ROWSxCOLUMNS")
    rows, columns = map(int, key.split("x"))
    return rows, columns


def products_from_json(data: Mapping[str, Any]) -> PackedProducts:
    """What JSON made of them. ValueError for shapes, tokens or order that are not as above."""
    products: PackedProducts = {}
    for key, ranges in data.items():
        shape_of(key)
        try:
            products[key] = tuple((most_tokens, way) for most_tokens, way in ranges)
        except (TypeError, ValueError):
            raise ValueError(
                f"plan: packed_products: {key}: expected pairs of tokens and way, got {ranges!r}"
            ) from None
    check_products(products)
    return products


def check_products(products: PackedProducts) -> None:
    """Raises ValueError unless tokens are whole numbers of at least 1 that ascend, and ways are names."""
    for key, ranges in products.items():
        shape_of(key)
        before = 0
        for most_tokens, way in ranges:
            if isinstance(most_tokens, bool) or not isinstance(most_tokens, int) or most_tokens <= before:
                raise ValueError(f"plan: packed_products: {key}: {most_tokens!r} tokens after {before}; must ascend")
            if not isinstance(way, str) or not way:
                raise ValueError(f"plan: packed_products: {key}: {way!r} is no way's name")
            before = most_tokens


def way_of(ranges: tuple[tuple[int, str], ...], num_tokens: int) -> str:
    """The way of a product of `num_tokens`."""
    return next((way for most_tokens, way in ranges if num_tokens <= most_tokens), DECODED)
