"""Products of few tokens with a packed NF4 weight on the GPU, by Triton: a weight is decoded where it is multiplied.

The twin is `nf4_products.decoded`: decode, then multiply. The decoded weights have the same bits here, and are summed
in fp32 as there, but in another order: a cut. A weight is read once, as half a byte, where decode and product move four
and a half. For many tokens they win nevertheless, since here each 64 tokens decode anew: `nf4_products` chooses. Triton
is an optional dependency: this module is imported late.

[Note: a product out of packed weights]
A program has ROWS outputs of up to TOKENS tokens, and a part of the columns, of which it takes COLUMNS at a time:

              columns, a part                   the weight is the left factor: its rows fill the 16 (Ada) or 64 (Hopper)
            .-------+-------+---.               rows of a matrix instruction, so that few tokens suffice beside them
    ROWS    |COLUMNS| next  |   |  x  tokens    words of codes for the next step are asked for before this one's are
            '-------+-------+---'               decoded: with all of Triton's stages, lookups would go through them, too

A 32-bit word is eight neighbours of one row and one quant block, hence columns are a multiple of eight; nothing else is
asked of a shape. The table's 16 entries lie in one line of the first-level cache, which serves a warp's 32 lookups at
once. About 10 instructions a weight (sm_89 and sm_90, counted in the machine code), of 40 that a 4090 issues while its
memory moves two weights, and of 17 on an H100.

Where rows are too few to fill a GPU, columns are cut into parts (`parts_of`), whose sums a second kernel adds in their
order. The cut depends on the weight's shape alone: not on the GPU, the tokens or what else runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from offload_rt.quantized.nf4_layout import CODES_A_WORD, NESTED_BLOCK_SIZE, NF4_ZERO_CODE, QUANT_BLOCK_SIZE, NF4Layout
from offload_rt.quantized.nf4_torch import sections_of, tables

DTYPES = (torch.bfloat16, torch.float16)
_ALL_ZERO = sum(NF4_ZERO_CODE << 4 * position for position in range(CODES_A_WORD))
"""A word of weights of zero: what is beyond the matrix."""
_TOKENS = (16, 32, 64)
_PROGRAMS = 512
"""That a product has, or its columns are cut: about four on each multiprocessor of a 4090 or an H100. A guess until a
GPU has measured it."""
_LEAST_STEPS = 4
"""Of a part."""
_SUM_ELEMENTS = 256


@dataclass
class Counters:
    """Products taken since the start."""

    num_products: int = 0
    decoded_elements: int = 0
    """Weights, each once for every `_TOKENS` tokens."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How the kernel is cut. `rows` and `columns` decide where parts begin, and so the order of sums."""

    rows: int = 64
    columns: int = 128
    num_warps: int = 4


counters = Counters()
DEFAULT = Launch()


@triton.jit
def _load_words(
    codes,
    absmax,
    nested_absmax,
    row_word,
    word,
    is_row,
    words_a_row,
    ALL_ZERO: tl.constexpr,
    WORDS_A_QUANT_BLOCK: tl.constexpr,
    NESTED_BLOCK_SIZE: tl.constexpr,
):
    place = row_word[:, None] + word[None, :]
    is_there = is_row[:, None] & (word[None, :] < words_a_row)
    quant_block = place // WORDS_A_QUANT_BLOCK
    return (
        tl.load(codes + place, mask=is_there, other=ALL_ZERO),
        tl.load(absmax + quant_block, mask=is_there, other=0),
        tl.load(nested_absmax + quant_block // NESTED_BLOCK_SIZE, mask=is_there, other=0.0),
    )


@triton.jit
def _weight(packed, scale, table, position: tl.constexpr, dtype: tl.constexpr):
    return (tl.load(table + ((packed >> ((4 * position) ^ 4)) & 15)) * scale).to(dtype)


@triton.jit
def _weights(packed, scale, table, ROWS: tl.constexpr, COLUMNS: tl.constexpr, dtype: tl.constexpr):
    """Words of eight codes to weights, [ROWS, COLUMNS]. By joins, so that a thread keeps the eight of its words."""
    even = tl.join(
        tl.join(_weight(packed, scale, table, 0, dtype), _weight(packed, scale, table, 4, dtype)),
        tl.join(_weight(packed, scale, table, 2, dtype), _weight(packed, scale, table, 6, dtype)),
    )
    odd = tl.join(
        tl.join(_weight(packed, scale, table, 1, dtype), _weight(packed, scale, table, 5, dtype)),
        tl.join(_weight(packed, scale, table, 3, dtype), _weight(packed, scale, table, 7, dtype)),
    )
    return tl.join(even, odd).reshape(ROWS, COLUMNS)


@triton.jit
def _product_kernel(
    x,
    codes,
    absmax,
    nested_absmax,
    nested_offset,
    nested_map,
    table,
    bias,
    out,
    num_tokens,
    rows,
    columns,
    columns_a_part,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    CODES_A_WORD: tl.constexpr,
    ALL_ZERO: tl.constexpr,
    WORDS_A_QUANT_BLOCK: tl.constexpr,
    NESTED_BLOCK_SIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, COLUMNS)
    WORDS: tl.constexpr = COLUMNS // CODES_A_WORD
    is_row, is_token = row < rows, token < num_tokens
    words_a_row = columns // CODES_A_WORD
    begin = part * columns_a_part
    word = begin // CODES_A_WORD + tl.arange(0, WORDS)
    offset = tl.load(nested_offset)
    total = tl.full((ROWS, TOKENS), 0.0, tl.float32)
    packed, code, nested = _load_words(
        codes, absmax, nested_absmax, row * words_a_row, word, is_row, words_a_row,
        ALL_ZERO, WORDS_A_QUANT_BLOCK, NESTED_BLOCK_SIZE,
    )  # fmt: skip
    for first in range(begin, min(begin + columns_a_part, columns), COLUMNS):
        word += WORDS
        next_packed, next_code, next_nested = _load_words(
            codes, absmax, nested_absmax, row * words_a_row, word, is_row, words_a_row,
            ALL_ZERO, WORDS_A_QUANT_BLOCK, NESTED_BLOCK_SIZE,
        )  # fmt: skip
        is_given = is_token[None, :] & ((first + column)[:, None] < columns)
        given = tl.load(x + token[None, :] * columns + (first + column)[:, None], mask=is_given, other=0.0)
        scale = tl.load(nested_map + code) * nested + offset
        total = tl.dot(_weights(packed, scale, table, ROWS, COLUMNS, x.dtype.element_ty), given, total)
        packed, code, nested = next_packed, next_code, next_nested
    if HAS_BIAS:
        total += tl.load(bias + row, mask=is_row, other=0.0).to(tl.float32)[:, None]
    place = (part * num_tokens + token[None, :]) * rows + row[:, None]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=is_token[None, :] & is_row[:, None])


@triton.jit
def _sum_kernel(
    parts, bias, out, num_elements, rows, PARTS: tl.constexpr, ELEMENTS: tl.constexpr, HAS_BIAS: tl.constexpr
):
    element = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)
    is_there = element < num_elements
    total = tl.load(parts + element, mask=is_there, other=0.0)
    for part in range(1, PARTS):
        total += tl.load(parts + part * num_elements + element, mask=is_there, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + element % rows, mask=is_there, other=0.0).to(tl.float32)
    tl.store(out + element, total.to(out.dtype.element_ty), mask=is_there)


def product(
    x: Tensor, blob: Tensor, layout: NF4Layout, rows: int, bias: Tensor | None = None, launch: Launch = DEFAULT
) -> Tensor:
    """x[..., columns] times the transposed (rows, columns) weight that `blob` holds, and `bias`[rows]: [..., rows].

    Asynchronous, on the current stream. Allocates the result, and fp32 parts of it where columns are cut. Raises
    `ValueError` for what `why_not` names, for a blob that is not of `layout`, and for tensors on different devices.
    """
    sections = sections_of(blob, layout)
    columns = x.shape[-1]
    if reason := why_not(rows, columns, x.dtype):
        raise ValueError(reason)
    if rows * columns != layout.num_elements:
        raise ValueError(f"the blob holds {layout.num_elements} weights, ({rows}, {columns}) are {rows * columns}")
    if bias is not None and (bias.shape != (rows,) or bias.dtype != x.dtype or not bias.is_contiguous()):
        raise ValueError(f"bias is {bias.dtype}{tuple(bias.shape)}, {x.dtype}({rows},) is needed")
    if any(tensor.device != x.device for tensor in (blob, x if bias is None else bias)):
        raise ValueError(f"x is on {x.device}, the blob on {blob.device}: all must be on one device")
    given = x.reshape(-1, columns).contiguous()
    num_tokens = given.shape[0]
    out = torch.empty((*x.shape[:-1], rows), dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    if not columns:
        return out.zero_() if bias is None else out.copy_(bias.expand_as(out))
    tokens = next((size for size in _TOKENS if size >= num_tokens), _TOKENS[-1])
    num_parts, columns_a_part = parts_of(rows, columns, launch)
    parts = out if num_parts == 1 else torch.empty((num_parts, num_tokens, rows), dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(rows, launch.rows), num_parts, triton.cdiv(num_tokens, tokens))
    counters.num_products += 1
    counters.decoded_elements += layout.num_elements * grid[2]
    padded_bias = given if bias is None else bias  # a pointer that is not read
    with torch.cuda.device_of(x):  # Triton launches on torch's current device
        _product_kernel[grid](
            given, sections.codes.view(torch.int32), *sections[1:], tables(x.device).nf4, padded_bias, parts,
            num_tokens, rows, columns, columns_a_part,
            ROWS=launch.rows, COLUMNS=launch.columns, TOKENS=tokens, CODES_A_WORD=CODES_A_WORD, ALL_ZERO=_ALL_ZERO,
            WORDS_A_QUANT_BLOCK=QUANT_BLOCK_SIZE // CODES_A_WORD, NESTED_BLOCK_SIZE=NESTED_BLOCK_SIZE,
            HAS_BIAS=bias is not None and num_parts == 1, num_warps=launch.num_warps, num_stages=1,
            enable_fp_fusion=False,
        )  # fmt: skip
        if num_parts > 1:
            _sum_kernel[(triton.cdiv(out.numel(), _SUM_ELEMENTS),)](
                parts, padded_bias, out, out.numel(), rows, PARTS=num_parts, ELEMENTS=_SUM_ELEMENTS,
                HAS_BIAS=bias is not None, enable_fp_fusion=False,
            )  # fmt: skip
    return out


def parts_of(rows: int, columns: int, launch: Launch = DEFAULT) -> tuple[int, int]:
    """Into how many parts the columns of a weight are cut, and the columns of one: whole steps, but for the last."""
    steps = triton.cdiv(columns, launch.columns)
    wanted = min(_PROGRAMS // triton.cdiv(rows, launch.rows), steps // _LEAST_STEPS)
    columns_a_part = triton.cdiv(steps, max(1, wanted)) * launch.columns
    return triton.cdiv(columns, columns_a_part), columns_a_part


def why_not(rows: int, columns: int, dtype: torch.dtype) -> str:
    """Why a product cannot be taken with a (rows, columns) weight; empty where it can."""
    if dtype not in DTYPES:
        return f"x.dtype is {dtype}, allowed: {', '.join(map(str, DTYPES))}"
    if columns % CODES_A_WORD:
        return f"the weight has {columns} columns, which are no multiple of {CODES_A_WORD}: words would be of two rows"
    if rows * columns // CODES_A_WORD >= 1 << 31:
        return f"the weight has {rows * columns} elements, more than 32 bits can number by words"
    return ""


def serves(device: torch.device) -> bool:
    """Whether the kernel runs on `device`: a GPU, or the CPU in Triton's interpreter."""
    return device.type == "cuda" or type(_product_kernel).__name__ == "InterpretedFunction"
