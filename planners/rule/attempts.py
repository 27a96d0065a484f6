"""The plans that the fixed rule chooses from (`streaming`): each made of a few choices, with all that it takes.

None of them is held against a budget here, and none fills memory that it leaves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, tee

from planners.plans.activations import Action, ActivationPolicy, Chunk
from planners.plans.placement import UpdateMode
from planners.plans.plan import DecodeScope, Plan, Ring, Tier
from planners.plans.training_state import StatePlacement
from planners.rule.edges import EdgesBy, edge_choices, head_tiles_of, looked_up_of, lookups_of, tiled_block
from planners.rule.filling import LAYERS, keeping
from planners.rule.streaming_problem import INPUTS_OF_CHUNKS, BlockSize, StreamingProblem
from planners.units import whole_pages

MAX_SLOTS = 3
MIN_CHUNK_TOKENS = 64
MIN_CHUNK_TOKENS_TRAINED = 256
"""Of a head that trains: each tile adds a gradient of the head's size to a sum."""
CHUNK_TOKENS = (4096, 2048, 1024, 512, 256)
"""Of a sequence whose layers do not fit whole, the best first: smaller chunks decode and launch more often."""
STAGING_PIECE_BYTES = 4 << 20
"""The most that is put away or fetched back at once; a drive is as fast with it as with more."""
SAVING = "saving and loading"
"""What a plan says of memory through which state goes between steps, beside what is free then."""
WHAT_TRAINS = "what trains, its gradients, optimizer"
"""What a plan, and an account, says of `StreamingProblem.trainable_bytes`."""
STEPPED_THERE = "optimizer state stepped there"
"""What a plan, and an account, says of the slots of a device that steps state."""
TIGHT_SLACK_BYTES = 64 << 20
"""Of freed memory held back, where a budget is tight."""
STATE_SLOTS = (128, 64, 32, 16, 8, 4, 2)
"""Pieces of state on their way, the best first: what is read ahead while a layer computes."""
PAGED_SLOTS = 2
"""Pieces of adapters' state in a device's memory: one is stepped there while another comes or goes."""
ENOUGH_STATE_SLOTS = 8
"""With so many, kept activations are worth more than further ones."""


def _states(problem: StreamingProblem, rest: Tier) -> list[StatePlacement | None]:
    """All placements of state, the fast ones first."""
    sizes = problem.training
    if sizes is None:
        return [None]
    everything = {block.name: len(block.pieces) for block in sizes.blocks}
    if sizes.adapters:
        on_nvme = [
            StatePlacement(in_memory={}, gradients=Tier.HOST, state_slots=slots)
            for slots in STATE_SLOTS
            if slots <= ENOUGH_STATE_SLOTS  # more would take the place of decoded weights
        ]
        in_host = StatePlacement(in_memory=everything, gradients=Tier.HOST)
        states = [in_host, *(on_nvme if problem.nvme_capacity_bytes is not None else [])]
        if not sizes.stepping_bytes:
            return list(states)
        return [state.stepped_on_device(sizes, 1.0, slots=PAGED_SLOTS) for state in states]
    if rest is Tier.HOST:
        return [StatePlacement(in_memory=everything, gradients=Tier.HOST)]
    return [
        StatePlacement(
            in_memory={}, gradients=gradients, state_slots=slots, weight_slots=2 if slots > 2 else 1,
            gradient_slots=(3 if slots > 4 else 2 if slots > 2 else 1) if gradients is Tier.NVME else 0,
        )
        for gradients in (Tier.HOST, Tier.NVME)
        for slots in STATE_SLOTS
    ]  # fmt: skip


def attempts(problem: StreamingProblem, rest: Tier, chunk_tokens: int | None) -> Iterator[Plan]:
    """All plans of the rule with weights resting there, the fast ones first. chunk_tokens: None for whole layers.

    Each is made when it is asked for: the first one that fits is taken, of hundreds.
    """
    homes = [Tier.DEVICE]
    if not problem.unified:
        homes.append(Tier.HOST)
    if problem.nvme_capacity_bytes is not None:
        homes.append(Tier.NVME)
    quantized = any(layer.decoded_bytes for layer in problem.layers)
    scopes = [DecodeScope.LAYER, DecodeScope.LINEAR] if quantized else [DecodeScope.LINEAR]
    in_place = problem.unified and rest is Tier.HOST
    most_slack_bytes = problem.slack_bytes(chunk_tokens)
    slacks = (most_slack_bytes, most_slack_bytes * 2 // 3, min(most_slack_bytes // 4, TIGHT_SLACK_BYTES))
    plans = (
        _plan(
            problem,
            rest,
            slots,
            home,
            state,
            scope,
            edges=edges,
            slack_bytes=slack_bytes,
            layer_major=layer_major,
            chunk_tokens=chunk_tokens,
        )
        for choices in edge_choices(problem, in_place=in_place)
        for slot_choices in (range(MAX_SLOTS, 1, -1), [1])
        for state in _states(problem, rest)
        for edges in choices
        for layer_major in _orders(problem, in_place=in_place)
        for home in homes
        for slots in slot_choices
        for slack_bytes in slacks
        for scope in scopes
    )
    if chunk_tokens is not None or problem.num_micro_batches > 1 and not in_place:
        return plans  # what is kept would be kept of all micro-batches
    if problem.training is None or problem.training.adapters:
        return plans
    if problem.cuts is not None and (problem.cuts.head_chunk_tokens is not None or problem.cuts.layer_major):
        return plans  # a tile is what they have in common with the run that goes on
    made, plans_again = tee(plans)
    return chain((_keeping(problem, plan) for plan in made if could_keep(plan)), plans_again)


def _orders(problem: StreamingProblem, *, in_place: bool) -> tuple[bool, ...]:
    """Whether micro-batches go through the layers together, the better choice first."""
    if problem.cuts is not None and problem.cuts.layer_major is not None:
        return (problem.cuts.layer_major,)
    return (True, False) if problem.num_micro_batches > 1 and not in_place else (False,)


def has_enough_slots(plan: Plan) -> bool:
    """Whether as many pieces of state are on their way as serve."""
    state = plan.state
    return state is not None and (bool(state.in_memory) or state.state_slots >= ENOUGH_STATE_SLOTS)


def could_keep(plan: Plan) -> bool:
    """Whether memory is better spent on kept activations than on more of what is on its way."""
    if not has_enough_slots(plan) or plan.layer_inputs is not Tier.DEVICE:
        return False
    return all(ring.num_slots > 1 for ring in plan.rings if ring.name == LAYERS)


def _keeping(problem: StreamingProblem, plan: Plan) -> Plan:
    """The plan with all activations kept and the loss taken at once: as fast as plain training, where memory is."""
    plan = keeping(problem, plan, len(problem.layers))
    device = {**plan.peak_bytes["device"], "activations": problem.transient_bytes(None)}
    return replace(plan, head_chunk_tokens=None, peak_bytes={**plan.peak_bytes, "device": device})


def _plan(
    problem: StreamingProblem,
    rest: Tier,
    slots: int,
    home: Tier,
    state: StatePlacement | None,
    scope: DecodeScope,
    *,
    edges: EdgesBy,
    slack_bytes: int,
    layer_major: bool,
    chunk_tokens: int | None,
) -> Plan:
    # Where HOST is DEVICE, a layer that rests in HOST is already where it is used.
    in_place = problem.unified and rest is Tier.HOST
    streamed_edges = tuple(block for block in problem.edges if edges is not EdgesBy.RESIDENT and block.streams)
    tiled = tiled_block(problem) if edges is EdgesBy.TILES else None
    by_rows = streamed_edges if edges in (EdgesBy.ROWS, EdgesBy.TILES) else ()
    if in_place:
        by_rows = tuple(block for block in by_rows if block is tiled)  # the others are where they are used
    looked_up = looked_up_of(problem, by_rows, tiled)
    in_pieces = (*looked_up, *([] if tiled is None or tiled in looked_up else [tiled]))
    streamed_edges = tuple(block for block in streamed_edges if block not in in_pieces)
    resident = tuple(block for block in problem.edges if block not in (*streamed_edges, *in_pieces))
    lookups = lookups_of(looked_up, rest)
    rings = []
    if problem.layers and not in_place:
        rings.append(_ring(LAYERS, problem.layers, slots, rest))
    if streamed_edges and not in_place:
        rings.append(_ring("edges", streamed_edges, 1, rest))
    if in_place:
        resident = tuple(block for block in (*problem.edges, *problem.layers) if block not in in_pieces)
    scratch = 2 * max((block.largest_module_bytes for block in problem.layers), default=0)
    if scope is DecodeScope.LAYER:
        scratch += max((block.decoded_bytes for block in problem.layers), default=0)
    together = problem.num_micro_batches if layer_major else 1
    one = whole_pages(problem.layer_input_bytes)
    each = one * together
    waiting = each if chunk_tokens is None else INPUTS_OF_CHUNKS * each
    tile_tokens = head_chunk_tokens(problem, chunk_tokens)
    tile_rows = None if problem.cuts is None else problem.cuts.head_tile_rows
    head_tiles = None if tiled is None else head_tiles_of(tiled, rest, tile_tokens, tile_rows)
    device = {
        "resident blocks": sum(block.stored_bytes for block in resident),
        **{f"ring of {ring.name}": ring.device_bytes for ring in rings},
        "decoded weights": scratch,
        WHAT_TRAINS: problem.trainable_bytes,
        "activations": problem.transient_bytes(tile_tokens, chunk_tokens),
        "freed, held back by the allocator": slack_bytes,
    }
    if state is not None and problem.training is not None and state.device_slots:
        device[STEPPED_THERE] = state.device_bytes(problem.training)
    host: dict[str, int] = {}
    nvme: dict[str, int] = {}
    if rest is Tier.NVME:
        trained = {block.name for block in problem.training.blocks} if problem.training is not None else set()
        frozen = [block for block in problem.layers + problem.edges if block.name not in trained]
        nvme["weights"] = sum(block.stored_bytes for block in frozen)
        if not problem.unified:
            host = {f"staging for {ring.name}": ring.device_bytes for ring in rings}
    elif rings or in_pieces:
        in_rings = [block for ring in rings for block in _members(problem, ring)]
        host["weights"] = sum(block.stored_bytes for block in (*in_rings, *in_pieces))
    if head_tiles is not None:
        device["tiles of the head"] = head_tiles.slots_bytes
        device["products by tiles"] = head_tiles.product_bytes
        if rest is Tier.NVME and not problem.unified:
            host["staging for tiles of the head"] = head_tiles.slots_bytes
    if lookups is not None:
        device["rows of embeddings"] = lookups.room_bytes
        sums = lookups.sums_bytes(sum(block.stored_bytes for block in looked_up))
        host["rows on their way"] = lookups.staging_bytes(unified=problem.unified) + sums
    if home is Tier.NVME:
        # Twice: a second micro-batch may begin before the first one's graph is gone. Staging: two out, two in.
        nvme["layer inputs"] = 2 * waiting * len(problem.layers)
        largest = waiting // together
        host["staging for layer inputs"] = 4 * min(largest, STAGING_PIECE_BYTES if problem.stages_pieces else largest)
    else:
        (device if home is Tier.DEVICE else host)["layer inputs"] = waiting * len(problem.layers)
    if home is not Tier.DEVICE:
        device["layer input in use"] = one
    if on_their_way := problem.on_their_way_bytes(home, by_chunks=chunk_tokens is not None):
        device["layer inputs on their way"] = on_their_way
    if layer_major:
        device["hidden states of other micro-batches"] = 2 * each
        if problem.thread_bytes:
            device["workspaces of other micro-batches"] = whole_pages((together - 1) * problem.thread_bytes)
    if state is not None and problem.training is not None:
        host |= state.memory_bytes(problem.training)
        # In one tier it takes the place of a step's activations.
        saving_bytes = problem.training.saving_bytes - (device["activations"] if problem.unified else 0)
        if saving_bytes > 0:
            host[SAVING] = saving_bytes
        if problem.nvme_capacity_bytes is not None:
            nvme |= state.nvme_bytes(problem.training)
    if problem.unified:
        device, host = {**device, **host}, {}
    return Plan(
        fingerprint=problem.fingerprint,
        planner="fixed streaming rule",
        resident=tuple(block.name for block in resident),
        rings=tuple(rings),
        layer_inputs=home,
        decode_scope=scope,
        head_chunk_tokens=tile_tokens,
        activations=None if chunk_tokens is None else _recomputed_by(chunk_tokens, problem),
        allocator_slack_bytes=slack_bytes,
        layer_major=layer_major,
        update_mode=update_mode(problem, state),
        state=state,
        lookups=lookups,
        head_tiles=head_tiles,
        peak_bytes={"device": device, "host": host, "nvme": nvme},
    )


def update_mode(problem: StreamingProblem, state: StatePlacement | None) -> UpdateMode:
    sizes = problem.training
    if state is None or sizes is None or not sizes.commits_each_step or state.is_all_in_memory(sizes):
        return UpdateMode.AFTER
    return UpdateMode.SPECULATIVE if sizes.clips else UpdateMode.BACKWARD


def _recomputed_by(chunk_tokens: int, problem: StreamingProblem) -> dict[str, ActivationPolicy]:
    policy = ActivationPolicy(chunks=(Chunk(num_tokens=chunk_tokens, action=Action.RECOMPUTE),))
    return {block.name: policy for block in problem.layers}


def head_chunk_tokens(problem: StreamingProblem, chunk_tokens: int | None = None) -> int | None:
    """The largest tile, halving from the whole batch, that needs no more memory than a layer does; None: the whole."""
    if problem.cuts is not None:
        return problem.cuts.head_chunk_tokens
    head = problem.loss_head
    if head is None or not head.tiles:
        return None
    chunk, least = head.num_tokens, MIN_CHUNK_TOKENS_TRAINED if head.trains else MIN_CHUNK_TOKENS
    while chunk > least and head.peak_bytes(chunk) > problem.layer_bytes(chunk_tokens):
        chunk = max(least, -(-chunk // 2))
    return chunk if chunk < head.num_tokens else None


def _ring(name: str, blocks: tuple[BlockSize, ...], slots: int, rest: Tier) -> Ring:
    return Ring(
        name=name,
        blocks=tuple(block.name for block in blocks),
        num_slots=min(slots, len(blocks)),
        slot_bytes=max(block.stored_bytes for block in blocks),
        rest=rest,
    )


def _members(problem: StreamingProblem, ring: Ring) -> list[BlockSize]:
    return [block for block in problem.layers + problem.edges if block.name in ring.blocks]
