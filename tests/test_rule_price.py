"""The fixed rule's plan where layers train, by the optimiser's simulator: to the byte of what runs; and who is chosen.

the rule's plan ──► runs under emulated links ──► bytes, seconds of links and drives ─┐
               └──► `rule_simulation` ─────────────────────────────────────────────────┴─► equal
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from offload_rt.plans.asked import Asked
from offload_rt.plans.planning_training import lowered_training, questions
from offload_rt.plans.rule_price import in_classes, rule_seconds, rule_simulation, why_no_question_says
from planners.optimiser.mip import plan_optimal
from planners.plans.activations import Action, ActivationPolicy, Chunk
from planners.plans.placement import Tier, UpdateMode
from planners.plans.plan import Plan
from planners.problems.problem import Problem
from planners.rule.streaming import plan_streaming
from planners.rule.streaming_problem import StreamingProblem
from planners.simulator.simulate import simulate
from planners.simulator.step_work import busy_seconds
from tests.parity import SEQ_LEN
from tests.test_device_share import MACHINES, asked_about
from tests.test_full_parity import ieee_square_root as ieee_square_root
from tests.test_planning_training import (
    AGAIN,
    BUDGETS,
    DRIVE,
    LAYER,
    Budget,
    asked,
    engine,
    kept_pass,
    moved,
    of_one_commit,
    train,
)

AFTER, BACKWARD, SPECULATIVE = UpdateMode.AFTER, UpdateMode.BACKWARD, UpdateMode.SPECULATIVE


@dataclass(frozen=True)
class Ruled:
    """A machine that is small in one way, and what the rule does on it."""

    device: int
    """KiB; and `host`, where 0 makes one tier of memory."""
    host: int
    clipping: str
    mode: UpdateMode
    rest: Tier
    """Of layers' weights."""
    kept: int = 0
    """Layers that keep what they save."""
    in_memory: int = 0
    """Pieces of state, of 43."""
    gradients: Tier = Tier.HOST
    commit_every: int | None = None
    staying: int = 0
    """Layers that are put into DEVICE memory by hand, where the others stream through one slot."""

    @property
    def budget(self) -> Budget:
        return Budget(
            self.device, self.host, self.clipping, (), (), AFTER, commit_every=self.commit_every,
            homes=frozenset({AGAIN}),
        )  # fmt: skip


D, H, N = Tier
RULED = {
    "a layer stepped in two parts": Ruled(500, 1040, "not", BACKWARD, N, in_memory=3),
    "gradients pass": Ruled(700, 640, "not", BACKWARD, N, gradients=N),
    "an embedding in memory": Ruled(700, 1040, "rarely", SPECULATIVE, N, in_memory=2),
    "all in HOST": Ruled(700, 4096, "not", AFTER, H, in_memory=43),
    "all in HOST, committed": Ruled(700, 4096, "not", AFTER, H, in_memory=43, commit_every=1),
    "a layer kept": Ruled(900, 1740, "rarely", SPECULATIVE, N, kept=1, in_memory=2),
    "layers stay": Ruled(1024, 1040, "rarely", SPECULATIVE, D, in_memory=7),
    "committed now and then": Ruled(700, 1740, "not", AFTER, N, commit_every=3),
    "one tier": Ruled(1740, 0, "rarely", SPECULATIVE, N, in_memory=2),
    "one tier, all in it": Ruled(6000, 0, "not", AFTER, D, kept=4, in_memory=43),
    "two layers stay": Ruled(1024, 1740, "not", BACKWARD, N, staying=2),
}
QUICK = ("a layer stepped in two parts", "two layers stay", "layers stay")


def question_of(ruled: Ruled, folder: Path) -> tuple[Plan, Problem]:
    """The rule's plan on that machine, and the question that commits as often."""
    _, streaming, found = asked(ruled.budget, folder)
    rule = plan_of(ruled, streaming)
    sizes = streaming.training
    assert rule.state is not None and sizes is not None
    return rule, found[0 if rule.state.is_all_in_memory(sizes) else -1][0]


def plan_of(ruled: Ruled, streaming: StreamingProblem) -> Plan:
    rule = plan_streaming(streaming)
    if not ruled.staying:
        return rule
    (ring,) = plan_streaming(replace(streaming, fills=False)).rings
    assert rule.state is not None
    smaller = replace(ring, blocks=ring.blocks[: -ruled.staying], num_slots=1)
    resident = (*(name for name in rule.resident if name not in ring.blocks), *ring.blocks[-ruled.staying :])
    state = replace(rule.state, in_memory={}, weight_slots=2)
    return replace(rule, resident=resident, rings=(smaller,), state=state, activations=None)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.full) for name in RULED]
)
def test_the_rules_plan_moves_what_its_simulation_moves(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ruled = RULED[name]
    (tmp_path / "asked").mkdir()
    rule, problem = question_of(ruled, tmp_path / "asked")
    every = ruled.commit_every or 1
    with engine(ruled.budget, tmp_path, monkeypatch, plan=rule if ruled.staying else "auto") as run:
        assert run.plan == rule
        train(run, 4)
        before = moved(run)
        train(run, 2 * every)
        after, training = moved(run), run.report()["training"]
        records = of_one_commit(run) / every if training["num_commits"] > 1 else 0.0
    state = rule.state
    assert state is not None and rule.update_mode is ruled.mode and state.gradients is ruled.gradients
    assert sum(state.in_memory.values()) == ruled.in_memory and len(rule.activations or ()) == ruled.kept
    assert {ring.rest for ring in rule.rings} == ({ruled.rest} - {D})
    assert (training["num_ahead_of_norm"] > 0) is (ruled.mode is not AFTER)
    each = {key: (after[key] - before[key]) / (2 * every) for key in after}
    found = rule_simulation(problem, rule).busy_seconds
    assert each["read"] == pytest.approx(found["ssd_read"] * DRIVE.read_bytes_per_second, abs=1)
    assert each["written"] - records == pytest.approx(found["ssd_write"] * DRIVE.write_bytes_per_second, abs=1)
    for resource in ("host_to_device", "device_to_host"):
        assert each.get(resource, 0.0) == pytest.approx(found[resource], rel=1e-4, abs=1e-9), resource
    assert each["recomputes"] == 4 - ruled.kept


def test_the_rules_simulated_steps_do_the_work_that_is_summed_by_hand(tmp_path: Path) -> None:
    for name in ("a layer stepped in two parts", "a layer kept", "one tier", "two layers stay"):
        (tmp_path / name).mkdir()
        rule, problem = question_of(RULED[name], tmp_path / name)
        asked_for, plan = in_classes(problem, rule)
        assert simulate(asked_for, plan).busy_seconds == pytest.approx(busy_seconds(asked_for, plan), rel=1e-6)
        places = {block: entry.weights for entry in plan.classes for block in entry.blocks}
        streamed = {block for block, split in places.items() if split.streamed_bytes}
        assert streamed == {block for ring in rule.rings for block in ring.blocks}


@pytest.mark.parametrize(
    "name",
    [
        "split, one tier",
        *(pytest.param(name, marks=pytest.mark.full) for name in ("all in memory", "split", "state on NVME")),
    ],
)
def test_the_optimisers_plan_costs_as_much_in_the_rules_words(name: str, tmp_path: Path) -> None:
    """Without its classes a plan for whole layers says all that the rule says of one."""
    workload, streaming, found = asked(BUDGETS[name], tmp_path)
    problem, freedoms = found[-1]
    plan = lowered_training(plan_optimal(problem, freedoms=freedoms), workload, streaming, problem)
    check_same_price(problem, plan)


@pytest.mark.parametrize("name", ["slow", pytest.param("slow, state on NVMe", marks=pytest.mark.full)])
def test_what_the_device_steps_of_the_rules_plan_is_priced_so(name: str, tmp_path: Path) -> None:
    there = MACHINES[name]
    workload, streaming = asked_about(there, tmp_path)
    found = Asked(questions=tuple(questions(workload, streaming, there.hardware, there.seconds(workload))))
    plan, answered = found.best(workload, streaming)
    assert plan.state is not None and plan.state.on_device
    check_same_price(answered.question, plan)


def check_same_price(problem: Problem, plan: Plan) -> None:
    words = replace(plan, classes=(), arenas=(), cuts=None, predicted={})
    said = rule_simulation(problem, words)
    assert said.step_seconds == pytest.approx(plan.predicted["step_seconds"], rel=1e-6)
    assert said.busy_seconds == pytest.approx(plan.predicted["busy_seconds"], rel=1e-6)


def test_what_is_kept_of_layers_is_not_computed_again(tmp_path: Path) -> None:
    rule, problem = question_of(RULED["a layer kept"], tmp_path)
    saved = kept_pass()
    again = 0.01 + 0.03 - saved.forward - saved.backward
    without = rule_simulation(problem, replace(rule, activations=None)).busy_seconds["compute"]
    assert without - rule_simulation(problem, rule).busy_seconds["compute"] == pytest.approx(again)
    nothing = tuple(
        replace(entry, saved=tuple(one for one in entry.saved if not one.recomputable), measured=LAYER)
        if entry.is_layer
        else entry
        for entry in problem.workload.classes
    )
    unmeasured = replace(problem, workload=replace(problem.workload, classes=nothing))
    with pytest.raises(ValueError, match="was not measured"):
        rule_seconds(unmeasured, rule)


def test_what_no_question_can_say_has_no_price(tmp_path: Path) -> None:
    rule, problem = question_of(RULED["gradients pass"], tmp_path)
    assert rule.state is not None and why_no_question_says(rule, SEQ_LEN) == ""
    whole, chunk = Chunk(num_tokens=1 << 40, action=Action.KEEP), Chunk(num_tokens=8, action=Action.RECOMPUTE)
    name = rule.rings[0].blocks[0]

    def policy(*chunks: Chunk) -> dict[str, ActivationPolicy]:
        return {name: ActivationPolicy(chunks=chunks)}

    swapped = replace(whole, action=Action.SWAP, tier=Tier.HOST)
    for changed, why in (
        (replace(rule, update_mode=SPECULATIVE), "gradients that wait on NVMe"),
        (replace(rule, state=replace(rule.state, in_memory={name: 1})), "gradients that wait on NVMe"),
        (replace(rule, layer_major=True), "several micro-batches"),
        (replace(rule, activations=policy(chunk)), "chunks"),
        (replace(rule, activations=policy(swapped)), "swapped"),
    ):
        assert why in why_no_question_says(changed, SEQ_LEN)
        with pytest.raises(ValueError, match=why):
            rule_seconds(problem, changed)
