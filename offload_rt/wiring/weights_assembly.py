"""Brings weights to where the plan says they rest, and makes the rings that they stream through.

A block rests whole in DEVICE, HOST or NVME, or by byte ranges in several of them:

    [0, device) stays in DEVICE   [device, + host) is copied from HOST   [.., + nvme) is read from NVME
                                  |------------- one slot of the ring, `streamed_bytes` ---------------|

Ranges are whole pages, and what streams begins with a tensor: see `BlockSpec.cuts_bytes`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from offload_rt.checkpoint.ingest import block_pieces, fill_slot
from offload_rt.errors import ConfigError
from offload_rt.layers.access import Access, LookupAccess, PartedAccess, ResidentAccess, RingAccess
from offload_rt.layers.discover import BlockDraft
from offload_rt.layers.executor import RingExecutor
from offload_rt.memory.arena import Arena, Slot
from offload_rt.optimizer.parted_weights import PartedWeights
from offload_rt.storage.store import STAGING_BYTES, Store
from offload_rt.storage.store_part import StorePart
from offload_rt.tensor_spec import IO_ALIGNMENT_BYTES, align_up
from offload_rt.tiering.resting import Resting, all_in, split_of
from offload_rt.tiering.rows import HostRows, PageSums, RowReader, RowSource, StoredRows
from offload_rt.tiering.tiers import HostResidence, NvmeResidence, Residence, SplitResidence, Tiers
from offload_rt.transfers.links import Links
from offload_rt.transfers.recording import Recorder
from offload_rt.wiring.state_assembly import StateAssembly
from offload_rt.wiring.workload import Workload
from planners.plans.plan import Plan, Ring, Split, Tier
from planners.plans.vocabulary import PAGE_SLOTS, HeadTiles, Lookups


@dataclass
class _InPieces:
    """A block that is read by rows, by tiles, or, where embedding and head are tied, by both."""

    draft: BlockDraft
    slot: Slot | None
    """All of it, in HOST; None where it rests on NVMe."""
    parts: list[StorePart | PageSums]
    """What is to see all of it once."""


class WeightsAssembly:
    """One engine's weights on their way to where they rest."""

    def __init__(
        self,
        workload: Workload,
        plan: Plan,
        tiers: Tiers,
        links: Links,
        store: Store | None,
        state: StateAssembly | None,
        recorder: Recorder | None,
        *,
        device_is_asynchronous: bool,
        left: Resting | None,
    ) -> None:
        """`left`: slots with frozen weights, which the runtime before has handed over; None: they are brought. Weights
        that train are made of their masters then.
        """
        self.resting: Resting = {}
        """What whoever follows can take over: the only copy there is."""
        self._left = left
        self._workload = workload
        self._plan = plan
        self._tiers = tiers
        self._links = links
        self._store = store
        self._state = state
        self._recorder = recorder
        self._device_is_asynchronous = device_is_asynchronous
        self._in_pieces: dict[str, _InPieces] = {}

    def resident(self) -> dict[str, Access]:
        """Brings the blocks that stay as a whole into DEVICE memory: piece by piece, where a device copies them."""
        accesses: dict[str, Access] = {}
        names = self._plan.resident
        if not names:
            return accesses
        sizes = {name: self._workload.draft(name).spec.stored_bytes for name in names}
        slots = self._places(Tier.DEVICE, "resident blocks", sizes)
        for name in names:
            draft = self._workload.draft(name)
            slot = slots[name]
            if self._device_is_asynchronous:
                if not self._is_made_of_masters(draft):
                    self._bring(draft, all_in(Tier.DEVICE, slot.num_bytes), slot, None)
            elif self._store is not None and not draft.trains:
                NvmeResidence(self._store, name, slot.num_bytes, self._links, None).fetch(slot).wait()
            else:
                self._fill(draft, slot)
            if self._state is not None and draft.trains:
                self._state.weights_rest_in(name, slot)
            accesses[name] = ResidentAccess(slot)
        return accesses

    def _fill(self, draft: BlockDraft, slot: Slot) -> None:
        """Brings a block's values into `slot`, unless they are there, or made of masters, of a run that goes on."""
        if self._left is None and not self._is_made_of_masters(draft):
            fill_slot(draft, self._workload.sources, slot)

    def _is_made_of_masters(self, draft: BlockDraft) -> bool:
        return draft.trains and self._state is not None and self._state.goes_on

    def ring(self, ring: Ring) -> tuple[RingExecutor, dict[str, Access]]:
        """Slots for a ring, what its blocks rest in, and how to get at them."""
        arena = self._tiers.arena(Tier.DEVICE, f"ring of {ring.name}", ring.device_bytes)
        drafts = [self._workload.draft(name) for name in ring.blocks]
        splits = [split_of(self._plan, draft.name, ring.rest, draft.spec.stored_bytes) for draft in drafts]
        staging = self._staging(ring, splits)
        in_host = self._places(
            Tier.HOST, "weights", {draft.name: split.host_bytes for draft, split in zip(drafts, splits, strict=True)}
        )
        in_device = self._places(
            Tier.DEVICE, f"what stays of {ring.name}",
            {d.name: d.spec.first_streamed_bytes(split.device_bytes) for d, split in zip(drafts, splits, strict=True)},
        )  # fmt: skip
        residents: list[Slot | None] = []
        residences: list[Residence] = []
        for draft, split in zip(drafts, splits, strict=True):
            resident, host = in_device.get(draft.name), in_host.get(draft.name)
            residents.append(resident)
            residences.append(self._residence(ring, draft, split, resident, host, staging))
        executor = RingExecutor(
            ring, residences, arena, backward=self._visited_in_backward(ring), recorder=self._recorder
        )
        accesses: dict[str, Access] = {}
        for index, (draft, split, resident) in enumerate(zip(drafts, splits, residents, strict=True)):
            streamed = RingAccess(executor, index)
            accesses[draft.name] = (
                streamed if resident is None else PartedAccess(resident, streamed, split.device_bytes)
            )
        return executor, accesses

    def lookups(self, lookups: Lookups) -> tuple[RowReader, dict[str, RowSource]]:
        """Rooms for rows of embeddings, and where these rest; see `bring_what_is_in_pieces`."""
        table = self._tiers.arena(Tier.DEVICE, "rows of embeddings", lookups.room_bytes)
        staging = None
        if not self._tiers.unified:
            staging = self._tiers.arena(Tier.HOST, "rows on their way", lookups.room_bytes)
        found = [self._taken_in_pieces(name, lookups.rest) for name in lookups.blocks]
        pages = None
        if lookups.rest is Tier.NVME:
            pages = self._tiers.arena(Tier.HOST, "pages of embeddings", PAGE_SLOTS * lookups.pages_bytes)
            num_bytes = sum(each.draft.spec.stored_bytes for each in found)
            self._tiers.account(Tier.HOST).reserve("checksums of pages", lookups.sums_bytes(num_bytes))
        sources: dict[str, RowSource] = {}
        for each in found:
            name, spec = each.draft.name, each.draft.spec
            if each.slot is not None:
                sources[name] = HostRows(spec.tensors[0], each.slot)
            elif pages is not None:
                store = self._open_store("lookups")
                sums = PageSums(store, name, spec.stored_bytes)
                each.parts.append(sums)
                sources[name] = StoredRows(spec.tensors[0], name, store, sums, pages, self._links)
        return RowReader(table, staging, self._links), sources

    def head_tiles(self, tiles: HeadTiles) -> tuple[RingExecutor, list[tuple[int, int]]]:
        """A ring for the tiles of a head, and their rows [begin, end) in its order; see `bring_what_is_in_pieces`."""
        taken = self._taken_in_pieces(tiles.block, tiles.rest)
        draft = taken.draft
        (spec,), stored_bytes = draft.spec.tensors, draft.spec.stored_bytes
        num_rows = spec.shape[0]
        rows = [(begin, min(begin + tiles.tile_rows, num_rows)) for begin in range(0, num_rows, tiles.tile_rows)]
        starts = [number * tiles.tile_bytes for number in range(len(rows))]
        sizes = [min(tiles.tile_bytes, stored_bytes - start) for start in starts]
        self._tiers.account(Tier.DEVICE).reserve("products by tiles", tiles.product_bytes)
        arena = self._tiers.arena(Tier.DEVICE, "tiles of the head", tiles.slots_bytes)
        residences: list[Residence]
        if taken.slot is None:
            store = self._open_store("tiles of the head")
            staging = None
            if not self._tiers.unified:
                staging = self._tiers.arena(Tier.HOST, "staging for tiles of the head", tiles.slots_bytes)
            parts = [StorePart(store, draft.name, start, size) for start, size in zip(starts, sizes, strict=True)]
            taken.parts += parts
            residences = [
                NvmeResidence(part, draft.name, part.num_bytes, self._links, staging, tiles.tile_bytes)
                for part in parts
            ]
        else:
            residences = [
                HostResidence(taken.slot.part(start, size), self._links)
                for start, size in zip(starts, sizes, strict=True)
            ]
        ring = Ring(
            name="tiles", blocks=tuple(f"{draft.name}[{begin}:{end}]" for begin, end in rows),
            num_slots=tiles.num_slots, slot_bytes=tiles.tile_bytes, rest=tiles.rest,
        )  # fmt: skip
        executor = RingExecutor(ring, residences, arena, recorder=self._recorder)
        return executor, rows

    def _taken_in_pieces(self, name: str, rest: Tier) -> _InPieces:
        """The block that rests whole in `rest`, the same for lookups and for tiles."""
        if name not in self._in_pieces:
            draft = self._workload.draft(name)
            slot = None
            if rest is Tier.HOST:
                slot = self._places(Tier.HOST, "weights", {name: draft.spec.stored_bytes})[name]
            self._in_pieces[name] = _InPieces(draft, slot, [])
        return self._in_pieces[name]

    def bring_what_is_in_pieces(self) -> dict[str, Access]:
        """Brings what is read by rows and tiles to where it rests, once; how to get at each block whole. Blocks."""
        accesses: dict[str, Access] = {}
        for name, each in self._in_pieces.items():
            num_bytes, rest = each.draft.spec.stored_bytes, Tier.NVME if each.slot is None else Tier.HOST
            self._bring(each.draft, all_in(rest, num_bytes), None, each.slot, *each.parts)
            residence: Residence
            if each.slot is None:
                residence = NvmeResidence(self._open_store("rows and tiles"), name, num_bytes, self._links, None)
            else:
                residence = HostResidence(each.slot, self._links)
            accesses[name] = LookupAccess(residence, each.slot, self._tiers.account(Tier.HOST), name)
        return accesses

    def _staging(self, ring: Ring, splits: Sequence[Split]) -> Arena | None:
        """Where in HOST what comes from NVME lands, if it does not land where it is used."""
        largest = max(split.nvme_bytes for split in splits)
        if self._tiers.unified or not largest:
            return None
        slots = ring.num_slots
        if self._plan.classes and ring.name == "layers":
            slots = self._plan.buffers.host_slots
        return self._tiers.arena(Tier.HOST, f"staging for {ring.name}", slots * align_up(largest, IO_ALIGNMENT_BYTES))

    def _places(self, tier: Tier, name: str, sizes: Mapping[str, int]) -> dict[str, Slot]:
        """A slot for what of each block rests in `tier`, by its name; none for nothing. What was left has its bytes."""
        wanted = {block: num_bytes for block, num_bytes in sizes.items() if num_bytes}
        if not wanted:
            return {}
        kept = {block for block in wanted if self._store is None and not self._workload.draft(block).trains}
        slots: dict[str, Slot] = {}
        if self._left is not None:
            slots = {block: self._left[block, tier] for block in kept}
            self._tiers.take_over(tier, name, list(slots.values()))
        for block in (block for block in wanted if block in kept - slots.keys()):
            # An arena of its own: all of it stays where it is handed over, all of it goes where the block moves.
            arena = self._tiers.arena(tier, f"{name}: {block}", wanted[block], booked_for=name)
            slots[block] = arena.acquire(wanted[block], block)
        if others := [block for block in wanted if block not in kept]:
            of = f"{name}, not handed over" if kept else name
            arena = self._tiers.arena(tier, of, sum(align_up(wanted[each], IO_ALIGNMENT_BYTES) for each in others))
            slots |= {each: arena.acquire(wanted[each], each) for each in others}
        self.resting |= {(block, tier): slots[block] for block in kept}
        return slots

    def _residence(
        self,
        ring: Ring,
        draft: BlockDraft,
        split: Split,
        resident: Slot | None,
        host: Slot | None,
        staging: Arena | None,
    ) -> Residence:
        whole = draft.spec.stored_bytes
        if split.nvme_bytes == whole:
            return self._on_nvme(ring, draft, staging)
        if host is not None and split.host_bytes == whole:
            if self._store is not None and not draft.trains:
                self._bring(draft, split, None, host)
            else:
                self._fill(draft, host)
            residence = HostResidence(host, self._links)
            if self._state is not None and draft.trains:
                self._state.weights_rest_in(draft.name, host, residence.settle)
            return residence
        if self._state is not None and draft.trains:
            return self._trained_parts(self._state, draft, split, resident, host, staging)
        part = None
        if split.nvme_bytes:
            part = StorePart(
                self._open_store(f"ring {ring.name!r}"), draft.name, whole - split.nvme_bytes, split.nvme_bytes
            )
        self._bring(draft, split, resident, host, *([] if part is None else [part]))
        parts: list[tuple[int, Residence]] = []
        if host is not None:
            parts.append((0, HostResidence(host, self._links)))
        if part is not None:
            parts.append((split.host_bytes, NvmeResidence(part, draft.name, part.num_bytes, self._links, staging)))
        return SplitResidence(parts)

    def _trained_parts(
        self,
        state: StateAssembly,
        draft: BlockDraft,
        split: Split,
        resident: Slot | None,
        host: Slot | None,
        staging: Arena | None,
    ) -> Residence:
        """What of a block that trains streams; what of it is in memory has its values, the log's part gets them."""
        if not state.goes_on:  # otherwise they are made of masters
            self._bring(draft, split, resident, host)
        parts: list[tuple[int, Residence]] = []
        in_host = None if host is None else HostResidence(host, self._links)
        if in_host is not None:
            parts.append((0, in_host))
        if split.nvme_bytes:
            residence = state.residence(draft, staging, split.device_bytes + split.host_bytes)
            parts.append((split.host_bytes, residence))
        settle = in_host.settle if in_host is not None else lambda: None
        state.weights_rest_in_parts(draft.name, PartedWeights(split, resident, host, settle))
        return SplitResidence(parts)

    def _on_nvme(self, ring: Ring, draft: BlockDraft, staging: Arena | None) -> Residence:
        if self._state is not None and draft.trains:
            return self._state.residence(draft, staging)
        return NvmeResidence(
            self._open_store(f"ring {ring.name!r}"), draft.name, draft.spec.stored_bytes, self._links, staging
        )

    def _open_store(self, user: str) -> Store:
        if self._store is None:
            raise ConfigError(f"plan: {user} rests on NVME, but nvme= gives no folder")
        return self._store

    def _pieces(self, draft: BlockDraft) -> Iterator[tuple[int, Slot]]:
        """The bytes of a block in order, in HOST: (offset in the block, a piece valid until the next one).

        Of a frozen one from the store where there is one, which verifies them; otherwise encoded once more. Blocks.
        """
        # Two pieces: whoever asked for one has it while the next is made.
        page = IO_ALIGNMENT_BYTES
        staging = Arena("pieces of weights", min(STAGING_BYTES, 2 * align_up(max(1, draft.spec.stored_bytes), page)))
        if self._store is not None and not draft.trains:
            yield from self._store.slabs(draft.name, staging)
            return
        for offset_bytes, tensor in block_pieces(draft, self._workload.sources):
            data = tensor.detach().reshape(-1).view(torch.uint8)
            most = staging.num_bytes // 2
            for begin in range(0, data.numel(), most):
                piece = staging.acquire(min(most, data.numel() - begin), draft.name)
                piece.tensor(torch.uint8, (piece.num_bytes,)).copy_(data[begin : begin + piece.num_bytes])
                yield offset_bytes + begin, piece
                del piece

    def _bring(
        self,
        draft: BlockDraft,
        split: Split,
        resident: Slot | None,
        host: Slot | None,
        *parts: StorePart | PageSums,
    ) -> None:
        """Puts what of the block rests in memory there, and shows all of it to `parts`. Blocks."""
        if self._left is not None:
            return
        for offset_bytes, piece in self._pieces(draft):
            for begin_bytes, place in ((0, resident), (split.device_bytes, host)):
                if place is not None:
                    self._copy(offset_bytes, piece, begin_bytes, place)
            for part in parts:
                part.see(offset_bytes, piece)

    def _copy(self, offset_bytes: int, piece: Slot, begin_bytes: int, place: Slot) -> None:
        """Puts what of `piece` belongs to `place`, which holds the block from `begin_bytes` on, there. Blocks."""
        first = max(offset_bytes, begin_bytes)
        last = min(offset_bytes + piece.num_bytes, begin_bytes + place.num_bytes)
        if first >= last:
            return
        source, target = piece.part(first - offset_bytes, last - first), place.part(first - begin_bytes, last - first)
        if target.on_device:
            copy = self._links.copy(source, target)
            self._links.wait(copy)  # whoever computes is behind it
            self._links.finish(copy)  # and the piece's memory may be the next one's
        else:
            target.tensor(torch.uint8, (last - first,)).copy_(source.tensor(torch.uint8, (last - first,)))

    def _visited_in_backward(self, ring: Ring) -> frozenset[int]:
        """The hint for the ring's schedule: layers from the first one that trains on; the head, if anything."""
        modules = [self._workload.draft(name).modules for name in ring.blocks]
        if ring.name == "layers":
            training = (
                index
                for index, owners in enumerate(modules)
                if any(p.requires_grad for module in owners for p in module.parameters())
            )
            return frozenset(range(next(training, 0), len(modules)))
        if self._plan.head_chunk_tokens is not None:
            return frozenset()  # the gradients of tiles are taken in forward
        return frozenset(i for i, owners in enumerate(modules) if any(isinstance(m, nn.Linear) for m in owners))
