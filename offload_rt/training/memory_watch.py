"""Says when a machine's memory runs low while a run trains, before the kernel kills the process without a word.

Budgets bound what the run takes; what others take is theirs. A thread looks once a second at what is left, of the RAM
or of the cgroup's limit. Where that is little, a line is logged and written to `memory.jsonl` in the run's folder, with
who holds how much of the run's own: it outlives the process. `offload-rt report` and a run that is resumed show it.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from offload_rt.memory.process_memory import MemoryLeft, memory_left, resident_bytes
from offload_rt.training.run_folder import low_memory_text

logger = logging.getLogger("offload_rt")

LOW_SHARE = 0.02
"""Of all there is: with less left, the kernel may kill soon."""
LOOK_SECONDS = 1.0


class MemoryWatch:
    """A context manager: looks when it is entered, and then now and again from a thread of its own."""

    def __init__(
        self,
        path: Path,
        *,
        left: Callable[[], MemoryLeft] = memory_left,
        resident: Callable[[], int] = resident_bytes,
    ) -> None:
        """`path` is the file that lines are appended to; it is made with the first one."""
        self._path = path
        self._left, self._resident = left, resident
        self._noted: tuple[int, Mapping[str, Any]] = 0, {}
        self._told_bytes: int | None = None
        """What was left when it was said last; None while there is enough."""
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="offload_rt-memory", daemon=True)

    def note(self, step: int, report: Mapping[str, Any]) -> None:
        """The run has taken that step, and holds what the engine's `report` says. It is not changed any more."""
        self._noted = step, report

    def look(self) -> None:
        """Looks once. Says so where memory is low: once, and again each time only half of that is left."""
        now = self._left()
        low = LOW_SHARE * now.total_bytes
        if now.left_bytes > 2 * low:
            self._told_bytes = None
        if now.left_bytes >= low or (self._told_bytes is not None and now.left_bytes > self._told_bytes / 2):
            return
        self._told_bytes = now.left_bytes
        step, report = self._noted
        line = {
            "time": round(time.time(), 3), "step": step, "left_bytes": now.left_bytes, "total_bytes": now.total_bytes,
            "of": now.of, "resident_bytes": self._resident(), "base_bytes": report.get("base_bytes"),
            "holdings": report.get("holdings", {}), "allocator": report.get("allocator", {}),
        }  # fmt: skip
        self._write(line)
        logger.warning("%s", low_memory_text(line))

    def __enter__(self) -> MemoryWatch:
        self.look()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_over.wait(LOOK_SECONDS):
            try:
                self.look()
            except Exception as error:  # noqa: BLE001 - nobody waits for this thread, and training does not need it
                logger.warning("memory is not watched any more: %r", error)
                return

    def _write(self, line: Mapping[str, Any]) -> None:
        try:
            file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            try:
                os.write(file, f"{json.dumps(line)}\n".encode())
            finally:
                os.close(file)
        except OSError as error:
            logger.warning("%s: cannot be written (%s)", self._path, error)
