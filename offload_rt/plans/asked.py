"""What the optimiser is asked about the model at hand, to ask it again where measurements say something else.

    first_answer ─► Asked ──► best ──► the plan that runs
                     ▲  │
                     │  └── measured, with_memory ──► Asked ──► best ──► a plan in its place
                     └── adapters: one question; where layers train, or adapters' state rests in tiers, one with all
                         of it in memory, one with a drive

Rates are those of a machine, seconds those of the blocks; both are in the question, so that it is asked again without
timing anything twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from offload_rt.errors import ConfigError
from offload_rt.meter import COMPUTE, CPU, DEVICE_TO_HOST, DEVICE_UPDATE, HOST_TO_DEVICE, SSD_READ, SSD_WRITE
from offload_rt.plans.device_share import with_the_best_share
from offload_rt.plans.planning import lowered, optimised_adapters
from offload_rt.plans.planning_adapters import questions_by_chunks
from offload_rt.plans.planning_budgets import with_slack
from offload_rt.plans.planning_training import lowered_training, questions_of
from offload_rt.wiring.adapter_draft import in_tiers, question
from offload_rt.wiring.runtime_options import RuntimeOptions
from offload_rt.wiring.workload import Workload
from planners.errors import PlanInfeasible
from planners.optimiser.mip import WEAR_SLOWDOWN
from planners.optimiser.rows import Freedoms
from planners.plans.plan import Plan
from planners.problems.hardware import Hardware
from planners.problems.problem import Problem
from planners.rule.streaming import plan_streaming
from planners.rule.streaming_problem import StreamingProblem
from planners.simulator.division import divided
from planners.simulator.simulate import simulate


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One question, or several of which the best answer runs."""

    questions: tuple[tuple[Problem, Freedoms], ...]
    answered: int = 0
    """Which of them the plan that runs is the answer to."""

    @property
    def question(self) -> Problem:
        return self.questions[self.answered][0]

    @property
    def memory_bytes(self) -> int:
        """Of DEVICE, as the questions have it."""
        return self.question.hardware.device.memory_bytes

    def best(self, workload: Workload, streaming: StreamingProblem) -> tuple[Plan, Asked]:
        """The fastest plan, as the runtime executes it, and the same questions of which one is answered now: without
        those about another order of micro-batches, which no plan that follows can have.

        Blocks for seconds. Raises what `optimal` raises, `PlanInfeasible` where no question has an answer.
        """
        found: tuple[Plan, Problem, int] | None = None
        failure: PlanInfeasible | None = None
        for index, (problem, freedoms) in enumerate(self.questions):
            try:
                plan, answered = with_the_best_share(problem, streaming, freedoms)
            except PlanInfeasible as error:
                failure = error  # the last question leaves most open
                continue
            if found is None or _seconds(plan) * (1 + WEAR_SLOWDOWN) < _seconds(found[0]):
                found = plan, answered, index
        if found is None:
            raise failure or ValueError("no question was asked")
        plan, problem, index = found
        order = problem.workload.layer_major
        alike = [number for number, (one, _) in enumerate(self.questions) if one.workload.layer_major is order]
        asked = Asked(questions=tuple(self.questions[number] for number in alike), answered=alike.index(index))
        if workload.training is None:
            return lowered(plan, streaming, problem), asked
        return lowered_training(plan, workload, streaming, problem), asked

    def measured(self, factors: Mapping[str, float]) -> Asked:
        """The questions for a machine whose resources take so many times as long."""
        return self._each(lambda problem: measured(problem, factors))

    def with_memory(self, num_bytes: int) -> Asked:
        """The questions with so much DEVICE memory."""
        return self._each(lambda problem: _with_memory(problem, num_bytes))

    def busy_seconds(self, plan: Plan) -> Mapping[str, float]:
        """Of each resource in a step of `plan`, which answers the question that is answered."""
        return simulate(divided(self.question, plan), plan).busy_seconds

    def step_seconds(self, plan: Plan) -> float:
        """As `busy_seconds`, of the step."""
        return simulate(divided(self.question, plan), plan).step_seconds

    def change_seconds(self, plan: Plan) -> float:
        """What it takes at most to bring everything to where `plan` has it.

        Weights that rest in memory are brought there anew, those in DEVICE over its link. State goes by the drive: what
        rests in memory is written for a commit and read again, and weights are rounded from all of the masters. Without
        a drive all stays where it is, but for weights that train, which are rounded where they are to be, less work
        than an update, and for frozen ones that move (`moving.seconds_of`).
        """
        if not self.question.hardware.drives:
            return 0.0
        hardware, links = self.question.hardware, self.question.hardware.links
        device = sum(len(entry.blocks) * entry.weights.device_bytes for entry in plan.classes)
        host = sum(len(entry.blocks) * entry.weights.host_bytes for entry in plan.classes)
        state = sum(
            entry.state_cuts[-1][1] * entry.count for entry in self.question.workload.classes if entry.state_cuts
        )
        seconds = 0.0 if hardware.unified else device / links.host_to_device_bytes_per_second
        seconds += (device + host + state) / hardware.read_bytes_per_second
        return seconds + state / hardware.write_bytes_per_second

    def _each(self, change: Callable[[Problem], Problem]) -> Asked:
        return replace(self, questions=tuple((change(problem), freedoms) for problem, freedoms in self.questions))


def first_answer(
    workload: Workload,
    streaming: StreamingProblem,
    hardware: Hardware,
    optimizer: torch.optim.Optimizer | None,
    options: RuntimeOptions,
    *,
    over_link: bool = False,
) -> tuple[Plan, Asked]:
    """The plan for whatever trains, after it was timed, and what was asked. Blocks for seconds.

    Where no plan holds adapters' state beside them, the fixed rule's neither, one that has it in tiers is an answer;
    layers are timed anew then. over_link: HOST is behind a link that is emulated, see `planning_adapters`. Raises
    ConfigError for what cannot be asked, and what `plan_optimal` raises.
    """
    if workload.training is None or optimizer is None:
        try:
            plan, problem = optimised_adapters(workload, streaming, hardware)
            return plan, asked(problem)
        except PlanInfeasible as infeasible:
            if optimizer is None or (streaming.unified and streaming.nvme_capacity_bytes is None):
                raise
            if _rule_fits(streaming, options):
                raise
            return _with_state_in_tiers(
                workload, streaming, hardware, optimizer, options, infeasible, over_link=over_link
            )
    return Asked(questions=tuple(questions_of(workload, streaming, hardware, optimizer))).best(workload, streaming)


def _rule_fits(streaming: StreamingProblem, options: RuntimeOptions) -> bool:
    """With adapters' state beside them: a plan that steps them where they are is better than one with tiers."""
    try:
        plan_streaming(streaming, rest=options.rest, fill=options.fills)
    except PlanInfeasible:
        return False
    return True


def _with_state_in_tiers(
    workload: Workload,
    streaming: StreamingProblem,
    hardware: Hardware,
    optimizer: torch.optim.Optimizer,
    options: RuntimeOptions,
    infeasible: PlanInfeasible,
    *,
    over_link: bool,
) -> tuple[Plan, Asked]:
    """As `first_answer`, of adapters whose state is `infeasible` beside them."""
    try:
        tiered = in_tiers(workload, optimizer, options)
    except ConfigError as reason:
        raise infeasible from reason
    again, failure = question(tiered, streaming.cuts, streaming), None
    for questions in questions_by_chunks(tiered, again, hardware, optimizer, over_link=over_link):
        try:
            return Asked(questions=questions).best(tiered, again)
        except PlanInfeasible as error:
            failure = failure or error  # of whole layers, see `optimised_adapters`
    raise failure or infeasible from infeasible


def asked(problem: Problem) -> Asked:
    """One question, which leaves all open."""
    return Asked(questions=((problem, Freedoms()),))


def measured(question: Problem, factors: Mapping[str, float]) -> Problem:
    """`question` for a machine whose resources take so many times as long."""
    hardware, workload = question.hardware, question.workload

    def slower(rate: float, name: str) -> float:
        return rate / factors.get(name, 1.0)

    links = replace(
        hardware.links,
        host_to_device_bytes_per_second=slower(hardware.links.host_to_device_bytes_per_second, HOST_TO_DEVICE),
        device_to_host_bytes_per_second=slower(hardware.links.device_to_host_bytes_per_second, DEVICE_TO_HOST),
    )
    drives = tuple(
        replace(
            drive, read_bytes_per_second=slower(drive.read_bytes_per_second, SSD_READ),
            write_bytes_per_second=slower(drive.write_bytes_per_second, SSD_WRITE),
        )
        for drive in hardware.drives
    )  # fmt: skip
    device, host = hardware.device, hardware.host
    device = replace(device, adamw_params_per_second=slower(device.adamw_params_per_second, DEVICE_UPDATE))
    host = replace(host, adamw_params_per_second=slower(host.adamw_params_per_second, CPU))
    classes = tuple(
        entry if entry.measured is None else replace(entry, measured=entry.measured.times(factors.get(COMPUTE, 1.0)))
        for entry in workload.classes
    )
    steps = workload.device_steps
    if steps is not None:
        steps = replace(steps, cpu_seconds_per_param=steps.cpu_seconds_per_param * factors.get(CPU, 1.0))
    return replace(
        question, hardware=replace(hardware, links=links, drives=drives, device=device, host=host),
        workload=replace(
            workload, classes=classes, device_steps=steps,
            summing_seconds_per_param=workload.summing_seconds_per_param * factors.get(CPU, 1.0),
        ),
    )  # fmt: skip


def _seconds(plan: Plan) -> float:
    return float(plan.predicted["step_seconds"])


def _with_memory(question: Problem, num_bytes: int) -> Problem:
    """With less slack where there is no room for it."""
    others_bytes = question.hardware.device.reserve_bytes - question.slack_bytes
    return with_slack(question, max(0, min(question.slack_bytes, num_bytes - 1 - others_bytes)), num_bytes)
