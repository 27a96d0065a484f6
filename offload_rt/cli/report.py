"""`offload-rt report`: what a training run has come to, from its folder, while it runs or long after. No torch."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from offload_rt.errors import ConfigError
from offload_rt.running import comparison
from offload_rt.training.run_folder import RunFolder, low_memory_text
from planners.errors import format_bytes

TAIL_SHARE = 0.1
"""Of the logged steps: what the last losses are averaged over."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", metavar="RUN", help="the folder that train was given as --out")
    parser.add_argument("--json", action="store_true", help="everything as one JSON object")


def run(arguments: argparse.Namespace) -> int:
    numbers = collect(Path(arguments.out))
    if arguments.json:
        sys.stdout.write(json.dumps(numbers, indent=1) + "\n")
        return 0
    for name, text in lines(numbers):
        sys.stdout.write(f"{name + ':' if name else '':<12} {text}\n")
    return 0


def collect(path: Path) -> dict[str, Any]:
    """All that `path` says of its run. Raises `ConfigError` where there is no run, `CheckpointError` for a bad file."""
    folder = RunFolder(path)
    if not folder.exists:
        raise ConfigError(f"report: {path} holds no run; give the folder that train had as --out")
    metrics = folder.metrics()
    return {
        "run": {
            "folder": str(path), "id": folder.run_id, "settings": folder.settings(), "finished": folder.finished_at(),
            "checkpoints": [step for step, _ in folder.checkpoints()],
        },
        "steps": summarise(metrics) if metrics else None,
        "low_memory": folder.low_memory(),
        "evaluations": summarise_evaluations(folder.evaluations()),
        "engine": folder.report(),
    }  # fmt: skip


def summarise(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of logged steps, at least one: losses, and medians with quartiles of what a step takes.

    The first step of a process also builds what later ones reuse, so that it counts only where there is no other.
    """
    losses = [float(line["loss"]) for line in metrics]
    tail = losses[-max(1, round(TAIL_SHARE * len(losses))) :]
    best = min(range(len(losses)), key=losses.__getitem__)
    steady = metrics[1:] or metrics
    return {
        "logged": len(metrics),
        "last_step": metrics[-1]["step"],
        "epoch": metrics[-1]["epoch"],
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "tail_loss": statistics.fmean(tail),
        "lowest_loss": losses[best],
        "lowest_loss_step": metrics[best]["step"],
        "seconds": _spread([line["seconds"] for line in steady]),
        "tokens_per_second": _spread([line["tokens"] / max(line["seconds"], 1e-9) for line in steady]),
        "bytes_read": _spread([line["bytes_read"] for line in steady]),
    }


def summarise_evaluations(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Of those with the newest held-out data: the newest, and the lowest loss; None where there is none.

    Losses are None where they were not finite.
    """
    same = [line for line in lines if line["eval_data"] == lines[-1]["eval_data"]]
    if not same:
        return None
    finite = [line for line in same if line["eval_loss"] is not None]
    lowest = min(finite, key=lambda line: line["eval_loss"], default=None)
    return {
        "made": len(same),
        "with_other_data": len(lines) - len(same),
        "tokens": same[-1]["eval_tokens"],
        "last_step": same[-1]["step"],
        "last_loss": same[-1]["eval_loss"],
        "lowest_loss": None if lowest is None else lowest["eval_loss"],
        "lowest_loss_step": None if lowest is None else lowest["step"],
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(values) == 1:
        return dict.fromkeys(("median", "low", "high"), values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def lines(numbers: Mapping[str, Any]) -> list[tuple[str, str]]:
    """`collect`'s numbers for people."""
    run, steps, engine = numbers["run"], numbers["steps"], numbers["engine"]
    settings = run["settings"]
    state = f"finished at step {run['finished']}" if run["finished"] is not None else "not finished"
    if run["checkpoints"]:
        state += f"; checkpoints at {', '.join(map(str, run['checkpoints']))}"
    found = [("run", f"{run['folder']}: {state}")]
    found += [(name, str(settings[name])) for name in ("model", "data") if name in settings]
    if settings:
        trains = f"all parameters, by {settings.get('optimizer')}" if settings.get("full") else settings.get("adapters")
        found.append(("trains", f"{trains}; lr {settings.get('lr')}, {settings.get('schedule')}"))
    if steps is None:
        found.append(("steps", "none was logged"))
    else:
        pace, tokens, read = steps["seconds"], steps["tokens_per_second"], steps["bytes_read"]
        found += [
            ("steps", f"{steps['last_step']}, in epoch {steps['epoch']}; {steps['logged']} logged"),
            (
                "loss",
                f"{steps['first_loss']:.4f} at first, {steps['last_loss']:.4f} at last; mean of the last tenth "
                f"{steps['tail_loss']:.4f}, lowest {steps['lowest_loss']:.4f} at step {steps['lowest_loss_step']}",
            ),
            (
                "a step",
                f"{pace['median']:.2f} s in the median, quartiles {pace['low']:.2f} to {pace['high']:.2f}; "
                f"{tokens['median']:.0f} tokens a second; {format_bytes(int(read['median']))} read",
            ),
        ]
    if numbers["evaluations"] is not None:
        found.append(("held out", _evaluations_line(numbers["evaluations"])))
    if low := numbers["low_memory"]:
        found.append(("low memory", f"{len(low)} time(s); {low_memory_text(low[-1])}"))
    if engine is not None:
        found += _engine_lines(engine)
    return found


def _evaluations_line(evaluations: Mapping[str, Any]) -> str:
    last, lowest = evaluations["last_loss"], evaluations["lowest_loss"]
    text = f"loss {'not finite' if last is None else f'{last:.4f}'} at step {evaluations['last_step']}"
    if lowest is not None:
        text += f", lowest {lowest:.4f} at step {evaluations['lowest_loss_step']}"
    text += f"; {evaluations['tokens']} tokens, {evaluations['made']} evaluation(s)"
    if evaluations["with_other_data"]:
        text += f"; {evaluations['with_other_data']} with other data left out"
    return text


def _engine_lines(engine: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Of the last process's engine."""
    allocator = engine["allocator"]
    memory = ", ".join(f"{tier} {format_bytes(used)}" for tier, used in engine["memory"].items() if used)
    steady = engine.get("steady_step")  # a run that ended early has none
    steps = comparison.lines(steady) if steady else []
    return [
        ("plan", f"{engine['plan']}; I/O by {engine['io']}, NF4 by {engine['nf4']}, on {engine['device']}"),
        ("memory", f"{memory or 'none'} planned"),
        (
            "allocator",
            f"{format_bytes(allocator['planned_bytes'])} planned; beside arenas the process grew by "
            f"{format_bytes(allocator['peak_bytes'])} at most, with what Python and libraries took; it peaked at "
            f"{format_bytes(engine['peak_resident_bytes'])}",
        ),
        *_rehearsal_line(engine.get("rehearsal")),
        *_under("at most", comparison.peak_lines(engine.get("peaks") or {})),
        (
            "moved",
            f"{format_bytes(engine['bytes_read'])} read, {format_bytes(engine['bytes_written'])} written "
            f"({format_bytes(int(engine['bytes_written_per_step']))} a step); "
            f"{engine['stall_seconds']:.2f} s waited, {engine['prefetch_misses']} prefetches missed",
        ),
        *_under("measured", steps),
    ]


def _under(name: str, texts: Sequence[str]) -> list[tuple[str, str]]:
    return [("" if number else name, text) for number, text in enumerate(texts)]


def _rehearsal_line(rehearsal: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    if rehearsal is None or rehearsal["measured_bytes"] is None:
        return []
    measured, planned = (format_bytes(rehearsal[name]) for name in ("measured_bytes", "planned_bytes"))
    return [("rehearsal", f"the longest step takes {measured} of tensors, {planned} planned: {rehearsal['result']}")]
