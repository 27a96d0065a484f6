"""What the demo's processes share: a meter for memory, drive and time, and children that answer in JSON.

[Note: how memory is measured]
Peak process memory is the kernel's: VmHWM, all resident memory of the process at its highest, whoever allocated it.
From it we subtract the base, VmRSS once torch, transformers and peft are imported and the data is ready, before the
model. At the head of each phase the peak is set back (free memory is returned to the kernel, then "5" is written to
/proc/self/clear_refs), so that a phase shows its own. Where that is not permitted, a phase shows the highest until its
end, and `resettable` is False. The meter is the same for the engine's process and for plain peft's.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Meter:
    """Cuts a process's life into phases. Make it when imports are done, before the model."""

    def __init__(self) -> None:
        self.base_bytes = _status_bytes("VmRSS")
        self.resettable = True
        self.phases: dict[str, dict[str, Any]] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Seconds, CPU seconds, peak bytes above the base and bytes from and to the drive inside."""
        self.resettable &= _reset_peak()
        drive, begin, cpu_begin = _drive_bytes(), time.monotonic(), time.process_time()
        yield
        seconds, cpu_seconds = time.monotonic() - begin, time.process_time() - cpu_begin
        moved = {key: value - drive[key] for key, value in _drive_bytes().items() if key in drive}
        self.phases[name] = {
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "peak_bytes": self.peak_bytes(),
            "kernel_bytes_read": moved.get("read_bytes"),
            "kernel_bytes_written": moved.get("write_bytes"),
        }

    def peak_bytes(self) -> int:
        """Above the base, since the phase began."""
        return _status_bytes("VmHWM") - self.base_bytes

    def facts(self) -> dict[str, Any]:
        """All phases, and what the process came to."""
        return {
            "base_bytes": self.base_bytes,
            "peak_is_per_phase": self.resettable,
            "peak_bytes": max(phase["peak_bytes"] for phase in self.phases.values()),
            "phases": self.phases,
        }


def run_child(script: str, *words: str | Path) -> dict[str, Any]:
    """Runs one of the demo's scripts to its end; returns the JSON object it printed, if it printed one."""
    path = Path(__file__).with_name(script)
    ran = subprocess.run([sys.executable, path, *words], stdout=subprocess.PIPE, text=True, check=False)
    if ran.returncode != 0:
        raise SystemExit(f"{script} {' '.join(map(str, words))} ended with exit code {ran.returncode}")
    answer: dict[str, Any] = json.loads(ran.stdout) if ran.stdout.strip() else {}
    return answer


def cpu_seconds_of_all() -> float:
    """CPU time of this process and of its children that have ended."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage)


def _reset_peak() -> bool:
    """Sets VmHWM back to what is resident now; False where not permitted. See [Note: how memory is measured]."""
    with contextlib.suppress(OSError, AttributeError):  # a C library other than glibc has no malloc_trim
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"/proc/self/status has no {key}")


def _drive_bytes() -> dict[str, int]:
    """What the kernel counts for this process; empty on kernels that do not count."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return {}
    return {key: int(value) for key, value in (line.split(": ") for line in lines)}
