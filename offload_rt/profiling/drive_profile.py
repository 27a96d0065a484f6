"""What a tensor that is put away costs more where it goes on to a drive than where it stays in HOST.

[Note: the drive pair]
A plan counts a drive's seconds by themselves, and they may hide behind what is computed. What does not hide is the
work of whoever computes: places, copies into staging and out of it, requests, looking at what has arrived. That is
timed by the processor time of this thread, in which waiting is not. Nothing is computed for it: tensors of the sizes
that a layer saves are put away and taken back, the last one first, in HOST and on the drive by turns. What the drive's
way takes more is its price.
"""

from __future__ import annotations

import logging
import statistics
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from offload_rt.errors import OffloadError
from offload_rt.profiling.workbench import RUNS, Workbench
from offload_rt.tensor_spec import IO_ALIGNMENT_BYTES, align_up
from offload_rt.tiering.stash import Stash, Stashed
from planners.errors import format_bytes

logger = logging.getLogger("offload_rt")

MOST_BYTES = 64 << 20
"""Put away in a run, of which there are `RUNS` and one before. Of more, tensors of all sizes are taken, and the seconds
are in proportion: a profile, which is made whenever the optimiser is asked, writes 384 MiB at most."""


class NotedStash:
    """A stash, and the sizes in bytes of what was put there."""

    def __init__(self, inner: Stash) -> None:
        self._inner = inner
        self.sizes: list[int] = []

    def put(self, tensor: torch.Tensor) -> Stashed | None:
        """As the stash inside."""
        self.sizes.append(tensor.numel() * tensor.element_size())
        return self._inner.put(tensor)

    @property
    def latest(self) -> weakref.ref[Any] | None:
        """As the stash inside."""
        return self._inner.latest

    def start_from(self, latest: weakref.ref[Any] | None) -> None:
        """As the stash inside."""
        self._inner.start_from(latest)

    def sizes_of_a_pass(self, num_passes: int) -> list[int]:
        """Of one of several equal ones."""
        return self.sizes[: len(self.sizes) // num_passes]


def drive_pair(
    host: Stash, sizes: Sequence[int], bench: Workbench, clock: Callable[[], float] = time.thread_time
) -> tuple[float, float]:
    """Seconds that putting tensors of `sizes` bytes away takes more on the drive of `bench` than in `host`, and that
    taking them back does; see the note. Zeros where it has no drive, and, with a warning, where that fails. Blocks.

    A device is asked to take them back as fast as to put them away: `block_profile`.
    """
    chosen = sample(sizes)
    if not chosen:
        return 0.0, 0.0
    num_bytes = sum(align_up(size, IO_ALIGNMENT_BYTES) for size in chosen)
    try:
        drive = bench.drive_stash(num_bytes, max(chosen))
        if drive is None:
            return 0.0, 0.0
        source = torch.zeros(max(chosen), dtype=torch.uint8, device=bench.device)
        ways = [host, drive]
        for way in ways:
            _there_and_back(way, source, chosen, clock)
        runs = [[_there_and_back(way, source, chosen, clock) for way in ways] for _ in range(RUNS)]
    except OffloadError as error:
        logger.warning(
            "what swapping to a drive takes beside the drive could not be measured, and counts as nothing: %s", error
        )
        return 0.0, 0.0
    wear = format_bytes((1 + RUNS) * num_bytes)
    logger.info("plan: %s were written to the drive, to time what swapping there takes beside it", wear)
    scale = sum(sizes) / sum(chosen)
    out, back = (scale * max(0.0, statistics.median(run[1][i] - run[0][i] for run in runs)) for i in (0, 1))
    return (out, out) if bench.copies_alone else (out, back)


def sample(sizes: Sequence[int], most_bytes: int = MOST_BYTES) -> list[int]:
    """Of `sizes`, in their order, every so many that they are about `most_bytes` together; one at least, if any."""
    every = -(-sum(sizes) // most_bytes)
    return [min(size, most_bytes) for size in sizes[:: max(1, every)]]


def _there_and_back(
    stash: Stash, source: torch.Tensor, sizes: Sequence[int], clock: Callable[[], float]
) -> tuple[float, float]:
    begin = clock()
    held = [stash.put(source[:size]) for size in sizes]
    there = clock()
    for stashed in reversed(held):
        if stashed is None:
            raise OffloadError("no room for what was put away before")
        stashed.load()
        stashed.release()
    return there - begin, clock() - there
