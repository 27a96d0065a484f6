"""What a person sees while it trains: a live bar on a terminal, else a plain line now and then. No torch."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from planners.errors import format_bytes

logger = logging.getLogger("offload_rt")

PLAIN_SECONDS = 5.0
"""Between two lines where there is no terminal."""
AVERAGED_STEPS = 20
"""Rates and the remaining time are means over this many steps."""


@dataclass(frozen=True, kw_only=True)
class StepNumbers:
    """What one step came to."""

    step: int
    loss: float
    tokens: int
    seconds: float
    bytes_read: int
    """In this step, from NVME."""
    memory: Mapping[str, int]
    """Tier to managed bytes."""
    seconds_besides: float = 0.0
    """What is still to come besides steps: evaluations."""


class Display:
    """A context manager; `step` after each step, `say` for a sentence."""

    def __init__(
        self,
        console: Console,
        *,
        total_steps: int,
        first_step: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._total_steps = total_steps
        self._clock = clock
        self._recent: deque[StepNumbers] = deque(maxlen=AVERAGED_STEPS)
        self._last_line_at: float | None = None
        self._progress: Progress | None = None
        self._is_lost = False
        if console.is_terminal:
            self._progress = Progress(
                TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=20),
                TextColumn("{task.fields[line]}"), console=console,
            )  # fmt: skip
            self._task = self._progress.add_task("", total=total_steps, completed=first_step, line="first step")

    def __enter__(self) -> Display:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def say(self, text: str) -> None:
        """Shows a sentence. An output that takes no more (its drive is full) is no reason to end a run: that is warned
        of once, and no more is shown. Whose reader has gone raises `BrokenPipeError`.
        """
        if self._is_lost:
            return
        try:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        except BrokenPipeError:
            raise
        except OSError as error:
            self._is_lost = True
            logger.warning("the output cannot be written any more (%s); training goes on, see metrics.jsonl", error)

    def step(self, numbers: StepNumbers) -> None:
        self._recent.append(numbers)
        if self._progress is not None:
            self._progress.update(self._task, completed=numbers.step, line=self.line())
            return
        now = self._clock()
        is_last = numbers.step == self._total_steps
        if self._last_line_at is None or is_last or now - self._last_line_at >= PLAIN_SECONDS:
            self._last_line_at = now
            self.say(f"step {numbers.step}/{self._total_steps}  {self.line()}")

    def line(self) -> str:
        """Loss of the last step, rates over the recent ones, remaining time, memory by tier."""
        last = self._recent[-1]
        seconds = max(sum(numbers.seconds for numbers in self._recent), 1e-9)
        tokens_per_second = sum(numbers.tokens for numbers in self._recent) / seconds
        bytes_per_second = sum(numbers.bytes_read for numbers in self._recent) / seconds
        remaining = (self._total_steps - last.step) * seconds / len(self._recent) + last.seconds_besides
        parts = [
            f"loss {last.loss:.4f}",
            f"{tokens_per_second:.0f} tokens/s",
            f"ETA {format_seconds(remaining)}",
            f"read {format_bytes(bytes_per_second)}/s",
        ]
        parts += [f"{tier} {format_bytes(num_bytes)}" for tier, num_bytes in last.memory.items()]
        return "  ".join(parts)


def format_seconds(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
