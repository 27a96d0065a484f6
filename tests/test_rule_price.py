"""The fixed rule's plan where layers train, by the optimiser's simulator: to the byte of what runs; and who is chosen.

the rule's plan ──► runs under emulated links ──► bytes, seconds of links and drives ─┐
               └──► `rule_simulation` ─────────────────────────────────────────────────┴─► equal
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from offload_rt import arguments
from offload_rt._engine import Engine
from offload_rt.config import EngineConfig, NvmePath
from offload_rt.emulation import emulated_config
from offload_rt.plans import plan_choice, planning_training
from offload_rt.plans.asked import Asked
from offload_rt.plans.cuts import cuts_of
from offload_rt.plans.plan_choice import MAX_SECONDS, OPTIMISER, RULE, choose
from offload_rt.plans.planning_training import lowered_training, questions
from offload_rt.plans.rule_price import in_classes, rule_seconds, rule_simulation, why_no_question_says
from offload_rt.plans.workload_sizes import streaming_problem
from offload_rt.profiling.drive_profile import MOST_BYTES
from offload_rt.profiling.profile_cost import profile_drive_bytes, profile_drive_seconds
from offload_rt.profiling.workbench import RUNS
from offload_rt.wiring.workload import Workload, find_workload
from planners.optimiser.mip import plan_optimal
from planners.plans.activations import Action, ActivationPolicy, Chunk
from planners.plans.placement import Tier, UpdateMode
from planners.plans.plan import Plan
from planners.problems.hardware import Hardware
from planners.problems.measured import MeasuredSeconds
from planners.problems.problem import Problem
from planners.rule.attempts import head_chunk_tokens
from planners.rule.streaming import plan_streaming
from planners.rule.streaming_problem import StreamingProblem
from planners.simulator.simulate import simulate
from planners.simulator.step_work import busy_seconds
from tests.full_parity import NORMS, OPTIMIZERS, build, run_engine, run_plain
from tests.parity import BATCH_SIZE, SEQ_LEN
from tests.test_device_share import MACHINES, asked_about
from tests.test_full_parity import ieee_square_root as ieee_square_root
from tests.test_planning_training import (
    AGAIN,
    BUDGETS,
    DRIVE,
    LAYER,
    OPTIONS,
    Budget,
    asked,
    case_of,
    engine,
    kept_pass,
    machine,
    moved,
    of_one_commit,
    seconds_of,
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
    micro_batches: int = 1
    together: bool = False
    """They go through each layer together."""

    @property
    def budget(self) -> Budget:
        return Budget(
            self.device, self.host, self.clipping, (), (), AFTER, commit_every=self.commit_every,
            homes=frozenset({AGAIN}), micro_batches=self.micro_batches, together=self.together,
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
    "several": Ruled(1580, 1740, "not", BACKWARD, D, kept=2, in_memory=7, micro_batches=3),
    "several, one tier": Ruled(2140, 0, "not", BACKWARD, N, micro_batches=3),
    "together": Ruled(700, 1740, "not", BACKWARD, N, in_memory=3, micro_batches=3, together=True),
    "together, all in HOST": Ruled(700, 4096, "not", AFTER, H, in_memory=43, micro_batches=2, together=True),
}
QUICK = ("a layer stepped in two parts", "two layers stay", "layers stay", "together")


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
    assert each["recomputes"] == ruled.micro_batches * (4 - ruled.kept)
    assert rule.layer_major is ruled.together


def test_the_rules_simulated_steps_do_the_work_that_is_summed_by_hand(tmp_path: Path) -> None:
    for name in ("a layer stepped in two parts", "a layer kept", "one tier", "two layers stay", "several", "together"):
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
        (replace(rule, layer_major=True, activations=policy(whole)), "several micro-batches together"),
        (replace(rule, activations=policy(chunk)), "chunks"),
        (replace(rule, activations=policy(swapped)), "swapped"),
    ):
        assert why in why_no_question_says(changed, SEQ_LEN)
        with pytest.raises(ValueError, match=why):
            rule_seconds(problem, changed)


FAST = replace(DRIVE, read_bytes_per_second=1e12, write_bytes_per_second=1e12)
LONG = MeasuredSeconds(forward=0.1, backward=0.3)
STREAMS = Ruled(860, 1740, "rarely", SPECULATIVE, N)
"""The rule has weights and state on NVMe there; the optimiser has room for the weights in HOST."""


def calibrated(monkeypatch: pytest.MonkeyPatch, *, drives_bind: bool, layer: MeasuredSeconds | None = None) -> Hardware:
    """This machine, with layers that take so long, which nobody measures."""
    hardware = replace(machine(STREAMS.device, STREAMS.host), drives=(DRIVE if drives_bind else FAST,))
    monkeypatch.setattr(arguments, "calibrated", lambda *_: hardware)
    layer = layer or (LAYER if drives_bind else LONG)

    def measured(workload: Workload, *_: Any) -> Any:
        return replace(seconds_of(workload), layers={draft.name: layer for draft in workload.layers})

    monkeypatch.setattr(planning_training, "measured_seconds", measured)
    return hardware


@pytest.mark.parametrize(
    ("every", "micro_batches"),
    [(None, 1), pytest.param(3, 1, marks=pytest.mark.full), pytest.param(None, 2, marks=pytest.mark.full)],
)
def test_auto_runs_the_optimisers_plan_where_drives_bind_with_the_rules_bits_and_commits(
    every: int | None, micro_batches: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of(replace(STREAMS.budget, micro_batches=micro_batches))
    expected, commits = run_plain(case), []
    given: dict[str, Any] = {
        "device_memory": STREAMS.device << 10, "host_memory": STREAMS.host << 10, "commit_every": every,
        "batch_size": BATCH_SIZE, "seq_len": SEQ_LEN, "max_grad_norm": NORMS[STREAMS.clipping], "options": OPTIONS,
        "optimizer": OPTIMIZERS[case.optimizer], "accumulation_steps": micro_batches,
    }  # fmt: skip
    for chosen in (OPTIMISER, RULE):
        (tmp_path / chosen).mkdir()
        calibrated(monkeypatch, drives_bind=chosen == OPTIMISER)
        with Engine(build(case), nvme=tmp_path / chosen, **given) as run:
            choice = run.report()["plan_choice"]
            assert (run.plan.planner, choice["chosen"]) == (chosen, chosen), choice["why"]
            assert ("no faster" in choice["why"]) is (chosen == RULE)
            assert (N in {ring.rest for ring in run.plan.rings}) is (chosen == RULE)
            assert run.plan.layer_major is (micro_batches > 1)
            for step, (want, got) in enumerate(zip(expected, run_engine(case, run), strict=True), 1):
                wrong = [key for key in got if not key.startswith("gradient") and not want[key].equal(got[key])]
                assert wrong == [], f"{chosen}, step {step}"
            report = run.report()
        commits.append(report["training"]["num_commits"])
        if chosen == OPTIMISER:
            assert choice["optimised_step_seconds"] == report["predicted"]["step_seconds"]
            assert choice["optimised_step_seconds"] < 0.9 * choice["rule_step_seconds"]
            assert report["replanning"]["off"] is None, "it is held against what is measured"
    assert commits[0] == commits[1] > 1


def choice_of(
    monkeypatch: pytest.MonkeyPatch, folder: Path, ruled: Ruled, *, layer: MeasuredSeconds = LAYER, **changes: Any
) -> tuple[Plan, Plan, plan_choice.Choice]:
    """The rule's plan, the one that is chosen, and why. changes: to the configuration."""
    hardware = calibrated(monkeypatch, drives_bind=True, layer=layer)
    workload, streaming, _ = asked(replace(ruled.budget, homes=frozenset()), folder)
    workload = replace(workload, config=replace(workload.config, **changes))
    rule = plan_streaming(streaming)
    optimizer = OPTIMIZERS["adamw"](list(workload.model.parameters()))
    plan, choice, found = choose(workload, streaming, rule, hardware, optimizer)
    assert (found is None) is (choice.chosen == RULE) is (plan is rule)
    return rule, plan, choice


@pytest.mark.parametrize(
    ("ruled", "changes", "why"),
    [
        (replace(STREAMS, device=1024, host=640), {}, "gradients that wait on NVMe"),
        (STREAMS, {"device_memory_bytes": None}, "no device_memory="),
    ],
)
def test_what_cannot_be_asked_about_layers_that_train_leaves_the_rules_plan(
    ruled: Ruled, changes: dict[str, Any], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, choice = choice_of(monkeypatch, tmp_path, ruled, **changes)
    assert choice.chosen == RULE and why in choice.why and not choice.seconds


@pytest.mark.parametrize(
    ("device", "host", "together"), [(860, 1740, True), pytest.param(2140, 0, False, marks=pytest.mark.full)]
)
def test_auto_asks_about_several_micro_batches_in_the_rules_order(
    device: int, host: int, together: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ruled = replace(STREAMS, device=device, host=host, micro_batches=3)
    rule, plan, choice = choice_of(monkeypatch, tmp_path, ruled)
    assert choice.chosen == OPTIMISER, choice.why
    assert rule.layer_major is plan.layer_major is together


def test_without_rates_the_optimiser_is_not_asked_about_layers_that_train(tmp_path: Path) -> None:
    workload, streaming, _ = asked(STREAMS.budget, tmp_path)
    rule = plan_streaming(streaming)
    plan, choice, _ = choose(workload, streaming, rule, None)
    assert plan is rule and "this machine's rates are not known; `offload-rt calibrate" in choice.why


@pytest.mark.parametrize("every", [None, pytest.param(1, marks=pytest.mark.full)])
def test_a_plan_that_would_commit_otherwise_is_not_taken(
    every: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The optimiser has room for all of the state, the rule has not. Taken where it is said how often."""
    ruled = replace(STREAMS, device=1024, host=2500, commit_every=every)
    can_keep = replace(LAYER, kept=replace(kept_pass(), forward=1e-4, backward=2e-4))
    rule, plan, choice = choice_of(monkeypatch, tmp_path, ruled, layer=can_keep)
    assert rule.state is not None and sum(rule.state.in_memory.values()) < 43
    if every is None:
        assert choice.chosen == RULE and "would commit no step" in choice.why
    else:
        assert plan.state is not None and sum(plan.state.in_memory.values()) == 43
        assert choice.chosen == OPTIMISER, choice.why


@pytest.mark.parametrize("keeps", [True, False])
def test_the_optimiser_takes_the_loss_as_the_rule_does(
    keeps: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once where the rule keeps all that layers save, by tiles where it does not: else the bits would differ."""
    monkeypatch.setattr(plan_choice, "GAIN", -10.0)
    hardware = calibrated(monkeypatch, drives_bind=False, layer=replace(LONG, kept=kept_pass()))
    hardware = replace(hardware, device=replace(hardware.device, memory_bytes=(64 if keeps else 20) << 20))
    hardware = replace(hardware, host=replace(hardware.host, memory_bytes=64 << 20))
    size = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=2048, tie_word_embeddings=False, **size))
    config = EngineConfig(batch_size=1, seq_len=1024, nvme=(NvmePath(path=tmp_path),))
    optimizer = OPTIMIZERS["adamw"](list(model.parameters()))
    workload = find_workload(model, None, emulated_config(config, hardware), optimizer, OPTIONS)
    streaming = streaming_problem(workload)
    rule = plan_streaming(streaming)
    tile = head_chunk_tokens(streaming)
    assert tile is not None and rule.head_chunk_tokens == (None if keeps else tile)
    plan, choice, _ = choose(workload, streaming, rule, hardware, optimizer)
    assert choice.chosen == OPTIMISER, choice.why
    assert cuts_of(plan, workload) == cuts_of(rule, workload)


def test_what_timing_writes_to_a_drive_is_in_the_estimate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hardware = calibrated(monkeypatch, drives_bind=True)
    workload, streaming, _ = asked(STREAMS.budget, tmp_path)
    num_bytes = profile_drive_bytes(workload, streaming)
    assert num_bytes == (1 + RUNS) * streaming.activation_bytes
    large = replace(streaming, activation_bytes=1 << 40)
    assert profile_drive_bytes(workload, large) == (1 + RUNS) * MOST_BYTES
    assert profile_drive_seconds(workload, streaming, hardware) == pytest.approx(2 * num_bytes / 1e8)
    without = replace(workload, config=replace(workload.config, nvme=()))
    assert profile_drive_bytes(without, streaming) == 0 == profile_drive_seconds(without, streaming, hardware)
    crawling = replace(hardware, drives=(replace(DRIVE, write_bytes_per_second=num_bytes / MAX_SECONDS),))
    rule = plan_streaming(streaming)
    _, choice, _ = choose(workload, streaming, rule, crawling)
    assert choice.chosen == RULE and "profiling a layer would take about 60 s" in choice.why
