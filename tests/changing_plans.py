"""Runs that change over between plans while they train, whenever somebody says so."""

from __future__ import annotations

import itertools
import threading
from dataclasses import replace
from typing import Any

import pytest

from offload_rt._engine import Engine
from offload_rt.errors import StorageError
from offload_rt.layers.autograd import RecomputedLayer
from offload_rt.optimizer.stepper import Stepper
from offload_rt.plans.plan_options import with_options
from offload_rt.running.replanning import _Answer, _Question
from offload_rt.wiring.runtime_assembly import RuntimeAssembly
from offload_rt.wiring.runtime_options import RuntimeOptions
from planners.plans.plan import Plan
from planners.rule.streaming import plan_streaming
from tests.tiny_training import PLACES

CHANGE_EVERY = 2
"""Steps."""
FAILURES = {
    "attach": (RuntimeAssembly, "_attach", 1),
    "masters": (Stepper, "rebuild_weights", 2),
    "hooks": (RecomputedLayer, "attach", 2),
}
"""Where a change may fail, and at which call: before anything is in the model, when half of the weights are made, or
when half of the hooks are in.
"""


def plan_of(run: Engine, place: str) -> Plan:
    """The rule's plan for what `run` trains, as one of `PLACES` has it."""
    made_of = run._runtime.made_of
    options = RuntimeOptions(**PLACES[place].get("options", {}))
    trains = {block.name for block in made_of.problem.training.blocks}
    if options.state is not None:
        in_memory = {name: count for name, count in options.state.in_memory.items() if name in trains}
        options = replace(options, state=replace(options.state, in_memory=in_memory))
    plan = plan_streaming(made_of.problem, rest=options.rest)
    return with_options(plan, made_of.workload, options, made_of.problem.training)


def propose(run: Engine, plan: Plan, *, commits: bool = True) -> None:
    """As the replanner does when it has found that `plan` is worth it, at the end of a step, which it `commits`."""
    done = threading.Thread()
    done.start()
    run._changes.replanner._to_take = _Question(
        "a test says so", None, run._runtime.made_of.problem, True, 0, done, [_Answer(plan)]
    )
    if commits:
        run._training.commit_next()


def fail_once(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Lets the next change of plans fail at one of `FAILURES`, with "there was none"."""
    of, name, at_call = FAILURES[where]
    whole, calls = getattr(of, name), itertools.count(1)

    def fails(self: Any, *arguments: Any, **named: Any) -> Any:
        if next(calls) == at_call:
            raise StorageError("there was none", path="/dev/null", errno=12)
        return whole(self, *arguments, **named)

    monkeypatch.setattr(of, name, fails)


def results(run: Engine) -> list[str]:
    """Of the plans that were proposed."""
    return [decision["result"] for decision in decisions(run)]


def decisions(run: Engine) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = run.report()["replanning"]["decisions"]
    return found


def with_pieces_in_memory(run: Engine, num_pieces: int) -> Plan:
    """The plan of a run whose adapters' state rests in tiers, with so much of it in memory."""
    plan = run.plan
    assert plan.state is not None
    return replace(plan, state=replace(plan.state, in_memory={"adapters": num_pieces}))


class Changes:
    """Two plans of a run that take turns: every other step another one is proposed."""

    def __init__(self, run: Engine) -> None:
        self._run, self._plans = run, [run.plan]
        adapters = run._runtime.made_of.problem.training.adapters
        self._plans.append(with_pieces_in_memory(run, 2) if adapters else plan_of(run, "in place"))

    def after_step(self) -> None:
        if self._run.step_number % CHANGE_EVERY == 0:
            propose(self._run, self._plans[self._run.plan == self._plans[0]])
