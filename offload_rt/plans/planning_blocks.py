"""A model's blocks in the optimiser's question: classes of equal ones, with what their passes take and hold."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from offload_rt.layers.discover import BlockDraft
from offload_rt.plans.planning_tokens import chunked_bytes, saved_of, transients_of
from planners.plans.vocabulary import RowsSize
from planners.problems.measured import MeasuredSeconds
from planners.problems.problem import BlockClass
from planners.rule.attempts import head_chunk_tokens
from planners.rule.streaming_problem import StreamingProblem
from planners.shapes.trace import Saved, Transient


@dataclass(frozen=True, kw_only=True)
class Passes:
    """What a pass forward and one backward take and hold of a block, as `BlockClass` has it."""

    seconds: MeasuredSeconds
    visits_backward: bool = True
    saved: tuple[Saved, ...] = ()
    transients: tuple[Transient, ...] = ()
    tile_bytes: int = 0
    alone_bytes: int = 0


def class_of(
    name: str,
    drafts: list[BlockDraft],
    order: dict[str, int],
    passes: Passes,
    *,
    is_layer: bool,
    trainable_params: int = 0,
    rows: RowsSize | None = None,
) -> BlockClass:
    """The class of `drafts`, which are equal, at their positions in `order`."""
    spec = drafts[0].spec
    quantized = [tensor.compute_bytes for tensor in spec.tensors if tensor.is_quantized]
    return BlockClass(
        name=name,
        blocks=tuple(draft.name for draft in drafts),
        positions=tuple(order[draft.name] for draft in drafts),
        is_layer=is_layer,
        stored_bytes=spec.stored_bytes,
        decoded_bytes=sum(quantized),
        largest_linear_bytes=max(quantized, default=0),
        trainable_params=trainable_params,
        forward_flops=0.0,
        backward_flops=0.0,
        attention_flops=0.0,
        moved_bytes=0.0,
        saved=passes.saved,
        attention_bytes=0.0,
        attention_groups=1,
        transients=passes.transients,
        tile_bytes=passes.tile_bytes,
        alone_bytes=passes.alone_bytes,
        visits_backward=passes.visits_backward,
        weight_cuts=spec.cuts_bytes,
        measured=passes.seconds,
        rows=rows,
    )


def needed_again(draft: BlockDraft, streaming: StreamingProblem, chunk_tokens: int | None = None) -> bool:
    """Whether an edge's weights are needed in backward: a product's, unless tiles take its gradients in forward."""
    at_once = head_chunk_tokens(streaming, chunk_tokens) is None
    return at_once and any(isinstance(module, nn.Linear) for module in draft.modules)


def kind_of(draft: BlockDraft) -> str:
    """Layers of one kind take equally long."""
    shapes = [(tensor.shape, tensor.dtype, tensor.encoding.value) for tensor in draft.spec.tensors]
    trained = [tuple(p.shape) for p in draft.modules[0].parameters() if p.requires_grad]
    return repr((type(draft.modules[0]).__name__, shapes, trained))


def passes_of(seconds: MeasuredSeconds, streaming: StreamingProblem, num_tokens: int, seq_len: int) -> Passes:
    """Those of a layer. Beside what it saves they need memory by tokens, or where it runs by chunks, as that was
    counted, and, when no chunk is there, what attention's backward is estimated to hold.
    """
    input_bytes_per_token = streaming.layer_input_bytes / num_tokens
    saved = saved_of(seconds, input_bytes_per_token=input_bytes_per_token, num_tokens=num_tokens)
    if seconds.chunks is None:
        whole = streaming.layer_bytes(None)
        transients = transients_of(seconds, layer_bytes=whole, num_tokens=num_tokens)
        return Passes(seconds=seconds, saved=saved, transients=transients)
    sequence_bytes = 0 if streaming.chunked is None else streaming.chunked.sequence_bytes
    sequence_bytes = max(sequence_bytes, streaming.attention_bytes)
    tile_bytes = chunked_bytes(seconds, seq_len=seq_len)
    return Passes(seconds=seconds, saved=saved, tile_bytes=tile_bytes, alone_bytes=sequence_bytes)


def passes_of_edge(
    seconds: MeasuredSeconds, peak: int, chunk_tokens: int | None, num_tokens: int, *, visits_backward: bool
) -> Passes:
    """Those of a block outside the layers, which takes all tokens, or the loss by tiles of its own."""
    if chunk_tokens is not None:
        return Passes(seconds=seconds, visits_backward=visits_backward, tile_bytes=peak)
    transients = transients_of(seconds, layer_bytes=peak, num_tokens=num_tokens)
    return Passes(seconds=seconds, visits_backward=visits_backward, transients=transients)
