"""DEVICE, HOST and NVME behind one interface: what each may hold, what it holds, and how a block comes to DEVICE.

Capacities are hard. Every arena is reserved from its tier here, by name, so that the report can say who holds what.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from offload_rt.errors import BudgetExceeded, OffloadError
from offload_rt.memory import mapped
from offload_rt.memory.arena import Arena, Region, Slot
from offload_rt.tensor_spec import IO_ALIGNMENT_BYTES, align_up
from offload_rt.transfers.device_streams import Device
from offload_rt.transfers.links import Links
from offload_rt.transfers.transfer import Transfer
from planners.errors import format_bytes
from planners.plans.plan import Tier


@dataclass
class TierAccount:
    """What may lie in a tier and what does, by owner, in bytes."""

    tier: Tier
    capacity_bytes: int | None
    holdings: dict[str, int] = field(default_factory=dict)
    arena_bytes: int = 0
    """Of these, in arenas; the rest is left to PyTorch's allocator."""
    arenas: list[weakref.ref[Arena]] = field(default_factory=list)
    """Those that are still used."""
    passing_bytes: int = 0
    most_passing_bytes: int = 0
    """Booked for a time, see `lend`: now, and the most that there was."""
    most_changing_bytes: int = 0
    """The most that was booked while a change of plans moved weights."""

    @property
    def used_bytes(self) -> int:
        return sum(self.holdings.values())

    def reserve(self, owner: str, num_bytes: int) -> None:
        """Books `num_bytes` for `owner`. Raises `BudgetExceeded`, naming all holders, when they do not fit."""
        self.check(owner, num_bytes)
        self.holdings[owner] = self.holdings.get(owner, 0) + num_bytes

    def lend(self, owner: str, num_bytes: int) -> Arena:
        """An arena beside the plan's, booked for `owner` until `take_back`. Raises `BudgetExceeded`."""
        self.check(owner, num_bytes)
        with mapped.reserved_from(self):
            arena = Arena(owner, num_bytes)  # before it is booked: the system may have no memory for it
        self.reserve(owner, num_bytes)
        self.arena_bytes += num_bytes
        self.passing_bytes += num_bytes
        self.most_passing_bytes = max(self.most_passing_bytes, self.passing_bytes)
        return arena

    def take_back(self, owner: str, num_bytes: int) -> None:
        """What `lend` booked is over. The memory goes with the last view of it."""
        self.release(owner, num_bytes)
        self.passing_bytes -= num_bytes

    def release(self, owner: str, num_bytes: int) -> None:
        """Of arenas, `num_bytes` are booked for `owner` no more."""
        self.holdings[owner] -= num_bytes
        if not self.holdings[owner]:
            del self.holdings[owner]
        self.arena_bytes -= num_bytes

    def check(self, owner: str, num_bytes: int) -> None:
        """As `reserve`, but books nothing."""
        if self.capacity_bytes is not None and self.used_bytes + num_bytes > self.capacity_bytes:
            held = ", ".join(f"{name} {format_bytes(size)}" for name, size in self.holdings.items())
            left = self.capacity_bytes - self.used_bytes
            raise BudgetExceeded(
                f"{self.tier.value} memory: {owner} needs {format_bytes(num_bytes)}, {format_bytes(left)} of "
                f"{format_bytes(self.capacity_bytes)} are left; "
                f"held by: {held or 'nobody'}"
            )


class Tiers:
    """The accounts of all tiers. Where `unified`, what is asked of HOST is booked in DEVICE."""

    def __init__(
        self,
        device_bytes: int | None,
        host_bytes: int | None,
        nvme_bytes: int | None,
        *,
        unified: bool,
        poison: bool,
        device: Device | None = None,
    ) -> None:
        self.unified = unified
        self._regions: weakref.WeakSet[Any] = weakref.WeakSet()
        """The memory of all arenas: a slot outlives its arena."""
        self._poison = poison
        self._device = device
        self.accounts = {
            Tier.DEVICE: TierAccount(Tier.DEVICE, device_bytes),
            Tier.HOST: TierAccount(Tier.HOST, host_bytes),
            Tier.NVME: TierAccount(Tier.NVME, nvme_bytes),
        }

    def account(self, tier: Tier) -> TierAccount:
        return self.accounts[Tier.DEVICE if self.unified and tier is Tier.HOST else tier]

    def arena(
        self,
        tier: Tier,
        name: str,
        num_bytes: int,
        *,
        copied: bool = True,
        poisoned: bool = True,
        granule_bytes: int = IO_ALIGNMENT_BYTES,
        booked_for: str | None = None,
    ) -> Arena:
        """Reserves an arena of `num_bytes` in `tier`. `copied`: a device copies to and from it, if it is in HOST.

        `booked_for` is the owner, where several arenas have the same one: it has the arena's name otherwise.
        `granule_bytes` is what leases of HOST memory are multiples of. Without `poisoned` it is not even where arenas
        are.
        """
        account, num_bytes = self.account(tier), align_up(num_bytes, IO_ALIGNMENT_BYTES)
        account.reserve(booked_for or name, num_bytes)
        account.arena_bytes += num_bytes
        poison = self._poison and poisoned
        with mapped.reserved_from(account):
            if self._device is not None and tier is Tier.DEVICE:
                arena = self._device.arena(name, num_bytes, poison=poison)
            else:
                arena = Arena(name, num_bytes, poison=poison, granule_bytes=granule_bytes)
        self._regions.add(arena.region)
        account.arenas.append(weakref.ref(arena))
        if num_bytes and tier is not Tier.DEVICE and copied:
            self._lock(name, arena.region)
        return arena

    def take_over(self, tier: Tier, name: str, slots: Sequence[Slot], *, copied: bool = True) -> None:
        """Books `slots` of other tiers, for `name`: their memory is these tiers' from now on, as it is. `copied`: as in
        `arena`.
        """
        account = self.account(tier)
        num_bytes = sum(align_up(slot.num_bytes, IO_ALIGNMENT_BYTES) for slot in slots)
        account.reserve(name, num_bytes)
        account.arena_bytes += num_bytes
        self._regions.update(slot.region for slot in slots)
        if tier is not Tier.DEVICE and copied:
            for slot in slots:
                self._lock(name, slot.region)

    def hold(self, tier: Tier, name: str, slot: Slot) -> None:
        """Books a slot of other tiers for `name` until `let_go`, whatever the capacity: its memory is there already."""
        account, num_bytes = self.account(tier), align_up(slot.num_bytes, IO_ALIGNMENT_BYTES)
        account.holdings[name] = account.holdings.get(name, 0) + num_bytes
        account.arena_bytes += num_bytes

    def let_go(self, tier: Tier, name: str, slot: Slot) -> None:
        """What `hold` has booked, or an arena whose one lease `slot` is, is not booked any more."""
        self.account(tier).release(name, align_up(slot.num_bytes, IO_ALIGNMENT_BYTES))

    def give_back(self, *, keep: Iterable[Slot] = (), seen: Iterable[Any] = ()) -> None:
        """Gives the memory of all arenas back to the system, but of those with a slot in `keep`, and of the regions
        that are `seen`; nobody may use it any more, and no copy may be under way.
        """
        kept = {id(slot.region) for slot in keep} | set(map(id, seen))
        for region in list(self._regions):
            if id(region) not in kept:
                self._regions.discard(region)
                region.give_back()

    def _lock(self, name: str, region: Region) -> None:
        if self._device is not None and not region.is_locked:
            region.is_locked = True
            self._device.lock(name, region)


class Fetch(Protocol):
    """A block on its way to a DEVICE slot."""

    def wait(self) -> None:
        """Blocks until it is there and, on its first read, verified. Raises what the transfer raised."""


class Residence(Protocol):
    """Where a streamed block rests."""

    num_bytes: int

    def fetch(self, slot: Slot) -> Fetch:
        """Starts bringing the block into `slot`. Blocks only where it passes a stage that a device still copies out of,
        or is still being written.
        """


class HostResidence:
    """A block that rests in HOST memory."""

    def __init__(self, slot: Slot, links: Links) -> None:
        self.num_bytes = slot.num_bytes
        self._slot = slot
        self._links = links
        self._copies: deque[Transfer] = deque()
        """Some may be under way: a device is behind, and whoever waits for the fetch waits for it in the device."""

    def fetch(self, slot: Slot) -> Fetch:
        transfer = self._links.copy(self._slot, slot.part(0, self.num_bytes), inward=True)
        if self._links.recorder is None:
            self._copies.clear()  # the last one is over last
        self._copies.append(transfer)
        return _Arrival(self._links, transfer)

    def settle(self) -> None:
        """Blocks until no copy of it is under way, so that its bytes may change. Errors are the fetches' to tell."""
        while self._copies:
            with contextlib.suppress(OffloadError):
                self._links.finish(self._copies.popleft())


class BlockSource(Protocol):
    """What reads blocks from NVMe: a store, or a log."""

    def read(self, block: str, slot: Slot) -> Transfer:
        """Starts reading a whole block into `slot`. Blocks only while it is still being written."""

    def verify(self, block: str, slot: Slot) -> None:
        """Checks a block that has arrived, where waiting for it did not. Raises `StoreCorrupt`."""


class NvmeResidence:
    """A block that rests on NVMe. With `staging`, it lands in HOST first, is verified and copied from there.

    stage_bytes: of a lease of `staging`, at least `num_bytes`: leases that are all alike leave no gaps too small.
    """

    def __init__(
        self,
        store: BlockSource,
        block: str,
        num_bytes: int,
        links: Links,
        staging: Arena | None,
        stage_bytes: int | None = None,
    ) -> None:
        self._stage_bytes = num_bytes if stage_bytes is None else stage_bytes
        self.num_bytes = num_bytes
        self._store = store
        self._block = block
        self._links = links
        self._staging = staging

    def fetch(self, slot: Slot) -> Fetch:
        if self._staging is None:
            return _Arrival(self._links, self._store.read(self._block, slot), self._store, self._block, slot)
        # A device that is behind still copies out of the stage of the block that it is to replace.
        stage = self._staging.acquire(self._stage_bytes, self._block).part(0, self.num_bytes)
        read = self._store.read(self._block, stage)
        copy = self._links.copy(
            stage, slot.part(0, self.num_bytes), after=read, inward=True,
            check=lambda: self._store.verify(self._block, stage),
        )  # fmt: skip
        return _Arrival(self._links, copy)


class _Arrival:
    """Waits for the last transfer of a fetch, then lets the store verify what arrived."""

    def __init__(
        self,
        links: Links,
        transfer: Transfer,
        store: BlockSource | None = None,
        block: str = "",
        slot: Slot | None = None,
    ) -> None:
        self._links = links
        self._transfer = transfer
        self._store = store
        self._block = block
        self._slot = slot

    def wait(self) -> None:
        self._links.wait(self._transfer)
        if self._store is not None and self._slot is not None:
            self._store.verify(self._block, self._slot)
            self._slot = None


class SplitResidence:
    """A block whose bytes come from several places, each to its own range of the slot: (where it begins, its place)."""

    def __init__(self, parts: Sequence[tuple[int, Residence]]) -> None:
        self.num_bytes = sum(residence.num_bytes for _, residence in parts)
        self._parts = tuple(parts)

    def fetch(self, slot: Slot) -> Fetch:
        begun = _Arrivals()
        try:
            for begin_bytes, residence in self._parts:
                begun.fetches.append(residence.fetch(slot.part(begin_bytes, residence.num_bytes)))
        except BaseException:
            with contextlib.suppress(OffloadError):  # the error that is told is the one that stopped it
                begun.wait()
            raise
        return begun


@dataclass
class _Arrivals:
    """Several fetches as one. If some fail, the first error is raised when none is under way any more."""

    fetches: list[Fetch] = field(default_factory=list)

    def wait(self) -> None:
        failure: OffloadError | None = None
        for fetch in self.fetches:
            try:
                fetch.wait()
            except OffloadError as error:
                failure = failure or error
        if failure is not None:
            raise failure
