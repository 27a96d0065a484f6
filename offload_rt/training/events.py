"""A run's numbers for TensorBoard, beside `metrics.jsonl`, which has the same ones.

TensorBoard writes from a thread of its own, and says what failed there when it is called the next time. A folder of
events that cannot be written any more is no reason to end a run: that is said once, and no more events are written.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from offload_rt.errors import ConfigError

logger = logging.getLogger("offload_rt")

LEFT_OUT = ("step", "time", "memory")
EVAL = "eval_"
"""What names of an evaluation's numbers begin with."""


class Events:
    """Of one run, in `logdir`. Nothing is written where that is None."""

    def __init__(self, logdir: Path | None) -> None:
        """Raises `ConfigError` where TensorBoard is missing, or the folder cannot be made."""
        self._logdir = logdir
        self._writer: Any = None
        if logdir is None:
            return
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                f"logdir: needs TensorBoard ({error}); pip install 'offload-rt[logging]', or leave it out"
            ) from error
        try:
            self._writer = SummaryWriter(str(logdir))
        except OSError as error:
            raise ConfigError(f"logdir: {logdir} cannot be written ({error})") from error

    def add(self, metrics: Mapping[str, Any], step: int) -> None:
        """The numbers of a step, or of an evaluation behind it. May wait for those before."""
        if self._writer is None:
            return
        try:
            for name, value in metrics.items():
                if name.startswith(EVAL) and isinstance(value, (int, float)):
                    self._writer.add_scalar(f"eval/{name.removeprefix(EVAL)}", value, step)
                elif name not in LEFT_OUT and not name.startswith(EVAL):
                    self._writer.add_scalar(f"train/{name}", value, step)
        except OSError as error:
            self._end(f"from step {step}", error)

    def close(self) -> None:
        """Blocks until all is written."""
        if self._writer is None:
            return
        try:
            self._writer.close()
        except OSError as error:
            self._end("of the last steps", error)

    def _end(self, which: str, error: OSError) -> None:
        self._writer = None
        logger.warning(
            "%s: events %s cannot be written (%s); training goes on without, its numbers are in metrics.jsonl",
            self._logdir, which, error,
        )  # fmt: skip
