"""Has the C library map large blocks each by itself, for as long as an engine's plan leaves little room for holes.

[Note: mapped blocks]
What a layer frees while it runs, glibc does not find again ([Note: holes] in `heap`), and a guard that looks between
layers sees the process when it has grown already: by four times a layer's tensors, where layers of 56 MiB made results
of 1 to 6 MiB. A block that is mapped by itself leaves no hole: its pages are the kernel's again when it is freed. But
they are cleared for whoever asks next: such a step took 8.6 seconds of processor time, 7.1 with a guard that gave all
holes back twice a layer, and 5.1 with a heap as large as it liked. So only a tight plan asks for it, and only for
blocks that its room for holes would hold few of. Results that can be foretold lie in an arena there (`transients`).

    mallopt(M_MMAP_THRESHOLD, ...)      blocks from here on are mapped, unless a hole fits
    mallopt(M_TRIM_THRESHOLD, ...)      what is free at the heap's end is given back by `free` itself

Both hold for the whole process. Engines that are open at once get what the tightest of them asks for; the last one that
closes, or is collected without that, leaves 32 and 64 MiB, which is what glibc's own thresholds come to in a process
that has freed large blocks. They would move by themselves, but no call lets them move again. Who has set them for the
process (in the environment: `MALLOC_MMAP_THRESHOLD_`, `GLIBC_TUNABLES`) keeps them, and a C library without `mallopt`
has nothing to be told.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import threading
import weakref
from collections import deque

BLOCKS_IN_HOLES = 16
"""Room for holes holds so many blocks of the size from which they are mapped. Between 8 and 32 (docs/log.md): with 32,
all parameters on 400 MiB took a fifth more processor time; with 8, 24 layers of 4096 tokens 12 MiB more memory."""
LEAST_MAPPED_BYTES = 128 << 10
"""glibc's own first threshold."""
MOST_MAPPED_BYTES = 32 << 20
"""The largest that it takes, and what its own grows to."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_lock = threading.Lock()


class MappedBlocks:
    """What one engine asks for: nothing, at first. Methods may be called from any thread."""

    def __init__(self) -> None:
        self.least_bytes: int | None = None
        """Blocks of this size are mapped, for this engine; None where it leaves them to the C library."""
        self._number = next(_numbers)
        weakref.finalize(self, _leaves, self._number).atexit = False

    def ask(self, hole_bytes: int) -> None:
        """Blocks are to be mapped where `hole_bytes` hold few of them."""
        if _is_set_outside() or _mallopt is None:
            return
        least = min(max(hole_bytes // BLOCKS_IN_HOLES, LEAST_MAPPED_BYTES), MOST_MAPPED_BYTES)
        with _lock:
            self.least_bytes = least
            _asked[self._number] = least
            _set(min(_asked.values()))
        _take_out()

    def close(self) -> None:
        """Leaves blocks to the C library, or to other engines. May be called twice."""
        self.least_bytes = None
        _leaves(self._number)


_numbers = itertools.count()
_asked: dict[int, int] = {}
"""By number, what engines ask for. Changed under the lock."""
_gone: deque[int] = deque()
"""Those that ask for nothing any more, and are still among them."""
_mallopt = getattr(ctypes.CDLL(None), "mallopt", None)


def _leaves(number: int) -> None:
    """May be called inside any allocation, also of the thread that holds the lock: then that one takes it out."""
    _gone.append(number)
    _take_out()


def _take_out() -> None:
    """Does not block: who holds the lock calls this when it is free again."""
    while _gone and _lock.acquire(blocking=False):
        try:
            asked = [_asked.pop(_gone.popleft(), None) for _ in range(len(_gone))]
            if any(least is not None for least in asked):
                _set(min(_asked.values(), default=MOST_MAPPED_BYTES))
        finally:
            _lock.release()


def _set(least_bytes: int) -> None:
    if _mallopt is not None:
        _mallopt(_M_MMAP_THRESHOLD, least_bytes)
        _mallopt(_M_TRIM_THRESHOLD, min(BLOCKS_IN_HOLES // 4 * least_bytes, 2 * MOST_MAPPED_BYTES))


def _is_set_outside() -> bool:
    return "MALLOC_MMAP_THRESHOLD_" in os.environ or "mmap_threshold" in os.environ.get("GLIBC_TUNABLES", "")
