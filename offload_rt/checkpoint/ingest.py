"""From a model's tensors to a block's bytes: cast, quantized and laid out on the way, slab by slab.

Where the tensors come from, memory or a checkpoint, is a `TensorSource`'s business; where the bytes go, a store or a
slot, is the caller's. What this module holds at any time is one slab with its codes, the scales of one NF4 matrix or
expert, and, for tensors that a checkpoint stores in a way that cannot be streamed, that tensor.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from offload_rt.checkpoint.mapping import BnbTensors
from offload_rt.checkpoint.sources import MemorySource, TensorSource, TransposedSource, materialise
from offload_rt.dtypes import torch_dtype
from offload_rt.errors import CheckpointError
from offload_rt.layers.discover import BlockDraft
from offload_rt.memory.arena import Slot
from offload_rt.quantized import codec
from offload_rt.quantized.nf4_layout import QUANT_BLOCK_SIZE
from offload_rt.quantized.prequantized import from_bitsandbytes
from offload_rt.tensor_spec import Encoding, TensorSpec

SLAB_BYTES = 32 << 20
"""At most so much of a source is in memory at a time; half of what the contract allows, for the cast beside it."""
FORMAT = "blocks/1 nf4/1"
"""Part of every store's key: changes when the bytes of a block would."""

Piece = tuple[int, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where each stored parameter's values come from."""

    streams: dict[str, TensorSource]
    prequantized: dict[str, BnbTensors]
    fingerprint: str
    """Of the content behind them."""
    describe: str
    """For messages: a path, or "the model"."""

    def let_go(self) -> None:
        """Forgets them, once all is where it rests: those of a model in memory hold its weights."""
        self.streams.clear()
        self.prequantized.clear()


def sources_in_memory(drafts: list[BlockDraft]) -> Sources:
    """The values that the model holds. Hashes all of them."""
    digest = hashlib.sha256()
    streams: dict[str, TensorSource] = {}
    for draft in drafts:
        for stored in draft.parameters:
            source = MemorySource(stored.parameter.detach())
            streams[stored.name] = source
            digest.update(stored.name.encode())
            for slab in source.slabs(SLAB_BYTES):
                digest.update(slab.view(torch.uint8).numpy().data)
    return Sources(streams=streams, prequantized={}, fingerprint=digest.hexdigest(), describe="the model")


def store_key(drafts: list[BlockDraft], sources: Sources) -> str:
    """Names the store that these blocks from these sources give: 16 hex digits."""
    specs = [draft.spec.to_json() for draft in drafts]
    text = json.dumps([FORMAT, sources.fingerprint, specs], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def block_pieces(
    draft: BlockDraft, sources: Sources, *, progress: Callable[[int], None] | None = None
) -> Iterator[Piece]:
    """The bytes of a block as (offset, tensor), offsets ascending; a tensor is valid until the next is asked for.

    `progress` is called with the source bytes read so far of each slab. Raises `CheckpointError` for a weight that is
    not finite where it is to be quantized, and what reading raises.
    """
    for spec in draft.spec.tensors:
        if spec.name in sources.prequantized:
            blob = _convert_bnb(spec, sources.prequantized[spec.name], sources)
            if spec.encoding is Encoding.RAW:  # a head in 4 bits: outside the layers, weights are kept decoded
                blob = codec.decode(blob, spec.shape, torch_dtype(spec.dtype))
            yield spec.offset_bytes, blob
            continue
        source = sources.streams[spec.name]
        if spec.encoding is Encoding.RAW:
            position = spec.offset_bytes
            for slab in source.slabs(SLAB_BYTES):
                cast = slab.to(torch_dtype(spec.dtype))
                yield position, cast
                position += cast.numel() * cast.element_size()
                _report(progress, slab)
        else:
            yield from _encode(spec, source, sources, progress)


def fill_slot(draft: BlockDraft, sources: Sources, slot: Slot) -> None:
    """Writes a block's bytes into `slot`, for blocks that rest in memory."""
    slot.tensor(torch.uint8, (slot.num_bytes,)).zero_()
    for offset, tensor in block_pieces(draft, sources):
        data = tensor.reshape(-1).view(torch.uint8)
        slot.tensor(torch.uint8, (data.numel(),), offset).copy_(data)


def _encode(
    spec: TensorSpec, source: TensorSource, sources: Sources, progress: Callable[[int], None] | None
) -> Iterator[Piece]:
    experts = spec.shape[0] if spec.encoding is Encoding.NF4_EXPERTS else 1
    per_expert = spec.num_elements // experts
    if spec.encoding is Encoding.NF4_TRANSPOSED:
        source = TransposedSource(source)
    slabs = source.slabs(SLAB_BYTES, QUANT_BLOCK_SIZE, boundary=per_expert)
    for expert in range(experts):
        start = spec.offset_bytes + (expert * spec.expert_stride_bytes if experts > 1 else 0)
        encoder = codec.PieceEncoder(per_expert)
        position, fed = start, 0
        try:
            while fed < per_expert:
                slab = next(slabs)
                # Quantized from the dtype that the model computes in, as transformers and bitsandbytes do.
                encoder.feed(slab.to(torch_dtype(spec.dtype)))
                fed += slab.numel()
                _report(progress, slab)
                if fed == per_expert:
                    encoder.finish()
                for codes in encoder.take_codes():
                    yield position, codes
                    position += codes.numel()
        except codec.NonFiniteWeight as error:
            raise CheckpointError(
                f"{sources.describe}: {spec.name} cannot be quantized: {error}"
                + (f" (expert {expert})" if experts > 1 else "")
            ) from None
        yield start + encoder.scales_offset_bytes, encoder.scales


def _convert_bnb(spec: TensorSpec, tensors: BnbTensors, sources: Sources) -> torch.Tensor:
    parts = {suffix: materialise(source) for suffix, source in tensors.parts.items()}
    name = f"{sources.describe}: {spec.name}"
    return from_bitsandbytes(tensors.packed.slabs(SLAB_BYTES), parts, tensors.state, name=name)


def _report(progress: Callable[[int], None] | None, slab: torch.Tensor) -> None:
    if progress is not None:
        progress(slab.numel() * slab.element_size())
