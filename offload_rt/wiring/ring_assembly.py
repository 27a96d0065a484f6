"""Locks a ring for copies of HOST memory that could not be locked itself, of what a plan leaves of the budget."""

from __future__ import annotations

import logging

from offload_rt.errors import PinningRefused
from offload_rt.memory.pinning import MIN_RING_BYTES, RING_BYTES
from offload_rt.tensor_spec import IO_ALIGNMENT_BYTES
from offload_rt.tiering.tiers import Tiers
from offload_rt.wiring.runtime_options import TensorDevice
from planners.plans.plan import Tier

logger = logging.getLogger("offload_rt")
_NAME = "locked ring"
_WAY_OUT = ". Where `offload-rt doctor` has found how much can be locked, there is room for one"


def lock_ring(device: TensorDevice, tiers: Tiers, planned_bytes: int) -> None:
    """Does nothing where all arenas, which are there already, could be locked. `planned_bytes` were left for the ring,
    0 where nobody knew. Says so where there can be none: copies hold up the computation then.
    """
    if not device.pageable_bytes:
        return
    host = tiers.account(Tier.HOST)
    num_bytes = planned_bytes or RING_BYTES
    if host.capacity_bytes is not None:
        num_bytes = min(num_bytes, host.capacity_bytes - host.used_bytes)
    num_bytes = num_bytes // IO_ALIGNMENT_BYTES * IO_ALIGNMENT_BYTES
    if num_bytes < MIN_RING_BYTES:
        logger.warning(
            "copies of pageable memory hold up the computation: the plan leaves no room for a locked ring%s", _WAY_OUT
        )
        return
    memory = tiers.arena(Tier.HOST, _NAME, num_bytes, copied=False).acquire(num_bytes, _NAME)
    try:
        device.pass_through(memory)
    except PinningRefused as refusal:
        tiers.let_go(Tier.HOST, _NAME, memory)
        logger.warning(
            "copies of pageable memory hold up the computation, for want of a locked ring: %s%s", refusal, _WAY_OUT
        )
