"""NF4 decode on the GPU: one Triton kernel, to the bit what `nf4_torch` gives. Chosen by `codec`, never by itself.

Triton is an optional dependency, so this module is imported late. It decodes only: encoding is done once, by the CPU.

[Note: a decode at the speed of memory]
A weight is half a byte in and two bytes out, so the writes decide. A thread takes 32-bit words of eight codes and
writes eight neighbours for each, 16 bytes in bf16; a warp's store is one run of 512 bytes. The eight share a quant
block: its absmax is looked up once a word, and 8 to 128 threads ask for the same one. The 16 weights' table lies in
shared memory, in 16 different banks: a warp's 32 lookups never conflict, whatever the codes are. About 9 instructions a
weight (sm_90, counted in the machine code), of 23 that an H100 issues while its memory moves the weight's 2.5 bytes.

    blob      | codes: word 0 | word 1 | ... word 7 | ...      a word: bytes b0 b1 b2 b3, each high nibble first
    weights   | 8 | 8 | ... 8 |                                  weight j is (word >> ((4 * j) ^ 4)) & 15
              '-- quant block: one absmax --'

Each product and sum rounds once: the launch forbids the compiler to fuse them (`enable_fp_fusion=False`). Where the
last word is not full, a second launch of one program stores part of it; masks inside a word would forbid wide stores.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from offload_rt.quantized.nf4_layout import CODES_A_WORD, NESTED_BLOCK_SIZE, QUANT_BLOCK_SIZE, NF4Layout
from offload_rt.quantized.nf4_torch import check_blob, tables

FLOAT_BYTES = 4
_TAIL_WORDS = 32
"""One warp's; only the first is there."""


@dataclass
class Counters:
    """Kernels launched since the start."""

    num_launches: int = 0
    decoded_elements: int = 0


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How the kernel is cut; the bits are the same for all. The default is a guess until a GPU has measured it."""

    words: int = 512
    """32-bit words of codes a program; a power of two."""
    num_warps: int = 4


counters = Counters()
DEFAULT = Launch()


@triton.jit
def _decode_kernel(
    words,
    codes_of_absmax,
    floats,
    table,
    out,
    absmax_begin,
    nested_absmax_begin,
    nested_offset_begin,
    nested_map_begin,
    first_word,
    num_words,
    num_elements,
    WORDS: tl.constexpr,
    CODES_A_WORD: tl.constexpr,
    WORDS_A_QUANT_BLOCK: tl.constexpr,
    NESTED_BLOCK_SIZE: tl.constexpr,
    IS_TAIL: tl.constexpr,
):
    begin = first_word + tl.program_id(0).to(tl.int64) * WORDS
    word = tl.arange(0, WORDS)
    is_there = word < num_words - begin
    packed = tl.load(words + begin + word, mask=is_there, other=0)
    quant_block = (begin + word) // WORDS_A_QUANT_BLOCK
    code_of_absmax = tl.load(codes_of_absmax + absmax_begin + quant_block, mask=is_there, other=0)
    value = tl.load(floats + nested_map_begin + code_of_absmax)
    nested = tl.load(floats + nested_absmax_begin + quant_block // NESTED_BLOCK_SIZE, mask=is_there, other=0.0)
    scale = value * nested + tl.load(floats + nested_offset_begin)

    position = tl.arange(0, CODES_A_WORD)
    code = (packed[:, None] >> ((4 * position) ^ 4)[None, :]) & 15
    entry = tl.gather(tl.load(table + tl.arange(0, 16)), code.reshape(WORDS * CODES_A_WORD), 0)
    weight = entry.reshape(WORDS, CODES_A_WORD) * scale[:, None]
    element = word[:, None] * CODES_A_WORD + position[None, :]
    is_stored = is_there[:, None]
    if IS_TAIL:
        is_stored = is_stored & (element < num_elements - begin * CODES_A_WORD)
    tl.store(out + begin * CODES_A_WORD + element, weight.to(out.dtype.element_ty), mask=is_stored)


def decode(blob: Tensor, layout: NF4Layout, out: Tensor, launch: Launch = DEFAULT) -> None:
    """Decodes `blob` into flat, contiguous `out` on the same GPU. Asynchronous, on the current stream.

    `blob` must be 64-byte aligned and of `layout.total_bytes`; raises `ValueError` otherwise, and where the two are on
    different devices.
    """
    check_blob(blob, layout)
    if out.device != blob.device:
        raise ValueError(f"out is on {out.device}, the blob on {blob.device}")
    num_elements = out.numel()
    counters.num_launches += num_elements > 0
    counters.decoded_elements += num_elements
    if not num_elements:
        return
    # The blob as a whole, thrice: views of its sections would take longer than the launch. The codes may end inside a
    # word; the gap behind them is part of the blob.
    words, floats = blob.view(torch.int32), blob.view(torch.float32)
    num_whole, num_words = num_elements // CODES_A_WORD, triton.cdiv(num_elements, CODES_A_WORD)
    with torch.cuda.device_of(out):  # Triton launches on torch's current device
        for first, last, num_at_once in ((0, num_whole, launch.words), (num_whole, num_words, _TAIL_WORDS)):
            if first == last:
                continue
            _decode_kernel[(triton.cdiv(last - first, num_at_once),)](
                words, blob, floats, tables(out.device).nf4, out, layout.absmax.begin_bytes,
                *[part.begin_bytes // FLOAT_BYTES for part in layout.sections[2:]], first, last, num_elements,
                WORDS=num_at_once, CODES_A_WORD=CODES_A_WORD,
                WORDS_A_QUANT_BLOCK=QUANT_BLOCK_SIZE // CODES_A_WORD, NESTED_BLOCK_SIZE=NESTED_BLOCK_SIZE,
                IS_TAIL=first == num_whole, num_warps=launch.num_warps, enable_fp_fusion=False,
            )  # fmt: skip


def serves(device: torch.device) -> bool:
    """Whether tensors on `device` can be decoded: a GPU's, or the CPU's in Triton's interpreter."""
    return device.type == "cuda" or type(_decode_kernel).__name__ == "InterpretedFunction"
