"""The demo's facts as checks and as a table. Nothing here measures or knows a number beforehand."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from planners.errors import format_bytes

LAYERS_AT_A_TIME = 3
PASSES = 2
"""A training step reads each layer at most once for forward and once for backward."""
CLEAR_P = 1e-3
COUNTED_SHARE = 0.95
"""Of our reads that the kernel's own count must confirm; it counts only what really came from a drive."""


def checks(facts: dict[str, Any]) -> dict[str, bool]:
    """What has to hold, by name. The gain is not asked of a quick run."""
    engine, accuracy, same = facts["engine"], facts["accuracy"], facts["same_outputs"]
    two_passes = PASSES * engine["steps"] * engine["num_layers"] * engine["layer_bytes"]
    found = {
        f"at most {LAYERS_AT_A_TIME} layers in memory": engine["layers_at_a_time"] <= LAYERS_AT_A_TIME
        and engine["layers_resident"] == 0
        and engine["layers_on_nvme"] == engine["num_layers"],
        "at most two reads of a layer a step": 0 < engine["bytes_read"] <= two_passes,
        "fetches are the schedule's": engine["fetches"] == engine["scheduled_fetches"],
        "no weight written": engine["bytes_written"] == 0,
        "same outputs in plain peft": same["same_tokens"] and same["same_logits"],
    }
    if engine["direct_io"] and engine["phases"]["training"]["kernel_bytes_read"]:
        kernel_bytes = engine["phases"]["training"]["kernel_bytes_read"]
        found["the kernel counted the reads"] = kernel_bytes >= COUNTED_SHARE * engine["bytes_read"]
    if not facts["quick"]:
        gain = accuracy["right_after"] > accuracy["right_before"] and accuracy["mcnemar_p"] < CLEAR_P
        found["clear gain (p < 0.001)"] = gain
    return found


def show(facts: dict[str, Any], console: Console) -> None:
    table = Table(show_header=False, title=f"SmolLM2-135M, NF4 + LoRA, seed {facts['seed']}")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for head, rows in _sections(facts).items():
        table.add_row(f"[bold]{head}[/bold]")
        for name, value in rows.items():
            table.add_row(f"  {name}", value)
        table.add_section()
    table.add_row("[bold]what has to hold[/bold]")
    for name, holds in facts["checks"].items():
        table.add_row(f"  {name}", "[green]yes[/green]" if holds else "[bold red]NO[/bold red]")
    console.print(table)


def _sections(facts: dict[str, Any]) -> dict[str, dict[str, str]]:
    engine, accuracy, same = facts["engine"], facts["accuracy"], facts["same_outputs"]
    training = engine["phases"]["training"]
    num = accuracy["num_questions"]

    def share(right: int, p_value: float | None = None) -> str:
        text = f"{right} of {num} ({right / num:.1%})"
        return text if p_value is None else f"{text}, p = {p_value:.1g}"

    def plain(name: str) -> str:
        run = facts[name]
        peak = run["phases"]["training"]["peak_bytes"]
        return f"{format_bytes(peak)}, {peak / engine['compared_peak_bytes']:.1f} times as much"

    def speed(run: dict[str, Any]) -> str:
        return "unknown" if run["tokens_per_second"] is None else f"{run['tokens_per_second']:.0f} tokens/s"

    def counted(num_bytes: int | None) -> str:
        return "not counted here" if num_bytes is None else format_bytes(num_bytes)

    own = "" if engine["peak_is_per_phase"] else " (with evaluation: it cannot be set back here)"
    return {
        f"right on {num} held-out questions": {
            "before": share(accuracy["right_before"]),
            "before, first number said": share(accuracy["right_before_first_number"]),
            "after (McNemar against before)": share(accuracy["right_after"], accuracy["mcnemar_p"]),
            "best fixed rule (against after)": share(accuracy["right_by_rule"], accuracy["mcnemar_p_against_rule"]),
            "that rule": accuracy["best_fixed_rule"],
        },
        "peak memory above the imports": {
            f"{engine['compared_steps']} steps": format_bytes(engine["compared_peak_bytes"]) + own,
            "as many in plain peft, bf16": plain("plain"),
            "the same, with recompute": plain("plain_recompute"),
            f"all {engine['steps']} steps": format_bytes(training["peak_bytes"]) + own,
            "any phase (store, evaluation)": format_bytes(engine["peak_bytes"]),
            "layers in memory at a time": f"{engine['layers_at_a_time']:g} of {engine['num_layers']}, "
            f"{format_bytes(engine['layer_bytes'])} each",
        },
        "NVMe, in training": {
            "read, by our count": format_bytes(engine["bytes_read"])
            + ("" if engine["direct_io"] else " (through the page cache)"),
            "read, by the kernel's": counted(training["kernel_bytes_read"]),
            "frozen bytes written": format_bytes(engine["bytes_written"]),
            "all written (training state)": counted(training["kernel_bytes_written"]),
            "waited for reads": f"{engine['stall_seconds']:.2f} s, "
            f"{engine['stall_seconds'] / engine['training_seconds']:.1%} of training",
            "prefetch misses": f"{engine['prefetch_misses']} of {engine['fetches']} fetches",
        },
        "time": {
            "training": f"{engine['steps']} steps, {engine['tokens']} tokens, {engine['training_seconds']:.0f} s",
            "speed": speed(engine),
            "plain peft, bf16": speed(facts["plain"]),
            "the same, with recompute": speed(facts["plain_recompute"]),
            "the whole demo": f"{facts['wall_seconds']:.0f} s, {facts['cpu_seconds']:.0f} s of CPU time",
        },
        "adapter": {
            "folder": facts["adapter"],
            "difference in plain peft": f"{same['largest_difference']:g} ({same['num_prompts']} prompts' logits)",
        },
    }
