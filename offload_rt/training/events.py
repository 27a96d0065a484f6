"""A run's numbers for TensorBoard and for Weights & Biases, beside `metrics.jsonl`, which has the same ones.

Both write from a thread or a process of their own, and say what failed there when they are called the next time. Events
that cannot be written any more are no reason to end a run: that is said once, and no more of them are written.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from offload_rt.errors import ConfigError

logger = logging.getLogger("offload_rt")

LEFT_OUT = ("step", "time", "memory")
EVAL = "eval_"
"""What names of an evaluation's numbers begin with."""


class Writer(Protocol):
    """Where events go."""

    failures: tuple[type[Exception], ...]
    """What its methods raise where it cannot write."""

    def add(self, numbers: Mapping[str, Any], step: int) -> None: ...
    def close(self, *, exit_code: int) -> None: ...


def require_installed(*, tensorboard: bool, wandb: bool) -> None:
    """Raises `ConfigError` where what is to be reported to is missing, before anything slow happens."""
    if tensorboard:
        _summary_writer()
    if wandb:
        _wandb()


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            f"logdir: needs TensorBoard ({error}); pip install 'offload-rt[logging]', or leave it out"
        ) from error
    return SummaryWriter


def _wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(f"wandb: is not installed ({error}); pip install wandb, or report elsewhere") from error
    return wandb


class TensorBoard:
    """A folder of TensorBoard's."""

    failures: tuple[type[Exception], ...] = (OSError,)

    def __init__(self, logdir: Path, *, at_step: int) -> None:
        """What the folder has of steps after `at_step`, which will be taken again, is shown no more; its files stay.

        Raises `ConfigError` where TensorBoard is missing, or the folder cannot be made.
        """
        self._logdir = logdir
        summary_writer = _summary_writer()
        try:
            self._writer: Any = summary_writer(str(logdir), purge_step=at_step + 1)
        except OSError as error:
            raise ConfigError(f"logdir: {logdir} cannot be written ({error})") from error

    def __str__(self) -> str:
        return str(self._logdir)

    def add(self, numbers: Mapping[str, Any], step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self, *, exit_code: int) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of wandb's, of the same id, so that a run that goes on is one there too. Its project, whether it is offline
    and all else are what its own environment variables say.
    """

    def __init__(self, run_id: str, out: Path, settings: Mapping[str, Any]) -> None:
        """Raises `ConfigError` where wandb is missing, or does not begin."""
        wandb = _wandb()
        self.failures: tuple[type[Exception], ...] = (OSError, wandb.Error)
        try:
            self._run: Any = wandb.init(
                id=run_id, resume="allow", name=out.absolute().name, dir=str(out), config=dict(settings)
            )
        except self.failures as error:
            raise ConfigError(f"wandb: {error} (or set WANDB_MODE=offline)") from error

    def __str__(self) -> str:
        return "wandb"

    def add(self, numbers: Mapping[str, Any], step: int) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self, *, exit_code: int) -> None:
        self._run.finish(exit_code=exit_code)


class Events:
    """Of one run. Leaving its scope closes it: by an error, as a run that failed."""

    def __init__(self, writers: Sequence[Writer] = ()) -> None:
        self._writers = list(writers)

    def add(self, metrics: Mapping[str, Any], step: int) -> None:
        """The numbers of a step, or of an evaluation behind it. May wait for those before."""
        numbers = {
            f"eval/{name.removeprefix(EVAL)}" if name.startswith(EVAL) else f"train/{name}": value
            for name, value in metrics.items()
            if name not in LEFT_OUT and isinstance(value, (int, float))
        }
        for writer in list(self._writers):
            try:
                writer.add(numbers, step)
            except writer.failures as error:
                self._end(writer, f"from step {step}", error)

    def close(self, *, exit_code: int = 0) -> None:
        """Blocks until all is written. With another `exit_code` than 0 wandb shows the run as one that failed. Closed
        again, it does nothing.
        """
        for writer in list(self._writers):
            try:
                writer.close(exit_code=exit_code)
            except writer.failures as error:
                self._end(writer, "of the last steps", error)
        self._writers.clear()

    def __enter__(self) -> Events:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.close(exit_code=0 if error is None else 1)

    def _end(self, writer: Writer, which: str, error: Exception) -> None:
        self._writers.remove(writer)
        logger.warning(
            "%s: events %s cannot be written (%s); training goes on without, its numbers are in metrics.jsonl",
            writer, which, error,
        )  # fmt: skip
