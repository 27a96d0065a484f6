"""Runs a command that may hang: it, and all that it has started, end when its time is over."""

import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

TAIL_BYTES = 8000


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int | None
    """Its exit status; None where its time was over."""
    tail: str
    """The end of what it wrote on stdout and stderr."""


def run_limited(command: Sequence[str], seconds: float, environment: Mapping[str, str] | None = None) -> Ended:
    """Blocks until `command` ends, at most `seconds`. It writes to a file: a pipe would be held by its children."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,
        )  # fmt: skip
        code: int | None
        try:
            code = process.wait(max(seconds, 1.0))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(max(0, output.seek(0, os.SEEK_END) - TAIL_BYTES))
        return Ended(code, output.read().decode(errors="replace"))
