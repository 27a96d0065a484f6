"""NF4 in plain torch: the definition, to the bit, of what every faster path must give.

It works on whole sections of a blob (`nf4_layout`) on any device, in chunks, and is written to be read. The
bytes are those of bitsandbytes 0.50 on a CPU, `quantize_4bit(quant_type="nf4", blocksize=64,
compress_statistics=True)`; the tests hold it to them. It chooses nothing and checks no user's argument:
that is `codec`.

[Note: arithmetic order]
Weights.  absmax = max |w|; scaled = w * (1 / max(absmax, 1e-38)); the code is the number of the table's
          midpoints below `scaled`, so a tie takes the lower code. The last quant block, if partial, divides
          instead (w / absmax) and stores max(absmax, 1e-38), as bitsandbytes' CPU path does.
Scales.   offset = torch's float32 mean of all absmax. deviation = absmax - offset; nested_absmax =
          max |deviation| of 256; the code comes from a table of 65536 steps of [-1, 1]. bitsandbytes' CPU
          path has that table since it dropped the exact search of its older releases and of CUDA; within
          half a step (1.5e-5) of a midpoint the two may pick different neighbours.
Decode.   absmax = map[code] * nested_absmax + offset, two roundings; weight = table[code] * absmax in
          float32, then one rounding to the dtype, to nearest even.

Above 32768 quant blocks torch shares a mean out to its threads, so the offset's last bit can depend on
their number.

Two behaviours of bitsandbytes' CPU decoder are faults and not followed: with AVX512-BF16 it flushes bfloat16
denormals to zero, and in matrices whose rows are a multiple of 16 but not of 64 it takes the wrong absmax.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from offload_rt.quantized.nf4_layout import (
    NESTED_BLOCK_SIZE,
    NF4_TABLE,
    NF4_ZERO_CODE,
    QUANT_BLOCK_SIZE,
    SECTION_ALIGNMENT_BYTES,
    NF4Layout,
    dynamic_map,
)

_SMALLEST_ABSMAX = 1e-38
_ABSMAX_STEPS = 65536
_CHUNK_ELEMENTS = 1 << 20
"""Keeps the temporaries near 30 MB whatever the tensor's size; a multiple of the quant block."""


class Sections(NamedTuple):
    """Views of one blob, in the order in which they lie; the native functions take them in the same order."""

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor
    nested_offset: Tensor
    nested_map: Tensor


def sections_of(blob: Tensor, layout: NF4Layout) -> Sections:
    """The sections of a blob, without a copy. Raises as `check_blob`."""
    check_blob(blob, layout)
    codes, absmax, *floats = (blob[part.begin_bytes : part.end_bytes] for part in layout.sections)
    return Sections(codes, absmax, *(part.view(torch.float32) for part in floats))


def section_arrays(blob: Tensor, layout: NF4Layout) -> list[Any]:
    """The same as numpy's arrays, of a blob in RAM: views of these cost a tenth of torch's. Raises as `check_blob`."""
    check_blob(blob, layout)
    whole = blob.numpy()
    codes, absmax, *floats = [whole[part.begin_bytes : part.end_bytes] for part in layout.sections]
    return [codes, absmax, *[part.view("float32") for part in floats]]


def check_blob(blob: Tensor, layout: NF4Layout) -> None:
    """Raises `ValueError` for a wrong dtype, size or alignment."""
    if blob.dtype != torch.uint8 or blob.dim() != 1 or not blob.is_contiguous():
        raise ValueError(f"blob must be contiguous uint8[n], got {blob.dtype}{tuple(blob.shape)}")
    if blob.numel() != layout.total_bytes:
        raise ValueError(f"blob has {blob.numel()} bytes, {layout.num_elements} elements need {layout.total_bytes}")
    misaligned_bytes = blob.data_ptr() % SECTION_ALIGNMENT_BYTES
    if misaligned_bytes:
        raise ValueError(f"blob starts {misaligned_bytes} bytes behind a multiple of {SECTION_ALIGNMENT_BYTES}")


def zero_gaps(blob: Tensor, layout: NF4Layout) -> None:
    """Clears what lies between the sections, so that equal weights give equal bytes and equal checksums."""
    next_begins = [section.begin_bytes for section in layout.sections[1:]] + [layout.total_bytes]
    for section, next_begin in zip(layout.sections, next_begins, strict=True):
        blob[section.end_bytes : next_begin] = 0


class Tables(NamedTuple):
    nf4: Tensor
    nf4_midpoints: Tensor
    dynamic_map: Tensor
    absmax_rounding: Tensor
    """uint8[65536]: the code of each step of [-1, 1]."""


@cache
def tables(device: torch.device) -> Tables:
    """The number maps as tensors; shared, not to be written."""
    nf4, values = (torch.tensor(table, dtype=torch.float32, device="cpu") for table in (NF4_TABLE, dynamic_map()))
    steps = torch.arange(_ABSMAX_STEPS, dtype=torch.float32, device="cpu") * 2 / (_ABSMAX_STEPS - 1) - 1
    rounding = torch.bucketize(steps, (values[:-1] + values[1:]) / 2).to(torch.uint8)
    midpoints = (nf4[:-1] + nf4[1:]) / 2
    return Tables(nf4.to(device), midpoints.to(device), values.to(device), rounding.to(device))


def encode_blocks(weights: Tensor, codes: Tensor, absmax: Tensor) -> int | None:
    """Fills `codes` and float32 `absmax` of flat `weights`, which begin at a quant block.

    Returns the index of the first weight that is NaN or infinite, if there is one; the outputs are then
    undefined.
    """
    for begin, end in _chunks(weights.numel()):
        values = weights[begin:end].float()
        finite = torch.isfinite(values)
        if not finite.all():
            return begin + int(finite.logical_not().int().argmax())
        num_whole = values.numel() // QUANT_BLOCK_SIZE * QUANT_BLOCK_SIZE
        blocks, tail = values[:num_whole].view(-1, QUANT_BLOCK_SIZE), values[num_whole:]
        block_absmax = blocks.abs().amax(dim=1)
        scaled = (blocks * (1.0 / block_absmax.clamp(min=_SMALLEST_ABSMAX)).unsqueeze(1)).view(-1)
        if tail.numel():
            tail_absmax = tail.abs().amax(dim=0, keepdim=True).clamp(min=_SMALLEST_ABSMAX)
            block_absmax = torch.cat([block_absmax, tail_absmax])
            scaled = torch.cat([scaled, tail / tail_absmax])
        indices = torch.bucketize(scaled, tables(weights.device).nf4_midpoints).to(torch.uint8)
        if indices.numel() % 2:
            indices = pad(indices, (0, 1), value=NF4_ZERO_CODE)
        codes[begin // 2 : _ceil_divide(end, 2)] = indices[::2] << 4 | indices[1::2]
        absmax[begin // QUANT_BLOCK_SIZE : _ceil_divide(end, QUANT_BLOCK_SIZE)] = block_absmax
    return None


def encode_absmax(absmax: Tensor, offset: Tensor, absmax_codes: Tensor, nested_absmax: Tensor) -> None:
    """The second quantization: fills the codes and the nested absmax of all `absmax`."""
    deviation = pad(absmax - offset, (0, -absmax.numel() % NESTED_BLOCK_SIZE))
    blocks = deviation.view(-1, NESTED_BLOCK_SIZE)
    nested_absmax.copy_(blocks.abs().amax(dim=1))
    scaled = (blocks * (1.0 / nested_absmax).unsqueeze(1)).view(-1)[: absmax.numel()]
    # 0 * inf is a NaN, in a nested block without deviations; it takes the lowest code, which decodes to 0
    # there.
    position = (scaled.nan_to_num(nan=-1.0).clamp(-1.0, 1.0) + 1.0) * 0.5
    # bitsandbytes fuses this multiply and add. In float64 both are exact, which leaves its one rounding to
    # float32.
    step = (position.double() * (_ABSMAX_STEPS - 1) + 0.5).float().long()
    absmax_codes.copy_(tables(absmax.device).absmax_rounding[step])


def decode(sections: Sections, out: Tensor) -> None:
    """Decodes into flat `out`, whose size is the number of elements and whose dtype is rounded to."""
    for begin, end in _chunks(out.numel()):
        packed = sections.codes[begin // 2 : _ceil_divide(end, 2)]
        codes = torch.stack([packed >> 4, packed & 0xF], dim=1).view(-1)[: end - begin]
        absmax = _decode_absmax(sections, begin // QUANT_BLOCK_SIZE, _ceil_divide(end, QUANT_BLOCK_SIZE))
        scales = absmax.repeat_interleave(QUANT_BLOCK_SIZE)[: end - begin]
        out[begin:end] = tables(out.device).nf4[codes.long()] * scales


def _decode_absmax(sections: Sections, begin: int, end: int) -> Tensor:
    """float32 absmax of quant blocks `[begin, end)`."""
    blocks = torch.arange(begin, end, device=sections.absmax.device)
    values = sections.nested_map[sections.absmax[begin:end].long()]
    return values * sections.nested_absmax[blocks // NESTED_BLOCK_SIZE] + sections.nested_offset


def _chunks(num_elements: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, num_elements, _CHUNK_ELEMENTS):
        yield begin, min(begin + _CHUNK_ELEMENTS, num_elements)


def _ceil_divide(left: int, right: int) -> int:
    return -(-left // right)
