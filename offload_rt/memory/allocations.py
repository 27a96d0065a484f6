"""What PyTorch's allocator hands out on the CPU, to the byte: how much was live at most, counted by its own profiler.

The allocator reports each block that it gives or takes back to a profiler that asks for memory. Of that profiler's
events only these are wanted, so that operations, two thirds of all, are not recorded. An event takes two kilobytes when
the session ends, a layer's forward and backward some three megabytes. A session cannot be cut short inside a backward
pass: autograd puts the thread's callbacks back when it leaves. Who does the same thing many times does it once, between
marks, and adds up (`representatives`).

[Note: blocks of other sessions and threads] The allocator also reports the end of a block that an earlier session saw
begin, whenever the garbage collector comes to it; it would lower this session's peak by chance. So blocks are known by
their address, and only those that began inside are counted. The end of one that another thread gives back is not
reported: it is known at the latest when its address is handed out again.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

_AUTOGRAD: Any = getattr(torch._C, "_autograd", None)
_PROFILER: Any = getattr(torch._C, "_profiler", None)
"""What `torch.profiler` is made of: that itself cannot leave operations out."""
_QUIET = "KINETO_LOG_LEVEL"
"""Otherwise the profiler writes two lines on stderr for each session."""
_LOG_LEVEL = "FLAGS_caffe2_log_level"
"""Of torch's core library, read at each message. Otherwise it warns on stderr of one in a thousand blocks that began
before the session, which are not counted here: [Note: blocks of other sessions and threads]."""
_ERRORS = 2
_MARK = "offload_rt mark: "
Happening = tuple[int, int, int] | tuple[int, str]
"""When, and the address and bytes of a block, negative where it was given back; or when, and a mark."""


@dataclass
class Stretch:
    """What was counted from one mark to the next. `peak_bytes` and `more_bytes`: above what was live at its begin."""

    mark: str
    more_bytes: int = 0
    peak_bytes: int = 0


class AllocationMeter:
    """A context manager. Counts what the calling thread allocates and gives back inside."""

    def __init__(self) -> None:
        self.live_bytes = 0
        """Allocated inside and not given back inside: [Note: blocks of other sessions and threads]."""
        self.peak_bytes = 0
        """The most that was live."""
        self.stretches: list[Stretch] = []
        """The same from mark to mark, in order; the first begins with the session and has no name."""
        self._quieter = ExitStack()

    @staticmethod
    def mark(name: str) -> None:
        """Begins a stretch, if somebody counts. Whoever gives back what another stretch took has it taken off there."""
        if _AUTOGRAD is not None and _AUTOGRAD._profiler_enabled():
            with torch.autograd.profiler.record_function(_MARK + name):
                pass

    @staticmethod
    def refusal() -> str | None:
        """Why nothing can be counted now; None where it can be."""
        if _AUTOGRAD is None or not hasattr(_PROFILER, "RecordScope"):
            return f"the profiler of torch {torch.__version__} cannot be asked for memory alone"
        return "a profiler of the caller's is at work" if _AUTOGRAD._profiler_enabled() else None

    def __enter__(self) -> AllocationMeter:
        activities = {_PROFILER.ProfilerActivity.CPU}
        config = _PROFILER.ProfilerConfig(
            _PROFILER.ProfilerState.KINETO, False, True, False, False, False, _PROFILER._ExperimentalConfig()
        )
        with _quiet():
            _AUTOGRAD._prepare_profiler(config, activities)
            _AUTOGRAD._enable_profiler(config, activities, {_PROFILER.RecordScope.USER_SCOPE})
        self._quieter.enter_context(_errors_alone())
        return self

    def __exit__(self, *exception: object) -> None:
        with self._quieter, _quiet():
            result = _AUTOGRAD._disable_profiler()
        self.stretches = counted(_happenings(result.experimental_event_tree()))
        self.live_bytes, self.peak_bytes = together(self.stretches)


def counted(happenings: Iterable[Happening]) -> list[Stretch]:
    """What was live, from mark to mark."""
    sizes: dict[int, int] = {}  # of live blocks, by address
    stretches = [Stretch("")]
    for happening in sorted(happenings, key=lambda happening: happening[0]):
        if len(happening) == 2:
            stretches.append(Stretch(happening[1]))
            continue
        _, address, num_bytes = happening
        stretch = stretches[-1]
        stretch.more_bytes -= sizes.pop(address, 0)
        if num_bytes > 0:
            sizes[address] = num_bytes
            stretch.more_bytes += num_bytes
            stretch.peak_bytes = max(stretch.peak_bytes, stretch.more_bytes)
    return stretches


def together(stretches: Iterable[Stretch]) -> tuple[int, int]:
    """What is live after them, one behind the other, and the most that is."""
    live_bytes = peak_bytes = 0
    for stretch in stretches:
        peak_bytes = max(peak_bytes, live_bytes + stretch.peak_bytes)
        live_bytes += stretch.more_bytes
    return live_bytes, peak_bytes


def _happenings(events: Iterable[Any]) -> Iterator[Happening]:
    """What `counted` takes. Blocks lie below what the caller's code gave a name to (`record_function`)."""
    for event in events:
        if event.name == "[memory]":
            block = event.extra_fields
            yield event.start_time_ns, block.ptr, block.alloc_size
        elif event.name.startswith(_MARK):
            yield event.start_time_ns, event.name.removeprefix(_MARK)
        yield from _happenings(event.children)


@contextmanager
def _quiet() -> Iterator[None]:
    before = os.environ.get(_QUIET)
    os.environ[_QUIET] = "99"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_QUIET]
        else:
            os.environ[_QUIET] = before


@contextmanager
def _errors_alone() -> Iterator[None]:
    """What torch's core library logs below errors, whichever thread's, is not written."""
    try:
        level = ctypes.c_int.in_dll(ctypes.CDLL("libc10.so"), _LOG_LEVEL)
    except (OSError, ValueError):  # another build, which logs otherwise: a line too many is no reason not to count
        yield
        return
    before = level.value
    level.value = max(before, _ERRORS)
    try:
        yield
    finally:
        level.value = before
