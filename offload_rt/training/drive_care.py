"""What a run writes to its drives, against what they are rated for and what the user allows a day.

Flash wears by being written: a drive is rated for so many terabytes (TBW). Reading costs nothing. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from offload_rt.errors import ConfigError
from planners.errors import format_bytes

SECONDS_PER_DAY = 86400
MEASURED_STEPS = 4
"""Steps after which a rate is believed. The first one is left out: it warms up."""


@dataclass(frozen=True, kw_only=True)
class DriveCare:
    """Rated endurance of the drives together, and the most that may be written a day. Bytes; None: not given."""

    tbw_bytes: int | None = None
    max_bytes_per_day: int | None = None

    def expectation(self, report: Mapping[str, Any], num_steps: int) -> str | None:
        """What the coming steps will write; None where that is nothing, and nobody asked. `report` is an engine's."""
        per_step = int(report.get("expected_bytes_written_per_step") or 0)
        if not per_step:
            return None if self == DriveCare() else "nothing is written to the drive in a step"
        total = per_step * num_steps
        share = (
            "" if self.tbw_bytes is None else f", {total / self.tbw_bytes:.2%} of the rated {_large(self.tbw_bytes)}"
        )
        return f"{format_bytes(per_step)} a step are written to the drive, {_large(total)} in {num_steps} steps{share}"

    def outcome(self, report: Mapping[str, Any], num_steps: int, seconds: float) -> str | None:
        """What was written, and for how long the drive would stand it; None as in `expectation`."""
        written, per_step = int(report.get("bytes_written") or 0), float(report.get("bytes_written_per_step") or 0)
        if not num_steps or not per_step:
            return None if self == DriveCare() else f"{format_bytes(written)}, nothing of it in steps"
        per_day = per_step * num_steps / max(seconds, 1e-9) * SECONDS_PER_DAY
        text = f"{format_bytes(written)}; {format_bytes(per_step)} a step, {_large(per_day)} a day at this speed"
        if self.tbw_bytes is not None:
            text += f": {self.tbw_bytes / per_day:.0f} days to the rated {_large(self.tbw_bytes)}"
        return text

    def check(self, report: Mapping[str, Any], *, steps_done: int, seconds: float, steps_left: int) -> None:
        """Raises `ConfigError`, saying what would fit, where this run writes more a day than is allowed.

        `seconds` were taken by the `steps_done` steps of this process, the first one left out. A run that ends before
        it has written a day's allowance is within it.
        """
        per_step = float(report.get("bytes_written_per_step") or 0)
        if self.max_bytes_per_day is None or steps_done < MEASURED_STEPS:
            return
        steps_per_day = (steps_done - 1) / max(seconds, 1e-9) * SECONDS_PER_DAY
        per_day = per_step * min(steps_per_day, steps_done + steps_left)
        if per_day > self.max_bytes_per_day:
            raise ConfigError(
                f"max_writes_per_day: {format_bytes(per_step)} a step at {seconds / (steps_done - 1):.2f} s a step are "
                f"{_large(per_day)} a day, allowed are {_large(self.max_bytes_per_day)}. What was done is saved; "
                f"{self._ways_out(report, steps_per_day)}"
            )

    def _ways_out(self, report: Mapping[str, Any], steps_per_day: float) -> str:
        training = report.get("training") or {}
        state, in_memory = int(training.get("state_bytes", 0)), int(training.get("state_in_memory_bytes", 0))
        ways = []
        if state > in_memory:
            every = max(1, math.ceil(state * steps_per_day / (self.max_bytes_per_day or 1)))
            ways.append(
                f"with {format_bytes(state - in_memory)} more of host memory the state stays there and is written only "
                f"where it is saved, and --save-every {every} fits"
            )
            ways.append("--optimizer adamw-8bit has half of the state")
        ways.append("or allow more")
        return "; ".join(ways)


def _large(num_bytes: float) -> str:
    """In decimal units, as drives are sold."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes / 1e3:.3g} kB"
