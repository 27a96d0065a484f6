"""One full fine-tuning step of offload_rt along time: what each thread does, and what is on its way to or from drives.

Finer than `Engine.trace`, thread by thread: functions of the product are wrapped for one step and put back. Reads and
writes are those that the engine's I/O records. A part's time is its own: while a part inside it runs, its clock stands.

    thread that trains    forward 0 | forward 1 | ... | backward 11 | gradients kept | backward 10 | ... | commit
    offload_rt-updates                                              | AdamW | checksum | AdamW | ...
    reads, writes         [ read ][ read ] ...                              [ write ][ write ] ...
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_trace import replaced

MOST_OPERATIONS = 1 << 16
IN_FLIGHT = ("read", "write")
WAIT = "waiting"
FORWARD, BACKWARD = "forward, outside layers", "backward, outside layers"


@dataclass(frozen=True)
class Span:
    """Work of one thread, or a transfer on its way, in seconds of `time.perf_counter`."""

    lane: str
    name: str
    begin: float
    end: float


class Spans:
    """Collects spans of all threads."""

    def __init__(self) -> None:
        self.found: list[Span] = []

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.found.append(Span(threading.current_thread().name, name, begin, time.perf_counter()))

    def wrapper(self, name: Callable[..., str] | str) -> Callable[[Any], Any]:
        """For `replaced`: the function runs as a part, named by what it is called with."""

        def make(function: Any) -> Any:
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                with self.part(name if isinstance(name, str) else name(*args, **kwargs)):
                    return function(*args, **kwargs)

            return wrapped

        return make


@contextlib.contextmanager
def watched(engine: Any, spans: Spans) -> Iterator[None]:
    """Everything that a step consists of leaves spans inside."""
    from offload_rt._engine import Engine
    from offload_rt.layers import autograd, executor
    from offload_rt.optimizer.commits import Commits
    from offload_rt.optimizer.gradients import Gradients
    from offload_rt.optimizer.state_slots import StateSlots
    from offload_rt.optimizer.stepper import Stepper
    from offload_rt.optimizer.training import FullTraining
    from offload_rt.storage import commit_log
    from offload_rt.tokenwise import layer as tokenwise_layer
    from offload_rt.transfers.transfer import Transfer
    from offload_rt.vocabulary import edge
    from offload_rt.vocabulary.loss_head import LossHead

    def of_block(block: Any, access: Any, phase: Any, **_: Any) -> str:
        return f"{phase.value} {block.name.rpartition('.')[2] or block.name}"

    def opened(function: Any) -> Any:
        @contextlib.contextmanager
        def wrapped(*args: Any, **kwargs: Any) -> Iterator[None]:
            with spans.part(of_block(*args, **kwargs)), function(*args, **kwargs):
                yield

        return wrapped

    with contextlib.ExitStack() as stack:
        for owner, name, make in (
            (autograd, "opened", opened),
            (tokenwise_layer, "opened", opened),
            (edge, "opened", opened),
            (Engine, "__call__", spans.wrapper(FORWARD)),
            (Engine, "backward", spans.wrapper(BACKWARD)),
            (LossHead, "_finish", spans.wrapper("head and loss")),
            (executor.RingExecutor, "acquire", spans.wrapper("ring: fetch")),
            (executor.RingExecutor, "release", spans.wrapper("ring: release, fetch ahead")),
            (Gradients, "add", spans.wrapper("gradients kept, norms")),
            (Stepper, "submit", spans.wrapper("update handed over")),
            (Stepper, "finish", spans.wrapper("updates finish")),
            (Stepper, "expect", spans.wrapper("reads ahead started")),
            (StateSlots, "_read_ahead", spans.wrapper("reads ahead started")),
            (Stepper, "_step_piece", spans.wrapper("AdamW")),
            (StateSlots, "_settle_writes", spans.wrapper("room for reads")),
            (StateSlots, "_arrived", spans.wrapper("state arrives")),
            (FullTraining, "step", spans.wrapper("step, besides")),
            (Commits, "_commit", spans.wrapper("commit")),
            (commit_log, "barrier", spans.wrapper("commit: fdatasync")),
            (commit_log, "crc32c", spans.wrapper("checksum")),
            (Transfer, "wait", spans.wrapper(WAIT)),
        ):
            stack.enter_context(replaced(owner, name, make))
        io = engine._runtime.links.io
        io.record(MOST_OPERATIONS)
        stack.callback(io.record, 0)
        yield
        now = time.perf_counter()
        for each in io.records()[0]:
            if each.kind in IN_FLIGHT:
                spans.found.append(Span(each.kind, each.kind, each.begin_seconds, each.end_seconds or now))


def traced_step(engine: Any, step: Callable[[], float]) -> dict[str, Any]:
    """One step, its parts' own seconds by thread, how much overlapped, and events for Perfetto."""
    spans = Spans()
    before = engine.report()
    with watched(engine, spans):
        begin = time.perf_counter()
        with spans.part("everything else"):
            step()
        end = time.perf_counter()
    after = engine.report()
    found = [span for span in spans.found if span.begin < end]
    work = [span for span in found if span.lane not in IN_FLIGHT]
    return {
        "seconds": end - begin,
        "threads": {lane: own_seconds([s for s in work if s.lane == lane]) for lane in {s.lane: 0 for s in work}},
        "overlap": overlaps(work, [s for s in found if s.lane in IN_FLIGHT], (begin, end)),
        "bytes_read": after["bytes_read"] - before["bytes_read"],
        "bytes_written": after["bytes_written"] - before["bytes_written"],
        "events": events(found, begin),
    }


def own_seconds(spans: Sequence[Span]) -> dict[str, float]:
    """Seconds of each kind of part on one thread, without those of parts inside it; the greatest first."""
    total: defaultdict[str, float] = defaultdict(float)
    open_spans: list[tuple[str, float]] = []
    for span in sorted(spans, key=lambda s: (s.begin, -s.end)):
        while open_spans and open_spans[-1][1] <= span.begin:
            open_spans.pop()
        kind = _kind(span)
        if open_spans:
            around = open_spans[-1][0]
            total[around] -= span.end - span.begin
            if kind == WAIT:
                kind = around if around.endswith(WAIT) else f"{around}, {kind}"
        total[kind] += span.end - span.begin
        open_spans.append((kind, span.end))
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def _kind(span: Span) -> str:
    """The part without the block that it was done for."""
    return span.name.split(" ")[0] + " of layers" if span.name.startswith(("forward ", "backward ")) else span.name


def overlaps(work: Sequence[Span], flights: Sequence[Span], step: tuple[float, float]) -> dict[str, float]:
    """Seconds of the step in which things happened, and in which they happened at the same time."""
    computing = _union([s for s in work if s.name in (FORWARD, BACKWARD)])
    updating = _union([s for s in work if s.name == "AdamW"])
    reading = _union([s for s in flights if s.name == "read"], step)
    writing = _union([s for s in flights if s.name == "write"], step)
    moving = _union(flights, step)
    return {
        "forward and backward": _length(computing),
        "AdamW": _length(updating),
        "reads under way": _length(reading),
        "writes under way": _length(writing),
        "reads or writes under way": _length(moving),
        "AdamW during forward and backward": _length(_both(computing, updating)),
        "transfers during forward and backward": _length(_both(computing, moving)),
        "transfers during AdamW": _length(_both(updating, moving)),
        "nothing under way": step[1] - step[0] - _length(moving),
    }


Ranges = list[tuple[float, float]]


def _union(spans: Sequence[Span], within: tuple[float, float] = (float("-inf"), float("inf"))) -> Ranges:
    merged: Ranges = []
    for begin, end in sorted((max(s.begin, within[0]), min(s.end, within[1])) for s in spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        elif begin < end:
            merged.append((begin, end))
    return merged


def _both(left: Ranges, right: Ranges) -> Ranges:
    found = [(max(a, c), min(b, d)) for a, b in left for c, d in right]
    return [(begin, end) for begin, end in found if begin < end]


def _length(ranges: Ranges) -> float:
    return sum(end - begin for begin, end in ranges)


def events(spans: Sequence[Span], begin: float) -> list[dict[str, Any]]:
    """In Chrome's format: threads as lanes, transfers as many lanes as are under way at once."""
    lanes: dict[str, int] = {}
    free: defaultdict[str, list[float]] = defaultdict(list)
    found: list[dict[str, Any]] = []
    for span in sorted(spans, key=lambda s: (s.begin, -s.end)):
        lane = span.lane
        if lane in IN_FLIGHT:
            number = next((n for n, end in enumerate(free[lane]) if end <= span.begin), len(free[lane]))
            free[lane][number : number + 1] = [span.end]
            lane = f"{lane} {number}"
        found.append(
            {
                "ph": "X", "pid": 0, "tid": lanes.setdefault(lane, len(lanes)), "name": span.name,
                "ts": 1e6 * (span.begin - begin), "dur": 1e6 * (span.end - span.begin),
            }
        )  # fmt: skip
    names = [
        {"ph": "M", "pid": 0, "tid": number, "name": "thread_name", "args": {"name": lane}}
        for lane, number in lanes.items()
    ]
    return names + found
