"""What a rehearsal found of a model's transient memory, remembered for its next start: formulas times one factor.

A plan is made from formulas ([Note: activation estimate] in `profile`). A rehearsal (`rehearsal`) counts what a step
really takes. That is kept in the user's cache folder, by everything that the formulas do not see (modules with their
dropout, what trains, the version of torch), and by what of the plan decides it; the ratio only where a plan made from
formulas did not fit.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import torch
from torch import nn

from offload_rt.cache import recall, remember
from planners.plans.plan import Plan
from planners.rule.streaming_problem import StreamingProblem


def sizes_key(model: nn.Module, fingerprint: str, *, of_device: bool = False) -> str:
    """Names what was measured: `fingerprint` is the workload's. of_device: in the memory of a device with streams."""
    trains = [(name, list(p.shape), str(p.dtype)) for name, p in model.named_parameters() if p.requires_grad]
    threads = None if of_device else torch.get_num_threads()  # each has tiles of its own in attention's backward
    text = json.dumps([fingerprint, repr(model), trains, torch.__version__, of_device, threads])
    return f"rehearsal-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def tensors_digest(plan: Plan) -> str:
    """Names what of `plan` decides which tensors PyTorch allocates in a step."""
    parts = (
        plan.layer_inputs, plan.decode_scope, plan.head_chunk_tokens, plan.activations, plan.layer_major,
        plan.update_mode, plan.head_tiles, plan.packed_products,
    )  # fmt: skip
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def remembered_bytes(key: str, digest: str) -> int | None:
    """What the longest step was measured to take under such a plan; None where nobody measured."""
    found = (recall(key) or {}).get(digest)
    return found if isinstance(found, int) and found > 0 else None


def remember_bytes(key: str, digest: str, num_bytes: int) -> None:
    """Keeps what was measured."""
    remember(key, {**(recall(key) or {}), digest: num_bytes})


def remembered_factor(key: str) -> float | None:
    """How many times the formulas' bytes are to be planned; None where formulas served. At least 1."""
    found = (recall(key) or {}).get("factor")
    return found if isinstance(found, float) and found >= 1.0 else None


def remember_factor(key: str, factor: float) -> None:
    """Keeps the larger of `factor` and what is known, for plans to come: with formulas alone none fitted."""
    remember(key, {**(recall(key) or {}), "factor": max(1.0, factor, remembered_factor(key) or 1.0)})


def scaled(problem: StreamingProblem, factor: float) -> StreamingProblem:
    """The question with transient activations of layers and head so many times as large."""
    head, chunked = problem.loss_head, problem.chunked
    if head is not None:
        head = replace(
            head,
            bytes_per_token=_times(head.bytes_per_token, factor),
            hidden_bytes_per_token=_times(head.hidden_bytes_per_token, factor),
        )
    if chunked is not None:
        chunked = replace(
            chunked,
            sequence_bytes=_times(chunked.sequence_bytes, factor),
            pairs_bytes=int(chunked.pairs_bytes * factor),
        )
    return replace(
        problem,
        activation_bytes=_times(problem.activation_bytes, factor),
        attention_bytes=_times(problem.attention_bytes, factor),
        loss_head=head,
        chunked=chunked,
    )


def _times(num_bytes: int, factor: float) -> int:
    """Rounded up."""
    return -int(-num_bytes * factor // 1)
