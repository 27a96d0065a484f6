"""Which steps are committed, and whether what is in memory and in the log is a whole step.

[Note: when a step is committed]
A loop steps its schedulers after `step` has returned, and draws its next batch before the next forward. So a commit has
everything as it was when `step` returned, but schedulers and learning rates as they are when the next forward begins,
which is when it is made (or by `close`, or by whoever saves or loads before). Not by a `close` because the loop has
failed in between: [Note: steps that a loop has not finished] in `closing`. Where
adapters train, an evaluation of other weights than the step has left, which are put back, commits nothing.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offload_rt.checkpoint.values import pack_values
from offload_rt.closing import Unfinished
from offload_rt.errors import ConfigError, OffloadError
from offload_rt.optimizer.pieces import TrainedBlock
from offload_rt.optimizer.state import StateHome, laid_weights


@dataclass(kw_only=True)
class CommitCounters:
    """What was committed since the start."""

    num_commits: int = 0
    commit_seconds: float = 0.0


class Commits:
    """The commits of one run. Without a log there are none, and none is due. Used by one thread."""

    def __init__(
        self,
        blocks: Sequence[TrainedBlock],
        home: StateHome,
        values: Callable[[], dict[str, Any]],
        groups: Callable[[], list[dict[str, Any]]],
        *,
        every: int | None,
        folder: Path | None,
    ) -> None:
        """`values` gives what the run is besides masters and moments, its `step` among them; `groups` the param groups
        in it as they are now. `every`: steps between commits, None for none. `folder`: where they are.
        """
        self.counters = CommitCounters()
        self.every = every
        self.folder = folder
        self.found_step: int | None = None
        """The step of an earlier run that the log goes on from, until somebody says that this is wanted."""
        if home.log is not None and home.log.committed.step:
            self.found_step = home.log.committed.step
        self.can_go_back = False
        """Whether what is committed is the state that the coming step begins with."""
        self.broken: str | None = None
        """Why the state is not that of a step any more; None where it is."""
        self._blocks = tuple(blocks)
        self._home = home
        self._values = values
        self._groups = groups
        self.extra: Callable[[], Mapping[str, Any]] = dict
        """What the owner's `carry` has set."""
        self._amend: Callable[[dict[str, Any]], dict[str, Any]] = dict
        self._unfinished = Unfinished()
        self._due: dict[str, Any] | None = None
        """What the commit of the last step carries; None where it is made, or not wanted."""

    def carry(self, extra: Callable[[], Mapping[str, Any]], amend: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """Sets what a commit carries besides: plain values and tensors. `amend` replaces what follows a step."""
        self.extra = extra
        self._amend = amend

    @property
    def carried(self) -> tuple[Callable[[], Mapping[str, Any]], Callable[[dict[str, Any]], dict[str, Any]]]:
        """What `carry` has set."""
        return self.extra, self._amend

    def all_values(self) -> dict[str, Any]:
        """What is saved besides masters and moments: plain values and tensors, the owner's included."""
        return {**self._values(), **self.extra()}

    def check_usable(self) -> None:
        """Raises `OffloadError` where the state is broken, `ConfigError` where it is an earlier run's."""
        if self.broken is not None:
            raise OffloadError(f"{self.broken}; go on from the last commit or checkpoint by engine.load_checkpoint")
        if self.found_step is not None:
            raise ConfigError(
                f"{self.folder} holds step {self.found_step} of an earlier run of this model: go on with it by "
                f"engine.load_checkpoint(engine.commit_folder), or remove it with `offload-rt clean --state`"
            )

    @contextmanager
    def broken_unless_done(self, why: str) -> Iterator[None]:
        """What is done inside leaves the state broken if it fails half-way."""
        self.broken = why
        yield
        self.broken = None

    def step_taken(self, step: int) -> None:
        """Notes that the state is that of `step` now, which is to be committed if it is time."""
        self.can_go_back, self._due = False, None
        if self.every is not None and step % self.every == 0:
            self.commit_next()

    def commit_next(self) -> None:
        """The step that was just taken is due, whatever `every` says; unless it is committed, or there is no log."""
        if self._home.log is not None and self._due is None and not self.can_go_back:
            self._due = copy.deepcopy(self.all_values())
            self._unfinished.step_taken()

    def abandon(self) -> None:
        """As `interface.Training` says."""
        if self._due is not None and self._unfinished.has_failed(self._due["step"]):
            self._due = None

    @property
    def is_due(self) -> bool:
        """Whether `finish` would commit."""
        return self._due is not None and self.broken is None

    def finish(self) -> None:
        """Makes the commit of the last step, where it is due. Blocks. See the note above."""
        self._unfinished.next_begins()
        if self.is_due and self._due is not None:
            self._commit(self._amend({**self._due, "groups": self._groups()}))

    def commit(self) -> None:
        """Makes the state as it is now real and durable, wherever it rests. Blocks. Needs a log."""
        self._commit(self.all_values())

    def begin_again(self, step: int) -> None:
        """After state was loaded, that of `step`, wherever it came from."""
        log = self._home.log
        self.can_go_back = log is not None and log.committed.step == step and not log.dirty
        self.found_step = self.broken = self._due = None

    def _commit(self, values: Mapping[str, Any]) -> None:
        log = self._home.log
        if log is None:
            raise ConfigError("commit: state is committed on NVMe; give nvme= a folder")
        self.check_usable()
        begin = time.perf_counter()
        weights = [laid_weights(block) for block in self._blocks if self._home.streams_weights(block)]
        payload = pack_values({**values, "weights": weights}, of="a commit")
        with self.broken_unless_done(f"the commit of step {values['step']} failed"):
            self._home.write_what_rests_in_memory(self._blocks)
            log.commit(values["step"], payload)
        self._due = None
        self.can_go_back = True
        self.counters.num_commits += 1
        self.counters.commit_seconds += time.perf_counter() - begin
