"""What a model and a machine need and have: transient activations, free memory. Estimates say what they rest on.

[Note: activation estimate]
A layer's recompute keeps, per token, about what goes into and comes out of its linears, twice over for the casts of
norms and adapters; 2.0 covers what was measured on Llama, Qwen and GPT-2 shapes. The head keeps, per token that is at
work, the logits, their fp32 copy, its log-softmax and the gradients of both.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from offload_rt.backbone import find_causal_model
from offload_rt.discover import BlockDraft
from planners.streaming_problem import ChunkedSize, LossHeadSize

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


def free_memory_bytes() -> int:
    """What this process may still take: free RAM or what its cgroup leaves, less a tenth as a reserve."""
    free = int(psutil.virtual_memory().available)
    limit, usage = cgroup_memory_bytes()
    if limit is not None:
        free = min(free, limit - usage)
    return free * 9 // 10


@dataclass(frozen=True, kw_only=True)
class MemoryLeft:
    """What anybody may still take before the kernel kills somebody."""

    left_bytes: int
    total_bytes: int
    of: str
    """"RAM", or "cgroup" where its limit is nearer."""


def memory_left() -> MemoryLeft:
    """Now, with the pages of files that the kernel would drop."""
    memory = psutil.virtual_memory()
    found = MemoryLeft(left_bytes=int(memory.available), total_bytes=int(memory.total), of="RAM")
    limit, usage = cgroup_memory_bytes(without_dropped=True)
    if limit is not None and limit - usage < found.left_bytes:
        return MemoryLeft(left_bytes=limit - usage, total_bytes=limit, of="cgroup")
    return found


def cgroup_memory_bytes(*, without_dropped: bool = False) -> tuple[int | None, int]:
    """The limit of this process's memory cgroup (v2 or v1) and what it uses; no limit is None. `without_dropped`: less
    the pages of files that have not been used lately.
    """
    places = []
    try:
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                base = Path("/sys/fs/cgroup" + path)
                places.append((base / "memory.max", base / "memory.current"))
            elif "memory" in controllers.split(","):
                for root in ("/sys/fs/cgroup/memory" + path, "/sys/fs/cgroup/memory"):
                    places.append((Path(root) / "memory.limit_in_bytes", Path(root) / "memory.usage_in_bytes"))
    except OSError:
        return None, 0
    for limit_file, usage_file in places:
        try:
            text = limit_file.read_text().strip()
            if text != "max" and int(text) < 1 << 60:
                usage = int(usage_file.read_text())
                return int(text), usage - (_inactive_bytes(limit_file.parent) if without_dropped else 0)
        except (OSError, ValueError):
            continue
    return None, 0


def _inactive_bytes(cgroup: Path) -> int:
    values = dict(line.split(maxsplit=1) for line in (cgroup / "memory.stat").read_text().splitlines())
    return int(values.get("total_inactive_file", values.get("inactive_file", 0)))


def peak_resident_bytes() -> int:
    """The most resident memory this process has had (VmHWM)."""
    return _status_bytes("VmHWM")


def resident_bytes() -> int:
    """Resident memory of this process now (VmRSS)."""
    return _status_bytes("VmRSS")


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return 0


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
