"""One extent over several drives: in contiguous stripes, as long as the drives are fast.

    block 0   |======= drive A =======|==== B ====|      A twice as fast as B: both are done at the same time
    block 1   |======= drive A =======|==== B ====|
    block 2   |=A=|                                      too small to cut: the drive that is least filled takes it

The places are part of the store, so that a store reads the same whatever the drives measure later.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from offload_rt.tensor_spec import IO_ALIGNMENT_BYTES

MIN_STRIPE_BYTES = 1 << 20
"""A shorter one would be less than a request."""
_PATIENCE = 64
"""Tries, each aiming lower at drives that the one before had overfilled. Of 40,000 random cases with a drive that could
hold everything, none took more than 19.
"""


@dataclass(frozen=True, kw_only=True)
class Stripe:
    """[offset_bytes, offset_bytes + length_bytes) of one drive's weights file; all in multiples of 4 KiB."""

    drive: int
    offset_bytes: int
    length_bytes: int


@dataclass(frozen=True, kw_only=True)
class StripePart:
    """The share of one stripe in a range of the extent: where in the range it begins, and where in the file."""

    drive: int
    begin_bytes: int
    offset_bytes: int
    length_bytes: int


def stripe_all(
    lengths_bytes: Sequence[int], weights: Sequence[float], capacities_bytes: Sequence[int]
) -> list[tuple[Stripe, ...]]:
    """Places extents one behind the other, shared out by `weights` (all above zero) as far as capacities allow.

    If all drives together cannot hold the extents, the places given do not fit either: whoever asked checks the space.
    """
    rooms = list(capacities_bytes)
    for _ in range(_PATIENCE):
        targets = _targets(sum(lengths_bytes), weights, rooms)
        places, ends = _stripe_by(lengths_bytes, targets, capacities_bytes)
        excess = [max(0, end - capacity) for end, capacity in zip(ends, capacities_bytes, strict=True)]
        if not any(excess):
            break
        # Short extents are not cut and shares are rounded: aim that much lower.
        rooms = [
            max(0, int(min(room, target)) - over) if over else room
            for room, target, over in zip(rooms, targets, excess, strict=True)
        ]
    return places


def _targets(total_bytes: int, weights: Sequence[float], rooms_bytes: Sequence[int]) -> list[float]:
    """How many bytes each drive is to hold: in proportion to its weight, or its room where that is less."""
    targets = [0.0] * len(weights)
    left, open_drives = float(total_bytes), set(range(len(weights)))
    while open_drives:
        per_weight = left / sum(weights[drive] for drive in open_drives)
        full = {drive for drive in open_drives if per_weight * weights[drive] > rooms_bytes[drive]}
        for drive in full or open_drives:
            targets[drive] = rooms_bytes[drive] if drive in full else per_weight * weights[drive]
            left -= targets[drive]
        open_drives = open_drives - full if full else set()
    return targets


def _stripe_by(
    lengths_bytes: Sequence[int], weights: Sequence[float], capacities_bytes: Sequence[int]
) -> tuple[list[tuple[Stripe, ...]], list[int]]:
    ends = [0] * len(weights)
    places = []
    for length in lengths_bytes:
        stripes = []
        left = length
        rooms = [capacity - end for capacity, end in zip(capacities_bytes, ends, strict=True)]
        for drive, share in _shares(length, weights, ends, rooms):
            stripes.append(Stripe(drive=drive, offset_bytes=ends[drive], length_bytes=share))
            ends[drive] += share
            left -= share
        if left:
            raise ValueError(f"stripes: {left} of {length} bytes have no place")
        places.append(tuple(stripes))
    return places, ends


def _shares(
    length: int, weights: Sequence[float], ends: Sequence[int], rooms_bytes: Sequence[int]
) -> list[tuple[int, int]]:
    """(drive, bytes) in the order of the drives, every share at least `MIN_STRIPE_BYTES` unless it is the only one."""
    usable = [drive for drive, weight in enumerate(weights) if weight > 0] or list(range(len(weights)))
    while True:
        total = sum(weights[drive] for drive in usable) or 1.0
        shares = [(drive, _aligned(length * weights[drive] / total)) for drive in usable]
        short = [drive for drive, share in shares if share < MIN_STRIPE_BYTES]
        if not short or len(usable) == 1:
            break
        # Without one that has no room for all of it, or that has most for its speed already; small extents so fill all
        # drives in turn.
        usable.remove(max(short, key=lambda d: (rooms_bytes[d] < length, ends[d] / (weights[d] or 1.0), d)))
    roomy = [drive for drive, room in enumerate(rooms_bytes) if room >= length]
    if len(usable) == 1 and roomy and usable[0] not in roomy:
        return [(min(roomy, key=lambda drive: (ends[drive] / (weights[drive] or 1.0), drive)), length)]
    (drive, share), *rest = shares
    return [(drive, share + length - sum(share for _, share in shares)), *rest]


def _aligned(num_bytes: float) -> int:
    return int(num_bytes) // IO_ALIGNMENT_BYTES * IO_ALIGNMENT_BYTES


def parts(stripes: Sequence[Stripe], position_bytes: int, num_bytes: int) -> Iterator[StripePart]:
    """What of [position, position + num) of the extent lies where, in order."""
    begin = 0  # of the stripe, within the extent
    for stripe in stripes:
        first = max(begin, position_bytes)
        last = min(begin + stripe.length_bytes, position_bytes + num_bytes)
        if first < last:
            yield StripePart(
                drive=stripe.drive,
                begin_bytes=first - position_bytes,
                offset_bytes=stripe.offset_bytes + first - begin,
                length_bytes=last - first,
            )
        begin += stripe.length_bytes
