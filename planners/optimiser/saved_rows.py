"""What blocks save for their backward in the steady program: which share of a tensor's tokens is kept, swapped to
which tier, or computed again.
"""

from __future__ import annotations

from dataclasses import dataclass

from planners.optimiser.program import Terms
from planners.optimiser.rows import BACKWARD, FORWARD, GB, Rows
from planners.plans.activations import Group
from planners.plans.placement import Tier
from planners.problems.cost import ClassCost, held_up_seconds, in_a_chunk, num_chunks
from planners.problems.problem import BlockClass
from planners.shapes.trace import Saved
from planners.simulator.arenas import demands

BEFORE, AFTER = Group.BEFORE.value, Group.AFTER.value


@dataclass(frozen=True)
class _Used:
    """Columns whose sum is how much of a saved tensor's bytes a chunk's buffers have to hold."""

    again: tuple[int, ...]
    swapped: tuple[int, ...]
    on_nvme: tuple[int, ...]


class SavedRows:
    """Adds the variables of one class after the other."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def add(self, entry: BlockClass, cost: ClassCost) -> tuple[tuple[int, int, int, int], ...]:
        """Of each tensor that the class saves, columns of the shares of its tokens: computed again, waiting on NVMe,
        waiting in HOST, kept.
        """
        rows, program = self._rows, self._rows.program
        workload, slots = rows.workload, rows.knobs.buffers.swap_slots
        of_chunk = in_a_chunk(rows.problem, rows.knobs.cuts, workload.seq_len)
        found: list[tuple[int, int, int, int]] = []
        used = []
        slot: Terms = []
        staged: Terms = []
        for j, (saved, seconds) in enumerate(zip(entry.saved, cost.recompute_seconds, strict=True)):
            size = saved.bytes_per_token * workload.pass_tokens
            redo = program.variable(float(saved.recomputable))
            nvme, host, kept = (program.variable(float(ok)) for ok in self._may_wait(saved))
            program.row([(redo, 1.0), (nvme, 1.0), (host, 1.0), (kept, 1.0)], 1.0, 1.0)
            n = entry.count
            rows.work(BACKWARD, "compute", redo, n * seconds)
            rows.redone.append((redo, n * seconds / rows.unit))
            for swapped in (nvme, host):
                rows.work(FORWARD, "device_to_host", swapped, n * size)
                rows.work(BACKWARD, "host_to_device", swapped, n * size)
                if rows.knobs.boundary is Tier.HOST and saved.name == "input":
                    rows.work(FORWARD, "host_to_device", swapped, n * size)
                on_nvme, in_host = float(swapped == nvme), float(swapped == host)
                for phase in (FORWARD, BACKWARD):
                    rows.work(phase, "compute", swapped, n * held_up_seconds(cost, j, phase, on_nvme, in_host))
            rows.work(FORWARD, "ssd_write", nvme, n * size)
            rows.work(BACKWARD, "ssd_read", nvme, n * size)
            used.append(self._used(entry, (redo, nvme, host, kept), saved.recomputable))
            each = saved.bytes_per_token * of_chunk
            if workload.goes_apart(saved):
                rows.largest("device", "layer input in use", [(part, each) for part in used[-1].swapped])
                rows.largest("host", "staging of layer inputs", [(nvme, float(workload.input_staging_bytes or 0))])
            else:
                slot += [(part, each) for part in used[-1].swapped]
                staged += [(part, 2 * slots * each) for part in used[-1].on_nvme]
            rows.hold("device", kept, n * size, passes=True)
            rows.hold("host", host, n * size, passes=True)
            rows.hold("nvme", nvme, n * size)
            if saved.name == AFTER and found:
                # What follows attention may need the graph of what precedes it, see `activations`.
                before = next(own for own, one in zip(found, entry.saved, strict=False) if one.name == BEFORE)
                program.at_most([(before[0], 1.0), (redo, -1.0)], 0.0)
            found.append((redo, nvme, host, kept))
        rows.largest("device", "swap slots", slot, count=slots)
        rows.largest("host", "staging of activations", staged)
        self._hold_chunks(entry, used, of_chunk)
        return tuple(found)

    def _may_wait(self, saved: Saved) -> tuple[bool, bool, bool]:
        """Whether tokens of it may wait on NVMe, in HOST and in DEVICE."""
        rows = self._rows
        free = not saved.recomputable or (rows.freedoms.swaps and rows.problem.capabilities.token_policy)
        on_nvme = bool(rows.hardware.drives) and free and (rows.freedoms.nvme_activations or not saved.recomputable)
        allowed = {Tier.NVME: on_nvme, Tier.HOST: free and not rows.unified, Tier.DEVICE: free}
        if saved.name == "input" and rows.knobs.inputs is not None:
            allowed = {tier: ok and tier is rows.knobs.inputs for tier, ok in allowed.items()}
        return allowed[Tier.NVME], allowed[Tier.HOST], allowed[Tier.DEVICE]

    def _hold_chunks(self, entry: BlockClass, used: list[_Used], of_chunk: float) -> None:
        """DEVICE memory of what a chunk of `of_chunk` tokens computes again, and takes back."""
        rows, workload = self._rows, self._rows.workload
        for demand in demands(rows.problem, rows.knobs, entry):
            # A chunk in a layer may use what is free of its slot; see `arenas`.
            own = rows.most["device", "swap slots"]
            live: Terms = [(own, -GB)] if entry.num_operations > 1 else []
            for j, shares in enumerate(used):
                each = entry.saved[j].bytes_per_token * of_chunk
                in_slot = demand.swapped[j] and entry.num_operations > 1 and not workload.goes_apart(entry.saved[j])
                live += [(part, each) for part in shares.again if demand.again[j]]
                live += [(part, each) for part in shares.swapped if in_slot]
            rows.largest("device", "a chunk", live, demand.fixed_bytes, passes=True)

    def _used(self, entry: BlockClass, columns: tuple[int, int, int, int], recomputable: bool) -> _Used:
        """What a chunk's buffers hold. Where chunks are treated whole, it is all or nothing, and shares count chunks;
        with those relaxed, it is the shares again.
        """
        rows, program = self._rows, self._rows.program
        redo, nvme, host, _ = columns
        if not recomputable or rows.problem.capabilities.token_shares:
            return _Used(again=(redo,), swapped=(nvme, host), on_nvme=(nvme,))
        count = entry.count * num_chunks(rows.problem, rows.knobs.cuts)
        for column in columns:
            program.row([(program.whole_number(count), 1.0), (column, -float(count))], 0.0, 0.0)
        again, swapped, on_nvme = (program.whole_number(1) for _ in range(3))
        for some, shares in ((again, (redo,)), (swapped, (nvme, host)), (on_nvme, (nvme,))):
            program.at_most([*((share, 1.0) for share in shares), (some, -1.0)], 0.0)
        return _Used(again=(again,), swapped=(swapped,), on_nvme=(on_nvme,))
