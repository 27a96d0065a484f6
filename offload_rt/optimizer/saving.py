"""Checkpoints of full fine-tuning: masters, moments and what else a run is, independent of plans and drives.

A checkpoint is a snapshot of the state's extents (weights are their masters, rounded) with the run's values as payload.
Any engine for the same model and the same kind of optimizer continues from it, wherever its own state rests. The commit
folder is a checkpoint too, which is continued from without copying anything.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from offload_rt.checkpoint.values import pack_values, unpack_values
from offload_rt.errors import CheckpointError, OffloadError
from offload_rt.optimizer.by_name import LAYOUT, check_layout, layout_json, read_layout_json
from offload_rt.optimizer.interface import Check, Values
from offload_rt.optimizer.log_commit import is_log
from offload_rt.optimizer.memory_log import MemoryLog
from offload_rt.optimizer.state import STATE_PREFIX, state_extent
from offload_rt.optimizer.tiered_training import TieredTraining
from offload_rt.storage.snapshot import SnapshotLog, load_snapshot, read_payload, save_snapshot


def save_training(training: TieredTraining, folder: Path) -> int:
    """Saves the state as it is now, durably; returns the bytes copied. `folder` must not exist. Blocks.

    With a log, this commits first; for the commit folder, that is all. Raises what a commit and `save_snapshot` raise.
    """
    if training.home.log is not None:
        training.commits.commit()
    if training.is_commit_folder(folder):
        return 0
    return save_snapshot(
        _log(training), folder, training.home.links, names=_is_state, beside={LAYOUT: layout_json(training.blocks)}
    )


def load_training(training: TieredTraining, folder: Path, check: Check) -> Values:
    """Brings a checkpoint to where state rests; returns what was saved besides. The caller begins again. Blocks.

    It may be the log of another run. Raises `CheckpointError` where it does not fit, `CheckpointVerifyError` where its
    bytes have changed.
    """
    if is_log(folder):
        with training.open_log(folder) as commit:
            commit.check_fits(training.blocks, training.rule.name)
            _take_over(training, folder, check, commit.values, commit.copy_into)
            return commit.values
    values = unpack_values(read_payload(folder)[1])
    check_layout(folder, training.blocks, read_layout_json(folder))
    links = training.home.links
    _take_over(training, folder, check, values, lambda log: load_snapshot(folder, log, links, names=_is_state))
    return values


def load_commit(training: TieredTraining, check: Check) -> Values:
    """Goes back to the newest commit; returns what it holds besides. The caller begins again. Blocks.

    The state is broken from the first change on, until then.
    """
    log = training.home.log
    if log is None or not log.committed.step:
        raise CheckpointError(f"{training.commits.folder}: no step has been committed here")
    values = unpack_values(log.committed.payload)
    check(values)
    training.groups.check(values["groups"])
    training.stop()
    training.commits.broken = f"loading {training.commits.folder} failed"
    log.drop()
    training.load_values(values)
    return values


def _take_over(
    training: TieredTraining, folder: Path, check: Check, values: Values, bring: Callable[[SnapshotLog], object]
) -> None:
    """The state is broken from the first change on, until the caller has begun again."""
    check(values)
    training.groups.check(values["groups"])
    training.stop()
    training.commits.broken = f"loading {folder} failed"
    training.load_values(values)
    try:
        bring(_log(training))
    except OffloadError as error:
        training.commits.broken += f": {error}"
        raise


def _is_state(name: str) -> bool:
    return name.startswith(STATE_PREFIX)


def _log(training: TieredTraining) -> SnapshotLog:
    home = training.home
    if home.log is not None:
        return home.log
    slots = {state_extent(piece): home.pieces[piece.name] for block in training.blocks for piece in block.pieces}
    return MemoryLog(
        slots, home.links, training.step_number, pack_values(training.commits.all_values(), of="a checkpoint")
    )
