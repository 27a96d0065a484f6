"""Turns a weight that bitsandbytes has quantized to NF4 into our blob, without quantizing it again.

A checkpoint holds it as several tensors (bitsandbytes 0.50, `QuantState.as_dict(packed=True)`); for a
weight X:

    X                                      packed codes, two to a byte, uint8 [n/2, 1] or another dtype's view
    X.absmax                               uint8, or float32 without double quantization
    X.quant_map                            float32[16]
    X.nested_absmax, X.nested_quant_map    float32, float32[256]; with double quantization only
    X.quant_state.bitsandbytes__nf4        JSON as uint8: quant_type, blocksize, dtype, shape, and with double
                                           quantization nested_blocksize, nested_dtype, nested_offset

Every section of the blob is a copy of one of these, so what is decoded is what bitsandbytes decodes, to the
bit. Without double quantization the scales are plain float32. They fit the blob exactly only if there are
at most 256 different ones (then they are its map); more are an error and not rounded in silence.

This module reads no files: the caller has found the tensors and parsed the JSON.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from offload_rt.errors import CheckpointError
from offload_rt.quantized.nf4_layout import NESTED_BLOCK_SIZE, NESTED_MAP_SIZE, QUANT_BLOCK_SIZE, NF4Layout, nf4_layout
from offload_rt.quantized.nf4_torch import Sections, sections_of, tables, zero_gaps


class UnsupportedQuantization(CheckpointError):
    """A well-formed weight that a blob cannot hold exactly: the original has to be quantized instead."""


def from_bitsandbytes(
    packed: Iterable[Tensor], parts: Mapping[str, Tensor], state: Mapping[str, Any], *, name: str
) -> Tensor:
    """The blob of one pre-quantized weight, on the CPU.

    `packed` are the codes in one or more slabs, `parts` the companions by suffix (`absmax`, `quant_map`,
    `nested_absmax`, `nested_quant_map`), `state` the parsed JSON, whose `shape` and `dtype` are the
    caller's to use. Raises `UnsupportedQuantization` for another quant type, block size or 4-bit map and
    for scales that do not fit, `CheckpointError` for sizes and dtypes that contradict each other and for
    scales that are not finite.
    """
    try:
        layout = nf4_layout(prod(int(size) for size in state["shape"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{name}: the quantization state has no shape: {error!r}") from error
    _check_state(state, "quant_type", "nf4", name)
    _check_state(state, "blocksize", QUANT_BLOCK_SIZE, name)
    quant_map = _part(parts, "quant_map", torch.float32, tables(torch.device("cpu")).nf4.numel(), name)
    if not torch.equal(quant_map, tables(quant_map.device).nf4):
        raise UnsupportedQuantization(f"{name}: its 4-bit map is not NF4's: {quant_map.tolist()}")

    blob = torch.empty(layout.total_bytes, dtype=torch.uint8, device="cpu")
    zero_gaps(blob, layout)
    sections = sections_of(blob, layout)
    _copy_codes(packed, sections.codes, name)
    if "nested_absmax" in parts:
        _copy_nested_scales(parts, state, sections, layout, name)
    else:
        _fit_plain_scales(parts, sections, layout, name)
    for section in sections[2:]:
        if not torch.isfinite(section).all():
            raise CheckpointError(f"{name}: a scale is not finite")
    return blob


def _copy_codes(packed: Iterable[Tensor], codes: Tensor, name: str) -> None:
    offset = 0
    for slab in packed:
        values = slab.contiguous().view(-1).view(torch.uint8)
        if offset + values.numel() <= codes.numel():
            codes[offset : offset + values.numel()] = values
        offset += values.numel()
    if offset != codes.numel():
        raise CheckpointError(f"{name}: holds {offset} bytes of codes, its shape needs {codes.numel()}")


def _copy_nested_scales(
    parts: Mapping[str, Tensor], state: Mapping[str, Any], sections: Sections, layout: NF4Layout, name: str
) -> None:
    _check_state(state, "nested_blocksize", NESTED_BLOCK_SIZE, name)
    _check_state(state, "nested_dtype", "float32", name)
    offset = state.get("nested_offset")
    if not isinstance(offset, (int, float)):
        raise CheckpointError(f"{name}: nested_offset is {offset!r}, a number is needed")
    sections.absmax.copy_(_part(parts, "absmax", torch.uint8, layout.num_quant_blocks, name))
    sections.nested_absmax.copy_(_part(parts, "nested_absmax", torch.float32, layout.num_nested_blocks, name))
    sections.nested_map.copy_(_part(parts, "nested_quant_map", torch.float32, NESTED_MAP_SIZE, name))
    sections.nested_offset.fill_(offset)


def _fit_plain_scales(parts: Mapping[str, Tensor], sections: Sections, layout: NF4Layout, name: str) -> None:
    """Scales without a second quantization: the map is their different values, times 1, plus 0."""
    absmax = _part(parts, "absmax", torch.float32, layout.num_quant_blocks, name)
    values, codes = torch.unique(absmax, return_inverse=True)
    if values.numel() > NESTED_MAP_SIZE:
        raise UnsupportedQuantization(
            f"{name}: quantized without double quantization, its {values.numel()} different scales do not "
            f"fit {NESTED_MAP_SIZE}; quantize the original, or with bnb_4bit_use_double_quant=True"
        )
    sections.absmax.copy_(codes)
    sections.nested_absmax.fill_(1.0)
    sections.nested_offset.zero_()
    sections.nested_map.zero_()
    sections.nested_map[: values.numel()] = values


def _check_state(state: Mapping[str, Any], field: str, wanted: object, name: str) -> None:
    if state.get(field) != wanted:
        raise UnsupportedQuantization(f"{name}: {field} is {state.get(field)!r}, only {wanted!r} is supported")


def _part(parts: Mapping[str, Tensor], part: str, dtype: torch.dtype, num_items: int, name: str) -> Tensor:
    if part not in parts:
        raise CheckpointError(f"{name}.{part} is missing")
    tensor = parts[part]
    if tensor.dtype != dtype or tensor.numel() != num_items:
        raise CheckpointError(
            f"{name}.{part} is {tensor.dtype}{tuple(tensor.shape)}, {dtype} of {num_items} items is needed"
        )
    return tensor.reshape(-1)
