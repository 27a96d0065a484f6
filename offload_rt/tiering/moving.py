"""Moves frozen weights between DEVICE and HOST where a change of plans wants it and no store has them.

Memory holds the only copy then, so a block goes by itself: its new memory is booked and filled, and only then is the
old one given back. Everything else of the plan before is gone by then, which makes the room; one block's new place may
be what another one has left.

    DEVICE   |= A =|      |            |      |            |= B =|      |
    HOST     |= B =|      |    ->      |= B =|= A =|   ->   |     |= A =|

[Note: the way back]
A move takes as much at its worst as its reverse does. So moves that fit in an order fit backwards in the reverse order:
a change that fails is undone so, in the room of the plan before, whatever the moves are. And what no greedy order
finds, the reverse of a greedy order backwards may.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import torch

from offload_rt.memory.arena import Slot
from offload_rt.tensor_spec import IO_ALIGNMENT_BYTES, align_up
from offload_rt.tiering.resting import Resting, splits_of
from offload_rt.tiering.tiers import Tiers
from offload_rt.transfers.links import Links
from offload_rt.wiring.runtime_options import TensorDevice
from offload_rt.wiring.workload import Workload
from planners.errors import format_bytes
from planners.plans.plan import Plan, Tier
from planners.problems.hardware import Hardware
from planners.rule.streaming_problem import StreamingProblem

Places = Mapping[Tier, int]
"""Bytes of a block by tier: of DEVICE its first ones, of HOST its last ones. They may have less than a page both."""
HELD = "weights of the plan before"


@dataclass(frozen=True)
class Move:
    """A block that is to rest elsewhere."""

    block: str
    before: Places
    after: Places

    @property
    def back(self) -> Move:
        return Move(self.block, self.after, self.before)

    @property
    def new(self) -> Places:
        """Memory that it takes; what rests in a tier stays there if it is as much as before."""
        return {tier: size for tier, size in self.after.items() if size != self.before.get(tier)}

    @property
    def old(self) -> Places:
        """Memory that it leaves."""
        return self.back.new


def places_of(plan: Plan, workload: Workload) -> dict[str, Places]:
    """By its name, where the bytes of each frozen block rest, as slots hold them."""
    splits = splits_of(plan, workload)
    found: dict[str, Places] = {}
    for draft in workload.frozen:
        if draft.name in splits:
            split = splits[draft.name]
            device_bytes = draft.spec.first_streamed_bytes(split.device_bytes) if split.device_bytes else 0
            sizes = {Tier.DEVICE: device_bytes, Tier.HOST: split.host_bytes}
            found[draft.name] = {tier: size for tier, size in sizes.items() if size}
    return found


def moves_between(workload: Workload, plan: Plan, other: Plan) -> list[Move]:
    """What `other` has elsewhere than `plan`, of plans that have everything in memory. In the order of the model."""
    before, after = places_of(plan, workload), places_of(other, workload)
    return [Move(name, before[name], after.get(name, {})) for name in before if before[name] != after.get(name, {})]


@dataclass(frozen=True)
class Room:
    """What is free in each tier, in bytes; below 0 where more is held than there may be."""

    free_bytes: Mapping[Tier, float]
    unified: bool

    def without(self, places: Places) -> Room:
        """When `places` are taken."""
        return self._changed(places, -1)

    def after(self, move: Move) -> Room:
        """When `move` was made."""
        return self.without(move.new)._changed(move.old, 1)

    def fits(self, move: Move, *, made: bool = False) -> bool:
        """Whether the block has room in its new place while it is in the old one, too. `made`: `move` was made last."""
        left = self.without(move.old if made else move.new).free_bytes
        return all(left[self._of(tier)] >= 0 for tier in move.new)

    def _changed(self, places: Places, sign: int) -> Room:
        free = dict(self.free_bytes)
        for tier, size in places.items():
            free[self._of(tier)] += sign * align_up(size, IO_ALIGNMENT_BYTES)
        return Room(free, self.unified)

    def _of(self, tier: Tier) -> Tier:
        return Tier.DEVICE if self.unified else tier


def room_beside(workload: Workload, problem: StreamingProblem, plan: Plan) -> Room:
    """What a change from `plan` to one for `problem` has to move weights in: all but what memory alone has, and what
    trains in the model's own memory.
    """
    capacities = {Tier.DEVICE: problem.device_capacity_bytes, Tier.HOST: problem.host_capacity_bytes}
    free = {tier: inf if capacity is None else float(capacity) for tier, capacity in capacities.items()}
    free[Tier.DEVICE] -= problem.trainable_bytes
    room = Room(free, problem.unified)
    if workload.training is not None:
        for piece in (piece for block in workload.training.blocks for piece in block.pieces):
            room = room.without({Tier.HOST: piece.num_bytes})
    for places in places_of(plan, workload).values():
        room = room.without(places)
    return room


def in_order(moves: Sequence[Move], room: Room) -> list[Move] | None:
    """`moves` in an order in which each fits into what is free then; None where none is found. `room` is what there is
    before the first. See [Note: the way back].
    """
    found = _greedy(moves, room, backwards=False)
    if found is not None:
        return found
    for move in moves:
        room = room.after(move)
    found = _greedy(moves, room, backwards=True)
    return None if found is None else found[::-1]


def _greedy(moves: Sequence[Move], room: Room, *, backwards: bool) -> list[Move] | None:
    """Always the first that fits; `backwards`, from where all were made, the first that may have been the last."""
    left, found = list(moves), list[Move]()
    while left:
        move = next((move for move in left if room.fits(move, made=backwards)), None)
        if move is None:
            return None
        room = room.after(move.back if backwards else move)
        left.remove(move)
        found.append(move)
    return found


def why_not_follow(workload: Workload, problem: StreamingProblem, plan: Plan, other: Plan) -> str:
    """Why `other`, which is for `problem`, cannot follow `plan` in a running engine; empty where it can.

    With nvme= everything can be brought anew: frozen weights from the store, state from the log.
    """
    if workload.config.nvme:
        return ""
    moves = moves_between(workload, plan, other)
    for move in moves:
        if not move.after:
            return f"the other plan has no place in memory for {move.block}, which is in no store"
    room = room_beside(workload, problem, plan)
    if in_order(moves, room) is not None:
        return ""
    free = " and ".join(
        f"{format_bytes(max(0, int(size)))} of {tier.value} memory" for tier, size in room.free_bytes.items()
        if size != inf
    )  # fmt: skip
    return (
        f"the other plan moves weights of {len(moves)} blocks, which are in no store, and beside all of them there is "
        f"no room to do it in: {free}"
    )


def moves_to(workload: Workload, problem: StreamingProblem, plan: Plan, other: Plan) -> list[Move]:
    """What is to be moved before `other`, for which `why_not_follow` is empty, follows `plan`; in order."""
    if workload.config.nvme:
        return []
    moves = moves_between(workload, plan, other)
    return in_order(moves, room_beside(workload, problem, plan)) or []


def seconds_of(moves: Iterable[Move], hardware: Hardware) -> float:
    """What `moves` take over the links of `hardware`."""
    if hardware.unified:
        return 0.0
    rates = {
        Tier.DEVICE: hardware.links.host_to_device_bytes_per_second,
        Tier.HOST: hardware.links.device_to_host_bytes_per_second,
    }
    more = [(tier, size - move.before.get(tier, 0)) for move in moves for tier, size in move.after.items()]
    return sum(max(0, num_bytes) / rates[tier] for tier, num_bytes in more)


class Mover:
    """Moves blocks of `resting`, which always says where each of them is as a whole. Between steps only."""

    def __init__(
        self, workload: Workload, resting: Resting, others: Sequence[Slot], tiers: Tiers, links: Links,
        device: TensorDevice | None, seen: Sequence[Any] = (),
    ) -> None:  # fmt: skip
        """others: of HOST, what besides stays where it is. Until `finish` all of it is booked in `tiers`. seen:
        regions that are not given back, for somebody else sees them.
        """
        self._workload = workload
        self._resting = resting
        self._others = others
        self._tiers = tiers
        self._links = links
        self._device = device
        self._seen = set(map(id, seen))
        for (_, tier), slot in resting.items():
            tiers.hold(tier, HELD, slot)
        for slot in others:
            tiers.hold(Tier.HOST, HELD, slot)

    def move(self, move: Move) -> None:
        """Blocks. Raises `BudgetExceeded`, and what copying raises: the block is where it was then."""
        slots = {
            tier: self._tiers.arena(tier, f"{move.block}, moved", size, booked_for=HELD).acquire(size, move.block)
            for tier, size in move.new.items()
        }
        for account in self._tiers.accounts.values():
            account.most_changing_bytes = max(account.most_changing_bytes, account.used_bytes)
        for tier, slot in slots.items():
            self._fill(move.block, tier, slot)
        for tier in move.old:
            left = self._resting.pop((move.block, tier))
            self._tiers.let_go(tier, HELD, left)
            if id(left.region) not in self._seen:
                left.region.give_back()
        self._resting |= {(move.block, tier): slot for tier, slot in slots.items()}

    def finish(self) -> None:
        """Nothing is booked any more: whoever takes it over books it."""
        for (_, tier), slot in self._resting.items():
            self._tiers.let_go(tier, HELD, slot)
        for slot in self._others:
            self._tiers.let_go(Tier.HOST, HELD, slot)

    def _fill(self, block: str, to: Tier, slot: Slot) -> None:
        """Brings what `slot`, in the tier `to`, is to hold of `block`: what DEVICE has of it, and the rest of HOST."""
        stored_bytes = self._workload.draft(block).spec.stored_bytes

        def begins(tier: Tier, held: Slot) -> int:
            return 0 if tier is Tier.DEVICE else stored_bytes - held.num_bytes

        begin = at = begins(to, slot)
        for tier in (Tier.DEVICE, Tier.HOST):
            source = self._resting.get((block, tier))
            if source is None:
                continue
            first = begins(tier, source)
            last = min(begin + slot.num_bytes, first + source.num_bytes)
            if at < last:
                self._copy(source.part(at - first, last - at), slot.part(at - begin, last - at), tier, to)
                at = last

    def _copy(self, source: Slot, target: Slot, tier: Tier, to: Tier) -> None:
        """Blocks until it is over."""
        links = self._links
        if self._device is not None and source.on_device and target.on_device:
            with self._device.on_compute():
                _bytes(target).copy_(_bytes(source))
            if links.recorder is not None:
                links.recorder.use("weights within DEVICE", reads=[source.range], writes=[target.range])
            self._device.compute.record().wait()
            return
        crosses = tier is not to and not self._tiers.unified
        copy = links.copy(source, target, inward=crosses and to is Tier.DEVICE)
        out = links.pace("weights to HOST", source.num_bytes, inward=False) if crosses and to is Tier.HOST else None
        links.wait(copy)  # whoever computes is behind it
        links.finish(copy)  # and its ends may be given back
        if out is not None:
            links.wait(out)


def _bytes(slot: Slot) -> torch.Tensor:
    return slot.tensor(torch.uint8, (slot.num_bytes,))
