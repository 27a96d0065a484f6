"""Offsets in one arena for buffers whose lifetimes are known: dynamic storage allocation.

    offset ▲      ┌───────┐
           │  ┌───┤   c   ├───┐            a: [0, 5)   b: [1, 4)   c: [2, 3)
           │  │ b └───────┘ b │
           │──┴───────────────┴──
           │          a
           └──0───1───2───3───4───► tick

A tick is an operation of the schedule, not a time: an offset that is right in the schedule's order is right however
long operations take. All intervals are half-open. An arena is *periodic*: what lives beyond its last tick lives on
from the first one of the next round, at the same offset.

No layout needs less than the most that is live at a tick. Buffers are placed one by one, each as low as those already
placed let it; some order of placing gives an optimum. A few fixed orders are tried, then the best is changed at random
until the bound is reached or `attempts` are spent. Deterministic. Solving this problem for one transformer layer, and
treating the layer's arena as one request of the whole step, is MEMO's bi-level planning (arXiv 2407.12117).

An arena may begin with a *slot*: bytes that are not next to the rest in memory, because other rounds have another slot
there. What has to be in the slot is stacked in it; everything else lies within the slot or behind it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from planners.plans.placement import Tier

ALIGNMENT_BYTES = 512
ATTEMPTS = 100
"""Random changes of the order. Whole layers reach the bound without any (docs/planner.md)."""


@dataclass(frozen=True, kw_only=True)
class Buffer:
    """Bytes that are live in ticks `[begin, end)` and lie at `[offset_bytes, offset_bytes + num_bytes)`."""

    name: str
    num_bytes: int
    begin: int
    end: int
    """Beyond the period: it lives on into the next round, for less than a whole one."""
    offset_bytes: int = 0

    @property
    def end_bytes(self) -> int:
        return self.offset_bytes + self.num_bytes


@dataclass(frozen=True, kw_only=True)
class Arena:
    """One region of a tier, and what lies where in it."""

    name: str
    tier: Tier
    num_bytes: int
    period: int
    """Ticks of a round."""
    buffers: tuple[Buffer, ...]
    slot_bytes: int = 0
    """The first bytes are a slot; no buffer lies across its end."""

    def __post_init__(self) -> None:
        for buffer in self.buffers:
            check_lifetime(buffer, self.period)


def check_lifetime(buffer: Buffer, period: int) -> None:
    """ValueError for a lifetime that no round of `period` ticks can have."""
    if not 0 <= buffer.begin < buffer.end <= buffer.begin + period or buffer.begin >= period:
        raise ValueError(
            f"layout: {buffer.name!r} lives in [{buffer.begin}, {buffer.end}), which is no lifetime in a round of "
            f"{period} ticks; a longer one needs more rounds laid out together"
        )
    if buffer.num_bytes < 0 or buffer.offset_bytes < 0:
        raise ValueError(f"layout: {buffer.name!r}: {buffer.num_bytes} bytes at offset {buffer.offset_bytes}")


def live_bytes(buffers: Sequence[Buffer], period: int) -> list[int]:
    """Bytes that are live at each tick of a round."""
    change = [0] * (period + 1)
    for buffer in buffers:
        for begin, end in _segments(buffer, period):
            change[begin] += buffer.num_bytes
            change[end] -= buffer.num_bytes
    live, now = [], 0
    for tick in range(period):
        now += change[tick]
        live.append(now)
    return live


def lay_out(
    name: str,
    tier: Tier,
    buffers: Sequence[Buffer],
    period: int,
    *,
    in_slot: Sequence[Buffer] = (),
    slot_bytes: int = 0,
    enough_bytes: int = 0,
    attempts: int = ATTEMPTS,
) -> Arena:
    """An arena for `buffers`, whose sizes are rounded up to `ALIGNMENT_BYTES`; empty ones are left out.

    What is `in_slot` is stacked there in order. An arena of `enough_bytes` is not improved further. Raises `ValueError`
    for a lifetime that does not fit a round, and for a slot that is too small. Blocks for milliseconds; see `attempts`.
    """
    stacked: list[Buffer] = []
    for buffer in _aligned(in_slot):
        stacked.append(replace(buffer, offset_bytes=stacked[-1].end_bytes if stacked else 0))
    if stacked and stacked[-1].end_bytes > slot_bytes:
        raise ValueError(f"layout: {name!r} needs a slot of {stacked[-1].end_bytes} bytes, it has {slot_bytes}")
    free = _aligned(buffers)
    for buffer in (*stacked, *free):
        check_lifetime(buffer, period)
    requests = tuple((buffer.num_bytes, buffer.begin, buffer.end) for buffer in free)
    offsets = _offsets(requests, tuple(stacked), slot_bytes, period, enough_bytes, attempts)
    placed = tuple(replace(buffer, offset_bytes=offset) for buffer, offset in zip(free, offsets, strict=True))
    num_bytes = max((buffer.end_bytes for buffer in (*stacked, *placed)), default=0)
    return Arena(
        name=name, tier=tier, num_bytes=max(num_bytes, slot_bytes), period=period, buffers=(*stacked, *placed),
        slot_bytes=slot_bytes,
    )  # fmt: skip


def _aligned(buffers: Sequence[Buffer]) -> tuple[Buffer, ...]:
    return tuple(replace(buffer, num_bytes=aligned(buffer.num_bytes)) for buffer in buffers if buffer.num_bytes)


def aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


Request = tuple[int, int, int]
"""Bytes, begin, end."""
_ORDERS: tuple[Callable[[Request], tuple[int, ...]], ...] = (
    lambda r: (r[1] - r[2], -r[0]),  # the longest-lived first: a stack
    lambda r: (-r[0], r[1] - r[2]),  # the largest first
    lambda r: (-r[0] * (r[2] - r[1]),),
    lambda r: (r[1], -r[0]),  # as they come
)


@lru_cache(maxsize=512)
def _offsets(
    requests: tuple[Request, ...],
    stacked: tuple[Buffer, ...],
    slot_bytes: int,
    period: int,
    enough_bytes: int,
    attempts: int,
) -> tuple[int, ...]:
    buffers = [Buffer(name="", num_bytes=size, begin=begin, end=end) for size, begin, end in requests]
    enough = max([enough_bytes, slot_bytes, *live_bytes([*buffers, *stacked], period)])
    sizes = [size for size, _, _ in requests]
    meets = _meetings([*buffers, *stacked], period)
    # Nothing lies across the end of the slot: an interval of no length that is always taken.
    wall = [(slot_bytes, slot_bytes)] if slot_bytes else []
    taken = [
        wall
        + [(stacked[j - len(sizes)].offset_bytes, stacked[j - len(sizes)].end_bytes) for j in own if j >= len(sizes)]
        for own in meets[: len(sizes)]
    ]
    meets = [[j for j in own if j < len(sizes)] for own in meets[: len(sizes)]]

    def height(offsets: list[int]) -> int:
        return max([slot_bytes, *(offset + size for size, offset in zip(sizes, offsets, strict=True))])

    best: list[int] = []
    best_top, order = -1, list[int]()
    for key in _ORDERS:
        trial = sorted(range(len(requests)), key=lambda i: (key(requests[i]), i))
        offsets = place(sizes, meets, taken, trial)
        if best_top < 0 or height(offsets) < best_top:
            best, best_top, order = offsets, height(offsets), trial
        if best_top <= enough:
            return tuple(best)
    chance = random.Random(0)
    for _ in range(attempts):
        trial = list(order)
        # What sticks out moves forward; now and then anything does, to leave a dead end.
        highest = [i for i in range(len(sizes)) if best[i] + sizes[i] == best_top]
        moved = chance.choice(highest) if highest and chance.random() < 0.6 else chance.randrange(len(sizes))
        trial.remove(moved)
        trial.insert(chance.randrange(len(trial) + 1), moved)
        offsets = place(sizes, meets, taken, trial)
        if height(offsets) <= best_top:
            best, best_top, order = offsets, height(offsets), trial
        if best_top <= enough:
            break
    return tuple(best)


def place(
    sizes: Sequence[int],
    meets: Sequence[Sequence[int]],
    taken: Sequence[Sequence[tuple[int, int]]],
    order: Sequence[int],
) -> list[int]:
    """Offsets when each buffer of `order` takes the lowest gap that those before it leave.

    `meets[i]` are the buffers that are live together with `i`, `taken[i]` what is not free for it from the start.
    """
    offsets = [-1] * len(sizes)
    for i in order:
        low = 0
        others = [(offsets[j], offsets[j] + sizes[j]) for j in meets[i] if offsets[j] >= 0]
        for begin, end in sorted([*taken[i], *others]):
            if begin - low >= sizes[i]:
                break
            low = max(low, end)
        offsets[i] = low
    return offsets


def _segments(buffer: Buffer, period: int) -> tuple[tuple[int, int], ...]:
    """The lifetime within a round: in two parts if it crosses the end."""
    if buffer.end <= period:
        return ((buffer.begin, buffer.end),)
    return ((buffer.begin, period), (0, buffer.end - period))


def _meetings(buffers: Sequence[Buffer], period: int) -> list[list[int]]:
    """For each buffer, those that are live at some tick that it is live at."""
    ticks = [sum(((1 << e) - (1 << b)) for b, e in _segments(buffer, period)) for buffer in buffers]
    return [[j for j, other in enumerate(ticks) if j != i and own & other] for i, own in enumerate(ticks)]
