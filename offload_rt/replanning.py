"""A plan made again while training, where the machine is not, or not any more, the one that it was made for.

    WINDOW_STEPS steps ──► drift ──► the question, with what was measured ──► the optimiser, in a thread
                                                                                       │ ADOPT_STEPS later
         the next step ◄── change_over ◄── is it worth it? by the simulator ◄──────────┘

A resource has drifted where each step of a window was off by more than `MARGIN`, in the same direction: links and
drives by the seconds that they take for a byte, computing and updates by their seconds (so a run of shorter sequences
than planned for is one whose computing is faster). Memory is short where the budget was what was free, and less is left
than the plan still needs, at the end of two windows. Then the optimiser is asked again. Its plan is taken where it has
the same cuts, so that no number changes, and gains more within `HORIZON_STEPS` than bringing the weights to their new
places costs. Either way the question that was asked is what later windows are held against, so that the same drift is
not found twice; and changes are at least `APART_STEPS` steps apart, so that it cannot flap. The step at which a plan is
taken does not depend on how long it took to find: whoever steps waits for it.

Weights move between tiers alone: they are in the store, whatever happens meanwhile, and what trains stays where it is,
as do commits. A change that fails goes back to the plan before. Where layers train, adapters' state rests in tiers, on
a GPU and without a store a running engine does not change over, and says so.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

from offload_rt.assembly import change_over
from offload_rt.errors import ConfigError, OffloadError
from offload_rt.meter import COMPUTE, DEVICE_TO_HOST, DEVICE_UPDATE, HOST_TO_DEVICE, SSD_READ, SSD_WRITE
from offload_rt.plan_check import check_plan
from offload_rt.planning import lowered
from offload_rt.profile import free_memory_bytes, resident_bytes
from offload_rt.runtime import Runtime
from offload_rt.steps import WARM_STEPS, StepMeter, StepReading
from planners.division import divided
from planners.errors import PlanInfeasible, format_bytes
from planners.mip import plan_optimal
from planners.plan import Plan, Tier
from planners.problem import MeasuredSeconds, Problem
from planners.simulate import simulate
from planners.streaming import StreamingProblem

logger = logging.getLogger("offload_rt")

WINDOW_STEPS = 8
MARGIN = 0.25
"""Other work on a machine makes single steps slower by more than that, but not every one of a window."""
ADOPT_STEPS = 4
APART_STEPS = 64
HORIZON_STEPS = 200
"""Within so many steps a change is to pay for itself."""
LEAST_GAIN = 0.05
"""Of a step's seconds. The simulator is no better than that."""
LEAST_SHARE = 0.02
"""Of a step's seconds: what takes less, measured and expected, is no reason for anything. Of memory in use: what is
short by less comes and goes."""
RATES = (HOST_TO_DEVICE, DEVICE_TO_HOST, SSD_READ, SSD_WRITE)


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
    """Of the optimiser: a plan as the runtime executes it, or why there is none."""

    plan: Plan | None
    why: str = ""
    seconds_before: float | None = None
    change_seconds: float | None = None


@dataclass
class _Asked:
    """A question under way."""

    because: str
    question: Problem
    streaming: StreamingProblem
    must: bool
    """The plan that runs does not fit any more."""
    steps_left: int
    thread: threading.Thread
    answers: list[_Answer]


class Replanner:
    """Of one engine, called between steps by the thread that steps."""

    def __init__(self, runtime: Runtime, base_bytes: int) -> None:
        """base_bytes: resident before there was an engine."""
        self.decisions: list[Decision] = []
        self.off = why_not(runtime)
        """Why nothing is planned again; empty where it is."""
        self._base_bytes = base_bytes
        self._question = runtime.made_of.question
        self._expected: Mapping[str, float] = runtime.plan.predicted.get("busy_seconds", {})
        self._asked: _Asked | None = None
        self._seen_steps = WARM_STEPS
        self._not_before = 0
        self._short_before = 0

    def after_step(self, runtime: Runtime, meter: StepMeter, step: int, *, more_bytes: int = 0) -> Runtime:
        """The runtime for the next step, this or another one. Blocks where a plan is due that is still looked for.

        step: the number of the one that is over; nothing of it is outstanding. more_bytes: what a rehearsal found that
        tensors take more than a plan says. Raises what changing back raises, where a change has failed.
        """
        if self.off or self._question is None:
            return runtime
        if self._asked is not None:
            self._asked.steps_left -= 1
            return runtime if self._asked.steps_left > 0 else self._decide(runtime, meter, step, more_bytes)
        if meter.num_steps < self._seen_steps:  # it began again
            self._seen_steps = WARM_STEPS
        if meter.num_steps - self._seen_steps < WINDOW_STEPS:
            return runtime
        self._seen_steps = meter.num_steps
        if step < self._not_before:
            return runtime
        window = list(meter.steps)[-WINDOW_STEPS:]
        factors = self._factors(window)
        drifts = [_drift(name, each) for name, each in factors.items() if has_drifted(each)]
        short = self._short_bytes(runtime)
        if short:
            drifts.append(f"memory is short by {format_bytes(short)}")
        if drifts:
            medians = {name: median(each) for name, each in factors.items()}
            self._ask(runtime, ", ".join(drifts), self._question, medians, short, more_bytes)
        return runtime

    def report(self) -> dict[str, Any]:
        """For an engine's report."""
        return {"off": self.off or None, "decisions": [asdict(decision) for decision in self.decisions]}

    def close(self) -> None:
        """Waits for a question that is under way."""
        if self._asked is not None:
            self._asked.thread.join()
            self._asked = None

    def _factors(self, window: Sequence[StepReading]) -> dict[str, list[float]]:
        """By resource, how many times as long as expected it took in each step; what was not used is left out."""
        if self._question is None:
            return {}
        rates, found, counts = _rates(self._question), dict[str, list[float]](), dict[str, float]()
        for name in RATES:
            pairs = [(s.resources.busy_seconds.get(name, 0.0), s.resources.moved_bytes.get(name, 0)) for s in window]
            if rates[name] and all(busy > 0 and moved for busy, moved in pairs):
                found[name] = [busy * rates[name] / moved for busy, moved in pairs]
                counts[name] = max(max(busy, moved / rates[name]) for busy, moved in pairs)
        for name in (COMPUTE, DEVICE_UPDATE):
            busy = [step.resources.busy_seconds.get(name, 0.0) for step in window]
            if self._expected.get(name) and all(seconds > 0 for seconds in busy):
                found[name] = [seconds / self._expected[name] for seconds in busy]
                counts[name] = max(*busy, self._expected[name])
        least = LEAST_SHARE * median(step.seconds for step in window)
        return {name: each for name, each in found.items() if counts[name] >= least}

    def _short_bytes(self, runtime: Runtime) -> int:
        """What the plan still needs and is not free, where budgets are what was free: now, and a window ago."""
        config = runtime.made_of.workload.config
        if config.device_memory_bytes is not None:
            return 0
        memory = [account for tier, account in runtime.tiers.accounts.items() if tier is not Tier.NVME]
        needs = sum(account.used_bytes for account in memory) - (resident_bytes() - self._base_bytes)
        before, self._short_before = self._short_before, max(0, needs - free_memory_bytes())
        short = min(before, self._short_before)
        return short if short > LEAST_SHARE * sum(account.used_bytes for account in memory) else 0

    def _ask(
        self,
        runtime: Runtime,
        because: str,
        question: Problem,
        factors: Mapping[str, float],
        short_bytes: int,
        more_bytes: int,
    ) -> None:
        streaming = runtime.made_of.problem
        asked = measured(question, factors)
        memory = asked.hardware.device.memory_bytes
        if short_bytes:
            memory = max(1, runtime.tiers.account(Tier.DEVICE).used_bytes - short_bytes)
            streaming = replace(streaming, device_capacity_bytes=memory)
            asked = _with_memory(asked, memory)
        answers: list[_Answer] = []
        plan = runtime.plan
        room = _with_memory(asked, memory - more_bytes)
        thread = threading.Thread(
            target=lambda: answers.append(_answer(room, streaming, plan)), name="offload_rt-plan", daemon=True
        )
        self._asked = _Asked(because, asked, streaming, bool(short_bytes), ADOPT_STEPS, thread, answers)
        thread.start()

    def _decide(self, runtime: Runtime, meter: StepMeter, step: int, more_bytes: int) -> Runtime:
        asked = self._asked
        if asked is None:
            return runtime
        asked.thread.join()
        self._asked = None
        self._seen_steps = meter.num_steps  # those that ran beside the optimiser were slower
        answer = asked.answers[0] if asked.answers else _Answer(None, "the optimiser failed")
        after = None if answer.plan is None else float(answer.plan.predicted["step_seconds"])
        why = answer.why or self._not_worth_it(answer, after, must=asked.must)
        self._hold_against(asked.question, runtime.plan)
        found = runtime
        if not why and answer.plan is not None:
            found, why = _changed(runtime, asked.streaming, answer.plan, more_bytes)
        if not why:
            self._hold_against(asked.question, found.plan)
        if found is not runtime:
            meter.begin_again()
        if found is not runtime or asked.must:
            self._not_before = step + APART_STEPS
        decision = Decision(
            step=step, because=asked.because, result="kept" if why else "changed", why=why,
            seconds_before=answer.seconds_before, seconds_after=after, change_seconds=answer.change_seconds,
        )  # fmt: skip
        self.decisions.append(decision)
        logger.info("%s", said(decision))
        return found

    def _not_worth_it(self, answer: _Answer, after: float | None, *, must: bool) -> str:
        """Empty where it is."""
        before, change = answer.seconds_before, answer.change_seconds
        if must or after is None or before is None or change is None:
            return ""
        if after > before * (1 - LEAST_GAIN):
            return f"no plan is more than {LEAST_GAIN:.0%} faster"
        if (before - after) * HORIZON_STEPS < change:
            return f"a change does not pay for itself within {HORIZON_STEPS} steps"
        return ""

    def _hold_against(self, question: Problem, plan: Plan) -> None:
        """Later windows are expected to be as `question` says."""
        self._question = question
        self._expected = simulate(divided(question, plan), plan).busy_seconds


def why_not(runtime: Runtime) -> str:
    """Why the plan of `runtime` is not made again; empty where it is."""
    made_of = runtime.made_of
    workload = made_of.workload
    if not made_of.options.replan:
        return "switched off"
    if workload.training is not None:
        what = "adapters' state rests in tiers" if workload.training.adapters else "layers train"
        return f"{what}, which does not change over while it runs"
    if workload.has_streams:
        return "a GPU does not change over while it runs"
    if not workload.config.nvme:
        return "weights are in no store that they could be brought from"
    if made_of.question is None:
        return "the plan was given, or is that of the fixed rule"
    return ""


def has_drifted(factors: Sequence[float]) -> bool:
    """Whether each of them is off by more than `MARGIN`, all in the same direction."""
    return min(factors) > 1 + MARGIN or max(factors) < 1 / (1 + MARGIN)


def measured(question: Problem, factors: Mapping[str, float]) -> Problem:
    """`question` for a machine whose resources take so many times as long."""
    hardware, workload = question.hardware, question.workload
    links = replace(
        hardware.links,
        host_to_device_bytes_per_second=hardware.links.host_to_device_bytes_per_second
        / factors.get(HOST_TO_DEVICE, 1.0),
        device_to_host_bytes_per_second=hardware.links.device_to_host_bytes_per_second
        / factors.get(DEVICE_TO_HOST, 1.0),
    )
    drives = tuple(
        replace(
            drive, read_bytes_per_second=drive.read_bytes_per_second / factors.get(SSD_READ, 1.0),
            write_bytes_per_second=drive.write_bytes_per_second / factors.get(SSD_WRITE, 1.0),
        )
        for drive in hardware.drives
    )  # fmt: skip
    update = factors.get(DEVICE_UPDATE, 1.0)
    device = replace(hardware.device, adamw_params_per_second=hardware.device.adamw_params_per_second / update)
    classes = tuple(
        entry if entry.measured is None else replace(entry, measured=_times(entry.measured, factors.get(COMPUTE, 1.0)))
        for entry in workload.classes
    )
    return replace(
        question, hardware=replace(hardware, links=links, drives=drives, device=device),
        workload=replace(workload, classes=classes),
    )  # fmt: skip


def same_cuts(plan: Plan, other: Plan) -> bool:
    """Whether both give the same numbers, to the bit."""

    def cuts(of: Plan) -> tuple[Any, ...]:
        chunked = {name for name, policy in (of.activations or {}).items() if len(policy.chunks) > 1}
        return of.cuts, of.head_chunk_tokens, of.layer_major, of.update_mode, chunked, of.packed_products

    return cuts(plan) == cuts(other)


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


def _drift(name: str, factors: Sequence[float]) -> str:
    return f"{name} takes {median(factors):.2f} times as long as planned"


def _rates(question: Problem) -> dict[str, float]:
    hardware = question.hardware
    links = hardware.links
    return {
        HOST_TO_DEVICE: 0.0 if hardware.unified else links.host_to_device_bytes_per_second,
        DEVICE_TO_HOST: 0.0 if hardware.unified else links.device_to_host_bytes_per_second,
        SSD_READ: hardware.read_bytes_per_second,
        SSD_WRITE: hardware.write_bytes_per_second,
    }


def _times(seconds: MeasuredSeconds, factor: float) -> MeasuredSeconds:
    kept = seconds.kept
    if kept is not None:
        kept = replace(
            kept, forward=kept.forward * factor, backward=kept.backward * factor, put_away=kept.put_away * factor,
            taken_back=kept.taken_back * factor,
        )  # fmt: skip
    return replace(
        seconds, forward=seconds.forward * factor, backward=seconds.backward * factor,
        decode=seconds.decode * factor, kept=kept,
    )  # fmt: skip


def _with_memory(question: Problem, num_bytes: int) -> Problem:
    """`question` with so much DEVICE memory."""
    device = question.hardware.device
    device = replace(device, memory_bytes=max(device.reserve_bytes + 1, num_bytes))
    return replace(question, hardware=replace(question.hardware, device=device))


def _answer(question: Problem, streaming: StreamingProblem, plan: Plan) -> _Answer:
    """Asks the optimiser. In a thread of its own: whatever it raises is an answer."""
    try:
        found = plan_optimal(question)
        before = simulate(divided(question, plan), plan).step_seconds
    except PlanInfeasible as error:
        return _Answer(None, f"no plan fits: {error}")
    except Exception as error:  # noqa: BLE001 - training goes on with the plan that it has
        return _Answer(None, f"the optimiser failed: {error!r}")
    other = lowered(found, streaming, question)
    if not same_cuts(plan, other):
        return _Answer(None, "the other plan cuts otherwise, which changes numbers")
    return _Answer(other, "", before, _change_seconds(question, other))


def _change_seconds(question: Problem, plan: Plan) -> float:
    """All weights that rest in memory are brought there anew, and those in DEVICE over its link."""
    device = sum(len(entry.blocks) * entry.weights.device_bytes for entry in plan.classes)
    host = sum(len(entry.blocks) * entry.weights.host_bytes for entry in plan.classes)
    rates = _rates(question)
    over_link = device / rates[HOST_TO_DEVICE] if rates[HOST_TO_DEVICE] else 0.0
    return (device + host) / rates[SSD_READ] + over_link


def _changed(runtime: Runtime, streaming: StreamingProblem, plan: Plan, more_bytes: int) -> tuple[Runtime, str]:
    """The runtime of `plan`, or that of the plan before and why."""
    before, question = (runtime.made_of.problem, runtime.plan), runtime.made_of.question
    try:
        check_plan(plan, streaming, runtime.made_of.workload)
    except ConfigError as error:
        return runtime, str(error)
    now = runtime
    try:
        now = change_over(runtime, streaming, plan, question)
        if more_bytes:
            now.tiers.account(Tier.DEVICE).reserve("activations", more_bytes)
        return now, ""
    except (OffloadError, MemoryError) as error:
        logger.warning("a change of plans failed, going back: %s", error)
        return change_over(now, *before, question), f"the change failed: {error}"
