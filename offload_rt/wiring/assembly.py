"""From a model to the runtime around it: the question, its plan, all checks; from a runtime to one that follows.

Everything is checked before anything is changed: sources, coverage, plan, budgets and the store come first; only then
do parameters leave the model's memory and hooks go in.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from offload_rt.arguments import Trained, WantedPlan
from offload_rt.checkpoint import open_checkpoint
from offload_rt.config import EngineConfig
from offload_rt.errors import ConfigError, PlanInfeasible
from offload_rt.layers.discover import check_coverage, coverage
from offload_rt.memory.heap import Base
from offload_rt.optim import AdamW
from offload_rt.optimizer.tiered_training import TieredTraining
from offload_rt.plans.asked import Asked, first_answer
from offload_rt.plans.cuts import check_cuts, products_of, with_products
from offload_rt.plans.plan_check import check_plan
from offload_rt.plans.plan_choice import Choice, after_rehearsal, choose
from offload_rt.plans.plan_options import with_options
from offload_rt.storage.mounts import doubts_about
from offload_rt.tiering.moving import moves_to, why_not_follow
from offload_rt.transfers.throttle import Throttle
from offload_rt.wiring.adapter_draft import planned, question
from offload_rt.wiring.runtime import Change, MadeOf, Runtime
from offload_rt.wiring.runtime_assembly import RuntimeAssembly
from offload_rt.wiring.runtime_options import RuntimeOptions
from offload_rt.wiring.store_assembly import Progress
from offload_rt.wiring.workload import Workload, find_workload
from planners.plans.plan import Plan
from planners.rule.streaming import plan_streaming
from planners.rule.streaming_problem import StreamingProblem

logger = logging.getLogger("offload_rt")


@dataclass(frozen=True, kw_only=True)
class _Decided:
    """Which plan runs, and what it answers."""

    plan: Plan
    workload: Workload
    problem: StreamingProblem
    asked: Asked | None
    """What the optimiser was asked, where the plan is its own."""
    choice: Choice | None
    """None where the plan was given, or the optimiser's was asked for."""


def assemble(
    trained: Trained,
    checkpoint: Path | None,
    config: EngineConfig,
    wanted: WantedPlan,
    options: RuntimeOptions,
    progress: Progress | None = None,
    *,
    base: Base,
) -> Runtime:
    """Builds the runtime around a model. `progress` is called with a phase, bytes done and bytes in all; `base` is the
    process without what the plan accounts for.
    """
    for drive in config.nvme:
        for doubt in doubts_about(drive.path):
            logger.warning("nvme %s: %s", drive.path, doubt)
    optimizer = trained.optimizer
    with contextlib.ExitStack() as while_assembling:
        opened = None if checkpoint is None else while_assembling.enter_context(open_checkpoint(checkpoint))
        workload = find_workload(trained.model, opened, config, optimizer, options)
        options = with_products(options, workload, wanted.given)
        covered = check_coverage(workload.drafts) if config.bits == 4 else coverage(workload.drafts)
        decided = _decide(workload, wanted, optimizer, options)
        workload = decided.workload
        check_plan(decided.plan, decided.problem, workload)
        if workload.training is None and isinstance(optimizer, AdamW):
            for parameter in (each for group in optimizer.param_groups for each in group["params"]):
                optimizer.check(parameter, config.device)
        check_cuts(decided.plan, workload, options.cuts)
        products_of(decided.plan, workload, options)
        made_of = MadeOf(
            workload=workload, problem=decided.problem, options=options, base=base,
            throttle=None if wanted.emulated is None else Throttle(wanted.emulated),
            plan_again=None if decided.choice is None else _planning_again(workload, options), asked=decided.asked,
            choice=decided.choice,
        )  # fmt: skip
        with RuntimeAssembly(made_of, decided.plan, progress) as assembly:
            runtime = assembly.run(covered, optimizer)
        workload.sources.let_go()
        return runtime


def _decide(
    workload: Workload, wanted: WantedPlan, optimizer: torch.optim.Optimizer | None, options: RuntimeOptions
) -> _Decided:
    """The plan that is given, the optimiser's where it was asked for and has one, or what `choose` chooses. Blocks for
    seconds where the optimiser is asked.
    """
    plan, emulated = wanted.given, wanted.emulated
    problem: StreamingProblem | None = None
    asked: Asked | None = None
    infeasible: PlanInfeasible | None = None
    if plan is None and wanted.optimise_for is not None:
        problem = question(workload, options.cuts)
        over_link = emulated is not None and not emulated.unified
        try:
            plan, asked = first_answer(workload, problem, wanted.optimise_for, optimizer, options, over_link=over_link)
        except PlanInfeasible as error:
            infeasible = error
    try:
        workload, problem, planned_so = planned(workload, plan, optimizer, options, problem)
    except PlanInfeasible:
        if infeasible is not None:
            raise infeasible from infeasible.__cause__
        raise
    runs = with_options(planned_so, workload, options, problem.training)
    if plan is not None:
        return _Decided(plan=runs, workload=workload, problem=problem, asked=asked, choice=None)
    why_not = 'under emulate=, plan="optimise" asks the optimiser' if emulated is not None else ""
    if infeasible is not None:  # by whole pages of each block, or by what a layer was measured to hold
        why_not = f"no plan of the optimiser's fits: {infeasible}"
        logger.warning("plan: %s; the fixed rule's runs", why_not)
    why_not = why_not or ("switches of the runtime change the plan" if runs != planned_so else "")
    runs, choice, asked = choose(workload, problem, runs, wanted.choose_for, optimizer, why_not=why_not)
    return _Decided(plan=runs, workload=workload, problem=problem, asked=asked, choice=choice)


def _planning_again(workload: Workload, options: RuntimeOptions) -> Callable[[StreamingProblem], Plan]:
    """The fixed rule for other sizes, to follow a plan of it, or the optimiser's that was chosen because it can."""

    def plan_again(problem: StreamingProblem) -> Plan:
        plan = plan_streaming(problem, rest=options.rest, fill=options.fills)
        return with_options(plan, workload, options, problem.training)

    return plan_again


def change_over(runtime: Runtime, change: Change) -> Runtime:
    """The runtime that carries out the plan of `change` in place of `runtime`, which is taken apart. Blocks; between
    steps only.

    State goes by the log: it is committed if it is not, and what the new plan holds in memory is read from there.
    Without a drive it stays in the memory that it is in; frozen weights that the new plan has elsewhere are copied
    there block by block, and those that train are made of masters. What is counted goes on, the optimizer stays the
    same object; memory of weights that somebody has a view of is that one's. Raises `ConfigError` before anything was
    changed. After any other error `runtime` can still be followed, by its own plan too.
    """
    choice = runtime.made_of.choice if change.asked is not None else after_rehearsal(runtime.made_of.choice)
    made_of = replace(runtime.made_of, problem=change.problem, asked=change.asked, choice=choice)
    check_plan(change.plan, made_of.problem, made_of.workload)
    if why := why_not_follow(made_of.workload, made_of.problem, runtime.plan, change.plan):
        raise ConfigError(f"plan: {why}")
    moves = [move.back for move in reversed(runtime.moved)]
    moves += moves_to(made_of.workload, made_of.problem, runtime.plan, change.plan)
    training = runtime.training
    if isinstance(training, TieredTraining) and training.home.log is not None and not training.commits.can_go_back:
        training.commits.commit()
    if moves and not runtime.is_closed:
        runtime.heap.trim()  # what the plan granted to holes may be wanted for the copies
    runtime.close()
    used = runtime.used_elsewhere()
    runtime.let_go()
    if runtime.device is not None:  # whose kernels may be behind; copies are over
        runtime.device.compute.record().wait()
    # Before the new plan's memory is taken, whoever still holds the old one's.
    seen = runtime.seen_elsewhere()
    if seen:
        logger.warning(
            "weights of %d blocks stay in memory beside the plan that follows, for somebody sees them (first: %s). Let "
            "go of the state_dict, or clone what is wanted of it", len({each.block for each in seen}), seen[0].block,
        )  # fmt: skip
    runtime.tiers.give_back(keep=runtime.only_copies(), seen=[*used, *(each.region() for each in seen)])
    with RuntimeAssembly(
        made_of, change.plan, None, before=runtime, moves=moves, more_bytes=change.more_bytes
    ) as assembly:
        follows = assembly.run(runtime.coverage, training.optimizer)
    runtime.resting = {}
    return follows
