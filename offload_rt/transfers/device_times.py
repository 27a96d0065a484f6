"""What an asynchronous device takes for its copies and kernels, by the times that it notes itself, one step in two.

Only the device knows when a copy began. So in some of the steps it is asked to note the time before and behind each
copy, each span in which the model runs, and each place at which `compute` waits. These marks are made once, with the
engine; a step that is timed takes them from a pool, and they go back when the device has passed the last one, which is
looked at when a later step ends. Nothing waits for a mark, and what the device is given is in the same order.

    caller      | forward ................... | backward ...
    compute     [span  layer 1 [stall] layer 2 | ...          ]      computing: spans less the stalls inside
    to_device    [copy]  [copy]     [copy]                           seconds a byte; where both ways are copied
    to_host                [copy]                                    at once, each takes longer by what a link shares

A stall is whatever the thread that runs the model waits for: the device may then have nothing to do. A step in which
there were more of them than marks says nothing of computing. Copies beyond those that there are marks for are not
timed; those before say what a byte takes.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from offload_rt.meter import COMPUTE, DEVICE_TO_HOST, DEVICE_UPDATE, HOST_TO_DEVICE
from offload_rt.transfers.device_streams import Device, Mark, Stream

EVERY_STEPS = 2
"""Steps of which one is timed: what noting a time costs the host is unknown until a GPU has run this."""
PAIRS_PER_LAYER = 64
"""Of marks, for copies and updates, in one micro-batch; and as many for spans and stalls. A layer whose activations are
put away waits for each tensor that comes back."""
MAX_PAIRS = 1 << 13
"""Each is two events of the driver's, which a change of plans makes again."""
STALL = "stall"
"""Beside the resources: `compute` or the thread that runs the model waits."""
KINDS = (HOST_TO_DEVICE, DEVICE_TO_HOST, DEVICE_UPDATE, COMPUTE, STALL)


@dataclass(eq=False)
class _Pair:
    begin: Mark
    end: Mark
    kind: str = ""
    num_bytes: int = 0
    is_recorded: bool = False


@dataclass
class _Sample:
    """A step that is timed."""

    base: Mark
    pairs: dict[str, list[_Pair]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    misses: set[str] = field(default_factory=set)
    """Of what there was more than marks, or of what nothing is to be learnt."""
    is_over: bool = False

    def has_passed(self) -> bool:
        """Whether the device has: of each stream the last mark, which has passed when all before it have."""
        if not all(pair.is_recorded for pairs in self.pairs.values() for pair in pairs):
            return False
        last = (pairs[-1] for pairs in self.pairs.values() if pairs)
        return self.base.has_passed() and all(pair.end.has_passed() for pair in last)


@dataclass(frozen=True, kw_only=True)
class Times:
    """Of a step."""

    seconds_per_byte: dict[str, float]
    """By link, at its full rate."""
    seconds: dict[str, float]
    """Of computing and of updates, as far as they are known."""


class DeviceTimes:
    """Of one device. Thread-safe, but `step_ends`, `enter` and `leave`, which whoever steps calls."""

    def __init__(self, device: Device, *, num_layers: int, duplex: float = 1.0) -> None:
        """num_layers: that a step calls, each as often as there are micro-batches. duplex: see
        `planners.problems.hardware.Links`.
        """
        num_pairs = min(PAIRS_PER_LAYER * max(1, num_layers), MAX_PAIRS)
        self.newest: Times | None = None
        self._device, self._duplex = device, duplex
        self._lock = threading.Lock()
        self._base = device.mark()
        self._moving = [_Pair(device.mark(), device.mark()) for _ in range(num_pairs)]
        self._computing = [_Pair(device.mark(), device.mark()) for _ in range(num_pairs)]
        self._sample: _Sample | None = None
        """Under way, or over and not read yet."""
        self._num_steps = 0
        self._span: _Pair | None = None
        self._threads: set[int] = set()
        """Which run the model, in a span: by turns, where there are several."""
        self._is_stalled = False

    def step_ends(self, *, counts: bool = True) -> Times | None:
        """The newest times; the next step may be timed. counts: whether the step that is over is one to learn from."""
        with self._lock:
            self._num_steps += 1
            sample = self._sample
            if sample is not None:
                if not counts and not sample.is_over:
                    sample.misses.update(KINDS)
                sample.is_over = True
                if sample.has_passed():
                    self.newest = self._times(sample)
                    self._give_back(sample)
            if self._sample is None and self._num_steps % EVERY_STEPS == 0:
                self._base.record(self._device.compute)
                self._sample = _Sample(self._base)
            return self.newest

    def forget(self) -> None:
        """What comes runs otherwise: nothing is known of it."""
        with self._lock:
            self.newest = None
            if self._sample is not None:
                self._sample.is_over = True
                self._sample.misses.update(KINDS)

    def enter(self) -> None:
        """The thread that calls runs the model from now on, by turns with those that do already."""
        is_first = not self._threads
        self._threads.add(threading.get_ident())
        if is_first:
            with self._lock:
                self._span = self._begin(COMPUTE, self._device.compute)

    def leave(self) -> None:
        """The model does not run any more, by any thread."""
        self._threads.clear()
        pair, self._span = self._span, None
        if pair is not None:
            self._end(pair, self._device.compute)

    @contextmanager
    def stalled(self) -> Iterator[None]:
        """The thread that calls waits inside, or makes `compute` wait. Nothing where it runs no model."""
        if threading.get_ident() not in self._threads or self._span is None or self._is_stalled:
            yield
            return
        self._is_stalled = True
        try:
            with self.timed(STALL, self._device.compute):
                yield
        finally:
            self._is_stalled = False

    @contextmanager
    def timed(self, kind: str, stream: Stream, num_bytes: int = 0) -> Iterator[None]:
        """`stream` is given something of `kind` inside, by nobody else meanwhile."""
        with self._lock:
            pair = self._begin(kind, stream, num_bytes)
        if pair is None:
            yield
            return
        try:
            yield
        finally:
            self._end(pair, stream)

    def _begin(self, kind: str, stream: Stream, num_bytes: int = 0) -> _Pair | None:
        """Notes the time, if this step is timed and there are marks. What raises leaves nothing to wait for."""
        sample = self._sample
        if sample is None or sample.is_over:
            return None
        pool = self._pool(kind)
        if not pool:
            sample.misses.add(kind)
            return None
        pair = pool.pop()
        pair.kind, pair.num_bytes, pair.is_recorded = kind, num_bytes, False
        sample.pairs[kind].append(pair)
        try:
            pair.begin.record(stream)
        except BaseException:
            self._drop(sample, pair)
            raise
        return pair

    def _end(self, pair: _Pair, stream: Stream) -> None:
        try:
            pair.end.record(stream)
        except BaseException:
            with self._lock:
                if self._sample is not None:  # the one that it was taken for, which waits for it
                    self._drop(self._sample, pair)
            raise
        pair.is_recorded = True

    def _drop(self, sample: _Sample, pair: _Pair) -> None:
        sample.pairs[pair.kind].remove(pair)
        sample.misses.add(pair.kind)
        self._pool(pair.kind).append(pair)

    def _give_back(self, sample: _Sample) -> None:
        for kind, pairs in sample.pairs.items():
            self._pool(kind).extend(pairs)
        self._sample = None

    def _pool(self, kind: str) -> list[_Pair]:
        return self._computing if kind in (COMPUTE, STALL) else self._moving

    def _times(self, sample: _Sample) -> Times:
        """Of a sample whose marks were passed; of what it says nothing, what was known before."""
        length = {
            kind: sum(pair.end.seconds_since(pair.begin) for pair in pairs) for kind, pairs in sample.pairs.items()
        }
        to_device, to_host = (
            [
                (pair.begin.seconds_since(sample.base), pair.end.seconds_since(sample.base))
                for pair in sample.pairs[link]
            ]
            for link in (HOST_TO_DEVICE, DEVICE_TO_HOST)
        )
        known = self.newest or Times(seconds_per_byte={}, seconds={})
        per_byte, seconds = dict(known.seconds_per_byte), dict(known.seconds)
        both = overlap_seconds(to_device, to_host)
        for link in (HOST_TO_DEVICE, DEVICE_TO_HOST):
            if num_bytes := sum(pair.num_bytes for pair in sample.pairs[link]):
                per_byte[link] = (length[link] - both * (1 - self._duplex) / 2) / num_bytes
        if sample.pairs[DEVICE_UPDATE] and DEVICE_UPDATE not in sample.misses:
            seconds[DEVICE_UPDATE] = length[DEVICE_UPDATE]
        if sample.pairs[COMPUTE] and not sample.misses & {COMPUTE, STALL}:
            seconds[COMPUTE] = length[COMPUTE] - length[STALL]
        return Times(seconds_per_byte=per_byte, seconds=seconds)


def overlap_seconds(one: Sequence[tuple[float, float]], other: Sequence[tuple[float, float]]) -> float:
    """In which both were under way. Intervals of each do not overlap one another."""
    edges = sorted(
        itertools.chain.from_iterable(
            ((begin, which, 1), (end, which, -1))
            for which, intervals in enumerate((one, other))
            for begin, end in intervals
        )
    )
    open_ = [0, 0]
    total = since = 0.0
    for at, which, change in edges:
        if min(open_) > 0:
            total += at - since
        open_[which] += change
        since = at
    return total
