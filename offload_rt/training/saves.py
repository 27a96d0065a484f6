"""Where a run's state is saved, and what of it is the newest: commits on NVMe, and folders in the run's own.

An engine that trains in full with `nvme=`, or whose adapters' state is there, commits there without copying anything;
then folders are made only when they are asked for. Any other engine saves folders. A commit belongs to the run whose id
it carries: the state of a model lies in one place on a drive, whichever run trains it.

A run goes on under other budgets than it was begun with, on other drives, or on another machine. So its saves are
looked for wherever they may be: where this engine commits, in the run's own folder, where the run has ever committed,
and on the drives that are given now.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from offload_rt.checkpoint.values import unpack_values
from offload_rt.errors import ConfigError, OffloadError, StorageError
from offload_rt.storage.commit_peek import peek
from offload_rt.training.run_folder import RunFolder


class SavingEngine(Protocol):
    """What saving needs of `offload_rt.Engine`."""

    @property
    def committed(self) -> Mapping[str, Any] | None: ...
    @property
    def commit_folder(self) -> Path: ...
    def save_checkpoint(self, folder: Any, /) -> object: ...


class Progress:
    """The loop's own tracked state: which run, and how many of its steps are done.

    A commit has everything but schedulers as it was when the engine's step returned, before the loop had counted it:
    `in_step` says so, and whoever loads such a commit counts that step.
    """

    def __init__(self, run_id: str, out: Path) -> None:
        self.step = 0
        self.in_step = False
        self._run = {"run": run_id, "out": str(out.absolute())}

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "in_step": self.in_step, **self._run}

    def belong_to(self, run_id: str) -> None:
        self._run["run"] = run_id

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = int(state["step"])
        self.in_step = bool(state.get("in_step"))
        self._run["run"] = state.get("run", self._run["run"])


@dataclass(frozen=True)
class Save:
    """One that can be loaded."""

    step: int
    folder: Path
    describe: str


class Saves:
    """The saves of the run in `folder`. Creating the object only looks."""

    def __init__(
        self,
        engine: SavingEngine,
        folder: RunFolder,
        progress: Progress,
        *,
        keep_last: int,
        drives: Sequence[Path] = (),
    ) -> None:
        """`drives` are the folders on NVMe that were given."""
        self._engine = engine
        self._folder = folder
        self._progress = progress
        self._keep_last = keep_last
        self._drives = tuple(drives)
        self.commits = engine.committed is not None

    def newest(self) -> Save | None:
        """The newest save that this engine has made; at the same step, the commit, which needs no copying."""
        return max(self._own(), key=lambda save: save.step, default=None)

    def find(self) -> Save | None:
        """The newest save of this run, wherever it is; None where none was made yet. Only looks.

        A run whose folder was removed, but not its commits, is taken over. Raises `ConfigError` where this engine's
        commits are another run's, which would be lost, and where steps were
        committed and none of them is found.
        """
        commit = self._commit()
        if commit is not None and commit["run"] and commit["out"] == str(self._folder.path.absolute()):
            self._folder.take_over(commit["run"])
        if commit is not None and commit["run"] != self._folder.run_id:
            raise ConfigError(self._in_the_way(commit))
        elsewhere, problems = self._elsewhere()
        newest = max([*self._own(), *elsewhere], key=lambda save: save.step, default=None)
        done, committed_in = self._folder.last_step(), self._folder.commit_folders
        if newest is None and done and committed_in:
            raise ConfigError(
                f"resume: {self._folder.path} has done {done} steps and committed them in {committed_in[0]}, where "
                f"none of them is found, nor on the drives that are given"
                + "".join(f" ({problem})" for problem in problems)
                + "; give --nvme the folder that they are in now"
            )
        return newest

    def _own(self) -> list[Save]:
        found = [Save(step, path, path.name) for step, path in self._folder.checkpoints()]
        commit = self._commit()
        if commit is not None and commit["run"] == self._folder.run_id:
            step = commit["step"] + commit["in_step"]
            found.insert(0, Save(step, self._engine.commit_folder, f"the commit of step {step} on NVME"))
        return found

    def _elsewhere(self) -> tuple[list[Save], list[str]]:
        """Commits of this run that are not where this engine commits; and what is wrong with those that should be."""
        saves, problems = [], []
        seen = {self._engine.commit_folder.resolve()} if self.commits else set()
        recorded = self._folder.commit_folders
        for folder in [*recorded, *(path for drive in self._drives for path in sorted(drive.glob("offload_rt-*")))]:
            if folder.resolve() in seen:
                continue
            seen.add(folder.resolve())
            try:
                commit = peek(folder)
            except OffloadError as error:
                if folder in recorded:
                    problems.append(str(error))
                continue  # somebody else's
            if commit is None:
                continue
            progress = _progress_of(unpack_values(commit.payload))
            if progress is not None and progress["run"] == self._folder.run_id:
                step = progress["step"] + progress["in_step"]
                saves.append(Save(step, folder, f"the commit of step {step} in {folder}"))
        return saves, problems

    def require_free(self) -> None:
        """Raises `ConfigError` where the drive holds the state of a run, this one or another: it would be lost. And
        where the run in the folder has steps that are committed anywhere else: nobody would find them any more.
        """
        commit = self._commit()
        if commit is not None:
            raise ConfigError(self._in_the_way(commit))
        elsewhere, _ = self._elsewhere()
        if elsewhere:
            newest = max(elsewhere, key=lambda save: save.step)
            raise ConfigError(
                f"out: {self._folder.path} holds an unfinished run ({newest.describe}); continue it with --resume, or "
                f"give another folder"
            )

    def save(self) -> Save:
        """Makes what there is now durable, unless it is. Blocks."""
        if self.commits:
            commit = self._commit()
            if commit is None or commit["step"] + commit["in_step"] != self._progress.step:
                self._engine.save_checkpoint(self._engine.commit_folder)
            step = self._progress.step
            return Save(step, self._engine.commit_folder, f"the commit of step {step} in {self._engine.commit_folder}")
        return self.copy()

    def copy(self) -> Save:
        """Saves a folder of its own, and removes old ones. Blocks. Raises as `require_run_folder`."""
        self.require_run_folder()
        path = self._folder.checkpoint_path(self._progress.step)
        if not path.exists():
            self._engine.save_checkpoint(path)
        self._folder.prune(keep_last=self._keep_last)
        return Save(self._progress.step, path, str(path))

    def require_run_folder(self) -> None:
        """Raises `StorageError` where the folder was moved or removed, or its lock: says what is saved, and where."""
        here, place = self._folder.path, self._folder.place()
        if place == here.absolute():
            return
        commit = self.newest() if self.commits else None
        if place is not None or (here.is_dir() and RunFolder(here).run_id == self._folder.run_id):
            checkpoints = RunFolder(place or here).checkpoints()
            saved = commit.describe if commit else checkpoints[-1][1].name if checkpoints else "the beginning"
            what = f"left without its lock, which keeps other runs out: go on with --resume, from {saved}"
            if place is not None:
                what = f"moved to {place}: go on with --resume --out {place}, from {saved}"
        elif commit is not None:
            what = f"removed, with all that was in it: go on with --resume, from {commit.describe}"
        else:
            what = "removed, with all that was in it: nothing of this run is saved"
        what = f"step {self._progress.step} was trained, and meanwhile the folder was {what}"
        raise StorageError(what, path=str(here), errno=errno.ENOENT)

    def require_found(self) -> None:
        """Raises `StorageError` where commits are not found any more by whoever goes on with this run: their folder was
        removed, or moved. Then a copy was saved first.
        """
        folder = self._engine.commit_folder if self.commits else None
        if folder is None or folder.exists():
            return
        copy = self.copy()
        raise StorageError(
            f"was removed, or moved, while step {copy.step} was trained; that is saved in {copy.folder}: go on with "
            f"--resume", path=str(folder), errno=errno.ENOENT,
        )  # fmt: skip

    def _commit(self) -> Mapping[str, Any] | None:
        """The loop's values of the newest commit; None where there is none with a step in it."""
        committed = self._engine.committed
        if not committed or not committed["step"]:
            return None
        return _progress_of(committed) or {"run": None, "out": None, "step": committed["step"], "in_step": False}

    def _in_the_way(self, commit: Mapping[str, Any]) -> str:
        folder = self._engine.commit_folder
        whose = f"the run in {commit['out']}" if commit["out"] else "a run of another program"
        goes_on = f"continue it with --resume --out {commit['out']}, or remove" if commit["out"] else "remove"
        return (
            f"nvme: {folder} holds step {commit['step'] + commit['in_step']} of {whose}, for the same model and "
            f"optimizer; {goes_on} its state with `offload-rt clean --state --yes --nvme {folder.parent}`"
        )


def _progress_of(values: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The loop's own values of a commit; None where another program made it."""
    progress = values.get("tracked", {}).get("progress")
    return progress if isinstance(progress, Mapping) else None
