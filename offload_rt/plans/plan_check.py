"""Whether a plan can be run: it was made for this workload, places each of its blocks, and asks for nothing else.

Everything that the runtime cannot do is a `ConfigError` here, before anything is changed.
"""

from __future__ import annotations

from offload_rt.errors import ConfigError
from offload_rt.optimizer.on_device import device_rule
from offload_rt.optimizer.paged import rule_on_device
from offload_rt.plans.planning_tokens import policies_of
from offload_rt.plans.planning_training import placement_of
from offload_rt.plans.workload_sizes import is_looked_up, is_multiplied, is_tied, rows_size
from offload_rt.tensor_spec import IO_ALIGNMENT_BYTES
from offload_rt.tiering.resting import all_in
from offload_rt.wiring.workload import Workload
from planners.plans.placement import UpdateMode
from planners.plans.plan import Plan, Ring, Split, Tier
from planners.plans.training_state import StatePlacement
from planners.plans.vocabulary import HeadTiles, Lookups
from planners.rule.streaming_problem import StreamingProblem


def check_plan(plan: Plan, problem: StreamingProblem, workload: Workload) -> None:
    """Raises `ConfigError` unless `plan` was made for this workload and places each of its blocks."""
    drafts = workload.drafts
    if plan.fingerprint != problem.fingerprint:
        raise ConfigError(
            f"plan: made for workload {plan.fingerprint}, this one is {problem.fingerprint} (model, batch_size, "
            f"seq_len or bits differ)"
        )
    if plan.head_chunk_tokens is not None and not (problem.loss_head is not None and problem.loss_head.tiles):
        raise ConfigError("plan: head_chunk_tokens is for causal language models of transformers; set it to null")
    looked_up = () if plan.lookups is None else plan.lookups.blocks
    tiled = () if plan.head_tiles is None else (plan.head_tiles.block,)
    placed = {*plan.resident, *(name for ring in plan.rings for name in ring.blocks), *looked_up, *tiled}
    if placed != {draft.name for draft in drafts}:
        odd = sorted(placed ^ {draft.name for draft in drafts})
        raise ConfigError(f"plan: its blocks are not this model's, first odd one: {odd[0]} ({len(odd)} differ)")
    _check_placed_once(plan)
    for ring in plan.rings:
        for name in ring.blocks:
            split = plan.weights_of(name)
            if split is not None:
                _check_split(ring, split, workload, name)
    for name in plan.resident:
        split = plan.weights_of(name)
        if split is not None and split.streamed_bytes:
            raise ConfigError(f"plan: {name} is resident, but its class streams {split.streamed_bytes} bytes of it")
    if plan.lookups is not None:
        _check_lookups(plan, plan.lookups, problem, workload)
    if plan.head_tiles is not None:
        _check_head_tiles(plan, plan.head_tiles, workload)
    _check_activations(plan, problem, workload)
    _check_state(plan, problem)
    _check_parts_that_train(plan, workload)
    says_state = any(entry.updates for entry in plan.classes)  # without, classes are of weights alone
    if says_state and plan.state is not None and problem.training is not None:
        said = placement_of(plan, workload, unified=problem.unified)
        if plan.state != said:
            raise ConfigError(f"plan: its classes place state so: {said}, and its state says: {plan.state}")
    if plan.state is not None:
        _check_updates_on_device(plan.state, workload)


def _check_placed_once(plan: Plan) -> None:
    """Whether no block is placed twice. What is embedding and head, tied, is in lookups and tiles, and rests once."""
    names = [*plan.resident, *(name for ring in plan.rings for name in ring.blocks)]
    looked_up = () if plan.lookups is None else plan.lookups.blocks
    tiled = () if plan.head_tiles is None else (plan.head_tiles.block,)
    names += looked_up + tuple(name for name in tiled if name not in looked_up)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"plan: places {twice[0]!r} twice ({len(twice)} are)")


def _check_lookups(plan: Plan, lookups: Lookups, problem: StreamingProblem, workload: Workload) -> None:
    """Whether these blocks can be read by rows, where they rest, through the room that there is."""
    tiled = None if plan.head_tiles is None else plan.head_tiles.block
    for name in lookups.blocks:
        draft = workload.draft(name)
        if is_tied(draft) and name != tiled:
            raise ConfigError(
                f"plan: lookups of {name!r}, which is the head, too: give tiles of it, or put it in a ring"
            )
        if not is_looked_up(draft) and not is_tied(draft):
            raise ConfigError(f"plan: lookups of {name!r}, which is no frozen embedding by itself; put it in a ring")
        row = rows_size(draft, most_rows=1)
        split = plan.weights_of(name)
        if split is not None and split != all_in(lookups.rest, split.total_bytes):
            raise ConfigError(f"plan: lookups of {name!r} from {lookups.rest.value}, but its class says {split}")
        if lookups.room_bytes < row.row_bytes:
            raise ConfigError(f"plan: lookups in {lookups.room_bytes} bytes, a row of {name!r} has {row.row_bytes}")
        if lookups.rest is Tier.NVME and lookups.pages_bytes < row.pages_bytes():
            raise ConfigError(f"plan: lookups with {lookups.pages_bytes} bytes of pages, a row has {row.row_bytes}")
    if lookups.rest is Tier.NVME and not workload.config.nvme:
        raise ConfigError("plan: lookups of blocks that rest on NVME, but nvme= gives no folder")
    if lookups.rest is Tier.HOST and problem.unified and lookups.blocks != (tiled,):
        raise ConfigError("plan: lookups from HOST, which is DEVICE without host_memory=; list the blocks as resident")


def _check_head_tiles(plan: Plan, tiles: HeadTiles, workload: Workload) -> None:
    """Whether this block can be multiplied with by tiles, where it rests."""
    draft, lookups = workload.draft(tiles.block), plan.lookups
    if is_tied(draft):
        if lookups is None or tiles.block not in lookups.blocks:
            raise ConfigError(
                f"plan: tiles of {tiles.block!r}, which is the embedding, too: give lookups of it, or put it in a ring"
            )
        if lookups.rest is not tiles.rest:
            raise ConfigError(
                f"plan: {tiles.block!r} is embedding and head, and rests once: its lookups are from "
                f"{lookups.rest.value}, its tiles from {tiles.rest.value}"
            )
    elif not is_multiplied(draft):
        raise ConfigError(f"plan: tiles of {tiles.block!r}, which is no frozen linear without a bias; put it in a ring")
    split = plan.weights_of(tiles.block)
    if split is not None and split != all_in(tiles.rest, split.total_bytes):
        raise ConfigError(f"plan: tiles of {tiles.block!r} from {tiles.rest.value}, but its class says {split}")
    num_tokens = workload.config.batch_size * workload.config.seq_len
    size = rows_size(draft, most_rows=num_tokens)
    if tiles.tile_rows * size.row_bytes != tiles.tile_bytes:
        raise ConfigError(
            f"plan: tiles of {tiles.tile_rows} rows, {size.row_bytes} bytes each, in {tiles.tile_bytes} bytes"
        )
    try:
        tiles.check_products(size, num_tokens=plan.head_chunk_tokens or num_tokens, batch_tokens=num_tokens)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if workload.training is not None and not workload.training.adapters:
        raise ConfigError(
            "plan: tiles of the head are for adapters; where layers train, a model is saved block by block"
        )
    if tiles.rest is Tier.NVME and not workload.config.nvme:
        raise ConfigError("plan: tiles of a head that rests on NVME, but nvme= gives no folder")


def _check_split(ring: Ring, split: Split, workload: Workload, name: str) -> None:
    """Whether the runtime can take a block of a ring from where its class says that its bytes rest."""
    draft = workload.draft(name)
    spec, where = draft.spec, f"plan: weights of {name}"
    if split.total_bytes != spec.stored_bytes:
        raise ConfigError(f"{where}: {split.total_bytes} bytes are placed, it has {spec.stored_bytes}")
    if not 0 < split.streamed_bytes <= ring.slot_bytes:
        raise ConfigError(f"{where}: {split.streamed_bytes} bytes stream through slots of {ring.slot_bytes}")
    if split.nvme_bytes and not workload.config.nvme:
        raise ConfigError(f"{where}: {split.nvme_bytes} bytes rest on NVME, but nvme= gives no folder")
    try:
        spec.first_streamed_bytes(split.device_bytes)
    except ValueError as error:
        raise ConfigError(f"plan: {error}") from None
    if split.host_bytes % IO_ALIGNMENT_BYTES:
        raise ConfigError(f"{where}: {split.host_bytes} bytes in HOST are not whole pages of {IO_ALIGNMENT_BYTES}")


def _check_parts_that_train(plan: Plan, workload: Workload) -> None:
    """Whether weights that train can rest in parts as the plan says."""
    state = plan.state
    for draft in workload.drafts:
        split = plan.weights_of(draft.name) if draft.trains else None
        if split is None or state is None or not split.streamed_bytes or split.nvme_bytes == split.total_bytes:
            continue
        if split.nvme_bytes and state.weight_slots < 1:
            raise ConfigError(
                f"plan: weights of {draft.name} that train rest on NVME and need weight_slots of at least 1"
            )
        if split.host_bytes < split.total_bytes and state.on_device.get(draft.name, 0):
            raise ConfigError(
                f"plan: weights of {draft.name} rest in parts, and its state is stepped on the device: one or the other"
            )


def _check_state(plan: Plan, problem: StreamingProblem) -> None:
    if (plan.state is None) != (problem.training is None):
        raise ConfigError(f"plan: state is {plan.state}, but layers {'do not ' if plan.state else ''}train")
    if plan.state is None or problem.training is None:
        return
    num_pieces = {block.name: len(block.pieces) for block in problem.training.blocks}
    for name, count in plan.state.in_memory.items():
        if name not in num_pieces:
            raise ConfigError(f"plan: state of {name!r} in memory, which is no block that trains")
        if count > num_pieces[name]:
            raise ConfigError(f"plan: {count} pieces of state of {name!r} in memory, which has {num_pieces[name]}")
    if plan.update_mode is UpdateMode.DEFERRED:
        raise ConfigError("plan: updates during the next forward, which the runtime cannot; allowed: all other modes")
    if problem.training.clips and plan.update_mode is UpdateMode.BACKWARD:
        raise ConfigError("plan: updates during backward, before the norm is known that max_grad_norm needs")
    waits = plan.state.gradients is Tier.HOST and plan.update_mode is UpdateMode.AFTER
    if problem.training.adapters and not waits:
        raise ConfigError(
            "plan: gradients of adapters stay with them, and updates wait for all: give state gradients 'host' and "
            "update_mode 'after'"
        )
    on_nvme = not plan.state.is_all_in_memory(problem.training)
    if (on_nvme or plan.state.gradients is Tier.NVME) and problem.nvme_capacity_bytes is None:
        raise ConfigError("plan: state or gradients rest on NVME, but nvme= gives no folder")
    if on_nvme and plan.state.state_slots < 1:
        raise ConfigError("plan: state rests on NVME and needs state_slots of at least 1")
    weights_change = not problem.training.adapters
    if weights_change and any(ring.rest is Tier.NVME for ring in plan.rings) and plan.state.weight_slots < 1:
        raise ConfigError("plan: weights that train rest on NVME and need weight_slots of at least 1")


def ends_commits(plan: Plan, other: Plan, problem: StreamingProblem, workload: Workload) -> bool:
    """Whether each step is committed only because `plan` has state on NVMe, and `other`, in its place, has none there.

    How often is then the plan's to say, and nobody has asked for less safety.
    """
    sizes = problem.training
    if workload.config.commit_every is not None or sizes is None or plan.state is None or other.state is None:
        return False
    return other.state.is_all_in_memory(sizes) and not plan.state.is_all_in_memory(sizes)


def _check_tokens(plan: Plan, seq_len: int) -> None:
    """Whether `activations` are what `classes` say, where these speak of tokens."""
    for entry in plan.classes:
        for split in entry.tokens:
            if split.total_tokens != seq_len:
                raise ConfigError(
                    f"plan: class {entry.name!r} places {split.total_tokens} tokens of {split.name!r}, a sequence has "
                    f"{seq_len}"
                )
    try:
        said = policies_of(plan) or {}
    except ValueError as error:
        raise ConfigError(f"plan: class {error}") from None
    given = plan.activations or {}
    odd = [name for name in {**said, **given} if said.get(name) != given.get(name)]
    if odd and any(entry.tokens for entry in plan.classes):
        raise ConfigError(
            f"plan: activations of {odd[0]!r} are not what its class says ({len(odd)} differ): "
            f"{given.get(odd[0])}, and by its class {said.get(odd[0])}"
        )


def _check_updates_on_device(state: StatePlacement, workload: Workload) -> None:
    """Whether the device can step what `state` gives to it."""
    training = workload.training
    if training is None:
        return
    num_pieces = {block.name: len(block.pieces) for block in training.blocks}
    if training.adapters and workload.has_streams and dict(state.on_device) != num_pieces:
        raise ConfigError(
            f"plan: adapters on a device are stepped there, all of them: give state on_device {num_pieces} and "
            f"device_slots of at least 1"
        )
    if not state.on_device:
        return
    for name, count in state.on_device.items():
        if name not in num_pieces:
            raise ConfigError(f"plan: state of {name!r} stepped on the device, which is no block that trains")
        if count > num_pieces[name]:
            raise ConfigError(
                f"plan: {count} pieces of state of {name!r} stepped on the device, which has {num_pieces[name]}"
            )
    if not workload.has_streams:
        raise ConfigError(
            f"plan: {sum(state.on_device.values())} pieces of state are stepped on the device, but "
            f"device={workload.config.device!r} is the CPU; give on_device {{}} and device_slots 0"
        )
    (rule_on_device if training.adapters else device_rule)(training.rule, workload.config.device)


def _check_activations(plan: Plan, problem: StreamingProblem, workload: Workload) -> None:
    _check_tokens(plan, workload.config.seq_len)
    layers = {name for d in workload.layers for name in (d.name, type(d.modules[0]).__name__)}
    for name, policy in (plan.activations or {}).items():
        if name not in layers:
            raise ConfigError(f"plan: activations of {name!r}, which is no layer of this model nor a class of them")
        try:
            to_host = policy.num_swapped(workload.config.seq_len, Tier.HOST)
        except ValueError as error:
            raise ConfigError(f"plan: {error}") from None
        if to_host and problem.unified:
            raise ConfigError(
                "plan: chunks are swapped to HOST, but DEVICE and HOST are one without host_memory=; keep them, or "
                "swap to NVME"
            )
