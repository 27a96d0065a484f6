"""What PyTorch's attention takes on a CPU beside its operands, its result and their gradients.

    fused        while its backward runs, each thread has its own tiles of queries by keys, whatever the model's size
    not fused    probabilities of all pairs of tokens, of each head: eager attention, dropout, values of another width
                 than keys

Counted with torch 2.13 by what its allocator gave out: tiles in fp32 to the byte, in 16 bits at most; pairs in both.
"""

from __future__ import annotations

_QUERIES_OF_TILE = ((768, 256), (192, 64), (1, 32))
"""From so many tokens of a sequence on, so many are in a tile."""
_KEYS_OF_TILE = 512
_KEYS_OF_PRODUCT = 256
"""Of those that a 16-bit product of a tile packs at a time, beside 64 features."""
BYTES_PER_PAIR = 12
BYTES_PER_PAIR_WITH_DROPOUT = 16
BYTES_PER_PAIR_OF_MASK = 5
"""Of all heads together: true or false, and added in fp32."""


def tiles_bytes(*, num_threads: int, seq_len: int, item_bytes: int) -> int:
    """Of all threads together, in the backward of fused attention with operands of so many bytes an element."""
    of_tile = next(size for least, size in _QUERIES_OF_TILE if seq_len >= least)
    queries, keys = min(seq_len, of_tile), min(seq_len, _KEYS_OF_TILE)
    tiles = 2 * queries * keys * max(4, item_bytes)
    if item_bytes < 4:
        packed_keys = min(keys, _KEYS_OF_PRODUCT)
        tiles += 2 * queries * keys * 2 + packed_keys * (2 * of_tile + 256) + 132 * of_tile + 2048
    return num_threads * tiles + queries * max(4, item_bytes)


def pairs_bytes(*, batch_size: int, num_heads: int, seq_len: int, drops: bool) -> int:
    """Of attention that is not fused, at most, from a layer's forward to its backward. drops: some probabilities."""
    of_heads = num_heads * (BYTES_PER_PAIR_WITH_DROPOUT if drops else BYTES_PER_PAIR)
    return batch_size * seq_len**2 * (of_heads + BYTES_PER_PAIR_OF_MASK)
