"""Checkpoints of full fine-tuning: masters, moments and what else a run is, independent of plans and drives.

A checkpoint is a snapshot of the state's extents (weights are their masters, rounded) with the run's values as payload.
Any engine for the same model and the same kind of optimizer continues from it, wherever its own state rests. The commit
folder is a checkpoint too, which is continued from without copying anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from offload_rt.checkpoint.values import pack_values, restore_rng, unpack_values
from offload_rt.errors import CheckpointError, OffloadError
from offload_rt.optimizer.adapters import AdapterTraining
from offload_rt.optimizer.by_name import LAYOUT, layout_json
from offload_rt.optimizer.memory_log import MemoryLog
from offload_rt.optimizer.state import STATE_PREFIX, state_extent
from offload_rt.optimizer.training import FullTraining
from offload_rt.snapshot import SnapshotLog, load_snapshot, read_payload, save_snapshot

Check = Callable[[Mapping[str, Any]], None]
Training = FullTraining | AdapterTraining


def save_training(training: FullTraining, folder: Path) -> int:
    """Saves the state as it is now, durably; returns the bytes copied. `folder` must not exist. Blocks.

    With a log, this commits first; for the commit folder, that is all. What was stepped ahead of a step that has not
    come is taken back. Raises what a commit and `save_snapshot` raise.
    """
    training.before_forward("state was saved between backward and step")
    if training.home.log is not None:
        training.commits.commit()
    if is_commit_folder(training, folder):
        return 0
    return save_snapshot(
        _log(training), folder, training.home.links, names=_is_state, beside={LAYOUT: layout_json(training.blocks)}
    )


def load_training(training: FullTraining, folder: Path, check: Check) -> dict[str, Any]:
    """Continues from a checkpoint, or from the commit folder; returns what was saved besides. Blocks.

    `check` may refuse the values, by raising, before anything is changed. Raises `CheckpointError` where the checkpoint
    does not fit, `CheckpointVerifyError` where its bytes have changed.
    """
    log = training.home.log
    training.commits.finish()
    if is_commit_folder(training, folder):
        return load_commit(training, check)
    values = unpack_values(read_payload(folder)[1])
    check(values)
    training.stop()
    training.load_values(values)
    try:
        load_snapshot(folder, _log(training), training.home.links, names=_is_state)
    except OffloadError as error:
        training.commits.broken = f"loading {folder} failed: {error}"
        raise
    training.begin_again((), from_log=log is not None)
    restore_rng(values["rng"])
    return values


def load_commit(training: Training, check: Check) -> dict[str, Any]:
    """Continues from the newest commit; the same as `load_training` for the commit folder."""
    log = training.home.log
    if log is None or not log.committed.step:
        raise CheckpointError(f"{training.commits.folder}: no step has been committed here")
    values = unpack_values(log.committed.payload)
    check(values)
    training.stop()
    log.drop()
    training.load_values(values)
    training.begin_again(values["weights"])
    restore_rng(values["rng"])
    return values


def committed_values(training: Training) -> dict[str, Any] | None:
    """What the newest commit holds besides the state; of a log that was just made, step 0. None without a log."""
    log = training.home.log
    return None if log is None else unpack_values(log.committed.payload)


def is_commit_folder(training: Training, folder: Path) -> bool:
    """Whether `folder` is where the commits of this run are."""
    return training.commits.folder is not None and folder.resolve() == training.commits.folder.resolve()


def _is_state(name: str) -> bool:
    return name.startswith(STATE_PREFIX)


def _log(training: FullTraining) -> SnapshotLog:
    home = training.home
    if home.log is not None:
        return home.log
    slots = {state_extent(piece): home.pieces[piece.name] for block in training.blocks for piece in block.pieces}
    return MemoryLog(
        slots, home.links, training.step_number, pack_values(training.commits.all_values(), of="a checkpoint")
    )
