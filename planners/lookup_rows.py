"""Columns and rows of the steady program for embeddings that are read by rows where they are not resident.

Such an embedding rests in one tier as a whole, all of them that are read by rows in the same: whole numbers, which the
relaxation leaves open. A lookup hides behind nothing: its ids are known when the step begins, and its rows are what
the first layer computes with.
"""

from __future__ import annotations

from planners.placement import Tier
from planners.problem import BlockClass
from planners.rows import FORWARD, Rows
from planners.vocabulary import Lookups, RowsSize


class LookupRows:
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
