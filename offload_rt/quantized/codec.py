"""Encodes and decodes NF4 blobs, by the native core on the CPU, by Triton on a GPU, by the torch twin elsewhere.

The blob is described in `nf4_layout`, its arithmetic in `nf4_torch`; all paths give the same bits, so the
choice between them is never visible in a result. On a GPU only decoding has a fast path. Nothing here knows
modules, tensor names, files or tiers.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import cache, lru_cache
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from offload_rt.errors import OffloadError
from offload_rt.native import native_core, why_not
from offload_rt.native_call import buffer_of, thread_count
from offload_rt.quantized import nf4_torch
from offload_rt.quantized.nf4_layout import QUANT_BLOCK_SIZE, SECTION_ALIGNMENT_BYTES, nf4_layout
from offload_rt.quantized.nf4_torch import Sections, check_blob, section_arrays, sections_of, tables, zero_gaps

Backend = Literal["auto", "native", "triton", "torch"]

_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


STREAMED_BYTES = 4 << 20
"""Of an output that is written around the caches: twice a core's second-level cache. What is larger is not there any
more when the product that follows reads it. Ordinary stores read each line before they write it: decodes of 8 and 23
MiB took 1.4 to 2.0 times as long by them, and decode and product together, of 128 to 2048 tokens, 1.03 to 1.21 times
(processor time, medians, one thread, AVX-512, loaded machine)."""


class NonFiniteWeight(OffloadError, ValueError):
    """A weight is NaN or infinite, or the mean of the scales overflows. The caller knows the tensor's name.

    `element` is the row-major index of the first such weight, None where only the mean overflows.
    """

    def __init__(self, message: str, *, element: int | None) -> None:
        super().__init__(message)
        self.element = element


def backend(requested: Backend = "auto", device: str = "cpu") -> str:
    """What decodes on `device`: `"native avx512"`, `"native avx2"`, `"native plain"`, `"triton"` or `"torch"`.

    `OFFLOAD_RT_NATIVE=0` in the environment turns the native core off. Asking for `"native"` or `"triton"`
    where it cannot be had raises `OffloadError` with the reason.
    """
    if device != "cpu":
        return "torch" if _triton(requested, torch.device(device)) is None else "triton"
    native = _native(requested)
    return "torch" if native is None else f"native {native.kernel_isas()[-1]}"


def encode(weight: Tensor, *, backend: Backend = "auto", num_threads: int | None = None) -> Tensor:
    """A new blob, uint8[total_bytes] on the weight's device; see `encode_into`."""
    blob = torch.empty(nf4_layout(weight.numel()).total_bytes, dtype=torch.uint8, device=weight.device)
    encode_into(weight, blob, backend=backend, num_threads=num_threads)
    return blob


def encode_into(weight: Tensor, blob: Tensor, *, backend: Backend = "auto", num_threads: int | None = None) -> None:
    """Quantizes a contiguous float32, bfloat16 or float16 tensor, in row-major order, into `blob`.

    Every byte of the blob is written, its gaps with zero. Takes 4 bytes of scratch for each quant block.
    Blocks until done. Raises `NonFiniteWeight`, and `ValueError` for a wrong dtype, size, stride or
    alignment.
    """
    encoder = StreamEncoder(weight.numel(), blob, backend=backend, num_threads=num_threads)
    encoder.feed(weight)
    encoder.finish()


class StreamEncoder:
    """Encodes a tensor that arrives in slabs of any size, so that it never lies in memory as a whole.

    The blob is complete after `finish()`, and is that of `encode` of the whole tensor. Until then `blob`
    belongs to the encoder. After an error the encoder is of no more use, and the blob is undefined.
    """

    def __init__(
        self, num_elements: int, blob: Tensor, *, backend: Backend = "auto", num_threads: int | None = None
    ) -> None:
        self._layout = nf4_layout(num_elements)
        self._sections = sections_of(blob, self._layout)
        self._native = _native(backend, blob)
        self._num_threads = thread_count(num_threads)
        self._absmax = torch.empty(self._layout.num_quant_blocks, dtype=torch.float32, device=blob.device)
        self._num_encoded = 0
        self._carry: Tensor | None = None
        """The beginning of a quant block that a slab's end has cut; None before the first slab."""
        zero_gaps(blob, self._layout)

    def feed(self, slab: Tensor) -> None:
        """Takes the next elements, in row-major order, all in one dtype; `slab` may be reused at once."""
        flat = _flat(slab, "slab").detach()
        if self._carry is None:
            self._carry = flat[:0]
        if flat.dtype != self._carry.dtype:
            raise ValueError(f"slab.dtype is {flat.dtype}, the slabs before it were {self._carry.dtype}")
        missing = self._layout.num_elements - self._num_encoded - self._carry.numel()
        if flat.numel() > missing:
            raise ValueError(
                f"slab has {flat.numel()} elements, only {missing} of {self._layout.num_elements} are missing"
            )
        if self._carry.numel():
            taken = min(QUANT_BLOCK_SIZE - self._carry.numel(), flat.numel())
            self._carry = torch.cat([self._carry, flat[:taken]])
            flat = flat[taken:]
            if self._carry.numel() < QUANT_BLOCK_SIZE:
                return
            self._encode_blocks(self._carry)
        num_whole = flat.numel() // QUANT_BLOCK_SIZE * QUANT_BLOCK_SIZE
        self._encode_blocks(flat[:num_whole])
        self._carry = flat[num_whole:].clone()

    def finish(self) -> None:
        """Encodes what is left, and the scales of all; raises `ValueError` if elements are missing."""
        num_fed = self._num_encoded + (0 if self._carry is None else self._carry.numel())
        if num_fed != self._layout.num_elements:
            raise ValueError(f"{num_fed} of {self._layout.num_elements} elements were fed")
        if self._carry is not None:
            self._encode_blocks(self._carry)
        self._encode_absmax()

    def _encode_blocks(self, flat: Tensor) -> None:
        if not flat.numel():
            return
        begin, end = self._num_encoded, self._num_encoded + flat.numel()
        codes = self._codes(begin // 2, -(-end // 2))
        absmax = self._absmax[begin // QUANT_BLOCK_SIZE : -(-end // QUANT_BLOCK_SIZE)]
        if self._native is None:
            bad = nf4_torch.encode_blocks(flat, codes, absmax)
        else:
            bad = self._native.nf4_encode(
                buffer_of(flat),
                _DTYPE_NAMES[flat.dtype],
                codes.numpy(),
                absmax.numpy(),
                num_threads=self._num_threads,
            )
        if bad is not None:
            element = begin + bad
            message = f"weight {element} of {self._layout.num_elements} is {flat[bad].item()}"
            raise NonFiniteWeight(message, element=element)
        self._num_encoded = end

    def _codes(self, begin: int, end: int) -> Tensor:
        """Where bytes [begin, end) of the codes go."""
        return self._sections.codes[begin:end]

    def _encode_absmax(self) -> None:
        # torch's own mean, because its order of summation is what bitsandbytes' offset has. Of nothing it
        # is NaN.
        offset = self._absmax.mean() if self._absmax.numel() else self._absmax.sum()
        if not torch.isfinite(offset):
            message = f"the mean of {self._absmax.numel()} absmax overflows float32, it is {offset.item()}"
            raise NonFiniteWeight(message, element=None)
        sections, constants = self._sections, tables(offset.device)
        sections.nested_offset.fill_(offset)
        sections.nested_map.copy_(constants.dynamic_map)
        if self._native is None:
            nf4_torch.encode_absmax(self._absmax, offset, sections.absmax, sections.nested_absmax)
        else:
            self._native.nf4_encode_absmax(
                self._absmax.numpy(),
                offset.item(),
                constants.absmax_rounding.numpy(),
                sections.absmax.numpy(),
                sections.nested_absmax.numpy(),
            )


class PieceEncoder(StreamEncoder):
    """A `StreamEncoder` without a blob: it hands the bytes out as they come, so that no size of tensor fills memory.

    `feed` is followed by `take_codes`, `finish` by `take_codes` and `scales`; the pieces in this order are the blob,
    but for the gap of zeros before the scales. Memory: the codes of one slab, and 5 bytes for each quant block.
    """

    def __init__(self, num_elements: int) -> None:
        self._layout = layout = nf4_layout(num_elements)
        self.scales_offset_bytes = layout.absmax.begin_bytes
        """Where the scales begin in the blob."""
        self.scales = aligned_bytes(layout.total_bytes - self.scales_offset_bytes)
        """Everything behind the codes; complete after `finish`."""
        self.scales.zero_()
        parts = [
            self.scales[part.begin_bytes - self.scales_offset_bytes : part.end_bytes - self.scales_offset_bytes]
            for part in layout.sections[1:]
        ]
        self._sections = Sections(self.scales[:0], parts[0], *(part.view(torch.float32) for part in parts[1:]))
        self._native = _native("auto", self.scales)
        self._num_threads = thread_count(None)
        self._absmax = torch.empty(layout.num_quant_blocks, dtype=torch.float32)
        self._num_encoded = 0
        self._carry = None
        self._pieces: list[Tensor] = []

    def take_codes(self) -> list[Tensor]:
        """The codes encoded since the last call, in order; the caller's from now on."""
        pieces, self._pieces = self._pieces, []
        return pieces

    def _codes(self, begin: int, end: int) -> Tensor:
        piece = torch.empty(end - begin, dtype=torch.uint8)
        self._pieces.append(piece)
        return piece


def aligned_bytes(num_bytes: int) -> Tensor:
    """Uninitialised memory that begins where a section of a blob may."""
    raw = torch.empty(num_bytes + SECTION_ALIGNMENT_BYTES, dtype=torch.uint8)
    return raw[-raw.data_ptr() % SECTION_ALIGNMENT_BYTES :][:num_bytes]


def decode(
    blob: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    backend: Backend = "auto",
    num_threads: int | None = None,
) -> Tensor:
    """The weights as a new tensor of `shape`; see `decode_into`."""
    out = torch.empty(tuple(shape), dtype=dtype, device=blob.device)
    decode_into(blob, out, backend=backend, num_threads=num_threads)
    return out


def decode_into(
    blob: Tensor,
    out: Tensor,
    *,
    backend: Backend = "auto",
    num_threads: int | None = None,
    streaming_stores: bool | None = None,
) -> None:
    """Decodes all weights, in row-major order, into contiguous float32, bfloat16 or float16 `out`.

    Allocates nothing on the native path. `num_threads` bounds the threads, None for torch's number; they are those
    that torch computes with, where torch has OpenMP's ([Note: whose threads] in `native/execution.h`). With
    `streaming_stores` the native path writes around the caches, without it through them; None takes the first from
    `STREAMED_BYTES` on. The bits are the same. Blocks until done; on a GPU it is given to the current stream. Raises
    `ValueError` for a wrong dtype, size, stride or alignment.
    """
    flat = _flat(out, "out").detach()
    layout = nf4_layout(flat.numel())
    triton = _triton(backend, blob.device)
    if triton is not None:
        triton.decode(blob, layout, flat)
        return
    native, num_threads = _native(backend, blob), thread_count(num_threads)
    if native is None:
        nf4_torch.decode(sections_of(blob, layout), flat)
        return
    native.nf4_decode(
        *section_arrays(blob, layout),
        buffer_of(flat),
        _DTYPE_NAMES[out.dtype],
        num_threads=num_threads,
        streaming_stores=flat.nbytes >= STREAMED_BYTES if streaming_stores is None else streaming_stores,
        openmp=_openmp(native),
    )


def decode_transposed_into(
    blob: Tensor,
    rows: int,
    columns: int,
    out: Tensor,
    *,
    backend: Backend = "auto",
    num_threads: int | None = None,
) -> None:
    """Decodes the stored (rows, columns) matrix into contiguous `out` of shape (columns, rows).

    For GPT-2's `Conv1D`, which keeps (in, out) where bitsandbytes quantizes (out, in). Otherwise like
    `decode_into`, but each thread takes scratch for 64 decoded rows, and Triton and the twin for the whole
    decoded matrix.
    """
    if tuple(out.shape) != (columns, rows):
        raise ValueError(f"out.shape is {tuple(out.shape)}, ({columns}, {rows}) is needed")
    flat = _flat(out, "out").detach()
    check_blob(blob, layout := nf4_layout(flat.numel()))
    triton = _triton(backend, blob.device)
    native, num_threads = None if triton is not None else _native(backend, blob), thread_count(num_threads)
    if native is None:
        decoded = torch.empty_like(flat)
        decode_into(blob, decoded, backend=backend)
        flat.view(columns, rows).copy_(decoded.view(rows, columns).t())
        return
    native.nf4_decode_transposed(
        *section_arrays(blob, layout),
        rows,
        columns,
        buffer_of(flat),
        _DTYPE_NAMES[out.dtype],
        num_threads=num_threads,
        openmp=_openmp(native),
    )


def _native(requested: Backend, blob: Tensor | None = None) -> ModuleType | None:
    """The native core, or None where the twin serves."""
    if requested not in ("auto", "native", "triton", "torch"):
        raise ValueError(f"backend is {requested!r}, allowed: 'auto', 'native', 'triton', 'torch'")
    on_cpu = blob is None or blob.device.type == "cpu"
    core = native_core() if on_cpu else None
    if requested == "native" and core is None:
        reason = why_not() if on_cpu else "the blob is not in CPU memory"
        raise OffloadError(f"the native codec was asked for, but it cannot serve: {reason}")
    return core if requested in ("auto", "native") else None


def _triton(requested: Backend, device: torch.device) -> ModuleType | None:
    """The module of the Triton kernel where it is to decode, None elsewhere."""
    if requested not in ("auto", "triton") or (requested == "auto" and device.type != "cuda"):
        return None
    kernel, reason = _load_triton()
    if kernel is not None and not kernel.serves(device):
        kernel, reason = None, f"the blob is in {device.type} memory"
    if kernel is None and requested == "triton":
        raise OffloadError(f"the Triton codec was asked for, but it cannot serve: {reason}")
    return kernel


@cache
def _load_triton() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("offload_rt.quantized.nf4_triton"), ""
    except ImportError as error:
        return None, str(error)


@lru_cache(maxsize=1)
def _openmp(native: ModuleType) -> bool:
    """Whether OpenMP's threads can decode. Once, because torch has been imported: it has loaded them, or never will."""
    return bool(native.has_openmp())


def _flat(tensor: Tensor, name: str) -> Tensor:
    if tensor.dtype not in _DTYPE_NAMES:
        raise ValueError(f"{name}.dtype is {tensor.dtype}, allowed: {', '.join(_DTYPE_NAMES.values())}")
    if not tensor.is_contiguous():
        shape, stride = tuple(tensor.shape), tensor.stride()
        raise ValueError(f"{name} must be contiguous, got strides {stride} for shape {shape}")
    return tensor.view(-1)
