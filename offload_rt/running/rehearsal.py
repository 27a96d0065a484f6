"""The longest step, run once before the first one, so that what it leaves to PyTorch's allocator is known and fits.

A plan takes the size of transient activations from formulas. Before a model is first called in training, that call is
stretched to the largest batch that the engine was declared for and goes forward and backward through the real code,
while every block that PyTorch allocates is counted (`allocations`; of a device's memory, by its allocator). On the CPU
one layer is run for all that are like it (`representatives`). Gradients of layers that train come to where they wait
and are dropped; their update on the CPU is counted beside it (`optimizer.rehearsed`), and added where it runs behind
the backward pass. Where a step takes more than was planned, the difference comes, in this order,

    from the room that the budget has left
    from freed memory that the C library was granted       (more of it is given back to the system then: slower)
    from a new plan with the measured sizes                (the fixed rule's)
    or one for so much less memory                         (the optimiser's, which is rehearsed in its turn)
    or there is none: `PlanInfeasible`, before anything was trained

It changes nothing: generators, buffers and plain attributes of modules, counters and prefetched blocks are put back;
gradients are the rehearsal's own. It is left out where formulas could be wrong by far and it would still fit. What was
measured before (`measured_sizes`) is held against the plan without running anything.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from offload_rt.config import EngineConfig
from offload_rt.errors import OffloadError
from offload_rt.layers.readers import is_reader
from offload_rt.memory.allocations import AllocationMeter
from offload_rt.optimizer.tiered_training import TieredTraining
from offload_rt.optimizer.training import FullTraining
from offload_rt.plans.cuts import cuts_of, cuts_to_json, warn_of_other_cuts
from offload_rt.plans.workload_sizes import gradients_under_way_bytes
from offload_rt.profiling.measured_sizes import (
    remember_bytes,
    remember_factor,
    remembered_bytes,
    scaled,
    sizes_key,
    tensors_digest,
)
from offload_rt.running.longest_step import longest, measure, unchanged
from offload_rt.tiering.moving import why_not_follow
from offload_rt.wiring.runtime import Change, Runtime
from planners.errors import PlanInfeasible, format_bytes, format_bytes_up
from planners.plans.plan import Plan, Tier
from planners.rule.attempts import TIGHT_SLACK_BYTES
from planners.rule.shortage import LAYER_INPUTS
from planners.rule.streaming_problem import StreamingProblem

logger = logging.getLogger("offload_rt")

ROOM = 3
"""With so many times what is planned for a step's tensors left in the budget, nobody needs to count them. Formulas were
1.3 times too small for Llama layers with adapters on every linear, and 1.8 times with dropout on those. Adapters that
compute with weights themselves are counted always: at 256 tokens DoRA took 3.3 times what formulas say, HRA 15 times.
"""
AGAIN = "planned again"
MOST_AGAIN = 3
"""Plans of the optimiser's that are rehearsed in place of the first, each of which may take its tensors otherwise."""
MEASURED_BEFORE = "measured by an earlier run"
SLACK = "freed, held back by the allocator"
TRANSIENT = (
    "activations",
    "products by tiles",
    "kept activations",
    *LAYER_INPUTS,
    "swapped activations on their way",
)
"""What a micro-batch takes of DEVICE memory outside arenas."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of it. Bytes; None where nothing was measured."""

    result: str
    """fits | within the budget | less freed memory is granted | planned again | left out"""
    why: str = ""
    planned_bytes: int | None = None
    measured_bytes: int | None = None
    seconds: float = 0.0
    num_layers: int | None = None
    """Layers that were run; None where no whole step was composed of what a few take."""


class Rehearsal:
    """Of one engine. `is_due` until it was run or left out."""

    def __init__(self) -> None:
        self.outcome: Outcome | None = None
        self.more_bytes = 0
        """What tensors were found to take more than the plan in effect says."""
        self._num_again = 0
        """Plans of the optimiser's that were made again."""
        self._is_of_another_plan = False
        """The newest of them is still to be rehearsed."""
        self._refusal: PlanInfeasible | None = None

    @property
    def is_due(self) -> bool:
        return self.outcome is None or self._is_of_another_plan or self._refusal is not None

    def run(
        self, runtime: Runtime, config: EngineConfig, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Change | None:
        """Rehearses the call `model(*args, **kwargs)`, which is about to be made. Blocks for about a step.

        Returns what the engine is to change over to; None keeps the plan it has. Raises `PlanInfeasible`.
        """
        if not (self.is_due and torch.is_grad_enabled() and model.training):
            return None
        if self._refusal is not None:
            raise self._refusal
        if isinstance(runtime.training, TieredTraining):
            runtime.training.commits.check_usable()
        if isinstance(runtime.training, FullTraining):
            runtime.training.check_written("forward")
            if runtime.training.gradients.blocks:
                return None  # a step has begun behind the engine's back: before the next one
        self._is_of_another_plan = False
        key = sizes_key(model, runtime.made_of.problem.fingerprint, of_device=runtime.device is not None)
        why = _left_out(runtime)
        digest = tensors_digest(runtime.plan)
        known = None if why else remembered_bytes(key, digest)
        if known is not None:
            return self._settled(runtime, key, known, 0.0, None)
        if runtime.device is None:
            why = why or AllocationMeter.refusal() or ""
        call = None if why else longest(args, kwargs, config)
        if call is None:
            self.outcome = Outcome(result="left out", why=why or "the call has arguments that cannot be stretched")
            if not why:
                logger.warning("the longest step is not rehearsed: %s", self.outcome.why)
            return None
        self.outcome = Outcome(result="left out", why="under way")
        begin = time.perf_counter()
        try:
            with unchanged(runtime, model):
                measured, num_layers = measure(runtime, model, *call)
                measured += runtime.transients.peak_bytes
        except (OffloadError, MemoryError):
            self.outcome = None
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, the batches to come may be shorter and do without
            self.outcome = Outcome(result="left out", why=f"a batch of the largest size raised {error!r}")
            logger.warning("the longest step is not rehearsed: %s", self.outcome.why)
            return None
        remember_bytes(key, digest, measured)
        return self._settled(runtime, key, measured, time.perf_counter() - begin, num_layers)

    def _settled(
        self, runtime: Runtime, key: str, measured: int, seconds: float, num_layers: int | None
    ) -> Change | None:
        """As `_settle`; what is refused stays so."""
        try:
            return self._settle(runtime, key, measured, seconds, num_layers)
        except PlanInfeasible as refusal:
            self._refusal = refusal
            raise

    def _settle(
        self, runtime: Runtime, key: str, measured: int, seconds: float, num_layers: int | None
    ) -> Change | None:
        planned = planned_bytes(runtime)
        account, guard = runtime.tiers.account(Tier.DEVICE), runtime.heap
        more = measured - planned

        def outcome(result: str) -> None:
            result = AGAIN if self._num_again else result
            self.outcome = Outcome(
                result=result, why="" if seconds else MEASURED_BEFORE, planned_bytes=planned, measured_bytes=measured,
                seconds=round(seconds, 6), num_layers=num_layers,
            )  # fmt: skip
            logger.info(
                "rehearsed the longest step%s in %.2f s: %s of tensors, %s planned: %s",
                "" if num_layers is None else f" by {num_layers} of {len(runtime.layers)} layers", seconds,
                format_bytes(measured), format_bytes(planned), result,
            )  # fmt: skip

        if more <= 0:
            outcome("fits")
            return None
        room = more if account.capacity_bytes is None else account.capacity_bytes - account.used_bytes
        slack = account.holdings.get(SLACK, 0)
        from_slack = max(0, more - room)
        if from_slack <= slack - min(TIGHT_SLACK_BYTES, slack // 4):
            account.holdings["activations"] += more
            self.more_bytes += more
            if from_slack:
                account.holdings[SLACK] -= from_slack
                if runtime.device is None:  # otherwise the C library's is in another memory
                    guard.grant(slack - from_slack)
            outcome("less freed memory is granted" if from_slack else "within the budget")
            return None
        scales = account.holdings["activations"] + account.holdings.get("kept activations", 0)
        says_tokens = any(entry.tokens for entry in runtime.plan.classes)
        formula = planned if says_tokens else scales  # of which such a plan says each part
        factor = (formula + more) / max(1, formula)
        remember_factor(key, factor)
        short: PlanInfeasible | None = None
        try:
            change = _planned_again(runtime, factor, self.more_bytes + more) if self._num_again < MOST_AGAIN else None
        except PlanInfeasible as error:
            if runtime.made_of.plan_again is not None:
                raise
            change, short = None, error
        if change is None:
            have = (account.capacity_bytes or 0) - account.used_bytes + planned
            budget = (account.capacity_bytes or 0) + more - room + runtime.made_of.problem.beside_plan_bytes
            raise PlanInfeasible(
                tier=account.tier.value,
                phase="rehearsal of the longest step: tensors of layers, or of the head",
                need_bytes=measured,
                have_bytes=have,
                ways_out=[
                    f"{account.tier.value}_memory of {format_bytes_up(budget)}",
                    'an engine made again with plan="auto": what was measured is remembered',
                ],
            ) from short
        outcome(AGAIN)
        self.more_bytes = change.more_bytes
        self._is_of_another_plan = change.asked is not None
        self._num_again += self._is_of_another_plan
        return change


def _planned_again(runtime: Runtime, factor: float, more_bytes: int) -> Change | None:
    """For tensors that are `factor` times as large as was thought, `more_bytes` in all; None for a plan that was given,
    and where none can follow.

    Raises `PlanInfeasible`.
    """
    made_of = runtime.made_of
    if made_of.plan_again is not None:
        problem, plan = _by_the_rule(runtime, scaled(made_of.problem, factor), made_of.plan_again)
        follows = not why_not_follow(made_of.workload, problem, runtime.plan, plan)
        return Change(problem=problem, plan=plan) if follows else None
    if made_of.asked is None:
        return None
    problem = replace(made_of.problem, cuts=runtime.cuts)
    less = made_of.asked.with_memory(made_of.asked.memory_bytes - more_bytes)
    best, answered = less.best(made_of.workload, problem)
    plan = made_of.as_fixed(best)
    if why_not_follow(made_of.workload, problem, runtime.plan, plan):
        return None
    asked = replace(made_of.asked, answered=answered.answered)
    return Change(problem=problem, plan=plan, asked=asked, more_bytes=more_bytes)


def _by_the_rule(
    runtime: Runtime, problem: StreamingProblem, plan_again: Callable[[StreamingProblem], Plan]
) -> tuple[StreamingProblem, Plan]:
    """The question with the cuts that its plan has. A run that goes on keeps its own, or is warned.

    Raises `PlanInfeasible`.
    """
    step = runtime.training.step_number
    if not step or problem.cuts is not None:
        return problem, plan_again(problem)
    kept = replace(problem, cuts=runtime.cuts)
    with suppress(PlanInfeasible):
        return kept, plan_again(kept)
    plan = plan_again(problem)
    warn_of_other_cuts(cuts_to_json(runtime.cuts), cuts_of(plan, runtime.made_of.workload), of=f"step {step}")
    return problem, plan


def planned_bytes(runtime: Runtime) -> int:
    """What one micro-batch's tensors may take of DEVICE memory, with gradients that have not left it."""
    holdings = runtime.tiers.account(Tier.DEVICE).holdings
    together = runtime.made_of.workload.config.accumulation_steps if runtime.plan.layer_major else 1
    sizes = {name: holdings.get(name, 0) for name in TRANSIENT}
    sizes["layer inputs"] //= together
    sizes["kept activations"] //= together
    if isinstance(runtime.training, FullTraining):
        return sum(sizes.values()) + gradients_under_way_bytes(runtime.made_of.workload)
    trains = [p for p in runtime.made_of.workload.model.parameters() if p.requires_grad]
    return sum(sizes.values()) + sum(p.numel() * p.element_size() for p in trains)


def _left_out(runtime: Runtime) -> str:
    """Why it need not, or cannot, be run; empty where it is to be."""
    account = runtime.tiers.account(Tier.DEVICE)
    room = "the budget has room for much more than is planned"
    if account.capacity_bytes is None:
        return room
    if any(map(is_reader, runtime.made_of.workload.model.modules())):
        return ""
    return room if account.capacity_bytes - account.used_bytes >= ROOM * planned_bytes(runtime) else ""
