"""What `offload-rt train` does: model and data in, an engine around it, the loop, the result out. Only wiring."""

from __future__ import annotations

import argparse
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from offload_rt import optim
from offload_rt._engine import Engine
from offload_rt.checkpoint.saved_adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_kind
from offload_rt.cli.calibrate_first import calibrate_first
from offload_rt.cli.model_folder import check_length, find_model, load_transformers, longest_row, set_values
from offload_rt.config import adapter_folder, parse_adapters, parse_bytes
from offload_rt.errors import ConfigError
from offload_rt.plans.cuts import cuts_from_json
from offload_rt.running.steps import WARM_STEPS
from offload_rt.running.tracing import require_writable
from offload_rt.storage.durable import make_folders
from offload_rt.training.batches import Batches, check_packing
from offload_rt.training.data import DataReport, load_examples
from offload_rt.training.data_files import data_files
from offload_rt.training.drive_care import DriveCare
from offload_rt.training.evaluation import Evaluation
from offload_rt.training.events import require_installed
from offload_rt.training.identity import file_digest, model_digest, place_and_content
from offload_rt.training.loop import TrainingResult, train
from offload_rt.training.options import TrainingOptions
from offload_rt.training.run import num_steps
from offload_rt.training.run_folder import EVAL_LOSS, RunFolder
from offload_rt.transfers.device_cuda import find_device
from offload_rt.wiring.runtime_options import RuntimeOptions
from planners.errors import format_bytes

INGEST_SECONDS = 2.0
"""Between two lines of progress while weights are encoded."""


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
    with RunFolder.locked(options.out) as folder:
        return _train(arguments, options, care, trace, folder, model_folder)


def _train(
    arguments: argparse.Namespace,
    options: TrainingOptions,
    care: DriveCare,
    trace: Path | None,
    folder: RunFolder,
    model_folder: Path,
) -> int:
    """Runs what the command line says in the run's folder, which is locked; returns the exit code."""
    console = Console()
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    saved = None if arguments.full else adapter_folder(arguments.adapters)
    if saved is not None:
        adapter_kind(saved)
    data = data_files(arguments.data)
    held_out_data = None if arguments.eval_data is None else data_files(arguments.eval_data)
    settings = {
        **_begun_with(folder, arguments, model_folder, data, saved),
        "bits": arguments.bits, "max_grad_norm": arguments.max_grad_norm,
        "seed": arguments.seed, "full": arguments.full, "optimizer": arguments.optimizer,
        "batch_size": arguments.batch_size, "packing": arguments.packing,
    }  # fmt: skip
    if options.resume:
        folder.require_same({**options.settings(), **settings})
    else:
        folder.require_free()
    tokenizer, model_on_meta, settings_of_model = load_transformers(model_folder)
    if arguments.seq_len is not None and (warning := check_length(model_on_meta, arguments.seq_len)):
        say(f"warning: {warning}")
    load = partial(
        load_examples,
        tokenizer=tokenizer,
        too_long=arguments.too_long,
        prompts="raw" if arguments.raw_prompts else "template",
    )
    examples, data_report = load(data, seq_len=arguments.seq_len or longest_row(model_on_meta))
    if arguments.seq_len is None:
        # Memory is planned for the longest row there is, not for one that never comes.
        arguments.seq_len = max(len(example) for example in examples)
    pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    batches_of = partial(
        Batches,
        batch_size=arguments.batch_size,
        seq_len=arguments.seq_len,
        seed=arguments.seed,
        packing=arguments.packing,
        pad_token_id=pad_token_id or 0,
    )
    batches, held_out, held_out_report = batches_of(examples), None, None
    if held_out_data is not None:
        held_out_examples, held_out_report = load(held_out_data, seq_len=arguments.seq_len)
        held_out = batches_of(held_out_examples)
    total_steps = num_steps(options, batches)
    if trace is not None and arguments.trace_steps > total_steps:
        raise ConfigError(f"--trace-steps: {arguments.trace_steps} are to be traced, the run has {total_steps}")
    _show_settings(console, arguments, saved, data_report, held_out_report, total_steps)
    calibrate_first(arguments.device, arguments.nvme, arguments.plan, say)
    torch.manual_seed(arguments.seed)
    keeps_cuts = options.resume and not arguments.other_cuts and folder.cuts is not None
    with Engine(
        model_on_meta,
        checkpoint=model_folder,
        bits=arguments.bits,
        adapters=None if arguments.full else _adapters(saved or arguments.adapters),
        device=arguments.device,
        device_memory=arguments.device_memory,
        host_memory=arguments.host_memory,
        nvme=arguments.nvme,
        batch_size=arguments.batch_size,
        seq_len=arguments.seq_len,
        accumulation_steps=arguments.accumulation_steps,
        max_grad_norm=arguments.max_grad_norm,
        optimizer=_optimizer(arguments.optimizer, arguments.lr) if arguments.full else None,
        lr=None if arguments.full else arguments.lr,
        plan=arguments.plan,
        progress=_IngestProgress(console),
        options=RuntimeOptions(
            cuts=cuts_from_json(folder.cuts or {}, of=str(folder.path)) if keeps_cuts else None,
            packed_products="measured" if arguments.packed_products else None,
        ),
    ) as engine:
        say(engine.summary())
        engine.model.train()
        if trace is not None:
            num_left = total_steps - (folder.last_step() if options.resume else 0)
            wait = max(0, min(WARM_STEPS, num_left - arguments.trace_steps))
            make_folders(trace.parent)
            engine.trace(trace, steps=arguments.trace_steps, wait=wait, on_ready=say)
        if arguments.packing:
            check_packing(engine, vocab_size=len(tokenizer), seq_len=arguments.seq_len)

        def save(result_folder: Path) -> None:
            while_training = set_values(model_on_meta.config, **settings_of_model)
            try:
                engine.save_pretrained(result_folder)
            finally:
                set_values(model_on_meta.config, **while_training)
            tokenizer.save_pretrained(result_folder)

        drives = [drive.path for drive in engine.config.nvme]
        result = train(
            engine,
            batches,
            options,
            settings=settings,
            console=console,
            care=care,
            drives=drives,
            evaluation=None if held_out is None else Evaluation(engine, held_out),
            save_best=save if arguments.keep_best else None,
            folder=folder,
        )
        if result.interrupted is not None:
            return 128 + result.interrupted
        result_folder = options.out / ("model" if arguments.full else "adapter")
        save(result_folder)
        _show_result(console, result, engine.report(), result_folder, folder.best)
    return 0


def _begun_with(
    folder: RunFolder, arguments: argparse.Namespace, model_folder: Path, data: Sequence[Path], saved: Path | None
) -> dict[str, Any]:
    """Model, data and the adapter in `saved`, by place and content: the same content in another place is the same."""
    before = folder.settings()
    settings: dict[str, Any] = place_and_content(
        "model", os.path.realpath(model_folder), model_digest(model_folder), before
    )
    if all(path.is_file() for path in data):  # a pipe is read once; its examples are compared when a run goes on
        places, contents = ", ".join(map(os.path.realpath, data)), "-".join(map(file_digest, data))
        settings |= place_and_content("data", places, contents, before)
    if saved is None:
        return settings | {"adapters": arguments.adapters}
    content = "-".join(file_digest(saved / name) for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS))
    return settings | place_and_content("adapters", os.path.realpath(saved), content, before)


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
    console: Console,
    arguments: argparse.Namespace,
    saved: Path | None,
    data_report: DataReport,
    held_out_report: DataReport | None,
    total_steps: int,
) -> None:
    """Every setting as it takes effect, before anything slow happens."""
    shown: dict[str, object] = {
        "model": arguments.model,
        "data": f"{', '.join(arguments.data)}: {data_report}",
        **({} if held_out_report is None else {"held out": _held_out(arguments, held_out_report)}),
        "weights": "NF4, double quantization" if arguments.bits == 4 else "as in the checkpoint",
        "trains": f"all parameters, by {arguments.optimizer}"
        if arguments.full
        else f"adapters: {_described(arguments.adapters, saved)}",
        "budgets": f"device {arguments.device_memory or 'measured'}, host {arguments.host_memory or 'one tier'}",
        "nvme": ", ".join(arguments.nvme) if arguments.nvme else "none",
        "batch": f"{arguments.batch_size} x {arguments.seq_len} tokens"
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


def _described(adapters: str, saved: Path | None) -> str:
    if saved is not None:
        return f"go on from {saved} ({adapter_kind(saved)}, as configured there)"
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
