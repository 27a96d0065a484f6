"""SIGINT and SIGTERM, for a loop that ends after the step they met: the first one is noted, the second aborts."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Stop:
    """Which signal asked for an end."""

    signal: signal.Signals | None = None


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """Notes the signals that come while the body runs. Elsewhere than in the main thread, none is watched."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    process = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:  # a forked child, such as a data loader's worker, which inherits this
            if number == signal.SIGTERM:  # is to end; Ctrl-C, which a terminal sends to all, is the loop's to answer
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if stop.signal is not None:
            restore()
            os.kill(os.getpid(), number)
            return
        stop.signal = signal.Signals(number)
        # Not through the console: the signal may have come in the middle of one of its writes.
        with contextlib.suppress(OSError):
            os.write(2, f"{stop.signal.name}: finishing this step, then saving (a second signal aborts)\n".encode())

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        restore()
