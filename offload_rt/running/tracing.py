"""A trace of measured steps: recorded when it is asked for, written for Perfetto, and said in a few lines.

    asked for | step 3 | step 4 | step 5        | step 6          wait=2, steps=1
                                |== recorded ===| written

It begins and ends between two steps, so that what a step moves by its trace is what `report` counts of it. Rows are
those of a planned step (`offload-rt plan --trace`), and waits besides. What was under way before is not in it; reads
and writes that are still under way at its end reach to it. The bits are the same.

The first steps of an engine check what later ones trust, so that they are waited for. At most 32768 spans are kept, in
20 MiB with the drives' records of them, and some 40 MiB more while they are written.
"""

from __future__ import annotations

import gzip
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from offload_rt.errors import ConfigError, OffloadError, StorageError
from offload_rt.meter import COMPUTE, DEVICE_UPDATE, RESOURCES, SSD_READ, SSD_WRITE, UPDATES_WAIT, WAIT
from offload_rt.running.steps import StepMeter
from offload_rt.spans import HOST_WAIT, STEP, Span, Spans
from offload_rt.storage.durable import write_atomically
from offload_rt.transfers.device_spans import MAX_PAIRS, DeviceSpans
from offload_rt.transfers.device_times import PAIRS_PER_LAYER, overlap_seconds
from offload_rt.wiring.runtime import Runtime
from planners.perfetto import ROWS, Slice, chrome_trace
from planners.units import seconds as in_words

logger = logging.getLogger("offload_rt")

SHOWN = {
    STEP: "step", COMPUTE: ROWS[COMPUTE], WAIT: "compute waits", **{row: ROWS[row] for row in ROWS if row != COMPUTE},
    UPDATES_WAIT: "CPU waits", HOST_WAIT: "host waits",
}  # fmt: skip
"""Rows in their order, as they are called."""
NUM_LONGEST = 3
"""Waits that are said."""
LEAST_SHARE = 0.005
"""Of a step: a resource that is busy for less is not said."""


@dataclass
class _Asked:
    """A trace that was asked for."""

    path: Path
    num_left_to_wait: int
    num_steps: int
    on_ready: Callable[[str], object]


class Tracing:
    """The traces of one engine, one at a time. Used by the thread that steps."""

    def __init__(self, runtime: Callable[[], Runtime], meter: StepMeter) -> None:
        self._runtime, self._meter = runtime, meter
        self._asked: _Asked | None = None
        self._spans: Spans | None = None
        self._traced: Runtime | None = None
        """Whose spans these are."""
        self._is_closed = False

    def ask(self, path: Path, *, steps: int, wait: int, on_ready: Callable[[str], object] | None) -> None:
        """See `Engine.trace`."""
        if self._is_closed:
            raise OffloadError("trace: the engine is closed; no step will come")
        for name, value, least in (("steps", steps, 1), ("wait", wait, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"trace: {name}: must be a whole number of at least {least}, got {value!r}")
        if self._asked is not None:
            raise ConfigError(f"trace: {self._asked.path} is not written yet; one trace at a time")
        require_writable(path)
        said = on_ready if on_ready is not None else lambda text: logger.info("%s", text)
        self._asked = _Asked(path, wait, steps, said)
        if not wait:
            self._begin()

    def step_is_over(self, number: int) -> None:
        """Step `number` is over. Blocks behind the last one that is traced: for a device, and for the file."""
        asked = self._asked
        if asked is None:
            return
        if self._spans is None:
            asked.num_left_to_wait -= 1
            if asked.num_left_to_wait <= 0:
                self._begin()
            return
        self._spans.step_is_over(number)
        asked.num_steps -= 1
        if not asked.num_steps:
            self._finish()

    def plan_has_changed(self) -> None:
        """Another runtime is in effect: what was recorded of the one before is dropped; the next step comes first."""
        if self._spans is None or self._asked is None or self._traced is self._runtime():
            return
        self._asked.num_steps += self._spans.num_steps
        logger.info("trace: the plan has changed; %d step(s) are traced from the next one on", self._asked.num_steps)
        self._tell(None)
        self._spans = self._traced = None

    def close(self) -> None:
        """Writes what there is of a trace whose last step did not come, and says so."""
        self._is_closed = True
        asked, spans = self._asked, self._spans
        if asked is None:
            return
        if spans is None or not spans.num_steps:
            logger.warning("trace: %s is not written: no step was over that was to be traced", asked.path)
            self._tell(None)
            self._asked = self._spans = self._traced = None
            return
        logger.warning("trace: %s lacks %d step(s), which did not come", asked.path, asked.num_steps)
        self._finish()

    def _begin(self) -> None:
        runtime = self._runtime()
        clock, throttle = runtime.links.meter.clock, runtime.links.throttle
        if runtime.device is not None and self._asked is not None:
            calls = len(runtime.layers) * runtime.made_of.workload.config.accumulation_steps * self._asked.num_steps
            num_pairs = min(PAIRS_PER_LAYER * max(1, calls), MAX_PAIRS)
            self._spans = DeviceSpans(clock, runtime.device, num_pairs=num_pairs)
        else:
            self._spans = Spans(clock, emulated=() if throttle is None else throttle.rows())
        self._traced = runtime
        self._tell(self._spans)

    def _tell(self, spans: Spans | None) -> None:
        """From now on `spans` is told of everything; None: nobody is."""
        runtime = self._traced
        if runtime is None:
            return
        links = runtime.links
        links.spans = links.meter.traced = self._meter.spans = spans
        for block in runtime.blocks:
            block.spans = spans
        emulated = () if links.throttle is None else links.throttle.rows()
        if SSD_READ not in emulated and not runtime.is_closed:
            links.io.record(0 if spans is None else spans.most)

    def _finish(self) -> None:
        """Writes the trace and says what is in it. Blocks. A file that cannot be written ends no run."""
        asked, spans, runtime = self._asked, self._spans, self._traced
        if asked is None or spans is None or runtime is None:
            return
        links = runtime.links
        spans.settle()
        if links.throttle is not None:
            links.throttle.busy_seconds()  # which brings emulated links up to now
        _add_drives(runtime, spans)
        self._tell(None)
        self._asked = self._spans = self._traced = None
        try:
            content = trace_json(spans).encode()
            write_atomically(asked.path, gzip.compress(content) if asked.path.suffix == ".gz" else content)
        except StorageError as error:
            logger.warning("trace: %s", error)
            return
        asked.on_ready("\n".join([*summary(spans), f"trace: {asked.path}, for ui.perfetto.dev"]))


def require_writable(path: Path) -> None:
    """Raises `ConfigError` where no file can be written at `path`. What is there stays until it is replaced."""
    try:
        if path.is_dir():
            raise IsADirectoryError(0, "is a folder")
        beside = path.with_name(path.name + ".partial")
        beside.open("wb").close()
        beside.unlink()
    except OSError as error:
        raise ConfigError(f"trace: {path} cannot be written: {error.strerror}") from None


def _add_drives(runtime: Runtime, spans: Spans) -> None:
    """What drives did since the recording began, by the names of what was read and written."""
    operations, num_left_out = runtime.links.io.records()
    spans.num_left_out += num_left_out
    now = spans.clock()
    for each in operations:
        spans.add(
            SSD_READ if each.kind == "read" else SSD_WRITE,
            spans.places.get((each.path, each.offset_bytes), each.kind) if each.num_bytes else each.kind,
            each.begin_seconds, now if each.end_seconds is None else each.end_seconds, each.num_bytes,
            is_over=each.end_seconds is not None,
        )  # fmt: skip


def trace_json(spans: Spans) -> str:
    """Settled spans in Chrome's trace format, from the beginning of the first step."""
    zero = spans.steps[0][1]
    found = [Slice(STEP, f"step {number}", STEP, begin - zero, end - zero) for number, begin, end in spans.steps]
    for span in spans.found:
        args: dict[str, object] = {} if not span.num_bytes else {"bytes": span.num_bytes}
        if span.of:
            args["waits for"] = span.of
        if not span.is_over:
            args["goes on"] = True
        category = span.name.split(" ")[0] if span.row == COMPUTE else span.row
        found.append(Slice(span.row, span.name, category, span.begin_seconds - zero, span.end_seconds - zero, args))
    rows = {row: shown for row, shown in SHOWN.items() if any(each.row == row for each in found)}
    return chrome_trace("measured steps", 2, rows, found)


def summary(spans: Spans) -> list[str]:
    """A line for each step: how long each resource was busy, how long computing waited and for which of them; and one
    of the longest waits.
    """
    lines = []
    of_row = {row: [span for span in spans.found if span.row == row] for row in (*RESOURCES, WAIT)}
    waits = of_row[WAIT]
    for number, begin, end in spans.steps:
        seconds = end - begin
        waiting = _union(waits, begin, end)
        busy = {row: _union(of_row[row], begin, end) for row in RESOURCES}
        shares = []
        for row, intervals in busy.items():
            length = _length(intervals)
            if row in (COMPUTE, DEVICE_UPDATE):  # these wait, too
                length -= overlap_seconds(intervals, waiting)
            if length > LEAST_SHARE * seconds:
                shares.append(f"{row} {length / seconds:.0%}")
        by = {of: _length(_union((s for s in waits if s.of == of), begin, end)) for of in {s.of for s in waits if s.of}}
        parts = [
            f"{in_words(length)} for {of}"
            for of, length in sorted(by.items(), key=lambda item: -item[1])
            if length > LEAST_SHARE * seconds
        ]
        lines.append(
            f"step {number}: {in_words(seconds)}; busy: {', '.join(shares) or 'nothing'}; computing waited "
            f"{in_words(_length(waiting))}{': ' if parts else ''}{', '.join(parts)}"
        )
    longest = sorted(waits, key=lambda span: span.begin_seconds - span.end_seconds)[:NUM_LONGEST]
    if longest:
        lines.append("longest waits: " + ", ".join(_described(span, spans) for span in longest))
    if spans.num_left_out:
        lines.append(f"{spans.num_left_out} span(s) had no room: at most {spans.most} are kept; trace fewer steps")
    return lines


def _described(span: Span, spans: Spans) -> str:
    """A wait in words."""
    at = span.begin_seconds
    number = next((number for number, begin, end in spans.steps if begin <= at < end), spans.steps[-1][0])
    phases = ("forward", "backward", "update", "forward, no gradients")
    inside = next(
        (
            f", {each.name}" for each in spans.found
            if each.name in phases and each.row in (COMPUTE, DEVICE_UPDATE)
            and each.begin_seconds <= at < each.end_seconds
        ), "",
    )  # fmt: skip
    of = f" ({span.of})" if span.of else ""
    return f"{in_words(span.end_seconds - at)} for {span.name}{of} in step {number}{inside}"


def _union(spans: Iterable[Span], begin: float, end: float) -> list[tuple[float, float]]:
    """The times in [begin, end) in which any of them was under way."""
    merged: list[tuple[float, float]] = []
    for one, other in sorted((max(s.begin_seconds, begin), min(s.end_seconds, end)) for s in spans):
        if merged and one <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(other, merged[-1][1]))
        elif one < other:
            merged.append((one, other))
    return merged


def _length(intervals: Sequence[tuple[float, float]]) -> float:
    return sum(end - begin for begin, end in intervals)
