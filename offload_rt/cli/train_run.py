"""What `offload-rt train` does: model and data in, an engine around it, the loop, the result out. Only wiring."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from offload_rt import optim
from offload_rt._engine import Engine
from offload_rt.checkpoint.saved_adapter import adapter_kind
from offload_rt.cli.calibrate_first import calibrate_first
from offload_rt.cli.model_folder import LanguageModel, check_length, find_model, load_transformers
from offload_rt.cli.train_data import TrainingFiles, TrainingRows
from offload_rt.config import parse_adapters, parse_bytes
from offload_rt.errors import ConfigError
from offload_rt.plans.cuts import cuts_from_json
from offload_rt.running.steps import WARM_STEPS
from offload_rt.running.tracing import require_writable
from offload_rt.storage.durable import make_folders
from offload_rt.training.batches import check_packing
from offload_rt.training.data import DataReport
from offload_rt.training.drive_care import DriveCare
from offload_rt.training.evaluation import Evaluation
from offload_rt.training.events import require_installed
from offload_rt.training.loop import TrainingResult, train
from offload_rt.training.options import TrainingOptions
from offload_rt.training.run import num_steps
from offload_rt.training.run_folder import EVAL_LOSS, RunFolder
from offload_rt.transfers.device_cuda import find_device
from offload_rt.wiring.runtime_options import RuntimeOptions
from planners.errors import format_bytes

INGEST_SECONDS = 2.0
"""Between two lines of progress while weights are encoded."""


@dataclass(frozen=True, kw_only=True)
class _Call:
    """A command line that was checked as far as it can be without reading a file of data or weights."""

    arguments: argparse.Namespace
    options: TrainingOptions
    care: DriveCare
    trace: Path | None
    model_folder: Path


def train_from_arguments(arguments: argparse.Namespace) -> int:
    """Runs a parsed command line; returns the exit code."""
    options = TrainingOptions(
        out=Path(arguments.out), steps=arguments.steps, epochs=arguments.epochs, lr=arguments.lr,
        warmup_ratio=arguments.warmup_ratio, schedule=arguments.schedule,
        accumulation_steps=arguments.accumulation_steps, save_every=arguments.save_every,
        copy_every=arguments.copy_every, keep_last=arguments.keep_last, logdir=arguments.logdir,
        eval_every=arguments.eval_every, wandb=arguments.report_to == "wandb", resume=arguments.resume,
    )  # fmt: skip
    care = DriveCare(
        tbw_bytes=None if arguments.tbw is None else parse_bytes(arguments.tbw, field="tbw"),
        max_bytes_per_day=None
        if arguments.max_writes_per_day is None
        else parse_bytes(arguments.max_writes_per_day, field="max_writes_per_day"),
    )
    # Everything that can be wrong with the call is found before a weight is read.
    require_installed(tensorboard=options.logdir is not None, wandb=options.wandb)
    trace = None if arguments.trace is None else Path(arguments.trace)
    if trace is not None and (trace.parent.exists() or options.out not in trace.parents):
        require_writable(trace)  # the run's folder is made when the run begins
    model_folder = find_model(arguments.model)
    find_device(arguments.device)
    call = _Call(arguments=arguments, options=options, care=care, trace=trace, model_folder=model_folder)
    with RunFolder.locked(options.out) as folder:
        return _train(call, folder)


def _train(call: _Call, folder: RunFolder) -> int:
    """Trains into the run's folder, which is locked; returns the exit code."""
    arguments, options = call.arguments, call.options
    console = Console()
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    files = TrainingFiles.find(arguments, call.model_folder)
    settings = {
        **files.settings(folder.settings()),
        "bits": arguments.bits, "max_grad_norm": arguments.max_grad_norm,
        "seed": arguments.seed, "full": arguments.full, "optimizer": arguments.optimizer,
        "batch_size": arguments.batch_size, "packing": arguments.packing,
    }  # fmt: skip
    if options.resume:
        folder.require_same({**options.settings(), **settings})
    else:
        folder.require_free()
    model = load_transformers(files.model)
    if arguments.seq_len is not None and (warning := check_length(model.module, arguments.seq_len)):
        say(f"warning: {warning}")
    rows = TrainingRows.read(arguments, files, model)
    total_steps = num_steps(options, rows.batches)
    if call.trace is not None and arguments.trace_steps > total_steps:
        raise ConfigError(f"--trace-steps: {arguments.trace_steps} are to be traced, the run has {total_steps}")
    _show_settings(console, arguments, files, rows, total_steps)
    calibrate_first(arguments.device, arguments.nvme, arguments.plan, say)
    torch.manual_seed(arguments.seed)
    with _engine(call, folder, model, files.adapters, rows.seq_len, _IngestProgress(console)) as engine:
        say(engine.summary())
        engine.model.train()
        if call.trace is not None:
            num_left = total_steps - (folder.last_step() if options.resume else 0)
            wait = max(0, min(WARM_STEPS, num_left - arguments.trace_steps))
            make_folders(call.trace.parent)
            engine.trace(call.trace, steps=arguments.trace_steps, wait=wait, on_ready=say)
        if arguments.packing:
            check_packing(engine, vocab_size=len(model.tokenizer), seq_len=rows.seq_len)
        save = partial(model.save, engine.save_pretrained)
        result = train(
            engine,
            rows.batches,
            options,
            settings=settings,
            console=console,
            care=call.care,
            drives=[drive.path for drive in engine.config.nvme],
            evaluation=None if rows.held_out is None else Evaluation(engine, rows.held_out),
            save_best=save if arguments.keep_best else None,
            folder=folder,
        )
        if result.interrupted is not None:
            return 128 + result.interrupted
        result_folder = options.out / ("model" if arguments.full else "adapter")
        save(result_folder)
        _show_result(console, result, engine.report(), result_folder, folder.best)
    return 0


def _engine(
    call: _Call,
    folder: RunFolder,
    model: LanguageModel,
    adapters: Path | str | None,
    seq_len: int,
    progress: _IngestProgress,
) -> Engine:
    """An engine around `model`, which goes on with the cuts of the run in `folder`, unless it may have others."""
    arguments = call.arguments
    keeps_cuts = call.options.resume and not arguments.other_cuts and folder.cuts is not None
    return Engine(
        model.module,
        checkpoint=call.model_folder,
        bits=arguments.bits,
        adapters=None if adapters is None else _adapters(adapters),
        device=arguments.device,
        device_memory=arguments.device_memory,
        host_memory=arguments.host_memory,
        nvme=arguments.nvme,
        batch_size=arguments.batch_size,
        seq_len=seq_len,
        accumulation_steps=arguments.accumulation_steps,
        max_grad_norm=arguments.max_grad_norm,
        optimizer=_optimizer(arguments.optimizer, arguments.lr) if arguments.full else None,
        lr=None if arguments.full else arguments.lr,
        plan=arguments.plan,
        progress=progress,
        options=RuntimeOptions(
            cuts=cuts_from_json(folder.cuts or {}, of=str(folder.path)) if keeps_cuts else None,
            packed_products="measured" if arguments.packed_products else None,
        ),
    )


def _adapters(given: Path | str) -> Any:
    """What the engine takes: the folder of a saved adapter, or the configuration that the text describes."""
    # peft imports it where it is installed, and it would warn of kernels that it lacks and nobody here calls.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import peft
    except ImportError as error:
        raise ConfigError(f"--adapters needs peft ({error}); pip install 'offload-rt[hf]'") from error
    return given if isinstance(given, Path) else peft.LoraConfig(task_type="CAUSAL_LM", **parse_adapters(given))


def _optimizer(name: str, lr: float) -> Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]:
    """What makes the optimizer of that name, with its own defaults besides the learning rate."""
    makers: dict[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]] = {
        "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=lr),
        "adamw-8bit": lambda parameters: optim.AdamW(parameters, lr=lr, moments="8bit"),
        "adamw-bf16": lambda parameters: optim.AdamW(parameters, lr=lr, moments="bfloat16"),
        "lion": lambda parameters: optim.Lion(parameters, lr=lr),
        "sgd": lambda parameters: torch.optim.SGD(parameters, lr=lr, momentum=0.9),
        "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=lr),
    }
    return makers[name]


class _IngestProgress:
    """The engine's `progress=`: a line now and then while weights are encoded, with speed and remaining time."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._phase = ""
        self._begin = self._last_line_at = 0.0

    def __call__(self, phase: str, done_bytes: int, total_bytes: int) -> None:
        now = time.monotonic()
        if phase != self._phase:
            self._phase, self._begin, self._last_line_at = phase, now, now
        if total_bytes <= 0 or (now - self._last_line_at < INGEST_SECONDS and done_bytes < total_bytes):
            return
        self._last_line_at = now
        bytes_per_second = done_bytes / max(now - self._begin, 1e-9)
        remaining = (total_bytes - done_bytes) / max(bytes_per_second, 1.0)
        self._console.print(
            f"{phase}: {format_bytes(done_bytes)} of {format_bytes(total_bytes)}, "
            f"{bytes_per_second / 1e9:.2f} GB/s, {remaining:.0f} s left",
            markup=False,
            highlight=False,
        )


def _show_settings(
    console: Console, arguments: argparse.Namespace, files: TrainingFiles, rows: TrainingRows, total_steps: int
) -> None:
    """Every setting as it takes effect, before anything slow happens."""
    shown: dict[str, object] = {
        "model": arguments.model,
        "data": f"{', '.join(arguments.data)}: {rows.report}",
        **({} if rows.held_out_report is None else {"held out": _held_out(arguments, rows.held_out_report)}),
        "weights": "NF4, double quantization" if arguments.bits == 4 else "as in the checkpoint",
        "trains": f"all parameters, by {arguments.optimizer}"
        if files.adapters is None
        else f"adapters: {_described(files.adapters)}",
        "budgets": f"device {arguments.device_memory or 'measured'}, host {arguments.host_memory or 'one tier'}",
        "nvme": ", ".join(arguments.nvme) if arguments.nvme else "none",
        "batch": f"{arguments.batch_size} x {rows.seq_len} tokens"
        + (", packed" if arguments.packing else "")
        + f", {arguments.accumulation_steps} micro-batch(es) a step",
        "steps": total_steps,
        "learning rate": f"{arguments.lr:g}, {arguments.schedule}, warm-up {arguments.warmup_ratio:g}",
        "clipping": "none" if arguments.max_grad_norm is None else f"norm {arguments.max_grad_norm:g}",
        "seed": arguments.seed,
        "out": arguments.out,
    }
    for name, value in shown.items():
        console.print(f"{name + ':':<15} {value}", markup=False, highlight=False, soft_wrap=True)


def _described(adapters: Path | str) -> str:
    if isinstance(adapters, Path):
        return f"go on from {adapters} ({adapter_kind(adapters)}, as configured there)"
    return ", ".join(f"{key}={value}" for key, value in parse_adapters(adapters).items())


def _held_out(arguments: argparse.Namespace, report: DataReport) -> str:
    every = "" if arguments.eval_every is None else f"every {arguments.eval_every} steps and "
    return f"{', '.join(arguments.eval_data)}: {report}; evaluated {every}at the end"


def _show_result(
    console: Console,
    result: TrainingResult,
    report: Mapping[str, Any],
    folder: Path,
    best: Mapping[str, Any] | None,
) -> None:
    table = Table(show_header=False)
    rows = {
        "steps": str(result.step),
        "last loss": "none: no step was left" if result.loss is None else f"{result.loss:.4f}",
        **({} if result.evaluated is None else {"held-out loss": f"{result.evaluated.loss:.4f}"}),
        "tokens": f"{result.tokens} ({result.tokens / max(result.seconds, 1e-9):.0f} a second)",
        "read from NVME": format_bytes(report.get("bytes_read", 0)),
        "waited for it": f"{report.get('stall_seconds', 0.0):.2f} s of {result.seconds:.2f} s",
        "prefetch misses": str(report.get("prefetch_misses", 0)),
        **{f"{tier} memory": format_bytes(used) for tier, used in report.get("memory", {}).items()},
        "result": str(folder),
        **({} if best is None else {"lowest": f"held-out loss {best[EVAL_LOSS]:.4f}, behind step {best['step']}"}),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
