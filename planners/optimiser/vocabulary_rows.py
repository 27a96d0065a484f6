"""Columns and rows of the steady program for embeddings by rows and a head by tiles, where they are not resident.

Either rests in one tier as a whole, all embeddings that are read by rows in the same: whole numbers, which the
relaxation leaves open. A lookup hides behind nothing: its ids are known when the step begins, and its rows are what
the first layer computes with. A head's tiles are brought twice, behind nothing but its own products, and its logits
computed twice.
"""

from __future__ import annotations

from planners.optimiser.rows import BACKWARD, FORWARD, Rows
from planners.plans.placement import Tier
from planners.plans.vocabulary import Lookups, RowsSize
from planners.problems.cost import class_costs, tiles_again_seconds
from planners.problems.problem import BlockClass

RESTS = (Tier.HOST, Tier.NVME)
"""Where a matrix rests that is not resident."""


class VocabularyRows:
    """Adds them to a program, class by class."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._rest: dict[Tier, int] = {}
        """Whether embeddings that are read by rows rest there."""

    def add(self, entry: BlockClass, size: RowsSize, allowed: list[bool]) -> tuple[int, int, int]:
        """Columns of the shares in DEVICE, where it is resident, in HOST and on NVMe; `allowed` of each."""
        rows, program = self._rows, self._rows.program
        device = program.variable(float(allowed[0]))
        columns = {tier: program.whole_number(int(ok)) for tier, ok in zip(RESTS, allowed[1:], strict=True)}
        program.row([(device, 1.0), *((column, 1.0) for column in columns.values())], 1.0, 1.0)
        rows.hold("device", device, entry.count * entry.stored_bytes)
        for (tier, column), ok in zip(columns.items(), allowed[1:], strict=True):
            if ok:
                rows.hold(tier.value, column, entry.count * entry.stored_bytes)
                self._look_up(entry, size, tier, column, entry.count * entry.stored_bytes)
        return device, columns[Tier.HOST], columns[Tier.NVME]

    def _look_up(self, entry: BlockClass, size: RowsSize, tier: Tier, column: int, table_bytes: int) -> None:
        """What reading a class by rows from `tier` takes, as far as `column` says that it is."""
        rows, program = self._rows, self._rows.program
        if not self._rest:
            self._rest = {rest: program.variable(1.0) for rest in RESTS}
            program.at_most([(rest, 1.0) for rest in self._rest.values()], 1.0)
        program.at_most([(column, 1.0), (self._rest[tier], -1.0)], 0.0)
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
            rows.hold("host", column, lookups.sums_bytes(table_bytes))

    def add_tiles(self, entry: BlockClass, allowed: list[bool]) -> tuple[int, int, int]:
        """The same of a head: columns of its shares in DEVICE, in HOST and on NVMe. Tied, it is read by rows, too."""
        rows, program = self._rows, self._rows.program
        if entry.product is None:
            raise ValueError(f"{entry.name!r}: is no head that goes by tiles")
        costs = class_costs(rows.problem, rows.knobs.cuts, rows.knobs.decode_scope)
        cost = costs[rows.workload.classes.index(entry)]
        if entry.in_tiles:
            allowed = [False, *allowed[1:]]
        elif not rows.freedoms.tiles:
            allowed = [True, False, False]
        device = program.variable(float(allowed[0]))
        places = zip(RESTS, allowed[1:], strict=True)
        found = [rows.workload.tiles_of(entry, tier) if ok else None for tier, ok in places]
        columns = [program.whole_number(int(tiles is not None)) for tiles in found]
        program.row([(column, 1.0) for column in (device, *columns)], 1.0, 1.0)
        beside = entry.beside_product_bytes
        streamed = entry.stored_bytes - beside
        rows.hold("device", device, entry.stored_bytes)
        for tier, column, tiles in zip(RESTS, columns, found, strict=True):
            if tiles is None:  # pages from NVMe may take more room than the matrix
                continue
            if (size := rows.workload.looked_up_of(entry)) is not None:
                self._look_up(entry, size, tier, column, streamed)
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
