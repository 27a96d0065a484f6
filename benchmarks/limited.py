"""Runs a command that may hang: it, and all that it has started, end when its time is over.

It is interrupted before it is killed, so that a Python program says where it was, and pytest what has failed so far.
"""

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

TAIL_BYTES = 32000
LAST_LINES = 40
GRACE_SECONDS = 5.0
"""Of its time, for what it still has to say when it is interrupted."""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int | None
    """Its exit status; None where its time was over."""
    tail: str
    """The end of what it wrote on stdout and stderr."""


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """What starts inside can be interrupted. What a shell has put into the background ignores that, and so do its
    children, otherwise. For the main thread.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if before is signal.SIG_IGN:
            signal.signal(signal.SIGINT, before)


def run_limited(command: Sequence[str], seconds: float, environment: Mapping[str, str] | None = None) -> Ended:
    """Blocks until `command` ends, at most `seconds`. It writes to a file: a pipe would be held by its children."""
    with tempfile.TemporaryFile() as output, interruptible():
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,
        )  # fmt: skip
        code: int | None = None
        try:
            code = process.wait(max(seconds - GRACE_SECONDS, 1.0))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS)
        finally:
            if code is None:  # its children, too, whether or not it has ended
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(max(0, output.seek(0, os.SEEK_END) - TAIL_BYTES))
        return Ended(code, output.read().decode(errors="replace"))


def last_words(tail: str) -> list[str]:
    """The last lines, without the frames of C++ that torch puts behind what went wrong, dozens of them."""
    return [line for line in tail.strip().splitlines() if not line.startswith("frame #")][-LAST_LINES:]
