"""Columns and rows of the steady program for embeddings by rows and a head by tiles, where they are not resident.

Either rests in one tier as a whole, all embeddings that are read by rows in the same: whole numbers, which the
relaxation leaves open. A lookup hides behind nothing: its ids are known when the step begins, and its rows are what
the first layer computes with. A head's tiles are brought twice, behind nothing but its own products, and its logits
computed twice.
"""

from __future__ import annotations

from planners.cost import class_costs, tiles_again_seconds
from planners.placement import Tier
from planners.problem import BlockClass
from planners.rows import BACKWARD, FORWARD, Rows
from planners.vocabulary import Lookups, RowsSize


class VocabularyRows:
    """Adds them to a program, class by class."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._rest: dict[Tier, int] = {}
        """Whether embeddings that are read by rows rest there."""

    def add(self, entry: BlockClass, size: RowsSize, allowed: list[bool]) -> tuple[int, int, int]:
        """Columns of the shares in DEVICE, where it is resident, in HOST and on NVMe; `allowed` of each."""
        rows, program = self._rows, self._rows.program
        if not self._rest:
            self._rest = {tier: program.variable(0.0, 1.0) for tier in (Tier.HOST, Tier.NVME)}
            program.at_most([(column, 1.0) for column in self._rest.values()], 1.0)
        device = program.variable(0.0, float(allowed[0]))
        columns = {tier: program.whole_number(int(ok)) for tier, ok in zip(self._rest, allowed[1:], strict=True)}
        program.row([(device, 1.0), *((column, 1.0) for column in columns.values())], 1.0, 1.0)
        rows.hold("device", device, entry.count * entry.stored_bytes)
        for (tier, column), ok in zip(columns.items(), allowed[1:], strict=True):
            if not ok:
                continue
            program.at_most([(column, 1.0), (self._rest[tier], -1.0)], 0.0)
            rows.hold(tier.value, column, entry.count * entry.stored_bytes)
            rows.work(FORWARD, "host_to_device", column, entry.count * size.looked_up_bytes)
            link = 0.0 if rows.unified else size.looked_up_bytes / rows.rate["host_to_device"]
            drive = size.read_bytes / rows.rate["ssd_read"] if tier is Tier.NVME else 0.0
            rows.wait(FORWARD, "rows", [(column, entry.count * (link + drive) / rows.unit)])
            lookups = Lookups.of(dict.fromkeys(entry.blocks, size), tier)
            rows.largest("device", "rows of embeddings", [(column, lookups.room_bytes)])
            if not rows.unified:
                rows.largest("host", "rows on their way", [(column, lookups.room_bytes)])
            if tier is Tier.NVME:
                rows.work(FORWARD, "ssd_read", column, entry.count * size.read_bytes)
                rows.largest("host", "pages of embeddings", [(column, lookups.staging_bytes(unified=True))])
                rows.hold("host", column, lookups.sums_bytes(entry.count * entry.stored_bytes))
        return device, columns[Tier.HOST], columns[Tier.NVME]

    def add_tiles(self, entry: BlockClass, allowed: list[bool]) -> tuple[int, int, int]:
        """The same of a head: columns of its shares in DEVICE, in HOST and on NVMe."""
        rows, program = self._rows, self._rows.program
        if entry.product is None:
            raise ValueError(f"{entry.name!r}: is no head that goes by tiles")
        costs = class_costs(rows.problem, rows.knobs.cuts, rows.knobs.decode_scope)
        cost = costs[rows.workload.classes.index(entry)]
        if entry.in_tiles:
            allowed = [False, *allowed[1:]]
        elif not rows.freedoms.tiles:
            allowed = [True, False, False]
        device = program.variable(0.0, float(allowed[0]))
        columns = [program.whole_number(int(ok)) for ok in allowed[1:]]
        program.row([(column, 1.0) for column in (device, *columns)], 1.0, 1.0)
        beside = entry.beside_product_bytes
        streamed = entry.stored_bytes - beside
        rows.hold("device", device, entry.stored_bytes)
        for tier, column, ok in zip((Tier.HOST, Tier.NVME), columns, allowed[1:], strict=True):
            tiles = rows.workload.tiles_of(entry, tier)
            if not ok or tiles is None:
                continue
            rows.hold(tier.value, column, streamed)
            rows.hold("device", column, beside + tiles.slots_bytes + tiles.product_bytes)
            if tier is Tier.NVME and not rows.unified:
                rows.hold("host", column, tiles.slots_bytes)
            again = tiles_again_seconds(rows.problem, entry)
            link = 0.0 if rows.unified else streamed / rows.rate["host_to_device"]
            drive = streamed / rows.rate["ssd_read"] if tier is Tier.NVME else 0.0
            for phase, own in ((FORWARD, cost.forward_seconds), (BACKWARD, cost.backward_seconds + again)):
                rows.work(phase, "host_to_device", column, streamed)
                if tier is Tier.NVME:
                    rows.work(phase, "ssd_read", column, streamed)
                rows.wait(phase, "tiles", [(column, max(0.0, max(link, drive) - own) / rows.unit)])
            rows.work(BACKWARD, "compute", column, again)
            rows.redone.append((column, again / rows.unit))
        return device, columns[0], columns[1]
