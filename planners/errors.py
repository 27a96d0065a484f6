"""Why no plan could be made. Infeasible is a finding about the machine; it is not a malformed question."""

from __future__ import annotations


class PlanInfeasible(Exception):
    """No plan fits the budgets. Says what is short, by how much, in which phase, and what would fit."""

    def __init__(
        self,
        *,
        tier: str,
        phase: str,
        need_bytes: int,
        have_bytes: int,
        ways_out: list[str],
        needs: dict[str, int] | None = None,
    ) -> None:
        self.tier = tier
        self.needs = needs if needs is not None else {tier: need_bytes}
        """Bytes that every tier which is short would have to hold."""
        self.phase = phase
        self.need_bytes = need_bytes
        self.have_bytes = have_bytes
        self.ways_out = ways_out
        options = "; ".join(ways_out) if ways_out else "none found"
        super().__init__(
            f"needs {format_bytes(need_bytes)} of {tier} memory at its peak ({phase}), "
            f"{format_bytes(have_bytes)} allowed, short by {format_bytes(need_bytes - have_bytes)}. "
            f"What would fit: {options}"
        )


def format_bytes_up(num_bytes: int) -> str:
    """As `format_bytes`, but never less than `num_bytes`, so that it can be passed on as a budget."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{-(-num_bytes * 1000 // size) / 1000:g} {unit}"
    return f"{num_bytes} B"


def format_bytes(num_bytes: float) -> str:
    """`num_bytes` for a reader: binary units, three significant digits."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(num_bytes) >= size:
            return f"{num_bytes / size:.4g} {unit}"
    return f"{num_bytes:.0f} B"
