"""What lies in a run's output folder, and which of it can be trusted after a kill. No torch.

    out/lock                held by who trains: see `run_lock`
    out/run.json            the run's id, settings that must not change on resume, where on NVMe its steps were
                            committed, the cuts of its plan, the evaluation of `best`, and the step of the run's end
    out/metrics.jsonl       one line a logged step, and one an evaluation behind it, appended; a kill loses at most the
                            line it was writing
    out/memory.jsonl        one line each time that memory ran low; none where it never did
    out/report.json         what the engine said of itself when this run was last saved, or ended
    out/checkpoint-<step>/  complete: engines write elsewhere and rename
    out/best/               what had the lowest held-out loss, where a run keeps it; run.json says of which step
    out/<anything else>     not ours

A checkpoint is removed by renaming it first, so that a folder named checkpoint-<step> is always whole. What a kill left
of one that was being written or removed goes when the run goes on, which may save at other steps.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from offload_rt.errors import CheckpointError, ConfigError, StorageError
from offload_rt.storage.durable import make_folders, os_error, write_atomically
from offload_rt.training.run_lock import RunLock
from planners.errors import format_bytes

logger = logging.getLogger("offload_rt")

EVAL_LOSS = "eval_loss"
CONTENT = " content"
"""Ends the name of a setting that is a digest of what another one names; of several files, one digest each."""


class RunFolder:
    """One run's folder. Creating the object only looks; `begin` writes."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._run_file = self.path / "run.json"
        self._metrics_file = self.path / "metrics.jsonl"
        self._report_file = self.path / "report.json"
        self.memory_file = self.path / "memory.jsonl"
        self._metrics: BinaryIO | None = None
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"out: {self.path} is a file, not a folder")
        self._is_new = False
        self._run_id = str(self._read_run().get("id") or uuid.uuid4().hex)
        self._lock: RunLock | None = None

    @classmethod
    @contextlib.contextmanager
    def locked(cls, path: str | Path) -> Iterator[RunFolder]:
        """The folder, with nobody else training into it until the body ends. It is made, and removed again where
        nothing came into it. Raises `RunInUse`, and `ConfigError` as `require_writable`.
        """
        cls(path).require_writable()
        lock = RunLock(Path(path))
        try:
            folder = cls(path)  # as it is from now on
            folder._lock = lock
            with contextlib.closing(folder):
                yield folder
        finally:
            lock.close()

    def be_new(self) -> None:
        """Is the folder of a run that is begun: what one that left nothing to go on from has written here is not its.

        Changes nothing before `begin`.
        """
        self._is_new = True
        self._run_id = uuid.uuid4().hex

    def take_over(self, run_id: str) -> None:
        """Is the folder of that run from now on, where nothing is left that says which one it was."""
        if not self._run_file.exists() and run_id != self._run_id:
            logger.warning("%s: run.json is gone, and with it the settings of the run that goes on", self.path)
            self._run_id = run_id

    def checkpoints(self) -> list[tuple[int, Path]]:
        """Step and folder of every complete checkpoint, oldest first."""
        found = []
        if self.path.is_dir():
            for entry in self.path.iterdir():
                match = re.fullmatch(r"checkpoint-(\d+)", entry.name)
                if match and entry.is_dir():
                    found.append((int(match[1]), entry))
        return sorted(found)

    @property
    def run_id(self) -> str:
        """Of the run in this folder; a new one where there is none yet, which `begin` writes down."""
        return self._run_id

    @property
    def exists(self) -> bool:
        """Whether a run was begun here."""
        return self._run_file.exists()

    def settings(self) -> dict[str, Any]:
        """What must not change on resume."""
        settings = self._read_run().get("settings", {})
        return settings if isinstance(settings, dict) else {}

    def metrics(self) -> list[dict[str, Any]]:
        """The logged steps, in order."""
        return [line for line in map(json.loads, _whole_lines(self._metrics_file)) if EVAL_LOSS not in line]

    def evaluations(self) -> list[dict[str, Any]]:
        """The evaluations, in order: the lines that have an `eval_loss`, None where it was not finite."""
        return [line for line in map(json.loads, _whole_lines(self._metrics_file)) if EVAL_LOSS in line]

    def low_memory(self) -> list[dict[str, Any]]:
        """When memory ran low, in order: see `memory_watch`."""
        return [json.loads(line) for line in _whole_lines(self.memory_file)]

    def report(self) -> dict[str, Any] | None:
        """What `write_report` wrote last; None if it never did."""
        return self._read_json(self._report_file) or None

    def write_report(self, report: Mapping[str, Any]) -> None:
        """Replaces the engine's report, whole."""
        write_atomically(self._report_file, json.dumps(report, indent=1).encode())

    @property
    def commit_folders(self) -> list[Path]:
        """Where on NVMe steps of the run in this folder were ever committed, the last place first."""
        return [Path(text) for text in self._read_run().get("commits", [])]

    @property
    def cuts(self) -> dict[str, Any] | None:
        """What `note_cuts` noted; None where nothing was."""
        return self._read_run().get("cuts")

    def note_cuts(self, cuts: Mapping[str, Any]) -> None:
        """Keeps the cuts with which the run takes its steps (plain JSON, see `offload_rt.plans.cuts`)."""
        if self.cuts != cuts:
            self._note(cuts=dict(cuts))

    @property
    def best_folder(self) -> Path:
        return self.path / "best"

    @property
    def best(self) -> dict[str, Any] | None:
        """`step`, `eval_loss` and `eval_data` of what `best_folder` holds; None where no run has kept it."""
        return self._read_run().get("best") if self.best_folder.is_dir() else None

    def note_best(self, evaluation: Mapping[str, Any]) -> None:
        """Says which evaluation `best_folder` is of, once that is written."""
        best = {name: evaluation[name] for name in ("step", EVAL_LOSS, "eval_data")}
        self._note(best=best)

    def last_step(self) -> int:
        """The step of the last line of metrics; 0 without one."""
        return max((line.get("step", 0) for line in self.metrics()), default=0)

    def finished_at(self) -> int | None:
        """The step at which the run in this folder came to its end; None if it did not."""
        finished = self._read_run().get("finished")
        return finished if isinstance(finished, int) else None

    def require_free(self) -> None:
        """Raises `ConfigError` if a run's checkpoints, its best or its end are here, which a new run would mix with its
        own.
        """
        checkpoints = self.checkpoints()
        finished = self.finished_at()
        if finished is None and not checkpoints:
            if self.best is not None:
                raise ConfigError(
                    f"out: {self.best_folder} is of step {self.best['step']} of an unfinished run; continue it with "
                    f"--resume, or give another folder"
                )
            return
        if finished is None:
            newest = checkpoints[-1][0]
            raise ConfigError(
                f"out: {self.path} holds an unfinished run (newest checkpoint: step {newest}); "
                "continue it with --resume, or give another folder"
            )
        raise ConfigError(
            f"out: {self.path} holds a run that finished at step {finished}; give another folder, "
            "or --resume with more steps to continue it"
        )

    def require_writable(self) -> None:
        """Raises `ConfigError` where the folder cannot be made or written to. Writes nothing."""
        there = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        if not there.is_dir():
            raise ConfigError(f"out: {there} is a file, not a folder")
        if not os.access(there, os.W_OK | os.X_OK):
            raise ConfigError(f"out: {there} cannot be written to (read-only, or no permission)")

    def place(self) -> Path | None:
        """Where the folder is, as far as its lock tells: somebody may have moved it. None where one is gone."""
        return self.path.absolute() if self._lock is None else self._lock.place()

    def require_same(self, settings: Mapping[str, Any]) -> None:
        """Raises `ConfigError` that lists every setting with which this folder's run was not begun."""
        before = self._read_run().get("settings", {})
        changed = []
        for key, value in settings.items():
            if key not in before or before[key] == value:
                continue
            content = f"{key}{CONTENT}"
            if key.endswith(CONTENT):
                changed.append(_other_content(key.removesuffix(CONTENT), before, settings))
            elif content not in before or content not in settings or before[content] == settings[content]:
                changed.append(f"{key} was {before[key]!r}, is {value!r}")
        if changed:
            raise ConfigError(f"resume: {self.path} was begun with other settings: {'; '.join(changed)}")

    def begin(self, *, at_step: int, settings: Mapping[str, Any], commits: Path | None = None) -> None:
        """Makes the folder; drops the metrics of steps after `at_step`, which will be taken again, and behind `be_new`
        all that another run has written.

        `commits`: where on NVMe the run's steps are committed from now on; None where they are checkpoints here.
        """
        try:
            make_folders(self.path)
            for cut_off in ("checkpoint-*.removing", ".checkpoint-*.partial-*"):
                for entry in self.path.glob(cut_off):
                    shutil.rmtree(entry)
            if self._is_new:
                for file in (self._run_file, self._metrics_file, self._report_file, self.memory_file):
                    file.unlink(missing_ok=True)
                self._is_new = False
            before = self._read_run()
            here = [] if commits is None else [str(commits.absolute())]
            places = here + [place for place in before.get("commits", []) if place not in here]
            run: dict[str, Any] = {
                "id": self._run_id, "commits": places, "settings": {**before.get("settings", {}), **settings},
                **{name: before[name] for name in ("cuts", "best") if name in before},
            }  # fmt: skip
            write_atomically(self._run_file, json.dumps(run, indent=1).encode())
            kept = [line for line in _whole_lines(self._metrics_file) if 0 < json.loads(line).get("step", 0) <= at_step]
            write_atomically(self._metrics_file, "".join(f"{line}\n" for line in kept).encode())
            self._metrics = open(self._metrics_file, "ab", buffering=0)  # noqa: SIM115 - closed by `close`
        except StorageError:
            raise
        except OSError as error:
            raise os_error("cannot be written", self.path, error) from error

    def append_metrics(self, metrics: Mapping[str, Any]) -> None:
        """One line, handed to the kernel at once: it survives this process. Raises `StorageError`."""
        if self._metrics is None:
            raise RuntimeError("append_metrics before begin")
        left = memoryview(f"{json.dumps(metrics)}\n".encode())
        try:
            while left:  # a drive that is almost full takes a part
                left = left[self._metrics.write(left) or 0 :]
        except OSError as error:
            raise os_error("cannot be written", self._metrics_file, error) from error

    def checkpoint_path(self, step: int) -> Path:
        return self.path / f"checkpoint-{step}"

    def prune(self, *, keep_last: int) -> None:
        """Removes all but the newest `keep_last` checkpoints."""
        for _, folder in self.checkpoints()[:-keep_last]:
            removing = folder.with_name(f"{folder.name}.removing")
            folder.rename(removing)
            shutil.rmtree(removing)

    def finish(self, *, at_step: int) -> None:
        self._note(finished=at_step)

    def close(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None

    def _note(self, **entries: Any) -> None:
        write_atomically(self._run_file, json.dumps({**self._read_run(), **entries}, indent=1).encode())

    def _read_run(self) -> dict[str, Any]:
        return self._read_json(self._run_file)

    @staticmethod
    def _read_json(path: Path) -> dict[str, Any]:
        if not path.exists():
            return {}
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error})") from error
        return data if isinstance(data, dict) else {}


def _other_content(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What is said of files that are not those of `before`, as far as digests and places tell."""
    digests, digests_now = (str(each[f"{name}{CONTENT}"]).split("-") for each in (before, now))
    places, places_now = (str(each.get(name, "")).split(", ") for each in (before, now))
    if len(digests) != len(digests_now):
        return f"{name} was {', '.join(places)}, is {', '.join(places_now)}"
    if sorted(digests) == sorted(digests_now):
        return f"{name} has the same files in another order, was {', '.join(places)}"
    if len(places) != len(digests) or len(places_now) != len(digests):
        if places == places_now:
            return f"{name} has other content than the run began with: {', '.join(places_now)}"
        return f"{name} was '{', '.join(places)}', is '{', '.join(places_now)}', which has other content"
    changed = [
        f"{there} has changed" if was == there else f"{there} has other content than {was} had"
        for was, there, digest, digest_now in zip(places, places_now, digests, digests_now, strict=True)
        if digest != digest_now
    ]
    return f"{name}: {', '.join(changed)}"


def low_memory_text(line: Mapping[str, Any]) -> str:
    """A line of `memory.jsonl` for people."""
    held = {
        f"{tier} {owner}": num_bytes
        for tier, holdings in line["holdings"].items()
        if tier != "nvme"
        for owner, num_bytes in holdings.items()
    }
    most = sorted(held.items(), key=lambda item: -item[1])[:3]
    text = (
        f"memory ran low behind step {line['step']}: {format_bytes(line['left_bytes'])} left of "
        f"{format_bytes(line['total_bytes'])} ({line['of']}), this process had {format_bytes(line['resident_bytes'])}"
    )
    return text + (f"; most for {', '.join(f'{n} {format_bytes(b)}' for n, b in most if b)}" if most else "")


def _whole_lines(path: Path) -> list[str]:
    """The lines of JSON that are whole; the last one may have been cut by a kill."""
    if not path.exists():
        return []
    whole = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if isinstance(json.loads(line), dict):
                whole.append(line)
        except ValueError:
            continue
    return whole
