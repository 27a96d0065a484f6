"""A plan made again while training, where the machine is not, or not any more, the one that it was made for.

    WINDOW_STEPS steps ──► drift ──► the questions, with what was measured ──► the optimiser, in a thread
                                                                                       │ ADOPT_STEPS later
       the next step's forward ◄── change_over ◄── is it worth it? by the simulator ◄──┘

A resource has drifted where each step of a window was off by more than a margin, in the same direction (`drift`): links
and drives by the seconds that they take for a byte, computing and updates by their seconds (so a run of shorter
sequences than planned for is one whose computing is faster). Memory is short where the budget was what was free, and
less is left than the plan still needs, at the end of two windows. Then the optimiser is asked again. Its plan is taken
where it has the same cuts, so that no number changes, and gains more within `HORIZON_STEPS` than bringing weights and
state to their new places costs. Either way the questions that were asked are what later windows are held against, so
that the same drift is not found twice; and changes are at least `APART_STEPS` steps apart, so that it cannot flap. The
step at which a plan is taken does not depend on how long it took to find: whoever steps waits for it. Where the fixed
rule has made the plan, nothing was predicted that could drift, and it is asked again where memory is short.

[Note: a change of plans is behind a commit]
Frozen weights are in the store, whatever happens meanwhile, and adapters that train in memory stay where they are.
State in tiers goes by the log, so that no more than one plan's memory is ever taken: a change needs a commit, and where
`commit_every` would not have made one, the step that is to be followed is committed as if it had. Like every commit it
is made when the next forward begins, with schedulers as they are then and everything else as it was when the step
returned; and right behind it the change:

    step N | scheduler, next batch | forward: commit of N, change | step N+1 | ...
                                              └ killed from here on, a run goes on from N under either plan

A forward that adds to gradients which wait already begins no step, nor does one right after a checkpoint was loaded
that is in no log, nor one that comes before the backward pass of the forward before it: then the change waits. It waits
as long as somebody keeps a loss that no backward pass goes through: no step is committed for its sake meanwhile, and
the log says so. A change that fails goes back to the plan before, by the same commit.

Without a drive there is no log and no commit, and what memory alone has is handed over as it lies (`resting`): masters
and moments, which no plan moves then, and frozen weights. Those that the other plan has elsewhere are copied there, a
block at a time (`moving`); a plan for which there is no room to do it in is not taken. Weights that train are rounded
from their masters, wherever they are to be. On a GPU, what its copies and kernels take is what it notes itself
(`device_times`), one step in two, and what is free of RAM says nothing of its memory. A plan that a rehearsal has made
again follows there as well.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import torch

from offload_rt.errors import ConfigError, OffloadError
from offload_rt.memory.process_memory import free_memory_bytes, resident_bytes
from offload_rt.plans.asked import Asked
from offload_rt.plans.cuts import same_cuts
from offload_rt.plans.plan_check import check_plan, ends_commits
from offload_rt.running import drift
from offload_rt.running.steps import WARM_STEPS, StepMeter
from offload_rt.tiering.moving import moves_between, seconds_of, why_not_follow
from offload_rt.wiring.assembly import change_over
from offload_rt.wiring.runtime import Change, MadeOf, Runtime
from planners.errors import PlanInfeasible, format_bytes
from planners.plans.plan import Plan, Tier
from planners.rule.streaming_problem import StreamingProblem

logger = logging.getLogger("offload_rt")

WINDOW_STEPS = 8
ADOPT_STEPS = 4
APART_STEPS = 64
WAIT_STEPS = 8
"""In a row, behind which a change had to wait: then that is said."""
HORIZON_STEPS = 200
"""Within so many steps a change is to pay for itself."""
LEAST_GAIN = 0.05
"""Of a step's seconds. The simulator is no better than that."""
LEAST_SHORT = 0.02
"""Of memory in use: what is short by less comes and goes."""
KEPT_DECISIONS = 32
"""The newest, which a report has. Where a machine is never still there are thousands in a week."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What was found, and what came of it. Seconds a step by the simulator, with the measured rates."""

    step: int
    because: str
    result: str
    """changed | kept"""
    why: str = ""
    """It was kept."""
    seconds_before: float | None = None
    seconds_after: float | None = None
    change_seconds: float | None = None


@dataclass(frozen=True)
class _Answer:
    """A plan as the runtime executes it, or why there is none."""

    plan: Plan | None
    why: str = ""
    asked: Asked | None = None
    """Which question the plan answers; None where it is the rule's."""
    seconds_before: float | None = None
    seconds_after: float | None = None
    change_seconds: float | None = None


@dataclass
class _Question:
    """Under way, or answered by a plan that is to be taken."""

    because: str
    asked: Asked | None
    streaming: StreamingProblem
    must: bool
    """The plan that runs does not fit any more."""
    steps_left: int
    thread: threading.Thread
    answers: list[_Answer]
    steps_waited: int = 0
    """In a row, behind which a backward pass was still to come."""

    def answer(self) -> _Answer:
        """Blocks until it is there."""
        self.thread.join()
        return self.answers[0] if self.answers else _Answer(None, "the optimiser failed")


class Replanner:
    """Of one engine, called between steps by the thread that steps."""

    def __init__(self, runtime: Runtime, base_bytes: int) -> None:
        """base_bytes: resident before there was an engine."""
        self.decisions: deque[Decision] = deque(maxlen=KEPT_DECISIONS)
        self._num_decisions = 0
        self.off = why_not(runtime)
        """Why nothing is planned again; empty where it is."""
        self._base_bytes = base_bytes
        self._held_against = runtime.made_of.asked
        """What later windows are expected to be as."""
        self._expected: Mapping[str, float] = runtime.plan.predicted.get("busy_seconds", {})
        self._under_way: _Question | None = None
        self._to_take: _Question | None = None
        self._seen_steps = WARM_STEPS
        self._not_before = 0
        self._short_before = 0

    def after_step(self, runtime: Runtime, meter: StepMeter, step: int, *, more_bytes: int = 0) -> None:
        """Looks at the step that is over, the number `step`. Blocks where a plan is due that is still looked for.

        more_bytes: what a rehearsal found that tensors take more than a plan says.
        """
        if self.off:
            return
        if self._to_take is not None:
            self._prepare(runtime, self._to_take, step)
            return
        if self._under_way is not None:
            self._under_way.steps_left -= 1
            if self._under_way.steps_left <= 0:
                self._decide(runtime, meter, step)
            return
        if meter.num_steps < self._seen_steps:  # it began again
            self._seen_steps = WARM_STEPS
        if meter.num_steps - self._seen_steps < WINDOW_STEPS:
            return
        self._seen_steps = meter.num_steps
        if step < self._not_before:
            return
        window = list(meter.steps)[-WINDOW_STEPS:]
        factors: dict[str, list[float]] = {}
        if self._held_against is not None:
            factors = drift.factors(window, self._held_against.question, self._expected)
        drifts = [drift.said(name, each) for name, each in factors.items() if drift.has_drifted(each)]
        short = self._short_bytes(runtime)
        if short:
            drifts.append(f"memory is short by {format_bytes(short)}")
        if drifts:
            medians = {name: median(each) for name, each in factors.items()}
            self._ask(runtime, ", ".join(drifts), medians, short, more_bytes)

    def is_due(self, runtime: Runtime) -> bool:
        """Whether a plan is to be taken when a step begins now, which can follow that of `runtime`: its training is
        settled then, for which it may block, and nobody has written to frozen weights, which it would bring anew.
        """
        may_follow = self._to_take is not None and not runtime.is_in_flight and not runtime.frozen.written
        return may_follow and runtime.training.settled()

    def before_step(self, runtime: Runtime, meter: StepMeter, step: int, *, more_bytes: int = 0) -> Runtime:
        """The runtime of the step that begins, behind the number `step`: another one where a plan was to be taken.

        `is_due` says so. Blocks. Raises what changing back raises where a change has failed: then half of the engine
        is gone.
        """
        taken, self._to_take = self._to_take, None
        if taken is None:
            return runtime
        answer = taken.answer()
        found, why = _changed(runtime, taken.streaming, answer, more_bytes)
        if not why:
            self._hold_against(answer.asked, found.plan)
        if found is not runtime:
            meter.begin_again()
            self._seen_steps = WARM_STEPS
            self._not_before = step + APART_STEPS
        self._say(taken, answer, step, why)
        return found

    def report(self) -> dict[str, Any]:
        """For an engine's report."""
        return {
            "off": self.off or None,
            "num_decisions": self._num_decisions,
            "decisions": [asdict(decision) for decision in self.decisions],
        }

    def close(self) -> None:
        """Waits for a question that is under way."""
        if self._under_way is not None:
            self._under_way.thread.join()
        self._under_way = self._to_take = None

    def _short_bytes(self, runtime: Runtime) -> int:
        """What the plan still needs and is not free, where budgets are what was free: now, and a window ago."""
        config = runtime.made_of.workload.config
        if config.device_memory_bytes is not None or runtime.made_of.workload.has_streams:
            return 0
        memory = [account for tier, account in runtime.tiers.accounts.items() if tier is not Tier.NVME]
        needs = sum(account.used_bytes for account in memory) - (resident_bytes() - self._base_bytes)
        before, self._short_before = self._short_before, max(0, needs - free_memory_bytes())
        short = min(before, self._short_before)
        return short if short > LEAST_SHORT * sum(account.used_bytes for account in memory) else 0

    def _ask(
        self, runtime: Runtime, because: str, factors: Mapping[str, float], short_bytes: int, more_bytes: int
    ) -> None:
        made_of, plan = runtime.made_of, runtime.plan
        streaming = replace(made_of.problem, cuts=runtime.cuts)
        asked = None if self._held_against is None else self._held_against.measured(factors)
        if short_bytes:
            memory = max(1, runtime.tiers.account(Tier.DEVICE).used_bytes - short_bytes)
            streaming = replace(streaming, device_capacity_bytes=memory)
            asked = None if asked is None else asked.with_memory(memory)
        answers: list[_Answer] = []

        def find() -> None:
            answers.append(_answer(made_of, asked, streaming, plan, more_bytes))

        thread = threading.Thread(target=find, name="offload_rt-plan", daemon=True)
        self._under_way = _Question(because, asked, streaming, bool(short_bytes), ADOPT_STEPS, thread, answers)
        thread.start()

    def _decide(self, runtime: Runtime, meter: StepMeter, step: int) -> None:
        """Whether the plan that was found is to be taken."""
        question = self._under_way
        if question is None:
            return
        answer = question.answer()
        self._under_way = None
        self._seen_steps = meter.num_steps  # those that ran beside the optimiser were slower
        why = answer.why or self._not_worth_it(answer, must=question.must)
        self._hold_against(question.asked, runtime.plan)
        if not why:
            self._to_take = question
            self._prepare(runtime, question, step)
            return
        if question.must:
            self._not_before = step + APART_STEPS
        self._say(question, answer, step, why)

    def _prepare(self, runtime: Runtime, question: _Question, step: int) -> None:
        """Has the step that is over committed, where the next one may begin with the change."""
        if not runtime.is_in_flight:
            question.steps_waited = 0
            runtime.training.commit_next()
            return
        question.steps_waited += 1
        if question.steps_waited == WAIT_STEPS:
            logger.warning(
                "step %d: a plan that was made again waits, since step %d, for the backward pass of a forward that is "
                "ahead of it. It is taken when there is none; of a loss that is only looked at, keep loss.detach()",
                step, step - WAIT_STEPS + 1,
            )  # fmt: skip

    def _say(self, question: _Question, answer: _Answer, step: int, why: str) -> None:
        decision = Decision(
            step=step, because=question.because, result="kept" if why else "changed", why=why,
            seconds_before=answer.seconds_before, seconds_after=answer.seconds_after,
            change_seconds=answer.change_seconds,
        )  # fmt: skip
        self.decisions.append(decision)
        self._num_decisions += 1
        logger.info("%s", said(decision))

    def _not_worth_it(self, answer: _Answer, *, must: bool) -> str:
        """Empty where it is."""
        before, after, change = answer.seconds_before, answer.seconds_after, answer.change_seconds
        if must or after is None or before is None or change is None:
            return ""
        if after > before * (1 - LEAST_GAIN):
            return f"no plan is more than {LEAST_GAIN:.0%} faster"
        if (before - after) * HORIZON_STEPS < change:
            return f"a change does not pay for itself within {HORIZON_STEPS} steps"
        return ""

    def _hold_against(self, asked: Asked | None, plan: Plan) -> None:
        """Later windows are expected to be as `asked` says."""
        self._held_against = asked
        self._expected = {} if asked is None else asked.busy_seconds(plan)


def why_not(runtime: Runtime) -> str:
    """Why the plan of `runtime` is not made again; empty where it is."""
    made_of = runtime.made_of
    workload = made_of.workload
    if not made_of.options.replan:
        return "switched off"
    if made_of.asked is None and workload.has_streams:
        return "nothing was predicted: the fixed rule's plan, or one that was given, on a device with memory of its own"
    if made_of.asked is None and made_of.plan_again is None:
        return "the plan was given"
    return ""


def said(decision: Decision) -> str:
    """A line for the log."""
    text = f"step {decision.step}: {decision.because}; the plan is {decision.result}"
    if decision.why:
        text += f": {decision.why}"
    if decision.seconds_before is not None and decision.seconds_after is not None:
        text += f" ({decision.seconds_before:.3f} s a step with it, {decision.seconds_after:.3f} with another one"
        text += "" if decision.change_seconds is None else f", {decision.change_seconds:.2f} to change"
        text += ")"
    return text


def _answer(made_of: MadeOf, asked: Asked | None, streaming: StreamingProblem, plan: Plan, more_bytes: int) -> _Answer:
    """Asks the optimiser, or the rule. In a thread of its own: whatever it raises is an answer."""
    try:
        if asked is not None:
            best, answered = asked.with_memory(asked.memory_bytes - more_bytes).best(made_of.workload, streaming)
            other = made_of.as_fixed(best)
            change_seconds = answered.change_seconds(best)
            if not made_of.workload.config.nvme:
                moves = moves_between(made_of.workload, plan, other)
                change_seconds += seconds_of(moves, answered.question.hardware)
            found = _Answer(
                other, "", replace(asked, answered=answered.answered), asked.step_seconds(plan),
                float(best.predicted["step_seconds"]), change_seconds,
            )  # fmt: skip
        elif made_of.plan_again is not None:
            capacity = streaming.device_capacity_bytes
            room = None if capacity is None else max(1, capacity - more_bytes)
            other = made_of.plan_again(replace(streaming, device_capacity_bytes=room))
            found = _Answer(other)
        else:
            return _Answer(None, "the plan was given")
    except PlanInfeasible as error:
        return _Answer(None, f"no plan fits: {error}")
    except Exception as error:  # noqa: BLE001 - training goes on with the plan that it has
        return _Answer(None, f"the optimiser failed: {error!r}")
    if not same_cuts(plan, other, made_of.workload):
        return _Answer(None, "the other plan cuts otherwise, which changes numbers")
    if ends_commits(plan, other, streaming, made_of.workload):
        why = "the other plan has all state in memory and would commit no step, where each is committed now"
        return _Answer(None, f"{why}: commit_every= says how often")
    why = why_not_follow(made_of.workload, streaming, plan, other)
    return _Answer(None, why) if why else found


def _changed(runtime: Runtime, streaming: StreamingProblem, answer: _Answer, more_bytes: int) -> tuple[Runtime, str]:
    """The runtime of the answer's plan, or that of the plan before and why."""
    made_of = runtime.made_of
    before = Change(problem=made_of.problem, plan=runtime.plan, asked=made_of.asked, more_bytes=more_bytes)
    if answer.plan is None:
        return runtime, answer.why
    try:
        check_plan(answer.plan, streaming, made_of.workload)
    except ConfigError as error:
        return runtime, str(error)
    try:
        change = Change(problem=streaming, plan=answer.plan, asked=answer.asked, more_bytes=more_bytes)
        return change_over(runtime, change), ""
    except (OffloadError, MemoryError, OSError, torch.cuda.OutOfMemoryError) as error:
        logger.warning("a change of plans failed, going back: %s", error)
        return change_over(runtime, before), f"the change failed: {error}"
