"""What a model needs of transient activations. Estimates say what they rest on.

[Note: activation estimate]
A layer's recompute keeps, per token, about what goes into and comes out of its linears, twice over for the casts of
norms and adapters; 2.0 covers what was measured on Llama, Qwen and GPT-2 shapes. The head keeps, per token that is at
work, the logits, their fp32 copy, its log-softmax and the gradients of both.

[Note: attention's backward]
When it runs, what follows attention in a layer has done its backward and is given back: 2.0 has room for what attention
takes then, as long as that goes by tokens. On the CPU it has tiles for each thread besides (`cpu_attention`), which in
a small layer, or by many threads, are more. So a layer takes the larger of the two, and not their sum.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn

from offload_rt.layers.discover import BlockDraft
from offload_rt.vocabulary.backbone import find_causal_model
from planners.rule.streaming_problem import ChunkedSize, LossHeadSize
from planners.shapes.cpu_attention import pairs_bytes, tiles_bytes

_LAYER_FACTOR = 2.0
"""Measured: [Note: activation estimate]."""
_HEAD_BYTES_PER_LOGIT = 4 + 4 + 4
"""fp32 copy, log-softmax and its gradient, beside the logits and their gradient in the model's dtype."""
_ATTENTION_DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
"""How configurations call it."""


def estimate_activation_bytes(
    model: nn.Module, drafts: list[BlockDraft], *, batch_size: int, seq_len: int, on_cpu: bool
) -> int:
    """Peak bytes of one layer's recompute, but for tiles. See [Note: activation estimate]."""
    tokens = batch_size * seq_len
    layers = [_features(draft) * tokens * _LAYER_FACTOR * _item_bytes(draft) for draft in drafts if draft.is_layer]
    of_pairs = _pairs_bytes(model, batch_size=batch_size, seq_len=seq_len, on_cpu=on_cpu)
    return int(max(layers, default=0)) + (of_pairs if layers else 0)


def attention_bytes(model: nn.Module, drafts: list[BlockDraft], *, batch_size: int, seq_len: int, on_cpu: bool) -> int:
    """What a layer holds while attention's backward runs, by as many threads as torch has now; 0 where the model's
    configuration says nothing of attention heads. See [Note: attention's backward].
    """
    sizes = {"batch_size": batch_size, "seq_len": seq_len}
    sequence_bytes = _sequence_bytes(model, drafts, **sizes, on_cpu=on_cpu)
    if not sequence_bytes or not on_cpu or _pairs_bytes(model, **sizes, on_cpu=on_cpu):
        return sequence_bytes
    # Of mixed ones the narrowest: attention's operands come out of products with matrices.
    narrowest = min(t.compute_bytes // max(1, t.num_elements) for d in drafts if d.is_layer for t in d.spec.tensors)
    return sequence_bytes + tiles_bytes(num_threads=torch.get_num_threads(), seq_len=seq_len, item_bytes=narrowest)


def chunked_size(
    model: nn.Module, drafts: list[BlockDraft], *, batch_size: int, seq_len: int, on_cpu: bool
) -> ChunkedSize | None:
    """What layers need by chunks of tokens; None where the model's configuration says nothing of attention heads."""
    sizes = {"batch_size": batch_size, "seq_len": seq_len}
    sequence_bytes = _sequence_bytes(model, drafts, **sizes, on_cpu=on_cpu)
    if not sequence_bytes or find_causal_model(model) is None:
        return None
    of_pairs = _pairs_bytes(model, **sizes, on_cpu=on_cpu)
    return ChunkedSize(num_tokens=seq_len, sequence_bytes=sequence_bytes, pairs_bytes=of_pairs)


def _sequence_bytes(model: nn.Module, drafts: list[BlockDraft], *, batch_size: int, seq_len: int, on_cpu: bool) -> int:
    """Of all tokens there are, in a layer's backward: input, gradient of output and of input; attention's operands, its
    result, the gradients of these, and what its kernel takes besides that goes by tokens or by pairs of them (on the
    CPU, keys and values in another order, and fp32 sums). 0 where nothing is known of heads.
    """
    config: Any = getattr(model, "config", None)
    heads = int(getattr(config, "num_attention_heads", None) or 0)
    items = [_item_bytes(draft) for draft in drafts if draft.is_layer]
    if not heads or not items:
        return 0
    hidden = int(getattr(config, "hidden_size", 0))
    width = _latent_width(config) or int(getattr(config, "head_dim", None) or -(-hidden // heads))
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    per_token = 3 * hidden + 5 * heads * width + 4 * kv_heads * width
    of_pairs = _pairs_bytes(model, batch_size=batch_size, seq_len=seq_len, on_cpu=on_cpu)
    return batch_size * seq_len * per_token * max(items) + of_pairs


def _pairs_bytes(model: nn.Module, *, batch_size: int, seq_len: int, on_cpu: bool) -> int:
    """Of all pairs of tokens, where attention is not fused; 0 where it is. A GPU's kernels drop, too."""
    config: Any = getattr(model, "config", None)
    implementation = getattr(config, "_attn_implementation", None)
    drops = any((getattr(config, name, None) or 0) > 0 for name in _ATTENTION_DROPOUTS)
    other_width = _latent_width(config) not in (0, int(getattr(config, "v_head_dim", None) or 0))
    if implementation != "eager" and not (implementation == "sdpa" and on_cpu and (drops or other_width)):
        return 0
    heads = int(getattr(config, "num_attention_heads", None) or 1)
    return pairs_bytes(batch_size=batch_size, num_heads=heads, seq_len=seq_len, drops=drops)


def _latent_width(config: Any) -> int:
    """Of a head's queries and keys in latent attention, where values may have another (`v_head_dim`); else 0."""
    if not getattr(config, "qk_nope_head_dim", None):
        return 0
    return int(config.qk_nope_head_dim) + int(config.qk_rope_head_dim)


def attention_width(model: nn.Module) -> int:
    """Of all heads of queries together; 0 where the model's configuration says nothing of them."""
    config: Any = getattr(model, "config", None)
    heads = int(getattr(config, "num_attention_heads", None) or 0)
    if not heads:
        return 0
    return heads * int(getattr(config, "head_dim", None) or -(-int(getattr(config, "hidden_size", 0)) // heads))


def loss_head_size(model: nn.Module, *, batch_size: int, seq_len: int) -> LossHeadSize | None:
    """What head and loss need per token, and whether they can run in tiles; None where no head is found."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and _is_head(model, module):
            weight = module._parameters.get("weight")
            if weight is None:  # it is computed, at each look
                weight = next(module.parameters())
            item_bytes = weight.element_size()
            return LossHeadSize(
                num_tokens=batch_size * seq_len,
                bytes_per_token=module.out_features * (2 * item_bytes + _HEAD_BYTES_PER_LOGIT),
                hidden_bytes_per_token=2 * module.in_features * item_bytes,
                tiles=find_causal_model(model) is not None,
                trains=weight.requires_grad,
            )
    return None


def layer_input_bytes(drafts: list[BlockDraft], *, batch_size: int, seq_len: int) -> int:
    """One layer's input for the largest batch. Its width is the size that most of a layer's tensors share."""
    largest = 0
    for draft in drafts:
        sizes = Counter(size for t in draft.spec.tensors for size in t.shape[-2:])
        if draft.is_layer and sizes:
            largest = max(largest, sizes.most_common(1)[0][0] * _item_bytes(draft))
    return batch_size * seq_len * largest


def _features(draft: BlockDraft) -> int:
    """In and out features of a layer's matrices, those of an expert stack counted once."""
    return sum(sum(t.shape[-2:]) for t in draft.spec.tensors if len(t.shape) >= 2)


def _item_bytes(draft: BlockDraft) -> int:
    return max(t.compute_bytes // max(1, t.num_elements) for t in draft.spec.tensors)


def _is_head(model: nn.Module, module: nn.Linear) -> bool:
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    head = getattr(head, "base_layer", head)
    return module is head
