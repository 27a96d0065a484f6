"""8-bit block-wise optimizer states, in plain torch: bitsandbytes' scheme (Dettmers et al., arXiv 2110.02861).

256 elements share one float32 absmax; an element is an index into 256 ascending values in [-1, 1], the dynamic map:
signed for a first moment, unsigned for a second. Decoding is `map[code] * absmax`. Encoding takes the value nearest to
`element / absmax`, on a tie the lower one. bitsandbytes' CPU code rounds through a table of 65536 steps of [-1, 1]
instead, so it may pick the neighbour of a value within half a step (1.5e-5) of a midpoint, and cannot tell smaller
values apart; its CUDA code searches exactly, as here.

A quant block with a NaN or an infinity gets that for its absmax and the largest code everywhere.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from offload_rt.quantized.nf4_layout import dynamic_map

QUANT_BLOCK_SIZE = 256


class Quantized(NamedTuple):
    """Flat tensors; the caller's memory."""

    codes: Tensor
    """uint8[n]"""
    absmax: Tensor
    """float32[ceil(n / 256)]"""


def zeros(num_elements: int) -> Quantized:
    """All zero, with bitsandbytes' bytes."""
    num_blocks = -(-num_elements // QUANT_BLOCK_SIZE)
    return Quantized(torch.zeros(num_elements, dtype=torch.uint8), torch.zeros(num_blocks))


@cache
def map_of(*, signed: bool) -> Tensor:
    """The 256 values as float32; shared, not to be written."""
    return torch.tensor(dynamic_map(signed=signed), dtype=torch.float32)


def decode(quantized: Quantized, *, signed: bool) -> Tensor:
    """float32[n], new."""
    codes, absmax = quantized
    scales = absmax.repeat_interleave(QUANT_BLOCK_SIZE)[: codes.numel()]
    return map_of(signed=signed)[codes.long()] * scales


def encode_into(values: Tensor, quantized: Quantized, *, signed: bool) -> None:
    """Fills `quantized` with flat float32 `values`."""
    codes, absmax = quantized
    blocks = pad(values, (0, -values.numel() % QUANT_BLOCK_SIZE)).view(-1, QUANT_BLOCK_SIZE)
    absmax.copy_(blocks.abs().amax(dim=1))
    scaled = blocks / torch.where(absmax == 0, 1.0, absmax).unsqueeze(1)
    sorted_values = map_of(signed=signed)
    indices = torch.bucketize(scaled, (sorted_values[:-1] + sorted_values[1:]) / 2)
    indices[~torch.isfinite(absmax)] = len(sorted_values) - 1
    codes.copy_(indices.view(-1)[: codes.numel()])
