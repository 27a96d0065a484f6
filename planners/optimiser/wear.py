"""What a plan for adapters may write where nobody says: drives wear by being written, and adapters need no writes.

A drive is rated for so many bytes over its warranty; at that pace it outlives the warranty, however long it trains.
What is written faster buys time with the drive's life: a plan of 70B at batch 8 that swaps to NVMe saves 7 % of the
time, and with it half a day until the drive is at the end of its rating, a week later. So plans for adapters keep to
the pace, unless none does, or the drive's life would save a month of training (`WORTH_SECONDS`); the prediction says
what would be faster and how long the drives would last. A limit that is given (`Problem.max_written_bytes`) replaces
it. Where all parameters train, state on the drive has to be written every step: plans write as little as a small
slowdown allows (`mip.WEAR_SLOWDOWN`), and their days are said as well.
"""

from __future__ import annotations

from typing import Any

from planners.plans.plan import Plan
from planners.problems.hardware import Hardware
from planners.problems.problem import Problem, Training

WARRANTY_SECONDS = 5 * 365 * 86400.0
"""Of consumer and data centre drives alike: five years, or the rated bytes, whichever comes first."""
USUAL_RATED_BYTES = 600 * 10**12
"""Of a drive whose rating is not known: what 1 TB of consumer flash (TLC) is rated for."""

WORTH_SECONDS = 30 * 86400.0
"""Of training that using up the drives' rating has to save: a month's electricity of a machine with one GPU (400 W) is
about the price of such a drive."""


def rated_bytes(hardware: Hardware) -> int:
    """What the drives together are rated for; 600 TB each where it is not known."""
    return hardware.endurance_bytes or USUAL_RATED_BYTES * len(hardware.drives)


def default_limit_bytes(problem: Problem, plan: Plan) -> int | None:
    """Of a step that takes as long as `plan` does: what to write at most, commits included, where `plan` writes more.

    None where `plan` keeps to the pace, a limit is given, or all parameters train.
    """
    if problem.max_written_bytes is not None or problem.workload.training is not Training.ADAPTERS:
        return None
    if not problem.hardware.drives:
        return None
    workload = problem.workload
    limit = int(rated_bytes(problem.hardware) / WARRANTY_SECONDS * float(plan.predicted["step_seconds"]))
    if workload.commit_every:  # which is asked for, and no choice of a plan
        committed = workload.trainable_params * (workload.state_bytes_per_param + workload.weight_bytes_per_param)
        limit += -(-committed // workload.commit_every)
    return limit if plan.predicted["ssd_bytes_written_per_step"] > limit else None


def is_worth_its_writes(problem: Problem, free: Plan, slower: Plan) -> bool:
    """Whether `free`, which writes at more than the pace, saves enough before the drives' rating is used up."""
    step = float(free.predicted["step_seconds"])
    gain = float(slower.predicted["step_seconds"]) / step - 1
    return gain * _seconds_to_rating(problem, free) >= WORTH_SECONDS


def spared(problem: Problem, limit_bytes: int, free: Plan) -> dict[str, Any]:
    """What a prediction says of the limit: how large it is, and what the plan without it takes and writes."""
    return {
        "limit_bytes": limit_bytes,
        "step_seconds_without": float(free.predicted["step_seconds"]),
        "ssd_bytes_written_without": int(free.predicted["ssd_bytes_written_per_step"]),
        "days_to_endurance_without": _seconds_to_rating(problem, free) / 86400,
    }


def _seconds_to_rating(problem: Problem, plan: Plan) -> float:
    steps = rated_bytes(problem.hardware) / float(plan.predicted["ssd_bytes_written_per_step"])
    return steps * float(plan.predicted["step_seconds"])
