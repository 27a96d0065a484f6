"""Where the bytes of one NF4 tensor lie, and the two number maps that give them meaning.

NF4 (QLoRA, arXiv 2305.14314): 64 weights form a *quant block* and share one scale, their absolute
maximum; a weight is stored as the 4-bit index of the nearest of 16 quantiles of the normal
distribution. Double quantization stores the scales in 8 bits too: their mean is subtracted, 256 of
them form a *nested block* with one float32 maximum, and each becomes an index into the 256 values
of the dynamic map (arXiv 1511.04561).

    weight   =  NF4_TABLE[code]  *  absmax                                  rounded to the dtype
    absmax   =  nested_map[absmax_code] * nested_absmax + nested_offset     float32, two roundings

The bytes of each section are bitsandbytes'. One tensor is one contiguous blob, so that a block of
the model is one read:

    0         64-byte aligned, the gaps are zero                                      total_bytes
    |  codes  |gap|  absmax  |gap|  nested_absmax  |gap|  nested_offset  |gap|  nested_map  |
     2 per byte    1 per 64        1 float per 16384      1 float               256 floats

The first element of a pair is the high nibble; a missing last one is stored as the code of zero.

[Note: the map travels with the tensor]
bitsandbytes builds its dynamic map with `torch.linspace`, whose last bit depends on whether the CPU
fuses a multiply and an add: 42 of the 256 values differ between two such machines. Earlier releases
also overwrote entry 0 with -1.0 when they quantized on the CPU (0.50 no longer does). A checkpoint is
decoded exactly only with the map it was made with, so the blob carries it: 1 KiB for each tensor.

This module is arithmetic on integers and floats. It imports neither torch nor numpy, because a plan
is computed where neither is installed. Encoding and decoding are in `codec`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

QUANT_BLOCK_SIZE = 64
"""Weights that share one absmax."""

NESTED_BLOCK_SIZE = 256
"""Absmax codes that share one nested absmax."""

SECTION_ALIGNMENT_BYTES = 64
"""A cache line, and the width of an AVX-512 register."""

CODES_A_WORD = 8
"""In 32 bits, which is how the kernels for GPUs read them."""

NESTED_MAP_SIZE = 256

NF4_TABLE: tuple[float, ...] = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""QLoRA's 16 quantiles, exact in float32; published as constants (appendix E of the paper)."""

NF4_ZERO_CODE = 7


class ByteRange(NamedTuple):
    """The half-open range `[begin_bytes, end_bytes)` of a blob."""

    begin_bytes: int
    end_bytes: int

    @property
    def length_bytes(self) -> int:
        return self.end_bytes - self.begin_bytes


@dataclass(frozen=True, kw_only=True)
class NF4Layout:
    """The sections of the blob that holds `num_elements` weights; made by `nf4_layout`."""

    num_elements: int
    num_quant_blocks: int
    num_nested_blocks: int
    codes: ByteRange
    """uint8, two codes a byte."""
    absmax: ByteRange
    """uint8, an index into the nested map for each quant block."""
    nested_absmax: ByteRange
    """float32, one for each nested block."""
    nested_offset: ByteRange
    """float32, one: the mean that was subtracted from every absmax."""
    nested_map: ByteRange
    """float32[256]: see [Note: the map travels with the tensor]."""
    total_bytes: int
    """The blob's length, a multiple of 64."""

    @property
    def sections(self) -> tuple[ByteRange, ...]:
        """All sections, in the order in which they lie."""
        return (self.codes, self.absmax, self.nested_absmax, self.nested_offset, self.nested_map)


@lru_cache(maxsize=1024)  # asked for at every decode
def nf4_layout(num_elements: int) -> NF4Layout:
    """The layout of a tensor of `num_elements` weights, whatever its shape.

    Raises `ValueError` for a negative count. Zero elements still have an offset and a map.
    """
    if num_elements < 0:
        raise ValueError(f"num_elements must not be negative, got {num_elements}")
    num_quant_blocks = -(-num_elements // QUANT_BLOCK_SIZE)
    num_nested_blocks = -(-num_quant_blocks // NESTED_BLOCK_SIZE)
    section_bytes = (
        -(-num_elements // 2),
        num_quant_blocks,
        4 * num_nested_blocks,
        4,
        4 * NESTED_MAP_SIZE,
    )
    ranges: list[ByteRange] = []
    offset_bytes = 0
    for length_bytes in section_bytes:
        ranges.append(ByteRange(offset_bytes, offset_bytes + length_bytes))
        offset_bytes = _align_up(offset_bytes + length_bytes)
    codes, absmax, nested_absmax, nested_offset, nested_map = ranges
    return NF4Layout(
        num_elements=num_elements,
        num_quant_blocks=num_quant_blocks,
        num_nested_blocks=num_nested_blocks,
        codes=codes,
        absmax=absmax,
        nested_absmax=nested_absmax,
        nested_offset=nested_offset,
        nested_map=nested_map,
        total_bytes=offset_bytes,
    )


def dynamic_map(*, signed: bool = True) -> tuple[float, ...]:
    """The 256 values, sorted, to which an encoder here rounds the scaled absmax.

    bitsandbytes' `create_dynamic_map()` on a CPU with fused multiply-add, to the bit. Seven decades
    from 1e-6 to 1; decade `i` is cut into `2**i` equal intervals of [0.1, 1], whose midpoints, with
    either sign, are its values. 0 and 1 fill the two places left, so the map is not symmetric: its
    lowest value is -0.9930. Without a sign there are twice as many intervals.
    """
    start, stop = _round_to_float32(0.1), 1.0
    values = [0.0, 1.0]
    for exponent in range(7):
        num_intervals = 2**exponent if signed else 2 ** (exponent + 1)
        step = _round_to_float32(_round_to_float32(stop - start) / num_intervals)
        # linspace walks from the nearer end, with one rounding for each boundary.
        boundaries = [
            _round_to_float32(start + step * i)
            if i < (num_intervals + 1) // 2
            else _round_to_float32(stop - step * (num_intervals - i))
            for i in range(num_intervals + 1)
        ]
        scale = _round_to_float32(10.0 ** (exponent - 6))
        for lower, upper in zip(boundaries, boundaries[1:], strict=False):
            mean = _round_to_float32(lower + upper) / 2
            value = _round_to_float32(scale * mean)
            values += [value, -value] if signed else [value]
    return tuple(sorted(values))


def _round_to_float32(value: float) -> float:
    """A double rounded to float32; of two float32 operands this is the correctly rounded result."""
    rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return rounded


def _align_up(offset_bytes: int) -> int:
    return -(-offset_bytes // SECTION_ALIGNMENT_BYTES) * SECTION_ALIGNMENT_BYTES
