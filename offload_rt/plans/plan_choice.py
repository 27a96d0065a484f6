"""`plan="auto"`: the fixed streaming rule's plan, or the optimiser's where that is expected to be faster.

The rule needs nothing but sizes. The optimiser needs this machine's rates (`offload-rt calibrate`, remembered) and a
layer's seconds, measured now; at these prices both plans are simulated, and the optimiser's runs if it is faster by
more than what predictions are off. Whatever stands in the way, the rule's plan runs, and the `Choice` says why. Where
layers train, a device makes its part of the updates of the rule's plan, at these rates, before the two are compared.
Both keep to the budgets, and the rule's can follow the optimiser's, since a rehearsal that does not fit goes back to
it. Where the rule cuts layers into chunks, the optimiser decides what becomes of each of these, and where it does not,
of whole layers; where the rule takes the head by tiles, so does the optimiser, and the loss at once or by the same
tiles: so the bits are the same. Where state may rest on NVMe, the optimiser's plan commits as often as the rule's.

    rule ──► can it be asked, and for how much? ──► profile, solve, simulate both ──► the faster one, and the reason
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from offload_rt.arguments import calibration
from offload_rt.errors import ConfigError, OffloadError
from offload_rt.plans.asked import Asked, asked
from offload_rt.plans.cuts import cuts_of
from offload_rt.plans.device_share import GAIN, with_balanced_share
from offload_rt.plans.plan_check import check_plan, ends_commits
from offload_rt.plans.plan_options import chunk_tokens_of
from offload_rt.plans.planning import by_tiles, lowered, measured_problem, optimal
from offload_rt.plans.planning_adapters import asked_for
from offload_rt.plans.planning_together import computing_again, together
from offload_rt.plans.planning_training import questions_of, why_not_asked
from offload_rt.plans.rule_price import rule_seconds, why_no_question_says
from offload_rt.profiling.profile_cost import profile_bytes, profile_drive_seconds, profile_seconds
from offload_rt.tiering.moving import why_not_follow
from offload_rt.wiring.workload import Workload
from planners.errors import PlanInfeasible, format_bytes
from planners.optimiser.rows import Freedoms
from planners.plans.plan import Plan
from planners.problems.hardware import Hardware
from planners.problems.problem import Problem
from planners.rule.streaming_problem import StreamingProblem

RULE, OPTIMISER = "fixed streaming rule", "optimiser"
MAX_SECONDS = 60.0
"""Of profiling, as estimated; a longer one is for who asks for it by plan="optimise"."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which plan runs, and why."""

    chosen: str
    why: str
    seconds: float = 0.0
    """What measuring and solving took."""
    rule_step_seconds: float | None = None
    optimised_step_seconds: float | None = None
    """Predicted, at the same prices."""

    def __str__(self) -> str:
        return f"auto: {self.chosen}: {self.why}"


def choose(
    workload: Workload,
    streaming: StreamingProblem,
    rule: Plan,
    machine: Hardware | None,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    why_not: str = "",
) -> tuple[Plan, Choice, Asked | None]:
    """The plan to run, of `rule` and what the optimiser finds, and if that is the optimiser's what it was asked.

    Blocks for a few seconds where it is asked. machine: as calibrated; None where it was not. optimizer: of what trains
    in layers, or of adapters whose state rests in tiers. why_not: what the caller knows against asking.
    """
    if machine is not None and not why_not:
        rule = with_balanced_share(rule, workload, streaming, machine)
    why_not = why_not or _why_not(workload, streaming, rule, machine)
    if why_not or machine is None:
        return rule, Choice(chosen=RULE, why=why_not), None
    begin = time.perf_counter()

    def chosen(name: str, why: str, **seconds: float) -> Choice:
        return Choice(chosen=name, why=why, seconds=round(time.perf_counter() - begin, 3), **seconds)

    try:
        answer = _for_layers if _layers_train(workload) else _for_adapters
        plan, found, ruled = answer(workload, streaming, rule, machine, optimizer)
        check_plan(plan, streaming, workload)
    except (OffloadError, PlanInfeasible, MemoryError, RuntimeError, ValueError) as error:
        return rule, chosen(RULE, f"the optimiser cannot plan this: {error}"), None
    if cuts_of(plan, workload) != cuts_of(rule, workload):
        cuts = cuts_of(plan, workload).describe()
        return rule, chosen(RULE, f"the optimiser's plan cuts otherwise, which changes numbers: {cuts}"), None
    if ends_commits(rule, plan, streaming, workload):
        why = "the optimiser's plan has all state in memory and would commit no step, the rule's commits each one"
        return rule, chosen(RULE, f"{why}: commit_every= says how often"), None
    if why := why_not_follow(workload, streaming, plan, rule):
        return rule, chosen(RULE, f"the rule's plan could not follow the optimiser's: {why}"), None
    optimised = float(plan.predicted["step_seconds"])
    both = {"rule_step_seconds": ruled, "optimised_step_seconds": optimised}
    compared = f"{optimised:.3g} s a step expected, {ruled:.3g} s with the rule"
    if optimised > (1 - GAIN) * ruled:
        return rule, chosen(RULE, f"the optimiser's plan is no faster by {GAIN:.0%}: {compared}", **both), None
    return plan, chosen(OPTIMISER, compared, **both), found


def _why_not(workload: Workload, streaming: StreamingProblem, rule: Plan, machine: Hardware | None) -> str:
    """Why the optimiser is not asked; empty where it is."""
    config = workload.config
    if config.device == "cpu" and workload.has_streams:
        return "there is no profile of a device that stands for another one"
    if _layers_train(workload):
        if why := why_not_asked(workload):
            return why
        if why := why_no_question_says(rule, config.seq_len, config.accumulation_steps):
            return f"the rule's plan has {why}, about which the optimiser cannot be asked where layers train"
    elif rule.layer_major and (why := _why_not_apart(workload, rule)):
        return f"the rule has several micro-batches to a fetch, and {why}"
    chunk_tokens = chunk_tokens_of(rule, workload)
    if config.device_memory_bytes is None and not workload.has_streams:
        return "no device_memory= says how much may be used; the optimiser would fill all that is free"
    if machine is None:
        return f"this machine's rates are not known; `{calibration(config)}` would let the optimiser plan"
    need, have = profile_bytes(workload, streaming, chunk_tokens), streaming.device_capacity_bytes
    if have is not None and need > have:
        return f"profiling a layer takes about {format_bytes(need)}, the budget is {format_bytes(have)}"
    seconds = profile_seconds(workload, machine, chunk_tokens) + profile_drive_seconds(workload, streaming, machine)
    if seconds > MAX_SECONDS:
        return f'profiling a layer would take about {seconds:.0f} s: plan="optimise" does it'
    return ""


def _why_not_apart(workload: Workload, rule: Plan) -> str:
    """Why the optimiser is not asked about micro-batches of adapters one after the other, where the rule has them go
    together; empty where it is.
    """
    if cuts_of(rule, workload).layer_major is not None:
        return "one after the other they would draw other random numbers"
    if workload.training is not None or rule.activations or rule.lookups is not None or rule.head_tiles is not None:
        return "what the rule does beside that has no price yet: state in tiers, chunks, rows or tiles"
    return ""


Answer = tuple[Plan, Asked, float]
"""The optimiser's plan, what it was asked, and what a step of the rule's plan takes at these prices."""


def _for_adapters(
    workload: Workload, streaming: StreamingProblem, rule: Plan, machine: Hardware,
    optimizer: torch.optim.Optimizer | None,
) -> Answer:  # fmt: skip
    """Asks with the rule's chunks and tiles, and where the rule has adapters' state in tiers, about state in tiers.

    About micro-batches one after the other, each of which can keep what it saves, whatever the rule's order.
    """
    problem = measured_problem(workload, streaming, machine, chunk_tokens=chunk_tokens_of(rule, workload))
    if rule.head_tiles is not None:
        problem = by_tiles(problem, streaming)
    if workload.training is None or optimizer is None:
        plan, problem = optimal(problem, streaming)
        ruled = together(computing_again(problem), streaming) if rule.layer_major else problem
        return lowered(plan, streaming, problem), asked(problem), rule_seconds(ruled, rule)
    return _as_often(asked_for(workload, streaming, problem, optimizer), workload, streaming, rule)


def _for_layers(
    workload: Workload, streaming: StreamingProblem, rule: Plan, machine: Hardware,
    optimizer: torch.optim.Optimizer | None,
) -> Answer:  # fmt: skip
    """Asks with the loss as the rule takes it, and micro-batches in the rule's order."""
    if optimizer is None:
        raise ConfigError("plan: layers train, but there is no optimizer")
    streaming = replace(streaming, cuts=replace(cuts_of(rule, workload), layer_major=rule.layer_major))
    return _as_often(questions_of(workload, streaming, machine, optimizer), workload, streaming, rule)


def _as_often(
    questions: Sequence[tuple[Problem, Freedoms]], workload: Workload, streaming: StreamingProblem, rule: Plan
) -> Answer:
    """The answer to that of the questions which commits as often as the rule's plan does."""
    question = questions[0 if _is_all_in_memory(rule, streaming) else -1]
    ruled = rule_seconds(question[0], rule)  # before the search, which is for nothing where this has no answer
    plan, found = Asked(questions=(question,)).best(workload, streaming)
    return plan, found, ruled


def _layers_train(workload: Workload) -> bool:
    return workload.training is not None and not workload.training.adapters


def _is_all_in_memory(plan: Plan, streaming: StreamingProblem) -> bool:
    """Whether a plan has no state of what trains on NVMe."""
    sizes = streaming.training
    return plan.state is not None and sizes is not None and plan.state.is_all_in_memory(sizes)


def after_rehearsal(choice: Choice | None) -> Choice | None:
    """What is said where the rule planned again, with the sizes that a rehearsal measured."""
    if choice is None or choice.chosen == RULE:
        return choice
    return replace(choice, chosen=RULE, why=f"planned again for what the rehearsal measured; before: {choice.why}")
