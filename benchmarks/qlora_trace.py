"""Where one step of qlora.py's contenders goes: by phase and part, by operator, by allocation, and along time.

Nothing here is in the product: its functions are wrapped for one step and put back. Three steps are looked at, one with
timers alone, one under torch.profiler, one under its memory profiler, because each look slows down what it sees.

A part's time is its own: while a part inside it runs, its clock stands. Backward includes the recompute. The memory
view knows torch's allocator only; arenas are in the engine's report.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from torch._C._profiler import _EventType
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile

TIMELINE_COLUMNS = 96
SHADES = " .:-=+*#%@"
NUM_LARGEST = 10

CATEGORIES = (
    ("NF4 decode", ("offload_rt NF4 decode", "bitsandbytes::")),
    ("waiting for reads", ("offload_rt wait",)),
    ("checksums", ("offload_rt checksum",)),
    ("attention", ("aten::_scaled_dot_product", "aten::scaled_dot_product")),
    ("matrix products", ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "aten::matmul", "mkldnn::")),
    ("softmax and loss", ("aten::_log_softmax", "aten::nll_loss", "aten::cross_entropy")),
    ("fused AdamW", ("aten::_fused_adamw",)),
    ("copies and casts", ("aten::copy_", "aten::_to_copy", "aten::clone", "aten::contiguous", "aten::cat")),
    ("allocation and filling", ("aten::empty", "aten::zero", "aten::fill_", "aten::full", "aten::ones", "aten::new_")),
    ("other operators", ("",)),
)


class Clock:
    """Exclusive time of named parts, and their spans. One thread."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.spans: list[tuple[str, float, float]] = []
        self._stack: list[str] = []
        self._since = time.perf_counter()

    def enter(self, part: str) -> None:
        self._charge()
        self._stack.append(part)

    def leave(self) -> None:
        self._charge()
        self._stack.pop()

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._stack:
            self.seconds[self._stack[-1]] += now - self._since
            self.spans.append((self._stack[-1], self._since, now))
        self._since = now

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.enter(name)
        try:
            yield
        finally:
            self.leave()


@contextlib.contextmanager
def replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """`owner.name` is `make(what it was)` inside."""
    shadowed = name in vars(owner)
    before = getattr(owner, name)
    setattr(owner, name, make(before))
    try:
        yield
    finally:
        if shadowed:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


def around(manager: Callable[[], contextlib.AbstractContextManager[Any]]) -> Callable[[Any], Any]:
    """Makes a wrapper that runs a function inside `manager()`."""

    def make(function: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with manager():
                return function(*args, **kwargs)

        return wrapper

    return make


@contextlib.contextmanager
def engine_wrapped(manager: Callable[[str], contextlib.AbstractContextManager[Any]]) -> Iterator[None]:
    """The engine's decode, waits and checksums run inside `manager(part)`."""
    from offload_rt.quantized import decoder
    from offload_rt.storage import store
    from offload_rt.transfers import links

    with (
        replaced(decoder, "_decode_into", around(lambda: manager("NF4 decode"))),
        replaced(links.Links, "wait", around(lambda: manager("wait for reads"))),
        replaced(store.Store, "verify", around(lambda: manager("checksum"))),
    ):
        yield


@contextlib.contextmanager
def phases_marked(model: Any, optimizer: Any, marks: dict[str, float]) -> Iterator[None]:
    """Notes when forward is through the layers, backward at the last of them, and the optimizer at work."""
    inner = model.get_base_model().model

    def note(name: str) -> None:
        marks[name] = time.perf_counter()

    def before_norm(module: Any, args: Any) -> None:
        note("layers forward")
        if args[0].requires_grad:
            args[0].register_hook(lambda grad: note("head and loss"))

    handles = [
        inner.norm.register_forward_pre_hook(before_norm),
        optimizer.register_step_pre_hook(lambda *_: note("layers backward")),
        optimizer.register_step_post_hook(lambda *_: note("optimizer")),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def timed_step(model: Any, optimizer: Any, engine: Any, step: Callable[[], float]) -> tuple[dict[str, Any], Clock]:
    """One step under timers: phases that add up, then, of the engine, parts that lie inside them."""
    clock = Clock()
    marks: dict[str, float] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(phases_marked(model, optimizer, marks))
        if engine is not None:
            stack.enter_context(engine_wrapped(clock.part))
            stack.enter_context(_layers_wrapped(clock))
        before = dict(engine.report()) if engine is not None else {}
        begin = time.perf_counter()
        step()
        end = time.perf_counter()
    parts = {}
    previous = begin
    for name in ("layers forward", "head and loss", "layers backward", "optimizer"):
        parts[name] = marks[name] - previous
        clock.spans.append((f"phase: {name}", previous, marks[name]))
        previous = marks[name]
    parts["rest of the step"] = end - previous
    parts |= {f"  of which {name}": seconds for name, seconds in sorted(clock.seconds.items())}
    timed: dict[str, Any] = {"seconds": end - begin, "parts": parts}
    if engine is not None:
        after = engine.report()
        keys = ("bytes_read", "fetches", "prefetch_misses", "decodes", "decoded_elements", "decode_overflow_bytes")
        timed["counted"] = {key: after[key] - before[key] for key in keys}
    return timed, clock


@contextlib.contextmanager
def _layers_wrapped(clock: Clock) -> Iterator[None]:
    """Charges the time between a block's acquire and its release, and the executor's own; notes reads in flight."""
    from offload_rt.layers import executor
    from offload_rt.transfers import links

    started: dict[int, float] = {}

    def acquire(function: Any) -> Any:
        def wrapper(self: Any, index: int, phase: Any, *, training: bool) -> Any:
            with clock.part("executor"):
                slot = function(self, index, phase, training=training)
            clock.enter(f"block open, {phase.value}")
            return slot

        return wrapper

    def release(function: Any) -> Any:
        def wrapper(self: Any, index: int) -> Any:
            clock.leave()
            with clock.part("executor"):
                return function(self, index)

        return wrapper

    def read(function: Any) -> Any:
        def wrapper(*args: Any) -> Any:
            moved = function(*args)
            started[id(moved)] = time.perf_counter()
            return moved

        return wrapper

    def wait(function: Any) -> Any:
        def wrapper(self: Any, moved: Any) -> Any:
            function(self, moved)
            begin = started.pop(id(moved), None)
            if begin is not None:
                clock.spans.append(("read under way", begin, time.perf_counter()))

        return wrapper

    with (
        replaced(executor.RingExecutor, "acquire", acquire),
        replaced(executor.RingExecutor, "release", release),
        replaced(links.Links, "read", read),
        replaced(links.Links, "wait", wait),
    ):
        yield


def timeline(clock: Clock, seconds: float) -> list[str]:
    """The step as text: a lane for each part, darker where more of a column's time is spent in it."""
    begin = min(start for _, start, _ in clock.spans)
    width = seconds / TIMELINE_COLUMNS
    lanes: defaultdict[str, list[float]] = defaultdict(lambda: [0.0] * TIMELINE_COLUMNS)
    for part, start, end in clock.spans:
        first, last = int((start - begin) / width), int((end - begin) / width)
        for column in range(max(0, first), min(last, TIMELINE_COLUMNS - 1) + 1):
            left = begin + column * width
            lanes[part][column] += max(0.0, min(end, left + width) - max(start, left)) / width
    order = sorted(
        lanes, key=lambda part: (not part.startswith("phase"), next(i for i, x in enumerate(lanes[part]) if x))
    )
    lines = [f"timeline of one step; a column is {width * 1000:.0f} ms"]
    for part in order:
        shades = "".join(SHADES[min(len(SHADES) - 1, int(share * (len(SHADES) - 1) + 0.999))] for share in lanes[part])
        lines.append(f"{part:24}|{shades}|")
    return lines


def profiled_step(engine: Any, step: Callable[[], float]) -> dict[str, Any]:
    """One step under torch.profiler: own time of operators by category; what is left is Python and bookkeeping."""
    with contextlib.ExitStack() as stack:
        if engine is not None:
            stack.enter_context(engine_wrapped(lambda part: record_function(f"offload_rt {part}")))
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            begin = time.perf_counter()
            step()
            seconds = time.perf_counter() - begin
    parts = dict.fromkeys((name for name, _ in CATEGORIES), 0.0)
    events = []
    outside = 0.0
    for event in profiler.key_averages():
        own = event.self_cpu_time_total / 1e6
        if not event.key.startswith(("aten::", "offload_rt", "bitsandbytes::", "mkldnn::")):
            outside += own  # nodes of autograd and the optimizer's own range: bookkeeping around operators
            continue
        category = next(name for name, prefixes in CATEGORIES if event.key.startswith(prefixes))
        parts[category] += own
        events.append({"operator": event.key, "seconds": own, "count": event.count})
    parts["Python and bookkeeping"] = seconds - sum(parts.values())
    parts = {name: own for name, own in parts.items() if own}
    events.sort(key=lambda event: -event["seconds"])
    return {"seconds": seconds, "parts": parts, "bookkeeping_in_nodes": outside, "operators": events[:25]}


def memory_step(step: Callable[[], float]) -> dict[str, Any]:
    """One step under the memory profiler: what torch's allocator holds at the peak, above what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    results = profiler.profiler.kineto_results if profiler.profiler is not None else None
    if results is None:
        return {"peak_bytes": 0, "largest": []}
    allocations: list[tuple[int, int, int, str]] = []

    def visit(event: Any, names: tuple[str, ...]) -> None:
        if event.tag == _EventType.Allocation:
            fields = event.typed[1]
            inner = [name for name in names if not name.startswith("aten::empty")]
            by = " < ".join(reversed(inner[-3:])) or "outside operators"
            allocations.append((event.start_time_ns, fields.ptr, fields.alloc_size, by))
        for child in event.children:
            visit(child, (*names, event.name))

    for root in results.experimental_event_tree():
        visit(root, ())
    live: dict[int, tuple[int, str]] = {}
    total = peak = 0
    at_peak: list[tuple[int, str]] = []
    allocations.sort(key=lambda allocation: allocation[0])
    moments = []
    for _, pointer, size, by in allocations:
        if size > 0:
            live[pointer] = (size, by)
            total += size
        elif pointer in live:
            total -= live.pop(pointer)[0]
        moments.append(total)
        peak = max(peak, total)
    live.clear()
    for (_, pointer, size, by), moment in zip(allocations, moments, strict=True):
        if size > 0:
            live[pointer] = (size, by)
        else:
            live.pop(pointer, None)
        if moment == peak:
            at_peak = list(live.values())
            break
    held: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for size, by in at_peak:
        held[by] += size
        counts[by] += 1
    largest = [{"bytes": size, "count": counts[by], "by": by} for by, size in held.most_common(NUM_LARGEST)]
    return {"peak_bytes": peak, "largest": largest}


def breakdown(model: Any, optimizer: Any, engine: Any, step: Callable[[], float]) -> dict[str, Any]:
    """Everything above, for the contender that `step` drives; `engine` is None for those in memory."""
    timed, clock = timed_step(model, optimizer, engine, step)
    return {
        "timed": timed,
        "timeline": timeline(clock, timed["seconds"]),
        "profiled": profiled_step(engine, step),
        "memory": memory_step(step),
    }
