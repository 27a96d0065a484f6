"""What a model needs of transient activations. Estimates say what they rest on.

[Note: activation estimate]
A layer's recompute keeps, per token, about what goes into and comes out of its linears, twice over for the casts of
norms and adapters; 2.0 covers what was measured on Llama, Qwen and GPT-2 shapes. The head keeps, per token that is at
work, the logits, their fp32 copy, its log-softmax and the gradients of both.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn

from offload_rt.layers.discover import BlockDraft
from offload_rt.vocabulary.backbone import find_causal_model
from planners.rule.streaming_problem import ChunkedSize, LossHeadSize

_LAYER_FACTOR = 2.0
"""Measured: [Note: activation estimate]."""
_HEAD_BYTES_PER_LOGIT = 4 + 4 + 4
"""fp32 copy, log-softmax and its gradient, beside the logits and their gradient in the model's dtype."""


def estimate_activation_bytes(model: nn.Module, drafts: list[BlockDraft], *, batch_size: int, seq_len: int) -> int:
    """Peak bytes of one layer's recompute. See [Note: activation estimate]."""
    tokens = batch_size * seq_len
    layers = [_features(draft) * tokens * _LAYER_FACTOR * _item_bytes(draft) for draft in drafts if draft.is_layer]
    config: Any = getattr(model, "config", None)
    if getattr(config, "_attn_implementation", None) == "eager":
        heads = int(getattr(config, "num_attention_heads", 1))
        layers = [peak + batch_size * heads * seq_len**2 * 10 for peak in layers]
    return int(max(layers, default=0))


def chunked_size(model: nn.Module, drafts: list[BlockDraft], *, batch_size: int, seq_len: int) -> ChunkedSize | None:
    """What layers need by chunks of tokens; None where the model's configuration says nothing of attention heads.

    Of all tokens there are, in backward: input, gradient of output and of input; attention's operands, its result, the
    gradients of these, and what its kernel takes besides (on the CPU, keys and values in another order, and fp32 sums).
    """
    config: Any = getattr(model, "config", None)
    heads = getattr(config, "num_attention_heads", None)
    if not heads or find_causal_model(model) is None:
        return None
    hidden = int(getattr(config, "hidden_size", 0))
    width = int(getattr(config, "head_dim", None) or -(-hidden // heads))
    if getattr(config, "qk_nope_head_dim", None):  # latent attention: queries and keys are wider than values
        width = int(config.qk_nope_head_dim) + int(config.qk_rope_head_dim)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    per_token = 3 * hidden + 5 * int(heads) * width + 4 * kv_heads * width
    tokens = batch_size * seq_len
    of_all_pairs = batch_size * int(heads) * seq_len**2 * 10 if config._attn_implementation == "eager" else 0
    item_bytes = max((_item_bytes(draft) for draft in drafts if draft.is_layer), default=4)
    return ChunkedSize(num_tokens=seq_len, sequence_bytes=tokens * per_token * item_bytes + of_all_pairs)


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
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear) and isinstance(weight, torch.Tensor) and _is_head(model, module):
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
