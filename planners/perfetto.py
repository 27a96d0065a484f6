"""A timeline in Chrome's trace format, which Perfetto reads: the same rows for a planned step and a measured one.

Slices of one row that overlap without one lying in the other are drawn in lanes below each other: so many reads are
under way at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

ROWS = {
    "compute": "compute", "host_to_device": "host → device", "device_to_host": "device → host",
    "ssd_read": "SSD read", "ssd_write": "SSD write", "cpu": "CPU", "device_update": "update (device)",
}  # fmt: skip
"""By resource, as it is shown, in this order."""
_LANES = 1000
"""Of a row, at most: numbers of the next row's begin there."""
_TICKS = 8_000_000
"""In a second. Times are whole eighths of a microsecond, which binary fractions hold exactly: Perfetto leaves out a
slice that begins in another and ends behind it, if only by the nanosecond that a reader's rounding makes.
"""


@dataclass(frozen=True, slots=True)
class Slice:
    """Something that took its time on a row."""

    row: str
    name: str
    category: str
    """What slices of one colour share."""
    begin_seconds: float
    end_seconds: float
    args: Mapping[str, Any] = field(default_factory=dict)
    """What is shown of it when it is clicked on."""


def chrome_trace(
    process: str,
    process_number: int,
    rows: Mapping[str, str],
    slices: Iterable[Slice],
    counters: Mapping[str, Sequence[tuple[float, float]]] | None = None,
) -> str:
    """The JSON of one timeline. `rows` by name, as they are shown, in their order; `counters` by their name, of (time,
    bytes). Times in seconds. Events of two timelines with different numbers may be put into one file.
    """
    numbers = {row: index * _LANES for index, row in enumerate(rows)}
    events: list[dict[str, Any]] = [_meta(process_number, 0, "process_name", name=process)]
    lanes: dict[str, list[list[int]]] = {row: [[]] for row in rows}
    drawn = []
    timed = [(round(each.begin_seconds * _TICKS), round(each.end_seconds * _TICKS), each) for each in slices]
    for begin, end, each in sorted(timed, key=lambda one: (one[0], -one[1])):
        event: dict[str, Any] = {
            "ph": "X", "pid": process_number, "tid": numbers[each.row] + _lane(lanes[each.row], begin, end),
            "name": each.name, "cat": each.category, "ts": begin * 1e6 / _TICKS, "dur": (end - begin) * 1e6 / _TICKS,
            "args": dict(each.args),
        }  # fmt: skip
        drawn.append(event)
    for row, shown in rows.items():
        for lane in range(len(lanes[row])):
            number = numbers[row] + lane
            events.append(_meta(process_number, number, "thread_name", name=f"{shown} {lane + 1}" if lane else shown))
            events.append(_meta(process_number, number, "thread_sort_index", sort_index=number))
    for counter, points in (counters or {}).items():
        events += [
            {"ph": "C", "pid": process_number, "name": counter, "ts": at * 1e6, "args": {"bytes": size}}
            for at, size in points
        ]
    return json.dumps({"traceEvents": events + drawn, "displayTimeUnit": "ms"})


def _lane(lanes: list[list[int]], begin: int, end: int) -> int:
    """The first lane in which nothing is open, or in which a slice from `begin` to `end` lies in what is; lanes are the
    ends of what is open. The last one takes what is left.
    """
    for lane, open_ends in enumerate(lanes):
        while open_ends and open_ends[-1] <= begin:
            open_ends.pop()
        if not open_ends or end <= open_ends[-1] or lane == _LANES - 1:
            open_ends.append(end)
            return lane
    lanes.append([end])
    return len(lanes) - 1


def _meta(process_number: int, thread_number: int, what: str, **args: Any) -> dict[str, Any]:
    return {"ph": "M", "pid": process_number, "tid": thread_number, "name": what, "args": args}
