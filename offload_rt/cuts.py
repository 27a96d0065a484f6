"""The cuts of a plan: what a run that goes on under other budgets has to keep, so that its bits are the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from torch import nn

from offload_rt.errors import CheckpointError, ConfigError
from offload_rt.workload import Workload, chunk_tokens_of
from planners.plan import Plan
from planners.streaming import Cuts


def cuts_of(plan: Plan, workload: Workload) -> Cuts:
    """The cuts that `plan` has."""
    together = workload.config.accumulation_steps > 1 and draws_numbers(workload.model)
    return Cuts(
        head_chunk_tokens=plan.head_chunk_tokens, chunk_tokens=chunk_tokens_of(plan, workload),
        layer_major=plan.layer_major if together else None,
    )  # fmt: skip


def check_cuts(plan: Plan, workload: Workload, wanted: Cuts | None) -> None:
    """Raises `ConfigError` where `plan` has others than those that are `wanted`; with None, none are."""
    found = cuts_of(plan, workload)
    if wanted is not None and found != wanted:
        raise ConfigError(
            f"plan: has other cuts ({found.describe()}) than the run that goes on ({wanted.describe()}), so that sums "
            f"would be taken in another order; give a plan with the same, or plan 'auto'"
        )


def cuts_from_json(data: Mapping[str, Any], *, of: str) -> Cuts:
    """What `asdict` made of cuts. Raises `CheckpointError`, which names `of`, for anything else."""
    names = {field.name for field in fields(Cuts)}
    if set(data) != names:
        raise CheckpointError(f"{of}: cuts have {', '.join(sorted(names))}, found {', '.join(sorted(data))}")
    return Cuts(**data)


def cuts_to_json(cuts: Cuts) -> dict[str, Any]:
    """For `cuts_from_json`."""
    return asdict(cuts)


def draws_numbers(model: nn.Module) -> bool:
    """Whether a forward in training draws random numbers, as far as its modules' own values tell (dropout, jitter)."""
    return any(
        isinstance(value, float) and value > 0.0
        for module in model.modules()
        for name, value in vars(module).items()
        if "drop" in name or "jitter" in name or (name == "p" and "Dropout" in type(module).__name__)
    )
