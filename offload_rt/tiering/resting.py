"""Where a plan has weights rest, and what of them memory alone has.

With nvme= everything can be brought anew: frozen weights from the store, state from the log. Without, a run's memory
holds the only copy, and who made the weights may be gone. Then a plan that follows another one in a running engine gets
the slots as they are, those of masters and moments too; frozen weights that it has elsewhere move first (`moving`), and
what a plan decides besides changes around them. Weights that train can go anywhere: they are their masters, rounded.

    the plan before   |-- weights --|-- ring --|-- decoded --|-- inputs --|
    the one after     |-- weights --|-- ring ------|-- inputs --|
"""

from __future__ import annotations

from collections.abc import Mapping

from offload_rt.memory.arena import Slot
from offload_rt.wiring.workload import Workload
from planners.plans.plan import Plan, Split, Tier

Resting = dict[tuple[str, Tier], Slot]
"""By block and tier, what of the block rests there."""


def split_of(plan: Plan, name: str, rest: Tier, num_bytes: int) -> Split:
    """Where the bytes of a block that streams rest: as the plan's classes say, or all in `rest`."""
    split = plan.weights_of(name)
    return all_in(rest, num_bytes) if split is None else split


def all_in(rest: Tier, num_bytes: int) -> Split:
    """All of a block in one tier."""
    sizes = {tier: num_bytes if tier is rest else 0 for tier in Tier}
    return Split(device_bytes=sizes[Tier.DEVICE], host_bytes=sizes[Tier.HOST], nvme_bytes=sizes[Tier.NVME])


def splits_of(plan: Plan, workload: Workload) -> Mapping[str, Split]:
    """By its name, where the bytes of each block rest."""
    sizes = {draft.name: draft.spec.stored_bytes for draft in workload.drafts}
    found = {name: all_in(Tier.DEVICE, sizes[name]) for name in plan.resident}
    for ring in plan.rings:
        found |= {name: split_of(plan, name, ring.rest, sizes[name]) for name in ring.blocks}
    if plan.lookups is not None:
        found |= {name: all_in(plan.lookups.rest, sizes[name]) for name in plan.lookups.blocks}
    if plan.head_tiles is not None:
        found[plan.head_tiles.block] = all_in(plan.head_tiles.rest, sizes[plan.head_tiles.block])
    return found
