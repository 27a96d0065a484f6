"""The loop behind `offload-rt train`: steps, schedule, metrics, checkpoints, signals, exact resume.

It drives an engine through its public methods only and owns no tensor. What a resumed run needs (engine
state, the schedule, the place in the data, the step) is saved together by the engine, as tracked objects.
It is not a trainer to be subclassed: for anything else, write the five lines around `engine.backward` and
`engine.step` yourself.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from rich.console import Console

from offload_rt.errors import ConfigError, NonFiniteLoss
from offload_rt.training.display import Display, StepNumbers, format_seconds
from offload_rt.training.drive_care import DriveCare
from offload_rt.training.evaluation import Evaluated, Evaluation, Evaluations
from offload_rt.training.events import Events, TensorBoard, WeightsAndBiases, Writer
from offload_rt.training.memory_watch import MemoryWatch
from offload_rt.training.options import TrainingOptions, lr_factor
from offload_rt.training.run_folder import RunFolder, low_memory_text
from offload_rt.training.saves import Progress, Saves, SavingEngine


class TrainingEngine(SavingEngine, Protocol):
    """What the loop needs of `offload_rt.Engine`."""

    @property
    def optimizer(self) -> torch.optim.Optimizer | None: ...
    @property
    def step_number(self) -> int: ...
    def train_batch(self, batches: list[dict[str, Any]], /) -> float: ...
    def track(self, name: str, tracked: Any, /) -> None: ...
    def load_checkpoint(self, folder: Any, /) -> object: ...
    def report(self) -> Mapping[str, Any]: ...


class ResumableBatches(Protocol):
    """An endless iterator over micro-batches that knows its place, such as `training.batches.Batches`."""

    @property
    def epoch(self) -> int: ...
    def num_batches(self, epoch: int, /) -> int: ...
    def __next__(self) -> dict[str, Any]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any], /) -> None: ...


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
    """The signal that ended the run early, after its state was saved."""
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
    steps and the last one; a signal leaves it out, and a run that is resumed makes up for one that is missing.
    `save_best` saves what trains to a folder, whole: it is called where an evaluation has the lowest loss. Raises
    `RunInUse` while somebody else trains into `options.out`, `ConfigError` if that holds another run, or if `care`
    allows less than the run writes to the drive (then what was done is saved), `StorageError` where the folder was
    removed or moved, `NonFiniteLoss` at the first loss that is not finite.
    Signals are watched only when called from the main thread: the first one ends the run after the step it
    met, with its state saved, the second aborts at once.
    """
    if folder is None:
        with RunFolder.locked(options.out) as folder:
            return train(
                engine, batches, options, settings=settings, console=console, care=care, drives=drives,
                evaluation=evaluation, save_best=save_best, folder=folder,
            )  # fmt: skip
    optimizer = engine.optimizer
    if optimizer is None:
        raise ConfigError("train: nothing trains; give the engine adapters, or leave some parameters trainable")
    declared = getattr(getattr(engine, "config", None), "accumulation_steps", options.accumulation_steps)
    if declared != options.accumulation_steps:
        raise ConfigError(
            f"accumulation_steps: the engine was made for {declared}, the loop has {options.accumulation_steps}"
        )
    care = care or DriveCare()
    total_steps = num_steps(options, batches)
    fixed = {**options.settings(), **(settings or {})}
    if options.resume:
        folder.require_same(fixed)
    else:
        folder.require_free()
    if evaluation is None and options.eval_every is not None:
        raise ConfigError("eval_every: there is no evaluation; give its data")
    if evaluation is None and save_best is not None:
        raise ConfigError("save_best: there is no evaluation; give its data")
    progress = Progress(folder.run_id, options.out)
    scheduler = _schedule(optimizer, options, total_steps)
    for name, tracked in (("progress", progress), ("batches", batches), ("scheduler", scheduler)):
        engine.track(name, tracked)

    saves = Saves(engine, folder, progress, keep_last=options.keep_last, drives=drives)
    if options.copy_every is not None and not saves.commits:
        raise ConfigError("copy_every: without commits on NVMe every save is a copy; give save_every")
    found = None
    if options.resume:
        found = saves.find()
    else:
        saves.require_free()
        folder.be_new()
        progress.belong_to(folder.run_id)
    saved_at = 0
    if found is not None:
        engine.load_checkpoint(found.folder)
        if progress.in_step:
            progress.in_step = False
            progress.step += 1
        while scheduler.last_epoch < progress.step:  # who ended between the step that was committed and this
            _advance(scheduler)
        saved_at = progress.step
        for group, lr in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
            group["lr"] = lr
    done_before = folder.last_step()
    writers: list[Writer] = []
    if options.logdir is not None:
        writers.append(TensorBoard(options.logdir, at_step=progress.step))
    folder.begin(at_step=progress.step, settings=fixed, commits=engine.commit_folder if saves.commits else None)
    folder.prune(keep_last=options.keep_last)  # who was killed behind a save may not have come to it
    if options.wandb:
        writers.append(WeightsAndBiases(folder.run_id, folder.path, fixed))
    loss: float | None = None
    tokens = 0
    begin = time.monotonic()
    with (
        contextlib.closing(folder),
        Events(writers) as events,
        Display(
            console or Console(), total_steps=total_steps, first_step=progress.step
        ) as display,
        _stop_on_signal() as stop,
        MemoryWatch(folder.memory_file) as watch,
    ):  # fmt: skip
        if options.resume:
            place = found.describe if found is not None else "the beginning: there is no checkpoint yet"
            again = max(0, done_before - progress.step)
            display.say(f"resuming from {place}" + (f"; {again} step(s) after it are taken again" if again else ""))
            for line in folder.low_memory()[-1:]:
                display.say(f"before, {low_memory_text(line)}")
        report = engine.report()
        watch.note(progress.step, report)
        if writes := care.expectation(report, total_steps - progress.step):
            display.say(f"writes: {writes}")
        evaluations = Evaluations(
            evaluation, folder, events, display.say, every=options.eval_every, total_steps=total_steps,
            is_to_stop=lambda: stop.signal is not None, save_best=save_best,
        )  # fmt: skip
        if evaluations.behind(progress.step):
            report = engine.report()
        bytes_read = int(report.get("bytes_read", 0))
        first_step, second_step_at = progress.step, begin
        while progress.step < total_steps and stop.signal is None:
            step_begin = time.monotonic()
            micro_batches = [next(batches) for _ in range(options.accumulation_steps)]
            lr = scheduler.get_last_lr()[0]
            progress.in_step = True
            steps_before = engine.step_number
            loss = engine.train_batch(micro_batches)
            progress.in_step = False
            if not math.isfinite(loss):
                newest = saves.newest()
                raise NonFiniteLoss(
                    f"step {progress.step + 1}: the loss is {loss}; "
                    + (f"the last good state is {newest.folder}" if newest else "no checkpoint was saved yet")
                )
            if engine.step_number == steps_before:  # left out, as the engine has said: the next batches take this step
                continue
            _advance(scheduler)
            progress.step += 1
            saves.require_run_folder()
            report = engine.report()
            watch.note(progress.step, report)
            if report.get("cuts") is not None:
                folder.note_cuts(report["cuts"])
            step_seconds = time.monotonic() - step_begin
            numbers = StepNumbers(
                step=progress.step,
                loss=loss,
                tokens=sum(map(num_tokens, micro_batches)),
                seconds=step_seconds,
                bytes_read=int(report.get("bytes_read", 0)) - bytes_read,
                memory={str(tier): int(num_bytes) for tier, num_bytes in report.get("memory", {}).items()},
                seconds_besides=evaluations.seconds_from(
                    progress.step, seconds_of_batch=step_seconds / options.accumulation_steps
                ),
            )
            tokens += numbers.tokens
            metrics = _metrics(numbers, report, lr=float(lr), epoch=batches.epoch)
            folder.append_metrics(metrics)
            events.add(metrics, progress.step)
            display.step(numbers)
            if options.save_every is not None and progress.step % options.save_every == 0:
                saves.save()
                folder.write_report(report)
                saved_at = progress.step
            if options.copy_every is not None and progress.step % options.copy_every == 0:
                saves.copy()
            saves.require_found()
            bytes_read += numbers.bytes_read
            if progress.step < total_steps and evaluations.behind(progress.step):  # the last one is saved first
                bytes_read = int(engine.report().get("bytes_read", 0))
            if progress.step == first_step + 1:
                second_step_at = time.monotonic()
            try:
                care.check(
                    report, steps_done=progress.step - first_step, seconds=time.monotonic() - second_step_at,
                    steps_left=total_steps - progress.step,
                )  # fmt: skip
            except ConfigError:
                saves.save()
                raise
        seconds = time.monotonic() - begin - evaluations.seconds
        newest = saves.save() if saved_at != progress.step else saves.newest()
        folder.write_report(engine.report())
        if progress.step == total_steps:
            evaluations.behind(progress.step)
        if stop.signal is not None and progress.step < total_steps:
            place = newest.describe if newest is not None else "nothing"
            display.say(
                f"{stop.signal.name}: stopped after step {progress.step} of {total_steps}, saved in {place}; continue "
                f"with --resume"
            )
            events.close(exit_code=128 + stop.signal)  # which may wait for a service
        else:
            folder.finish(at_step=progress.step)
            display.say(f"finished at step {progress.step} after {format_seconds(seconds)}")
            if written := care.outcome(engine.report(), progress.step - first_step, seconds):
                display.say(f"written: {written}")
        return TrainingResult(
            step=progress.step,
            loss=loss,
            tokens=tokens,
            seconds=seconds,
            interrupted=stop.signal if progress.step < total_steps else None,
            checkpoint=None if newest is None else newest.folder,
            evaluated=evaluations.newest,
        )


def num_steps(options: TrainingOptions, batches: ResumableBatches) -> int:
    """Optimizer steps of the whole run."""
    if options.steps is not None:
        return options.steps
    num_batches = sum(batches.num_batches(epoch) for epoch in range(options.epochs or 0))
    return math.ceil(num_batches / options.accumulation_steps)


def num_tokens(batch: Mapping[str, Any]) -> int:
    """Tokens of a micro-batch, padding left out where its mask tells."""
    mask = batch.get("attention_mask")
    return int(mask.sum()) if mask is not None else int(batch["input_ids"].numel())


def _schedule(
    optimizer: torch.optim.Optimizer, options: TrainingOptions, total_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    if options.lr is not None:
        for group in optimizer.param_groups:
            group["lr"] = options.lr
            group.pop("initial_lr", None)

    def factor(step: int) -> float:
        return lr_factor(step, total_steps=total_steps, warmup_ratio=options.warmup_ratio, schedule=options.schedule)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _advance(scheduler: torch.optim.lr_scheduler.LambdaLR) -> None:
    with warnings.catch_warnings():
        # torch looks whether `optimizer.step` was called; an engine steps each block where its state lies.
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        scheduler.step()


def _metrics(numbers: StepNumbers, report: Mapping[str, Any], *, lr: float, epoch: int) -> dict[str, Any]:
    metrics: dict[str, Any] = {
        "step": numbers.step, "epoch": epoch, "loss": numbers.loss, "lr": lr, "tokens": numbers.tokens,
        "seconds": round(numbers.seconds, 6), "bytes_read": numbers.bytes_read,
    }  # fmt: skip
    for name in ("stall_seconds", "prefetch_misses", "grad_norm"):
        if isinstance(report.get(name), (int, float)):
            metrics[name] = report[name]
    return {**metrics, "memory": dict(numbers.memory), "time": round(time.time(), 3)}


class _Stop:
    """Which signal asked for an end."""

    signal: signal.Signals | None = None


@contextlib.contextmanager
def _stop_on_signal() -> Iterator[_Stop]:
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    process = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:  # a forked child, such as a data loader's worker, which inherits this
            if number == signal.SIGTERM:  # is to end; Ctrl-C, which a terminal sends to all, is the loop's to answer
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if stop.signal is not None:
            restore()
            os.kill(os.getpid(), number)
            return
        stop.signal = signal.Signals(number)
        # Not through the console: the signal may have come in the middle of one of its writes.
        with contextlib.suppress(OSError):
            os.write(2, f"{stop.signal.name}: finishing this step, then saving (a second signal aborts)\n".encode())

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        restore()
