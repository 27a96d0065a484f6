"""The loop behind `offload-rt train`: steps, what is due behind each of them, and its end, by a signal or not.

It drives an engine through its public methods only and owns no tensor. How far a run is, and how it goes on exactly
there, is `run`. It is not a trainer to be subclassed: for anything else, write the five lines around `engine.backward`
and `engine.step` yourself.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from offload_rt.errors import ConfigError
from offload_rt.training.display import Display, StepNumbers, format_seconds
from offload_rt.training.drive_care import DriveCare
from offload_rt.training.evaluation import Evaluated, Evaluation, Evaluations
from offload_rt.training.events import Events
from offload_rt.training.memory_watch import MemoryWatch
from offload_rt.training.options import TrainingOptions
from offload_rt.training.run import ResumableBatches, Run, TrainingEngine
from offload_rt.training.run_folder import RunFolder
from offload_rt.training.stop_signal import Stop, stop_on_signal


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """How a run ended."""

    step: int
    """Steps taken in all."""
    loss: float | None
    """Of the last step; None if this call took none."""
    tokens: int
    """Seen by this call, padding left out."""
    seconds: float
    """Wall time of this call's steps, without evaluations."""
    interrupted: signal.Signals | None
    """The signal that ended the run early, after its state was saved: before its last step, or before the evaluation
    behind that.
    """
    checkpoint: Path | None
    """The newest one: a folder, or where commits are."""
    evaluated: Evaluated | None = None
    """The newest of this call."""


def train(
    engine: TrainingEngine,
    batches: ResumableBatches,
    options: TrainingOptions,
    *,
    settings: Mapping[str, Any] | None = None,
    console: Console | None = None,
    care: DriveCare | None = None,
    drives: Sequence[Path] = (),
    evaluation: Evaluation | None = None,
    save_best: Callable[[Path], object] | None = None,
    folder: RunFolder | None = None,
) -> TrainingResult:
    """Trains until the last step, or until SIGINT or SIGTERM, and saves.

    `folder` is that of `options.out`, where the caller has it locked; left out, it is locked until this returns.
    `settings` are further values (plain JSON) that must not change when the run is resumed; `drives` are folders on
    NVMe where commits of a run that is resumed may be besides. `evaluation` is made behind every `options.eval_every`
    steps and the last one; a signal leaves it out, and a run that is resumed makes up for one that is missing. Until
    it does, a run whose last one is missing is not finished.
    `save_best` saves what trains to a folder, whole: it is called where an evaluation has the lowest loss. Raises
    `RunInUse` while somebody else trains into `options.out`, `ConfigError` if that holds another run, or if `care`
    allows less than the run writes to the drive (then what was done is saved), `StorageError` where the folder was
    removed or moved, `NonFiniteLoss` at the first loss that is not finite.
    Signals are watched only when called from the main thread: the first one ends the run after the step it
    met, with its state saved, the second aborts at once.
    """
    with RunFolder.locked(options.out) if folder is None else contextlib.nullcontext(folder) as held:
        optimizer = _optimizer_of(engine, options)
        fixed = {**options.settings(), **(settings or {})}
        if options.resume:
            held.require_same(fixed)
        else:
            held.require_free()
        if evaluation is None and options.eval_every is not None:
            raise ConfigError("eval_every: there is no evaluation; give its data")
        if evaluation is None and save_best is not None:
            raise ConfigError("save_best: there is no evaluation; give its data")
        run = Run(engine, optimizer, batches, options, held, drives=drives)
        writers = run.start(fixed)
        with (
            contextlib.closing(held),
            Events(writers) as events,
            Display(console or Console(), total_steps=run.total_steps, first_step=run.step) as display,
            stop_on_signal() as stop,
            MemoryWatch(held.memory_file) as watch,
        ):
            evaluations = Evaluations(
                evaluation, held, events, display.say, every=options.eval_every, total_steps=run.total_steps,
                is_to_stop=lambda: stop.signal is not None, save_best=save_best,
            )  # fmt: skip
            steps = _Steps(run, care or DriveCare(), evaluations, events, display, watch)
            steps.begin()
            while run.steps_left > 0 and stop.signal is None:
                steps.take()
            return steps.end(stop)


def _optimizer_of(engine: TrainingEngine, options: TrainingOptions) -> torch.optim.Optimizer:
    """Raises `ConfigError` where it has none, or was not made for `options`."""
    optimizer = engine.optimizer
    if optimizer is None:
        raise ConfigError("train: nothing trains; give the engine adapters, or leave some parameters trainable")
    declared = getattr(getattr(engine, "config", None), "accumulation_steps", options.accumulation_steps)
    if declared != options.accumulation_steps:
        raise ConfigError(
            f"accumulation_steps: the engine was made for {declared}, the loop has {options.accumulation_steps}"
        )
    return optimizer


class _Steps:
    """Those of a run that this call takes, with what is due behind each of them, and at the end."""

    def __init__(
        self,
        run: Run,
        care: DriveCare,
        evaluations: Evaluations,
        events: Events,
        display: Display,
        watch: MemoryWatch,
    ) -> None:
        self._run, self._care, self._evaluations = run, care, evaluations
        self._events, self._display, self._watch = events, display, watch
        self._first_step, self._begin = run.step, time.monotonic()
        self._second_step_at = self._begin
        self._tokens = 0
        self._bytes_read = 0
        """What the engine had read when the coming step could begin."""

    def begin(self) -> None:
        """Says where the run goes on and what it will write, and makes up for an evaluation that is missing. Blocks."""
        run = self._run
        for sentence in run.past():
            self._display.say(sentence)
        report = run.engine.report()
        self._watch.note(run.step, report)
        if writes := self._care.expectation(report, run.steps_left):
            self._display.say(f"writes: {writes}")
        if run.steps_left > 0 and self._evaluations.behind(run.step):
            report = run.engine.report()
        self._bytes_read = int(report.get("bytes_read", 0))

    def take(self) -> None:
        """Takes the next step, unless the engine leaves it out, and does what is due behind it. Blocks."""
        run = self._run
        begin = time.monotonic()
        micro_batches = [next(run.batches) for _ in range(run.options.accumulation_steps)]
        lr = run.lr
        loss = run.take_step(micro_batches)
        if loss is None:
            return
        run.saves.require_run_folder()
        report = run.engine.report()
        self._watch.note(run.step, report)
        if report.get("cuts") is not None:
            run.folder.note_cuts(report["cuts"])
        self._tell(self._numbers(loss, micro_batches, report, time.monotonic() - begin), report, lr)
        self._save(report)
        if run.steps_left > 0 and self._evaluations.behind(run.step):  # the last one is saved first
            self._bytes_read = int(run.engine.report().get("bytes_read", 0))
        self._check_writes(report)

    def _numbers(
        self, loss: float, micro_batches: Sequence[Mapping[str, Any]], report: Mapping[str, Any], seconds: float
    ) -> StepNumbers:
        """What the step came to that took `seconds`, after which the engine gave `report`."""
        run = self._run
        bytes_read = int(report.get("bytes_read", 0))
        numbers = StepNumbers(
            step=run.step,
            loss=loss,
            tokens=sum(map(num_tokens, micro_batches)),
            seconds=seconds,
            bytes_read=bytes_read - self._bytes_read,
            memory={str(tier): int(num_bytes) for tier, num_bytes in report.get("memory", {}).items()},
            seconds_besides=self._evaluations.seconds_from(
                run.step, seconds_of_batch=seconds / run.options.accumulation_steps
            ),
        )
        self._tokens += numbers.tokens
        self._bytes_read = bytes_read
        return numbers

    def _tell(self, numbers: StepNumbers, report: Mapping[str, Any], lr: float) -> None:
        metrics = _metrics(numbers, report, lr=lr, epoch=self._run.batches.epoch)
        self._run.folder.append_metrics(metrics)
        self._events.add(metrics, numbers.step)
        self._display.step(numbers)

    def _save(self, report: Mapping[str, Any]) -> None:
        """What is due of it behind the step."""
        run, options = self._run, self._run.options
        if options.save_every is not None and run.step % options.save_every == 0:
            run.save()
            run.folder.write_report(report)
        if options.copy_every is not None and run.step % options.copy_every == 0:
            run.saves.copy()
        run.saves.require_found()

    def _check_writes(self, report: Mapping[str, Any]) -> None:
        """Raises `ConfigError` where the run writes more than is allowed, with its state saved."""
        run, steps_done = self._run, self._run.step - self._first_step
        if steps_done == 1:
            self._second_step_at = time.monotonic()
        seconds = time.monotonic() - self._second_step_at
        try:
            self._care.check(report, steps_done=steps_done, seconds=seconds, steps_left=run.steps_left)
        except ConfigError:
            run.save()
            raise

    def end(self, stop: Stop) -> TrainingResult:
        """Saves, evaluates what was trained to its end, and says how it ended. Blocks."""
        run, display = self._run, self._display
        seconds = time.monotonic() - self._begin - self._evaluations.seconds
        newest = run.saved()
        run.folder.write_report(run.engine.report())
        if run.steps_left == 0:
            self._evaluations.behind(run.step)
        is_done = run.steps_left == 0 and not self._evaluations.is_missing(run.step)
        interrupted = None if is_done else stop.signal
        if interrupted is not None:
            place = newest.describe if newest is not None else "nothing"
            stopped = f"stopped after step {run.step} of {run.total_steps}, saved in {place}"
            if run.steps_left == 0:
                stopped += "; all steps are taken, the last evaluation is not made"
            display.say(f"{interrupted.name}: {stopped}; continue with --resume")
            self._events.close(exit_code=128 + interrupted)  # which may wait for a service
        else:
            run.folder.finish(at_step=run.step)
            display.say(f"finished at step {run.step} after {format_seconds(seconds)}")
            if written := self._care.outcome(run.engine.report(), run.step - self._first_step, seconds):
                display.say(f"written: {written}")
        return TrainingResult(
            step=run.step,
            loss=run.loss,
            tokens=self._tokens,
            seconds=seconds,
            interrupted=interrupted,
            checkpoint=None if newest is None else newest.folder,
            evaluated=self._evaluations.newest,
        )


def num_tokens(batch: Mapping[str, Any]) -> int:
    """Tokens of a micro-batch, padding left out where its mask tells."""
    mask = batch.get("attention_mask")
    return int(mask.sum()) if mask is not None else int(batch["input_ids"].numel())


def _metrics(numbers: StepNumbers, report: Mapping[str, Any], *, lr: float, epoch: int) -> dict[str, Any]:
    metrics: dict[str, Any] = {
        "step": numbers.step, "epoch": epoch, "loss": numbers.loss, "lr": lr, "tokens": numbers.tokens,
        "seconds": round(numbers.seconds, 6), "bytes_read": numbers.bytes_read,
    }  # fmt: skip
    for name in ("stall_seconds", "prefetch_misses", "grad_norm"):
        if isinstance(report.get(name), (int, float)):
            metrics[name] = report[name]
    return {**metrics, "memory": dict(numbers.memory), "time": round(time.time(), 3)}
