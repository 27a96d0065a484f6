"""What is decided of tokens, between the optimiser and the runtime: saved tensors out of a measurement, policies and
sizes out of a plan.

The runtime stores two things of a layer: its input, all inputs in one tier; and everything else that backward needs,
which is kept, put away or computed again as one. So a layer has two `Saved`, and a plan's `classes` say of the second
one where its tokens go; `Plan.activations` is derived from that (`policies_of`), and a plan whose two sayings differ is
refused. What a layer saves is not trusted to be what was measured: if a stash is full the rest stays, and is counted.

[Note: whole layers or tokens]
Where a layer's activations fit into DEVICE memory one layer at a time, a mix of keeping, swapping and recomputing is
had by treating whole layers differently. That cuts nothing, so that it gives the bits of plain training, needs nothing
of a layer but that it runs, and loses little: with n layers, shares come in steps of 1 / n. The optimiser plans so.
Shares of each layer's tokens are a cut, recompute what leads to attention twice, and pay only where a layer does not
fit whole. Then layers run by chunks of one length, and it plans what becomes of each group of each chunk: a layer has
a `Saved` for each group, and its input another one, with which attention's result waits. A plan may say other shares
of tokens too, and they become chunks that end where the shares do.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from offload_rt.tensor_spec import IO_ALIGNMENT_BYTES, align_up
from offload_rt.tiering.stash import GRANULE_BYTES
from planners.plans.activations import Action, ActivationPolicy, Chunk, Group, Treatment, whole_batch
from planners.plans.placement import ClassPlan, Cuts, Tier, TokenSplit
from planners.plans.plan import Plan
from planners.plans.schedule import Phase
from planners.problems.measured import MeasuredSeconds
from planners.rule.attempts import STAGING_PIECE_BYTES
from planners.rule.filling import KEPT_TENSORS
from planners.rule.streaming_problem import StreamingProblem
from planners.shapes.trace import Saved, Transient

LEAST_TRANSIENT_SHARE = 4
"""Of the estimate of all that a layer needs: gradients on their way through it, where it saves as much as that."""
INPUT, ACTIVATIONS = "input", "activations"
"""The names of the two `Saved` of a layer that runs whole."""
GROUPS = frozenset(group.value for group in Group if group is not Group.RESULT)
"""Those of what one by chunks saves beside its input, and attention's result, which waits with that."""
PAGES_WITH_INPUT = 8
"""That tensors which wait with a layer's input may take more than their bytes: attention's result, a log-sum-exp."""


def saved_of(seconds: MeasuredSeconds, *, input_bytes_per_token: float, num_tokens: int) -> tuple[Saved, ...]:
    """What the runtime stores of a layer. Without a measurement of what backward needs, only its input."""
    with_input = 0.0 if seconds.chunks is None else seconds.chunks.with_input_bytes / num_tokens
    given = Saved(name=INPUT, bytes_per_token=input_bytes_per_token + with_input, recomputable=False)
    if seconds.kept is None:
        return (given,)
    groups = seconds.kept.groups
    if not groups:
        return given, Saved(name=ACTIVATIONS, bytes_per_token=seconds.kept.saved_bytes / num_tokens)
    return given, *(Saved(name=group.name, bytes_per_token=group.num_bytes / num_tokens) for group in groups)


def chunked_bytes(seconds: MeasuredSeconds, *, seq_len: int) -> int:
    """What a layer's passes hold that runs by chunks, whatever is kept, put away or computed again of them.

    Of what was held at most, a chunk that is computed again is charged by itself.
    """
    if seconds.chunks is None:
        raise ValueError("plan: a layer by chunks was not measured so")
    saved_bytes = 0 if seconds.kept is None else seconds.kept.saved_bytes
    return max(0, seconds.chunks.peak_bytes - saved_bytes * seconds.chunks.num_tokens // seq_len)


def input_staging_bytes(streaming: StreamingProblem) -> int | None:
    """HOST memory through which layer inputs pass to and from NVMe, as `activation_assembly` makes it; None where they
    go whole.
    """
    if not streaming.stages_pieces:
        return None
    return 4 * min(align_up(streaming.layer_input_bytes, IO_ALIGNMENT_BYTES), STAGING_PIECE_BYTES)


def transients_of(seconds: MeasuredSeconds, *, layer_bytes: int, num_tokens: int) -> tuple[Transient, ...]:
    """What a layer's passes need besides, of `layer_bytes` with all that it saves. One operation in either phase."""
    saved_bytes = 0 if seconds.kept is None else seconds.kept.saved_bytes
    each = max(layer_bytes - saved_bytes, layer_bytes // LEAST_TRANSIENT_SHARE) / num_tokens
    return tuple(Transient(name="transient", bytes_per_token=each, phase=phase, begin=0, end=1) for phase in Phase)


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """What storing activations takes more than their bytes, at most."""

    device_bytes: int = 0
    host_bytes: int = 0
    nvme_bytes: int = 0

    def __add__(self, other: Rounding) -> Rounding:
        return Rounding(
            device_bytes=self.device_bytes + other.device_bytes,
            host_bytes=self.host_bytes + other.host_bytes,
            nvme_bytes=self.nvme_bytes + other.nvme_bytes,
        )


def rounding_of(seconds: Sequence[MeasuredSeconds], *, input_bytes: int, seq_len: int, unified: bool) -> Rounding:
    """For layers with these measurements. A tensor begins at a granule of HOST, at a page of a drive; small ones stay.
    unified: nothing is put away to HOST.

    Layer inputs have their place on a drive twice, since a second micro-batch may begin before the first one's graph is
    gone; the plan counts one.
    """
    kept = [one.kept for one in seconds if one.kept is not None]
    chunks = [one.chunks for one in seconds if one.chunks is not None]
    tensors = KEPT_TENSORS * sum(
        1 if one.chunks is None else len(one.kept.groups) * -(-seq_len // one.chunks.num_tokens)
        for one in seconds
        if one.kept is not None
    )
    beside = len(chunks) * PAGES_WITH_INPUT * IO_ALIGNMENT_BYTES
    return Rounding(
        device_bytes=sum(one.small_bytes for one in kept),
        host_bytes=len(kept) * KEPT_TENSORS * GRANULE_BYTES if unified else tensors * GRANULE_BYTES + beside,
        nvme_bytes=tensors * IO_ALIGNMENT_BYTES
        + len(seconds) * input_bytes
        + sum(one.with_input_bytes for one in chunks)
        + 2 * beside,
    )


def policies_of(plan: Plan) -> dict[str, ActivationPolicy] | None:
    """What `plan.classes` say of each block's tokens, by block; None where all of them are recomputed whole.

    ValueError for what cannot be run.
    """
    found: dict[str, ActivationPolicy] = {}
    for entry in plan.classes:
        policy = _policy(plan, entry)
        if policy is not None:
            found |= dict.fromkeys(entry.blocks, policy)
    return found or None


def _policy(plan: Plan, entry: ClassPlan) -> ActivationPolicy | None:
    again = [split for split in entry.tokens if split.name != INPUT]
    seq_len = entry.tokens[0].total_tokens if entry.tokens else 0
    if plan.cuts is not None and plan.cuts.chunk_tokens < seq_len and {split.name for split in again} <= GROUPS:
        return _by_groups(again, seq_len, plan.cuts)
    if not again:
        return None
    parts = _parts(again[0])
    if any(_parts(split) != parts for split in again):
        raise ValueError(f"{entry.name!r}: what a layer saves is stored as one, but its parts go different ways")
    most = seq_len if plan.cuts is None else min(seq_len, plan.cuts.chunk_tokens)
    groups = 1 if plan.cuts is None else plan.cuts.attention_groups
    if len(parts) == 1 and most == seq_len and groups == 1:
        _, action, tier = parts[0]
        return None if action is Action.RECOMPUTE else whole_batch(action, tier)
    chunks = [
        Chunk(num_tokens=min(most, tokens - begin), action=action, tier=tier)
        for tokens, action, tier in parts
        for begin in range(0, tokens, most)
    ]
    return ActivationPolicy(chunks=tuple(chunks), attention_groups=groups)


def _by_groups(splits: Sequence[TokenSplit], seq_len: int, cuts: Cuts) -> ActivationPolicy:
    """Chunks of one length, and of each what becomes of its groups. Nothing is known to be saved: computed again."""
    chunks = []
    for begin in range(0, seq_len, cuts.chunk_tokens):
        own = {split.name: _treatment_at(split, begin) for split in splits}
        after = own.pop(Group.AFTER.value, Treatment(action=Action.RECOMPUTE))
        others = {name: treatment for name, treatment in own.items() if treatment != after}
        chunks.append(Chunk(num_tokens=cuts.chunk_tokens, action=after.action, tier=after.tier, **others))
    while len(chunks) > 1 and chunks[-1] == chunks[-2]:
        chunks.pop()  # the last one repeats
    return ActivationPolicy(chunks=tuple(chunks), attention_groups=cuts.attention_groups)


def _treatment_at(split: TokenSplit, token: int) -> Treatment:
    """What becomes of the chunk that begins at `token`."""
    ends = itertools.accumulate(num_tokens for num_tokens, _, _ in _parts(split))
    _, action, tier = next(part for part, end in zip(_parts(split), ends, strict=True) if token < end)
    return Treatment(action=action, tier=tier)


def _parts(split: TokenSplit) -> list[tuple[int, Action, Tier | None]]:
    """Ranges of tokens in the order of `planners.plans.placement`, those that are not empty."""
    parts = (
        (split.recompute_tokens, Action.RECOMPUTE, None),
        (split.nvme_tokens, Action.SWAP, Tier.NVME),
        (split.host_tokens, Action.SWAP, Tier.HOST),
        (split.device_tokens, Action.KEEP, None),
    )
    return [part for part in parts if part[0]]


@dataclass(frozen=True, kw_only=True)
class ActivationSizes:
    """What a plan says that activations take, in bytes of a whole batch."""

    transient_bytes: int
    """While a layer, or the head, runs."""
    window_bytes: int
    """Of DEVICE memory for what is swapped, on its way in either direction."""
    kept_bytes: int
    swapped_bytes: dict[Tier, int]
    """By tier, of all layers, with what storing them there takes more."""
    staging_bytes: int
    """Of HOST, for what passes through it to and from drives."""
    input_bytes: dict[str, int]
    """Of each layer, by its block: its input, with what waits with that."""


def sizes_of(plan: Plan, batch_size: int) -> ActivationSizes | None:
    """What `plan` has room for, of one micro-batch; None where it has no classes and so says nothing of it."""
    chunks = [arena for arena in plan.arenas if arena.name not in (Tier.DEVICE.value, Tier.HOST.value)]
    if not plan.classes or not chunks:
        return None
    swapped: dict[Tier, int] = {}
    inputs: dict[str, int] = {}
    kept = staging = 0.0
    for entry in plan.classes:
        on_nvme = 0.0
        for split in entry.tokens:
            each = split.bytes_per_token * batch_size
            in_chunk = split.total_tokens if plan.cuts is None else min(split.total_tokens, plan.cuts.chunk_tokens)
            num_chunks = -(-split.total_tokens // in_chunk)
            if split.name == INPUT:
                elsewhere = num_chunks > 1 and plan.layer_inputs is not Tier.DEVICE
                pages = PAGES_WITH_INPUT * IO_ALIGNMENT_BYTES if elsewhere else 0
                size = align_up(round(each * split.total_tokens), IO_ALIGNMENT_BYTES) + pages
                inputs |= dict.fromkeys(entry.blocks, size)
                continue
            kept += len(entry.blocks) * each * split.device_tokens
            on_nvme += each * min(split.nvme_tokens, in_chunk)
            for tier, tokens, granule in (
                (Tier.HOST, split.host_tokens, GRANULE_BYTES),
                (Tier.NVME, split.nvme_tokens, IO_ALIGNMENT_BYTES),
            ):
                if tokens:
                    num_bytes = round(each * tokens) + -(-tokens // in_chunk) * KEPT_TENSORS * granule
                    swapped[tier] = swapped.get(tier, 0) + len(entry.blocks) * num_bytes
        staging = max(staging, 2 * plan.buffers.swap_slots * on_nvme)
    slot = chunks[0].slot_bytes
    return ActivationSizes(
        transient_bytes=max(arena.num_bytes for arena in chunks) - slot,
        window_bytes=plan.buffers.swap_slots * slot,
        kept_bytes=round(kept),
        swapped_bytes=swapped,
        staging_bytes=round(staging),
        input_bytes=inputs,
    )
