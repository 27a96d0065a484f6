"""Full fine-tuning as the optimiser plans it, run under emulated links: its numbers, its bytes, its memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import pytest

from offload_rt._engine import Engine
from offload_rt.config import EngineConfig, NvmePath
from offload_rt.emulation import emulated_config
from offload_rt.errors import ConfigError
from offload_rt.layers.discover import find_blocks
from offload_rt.plans import planning_together, planning_training
from offload_rt.plans.planning_tokens import ACTIVATIONS
from offload_rt.plans.planning_training import (
    check_can_be_asked,
    lowered_training,
    placement_of,
    questions,
    state_cuts,
)
from offload_rt.plans.training_seconds import TrainingSeconds, measured_seconds
from offload_rt.plans.workload_sizes import streaming_problem
from offload_rt.profiling.block_profile import profile_layer
from offload_rt.profiling.update_profile import PIECES, steps_per_second
from offload_rt.storage.commit_record import RECORD_BYTES, body_bytes
from offload_rt.tensor_spec import align_up
from offload_rt.wiring.runtime_options import RuntimeOptions
from offload_rt.wiring.workload import Workload, find_workload
from planners.errors import PlanInfeasible
from planners.optimiser import choices
from planners.optimiser.greedy import plan_greedy
from planners.optimiser.mip import plan_optimal
from planners.plans.activations import Action, whole_batch
from planners.plans.placement import ClassPlan, Split, Tier, UpdateMode
from planners.plans.plan import Plan
from planners.problems.hardware import Drive, Hardware
from planners.problems.measured import KeptPass, MeasuredSeconds
from planners.problems.model_workload import make_workload
from planners.problems.problem import Problem
from planners.rule.streaming_problem import StreamingProblem
from planners.shapes.architectures import shape_from_config
from planners.simulator.division import HOMES
from planners.simulator.validate import InvalidPlan, check, check_modes
from tests import test_planning
from tests.conftest import language_batch
from tests.full_parity import NORMS, OPTIMIZERS, STEPS, Case, build, run_engine, run_plain, training_of
from tests.parity import BATCH_SIZE, SEQ_LEN
from tests.planner_cases import TINY
from tests.test_full_parity import ieee_square_root as ieee_square_root
from tests.tiny_blocks import CountingRule, blocks

KIB, PAGE = 1 << 10, 4096
OPTIONS = RuntimeOptions(piece_elements=4096)
DRIVE = Drive(capacity_bytes=1 << 30, read_bytes_per_second=1e8, write_bytes_per_second=1e8)
LAYER = MeasuredSeconds(forward=1e-4, backward=2e-4)
STEPS_PER_SECOND = 1e9


@dataclass(frozen=True)
class Budget:
    """A machine that is small in one way, and where a layer's weights and state rest on it."""

    device: int
    """KiB; and `host`, where 0 makes one tier of memory."""
    host: int
    clipping: str
    weights: tuple[Tier, ...]
    state: tuple[Tier, ...]
    mode: UpdateMode
    only: Tier | None = None
    """Weights are made to rest there."""
    commit_every: int | None = None
    homes: frozenset[str] = frozenset()
    """Of what layers save, each at least once: of how many layers is the program's choice. Empty: that was not
    measured, and is computed again.
    """
    micro_batches: int = 1
    """Of a step."""
    together: bool = False
    """They go through each layer together."""


D, H, N = Tier
AGAIN, _, IN_HOST, KEPT = HOMES
BACKWARD, SPECULATIVE, AFTER = UpdateMode.BACKWARD, UpdateMode.SPECULATIVE, UpdateMode.AFTER
BUDGETS = {
    "all in memory": Budget(700, 4096, "not", (H,), (H,), AFTER),
    "all in memory, committed": Budget(700, 4096, "rarely", (H,), (H,), AFTER, commit_every=1),
    "one tier": Budget(6000, 0, "rarely", (D,), (D,), AFTER),
    "split": Budget(700, 1740, "not", (H,), (H, N), BACKWARD),
    "split, clipped": Budget(1024, 1740, "rarely", (D,), (H, N), SPECULATIVE),
    "split, one tier": Budget(2140, 0, "rarely", (D,), (D, N), SPECULATIVE),
    "state on NVME": Budget(1024, 640, "not", (D,), (N,), BACKWARD),
    "state on NVME, weights in HOST": Budget(700, 1040, "rarely", (H,), (N,), SPECULATIVE),
    "all on NVME": Budget(1024, 1040, "not", (N,), (N,), BACKWARD, only=N),
    "weights on NVME, state split": Budget(1024, 1740, "not", (N,), (H, N), AFTER, only=N),
    "all on NVME, one tier": Budget(1740, 0, "rarely", (N,), (N,), SPECULATIVE, only=N),
    "weights on NVME, state not": Budget(1024, 4096, "not", (N,), (H,), AFTER, only=N, commit_every=1),
    "weights on NVME, never committed": Budget(700, 2680, "not", (N,), (H,), AFTER),
    "committed now and then": Budget(1024, 1740, "not", (D,), (H, N), AFTER, commit_every=3),
    "some layers kept": Budget(1580, 0, "rarely", (N,), (N,), SPECULATIVE, homes=frozenset({AGAIN, KEPT})),
    "put away and kept": Budget(755, 1740, "rarely", (H,), (N,), SPECULATIVE, homes=frozenset({IN_HOST, KEPT})),
    "several": Budget(1024, 4096, "not", (H,), (H,), AFTER, micro_batches=5),
    "several, split": Budget(700, 1740, "not", (H,), (H, N), BACKWARD, micro_batches=3),
    "several, clipped": Budget(1024, 1740, "rarely", (D,), (H, N), SPECULATIVE, micro_batches=2),
    "several, one tier": Budget(2140, 0, "rarely", (D,), (D, N), SPECULATIVE, micro_batches=2),
    "several, all on NVME": Budget(1024, 1460, "not", (N,), (N,), BACKWARD, only=N, micro_batches=2),
    "together": Budget(1024, 4096, "not", (H,), (H,), AFTER, micro_batches=3, together=True),
    "together, split": Budget(700, 1740, "rarely", (H,), (H, N), SPECULATIVE, micro_batches=3, together=True),
    "together, one tier": Budget(2140, 0, "not", (D,), (D, N), BACKWARD, micro_batches=2, together=True),
    "together, all on NVME": Budget(1024, 1460, "not", (N,), (N,), BACKWARD, only=N, micro_batches=2, together=True),
    "several, put away and kept": Budget(
        755, 2040, "rarely", (H,), (N,), SPECULATIVE, homes=frozenset({IN_HOST, KEPT}), micro_batches=2
    ),
}  # fmt: skip
QUICK = ("split, one tier", "all on NVME", "put away and kept", "several, split", "together, split")


def case_of(budget: Budget) -> Case:
    return Case("llama", "bfloat16", "adamw", budget.micro_batches, budget.clipping, False, "on NVME")


def machine(device_kib: int, host_kib: int) -> Hardware:
    return replace(test_planning.machine(device_kib * KIB, host_kib * KIB), drives=(DRIVE,), drive_mix=0.3)


@functools.cache
def kept_pass() -> KeptPass:
    """What a layer really saves, with seconds that nobody measured: computing it again is what takes longest."""
    model = build(case_of(BUDGETS["split"]))
    model.enable_input_require_grads()  # type: ignore[operator]  # as behind an embedding that trains
    draft = next(draft for draft in find_blocks(model, bits=None) if draft.is_layer)
    kept = profile_layer(model, draft, batch_size=BATCH_SIZE, seq_len=SEQ_LEN).kept
    assert kept is not None
    return replace(kept, forward=0.01, backward=0.02, put_away=1e-4, taken_back=2e-4)


def seconds_of(workload: Workload, kept: KeptPass | None = None) -> TrainingSeconds:
    """That nobody measured: drives bind, or computing layers does where they may keep what they save."""
    layer = LAYER if kept is None else MeasuredSeconds(forward=0.01, backward=0.03, kept=kept)
    return TrainingSeconds(
        layers={draft.name: layer for draft in workload.layers},
        head=MeasuredSeconds(forward=1e-4, backward=0.0),
        embeddings={},
        steps_per_second=STEPS_PER_SECOND,
        deliveries_per_second=1e10,
    )


def asked(budget: Budget, folder: Path) -> tuple[Workload, StreamingProblem, list[tuple[Problem, Any]]]:
    """A fresh model taken apart, and what the optimiser is asked about it."""
    case, hardware = case_of(budget), machine(budget.device, budget.host)
    kept = kept_pass() if budget.homes else None
    config = EngineConfig(
        batch_size=BATCH_SIZE, seq_len=SEQ_LEN, nvme=(NvmePath(path=folder),), max_grad_norm=NORMS[budget.clipping],
        commit_every=budget.commit_every, accumulation_steps=budget.micro_batches,
    )  # fmt: skip
    model = build(case)
    optimizer = OPTIMIZERS[case.optimizer](list(model.parameters()))
    workload = find_workload(model, None, emulated_config(config, hardware), optimizer, OPTIONS)
    streaming = streaming_problem(workload)
    found = list(questions(workload, streaming, hardware, seconds_of(workload, kept)))
    return workload, streaming, [one for one in found if one[0].workload.layer_major is budget.together]


def test_a_dry_run_of_several_micro_batches_sums_as_the_engine_is_asked_to(tmp_path):
    budget = BUDGETS["several, split"]
    (problem, _), *_ = asked(budget, tmp_path)[2]
    dry = make_workload(
        shape_from_config(TINY, "tiny"), batch_size=BATCH_SIZE, seq_len=SEQ_LEN, rank=None, accumulation_steps=3
    )
    for field in ("micro_batches", "passes", "sums_gradients", "waiting_gradient_bytes_per_param", "layer_major"):
        assert getattr(dry, field) == getattr(problem.workload, field), field


def engine(budget: Budget, folder: Path, monkeypatch: pytest.MonkeyPatch, **arguments: Any) -> Engine:
    case, kept = case_of(budget), kept_pass() if budget.homes else None
    monkeypatch.setattr(planning_training, "measured_seconds", lambda workload, *_: seconds_of(workload, kept))
    if budget.micro_batches > 1:
        monkeypatch.setattr(planning_together, "orders", lambda _: (budget.together,))
    if budget.only is not None:
        monkeypatch.setattr(choices, "homes", only_there(choices.homes, budget.only))
        monkeypatch.setattr(planning_training, "questions", lambda *given: list(questions(*given))[-1:])
    given = {"plan": "optimise", "emulate": machine(budget.device, budget.host), **arguments}
    return Engine(
        build(case), batch_size=BATCH_SIZE, seq_len=SEQ_LEN, max_grad_norm=NORMS[budget.clipping], nvme=folder,
        commit_every=budget.commit_every, optimizer=OPTIMIZERS[case.optimizer], options=OPTIONS,
        accumulation_steps=budget.micro_batches, **given,
    )  # fmt: skip


def only_there(homes: Callable[[Problem], Any], tier: Tier) -> Callable[[Problem], Any]:
    return lambda problem: [home for home in homes(problem) if home[0] is tier]


def layers_of(plan: Plan) -> list[ClassPlan]:
    return [entry for entry in plan.classes if entry.name.startswith("layer")]


def homes_of(plan: Plan) -> tuple[str, ...]:
    """Of each layer, in the order of forward: see `Budget`, and what `activations` say of each layer is that."""
    found = {}
    for entry in layers_of(plan):
        for split in (split for split in entry.tokens if split.name == ACTIVATIONS):
            tokens = (split.recompute_tokens, split.nvme_tokens, split.host_tokens, split.device_tokens)
            found |= dict.fromkeys(entry.blocks, HOMES[tokens.index(SEQ_LEN)])
    said = {AGAIN: None, IN_HOST: whole_batch(Action.SWAP, H), KEPT: whole_batch(Action.KEEP)}
    given = plan.activations or {}
    assert all(given.get(block) == said[home] for block, home in found.items())
    return tuple(found[block] for block in sorted(found))


def tiers_of(plan: Plan) -> tuple[tuple[Tier, ...], tuple[Tier, ...]]:
    entry = layers_of(plan)[0]
    split = entry.weights
    sizes = (split.device_bytes, split.host_bytes, split.nvme_bytes)
    weights = tuple(tier for tier, size in zip(Tier, sizes, strict=True) if size)
    return weights, tuple(update.tier for update in entry.updates if update.params)


def moved(run: Engine) -> dict[str, float]:
    """Bytes that drives moved so far, and seconds that links and drives worked; what layers did with what they save.
    Nothing is under way.
    """
    report = run.report()
    groups = {} if report["tokenwise"] is None else report["tokenwise"]["bytes_by_group"]
    return {
        **report["link_busy_seconds"], "read": report["bytes_read"], "written": report["bytes_written"],
        "recomputes": report["recomputes"], "away": groups.get("chunk in host", 0),
        "kept": groups.get("chunk in device", 0),
    }  # fmt: skip


def of_one_commit(run: Engine) -> int:
    """What a commit writes besides state: its record, and the body that this vouches for."""
    log = training_of(run).home.log
    assert log is not None
    return RECORD_BYTES + align_up(body_bytes(len(log.names), len(log.committed.payload)), PAGE)


def train(run: Engine, num_steps: int) -> None:
    """Without padding, whose masks no measurement foresees."""
    for number in range(num_steps):
        batches = [language_batch(number, BATCH_SIZE, SEQ_LEN)] * run.config.accumulation_steps
        if run.plan.layer_major:
            run.train_batch(batches)
            continue
        for batch in batches:
            run.backward(run(**batch).loss)
        run.step()


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.full) for name in BUDGETS]
)
def test_an_optimised_plan_trains_with_the_bits_of_plain_pytorch_and_moves_the_bytes_it_predicts(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = BUDGETS[name]
    expected = run_plain(case_of(budget))
    with engine(budget, tmp_path, monkeypatch) as run:
        plan = run.plan
        assert tiers_of(plan) == (budget.weights, budget.state) and plan.update_mode is budget.mode
        assert set(homes_of(plan)) == budget.homes
        found = run_engine(case_of(budget), run)
        for step, (want, got) in enumerate(zip(expected, found, strict=True), 1):
            wrong = [key for key in got if not key.startswith("gradient") and not want[key].equal(got[key])]
            assert wrong == [], f"step {step}"
        train(run, 3)
        before = moved(run)
        every = budget.commit_every or 1
        train(run, 3 * every)
        after = moved(run)
        report = run.report()
        commits = of_one_commit(run) / every if report["training"]["num_commits"] > 1 else 0.0
        ahead = report["training"]["num_ahead_of_norm"]
    each = {key: (after[key] - before[key]) / (3 * every) for key in after}
    assert (ahead > STEPS) is (budget.mode is not AFTER)
    assert (commits > 0) is (N in budget.state or budget.commit_every is not None)
    check_activations(homes_of(plan), each, report, budget.micro_batches)
    predicted = plan.predicted["busy_seconds"]
    assert each["written"] == pytest.approx(predicted["ssd_write"] * DRIVE.write_bytes_per_second + commits, abs=1)
    assert each["read"] == pytest.approx(predicted["ssd_read"] * DRIVE.read_bytes_per_second, abs=1)
    each["ssd_write"] -= commits / DRIVE.write_bytes_per_second
    for resource in ("host_to_device", "device_to_host", "ssd_read", "ssd_write"):
        assert each.get(resource, 0.0) == pytest.approx(predicted[resource], rel=1e-3, abs=1e-9), resource
    pages = PAGE * (len(report["holdings"]) + 2 * (4 + 2))
    capacities = {"device": budget.device * KIB, "host": budget.host * KIB}
    for tier, capacity in capacities.items():
        assert report["memory"][tier] <= capacity
        reserve = plan_reserve(budget, tmp_path / "again") if tier == "device" else 0
        granted = plan.allocator_slack_bytes if tier == "device" else 0  # a quarter of it at least is the reserve's
        assert report["memory"][tier] <= plan.predicted_bytes(Tier(tier)) + reserve + granted + pages


def check_activations(homes: tuple[str, ...], each: dict[str, float], report: dict[str, Any], times: int) -> None:
    """Each micro-batch of a step keeps, puts away and computes again what the plan says, to the byte."""
    count = homes.count
    assert each["recomputes"] == times * (count(AGAIN) if homes else 4)
    assert (report["tokenwise"] is not None) is bool(homes)
    if homes:
        saved, tokenwise = kept_pass(), report["tokenwise"]
        assert tokenwise["num_whole"] == tokenwise["no_room_bytes"] == 0
        assert each["away"] == times * count(IN_HOST) * saved.saved_bytes
        kept_bytes = count(KEPT) * saved.saved_bytes + (4 - count(AGAIN)) * saved.small_bytes
        assert each["kept"] == times * kept_bytes


def plan_reserve(budget: Budget, folder: Path) -> int:
    folder.mkdir(exist_ok=True)
    return asked(budget, folder)[2][-1][0].hardware.device.reserve_bytes


def test_the_fixed_rule_and_the_optimiser_give_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budget = BUDGETS["split"]
    traces = []
    for plan in ("auto", "optimise"):
        (tmp_path / plan).mkdir()
        budgets = {} if plan == "optimise" else {"emulate": None, "device_memory": "64MiB", "host_memory": "64MiB"}
        with engine(budget, tmp_path / plan, monkeypatch, plan=plan, **budgets) as run:
            traces.append(run_engine(case_of(budget), run))
            assert run.plan.planner == ("fixed streaming rule" if plan == "auto" else "optimiser")
    for one, other in zip(*traces, strict=True):
        assert [name for name in one if not one[name].equal(other[name])] == []


def test_the_question_has_the_pieces_gradients_and_weights_that_there_are(tmp_path: Path) -> None:
    workload, streaming, found = asked(BUDGETS["split"], tmp_path)
    training = workload.training
    assert training is not None
    for problem, _ in found:
        classes = {name: entry for entry in problem.workload.classes for name in entry.blocks}
        assert set(classes) == {block.name for block in training.blocks}
        for block in training.blocks:
            entry = classes[block.name]
            assert entry.state_cuts[-1] == (entry.trainable_params, block.state_bytes)
            assert len(entry.state_cuts) == len(block.pieces) + 1
            assert entry.stored_bytes == block.weights_bytes and entry.weights_stay is (block.weights is None)
        positions = sorted(position for entry in problem.workload.classes for position in entry.positions)
        assert positions == list(range(len(training.blocks)))
        assert classes["model.norm.weight"].positions == (len(training.blocks) - 1,)
    in_memory, with_drive = (problem for problem, _ in found)
    assert in_memory.workload.commit_every is None and with_drive.workload.commit_every == 1
    assert N not in in_memory.capabilities.state_tiers
    assert all(freedoms.weights[list(Tier).index(N)] for _, freedoms in found), "weights may rest on it in either"


@pytest.mark.parametrize("name", ["split", "split, one tier", "all on NVME", "committed now and then"])
def test_plans_of_real_blocks_pass_the_validator_and_what_the_runtime_cannot_do_does_not(
    name: str, tmp_path: Path
) -> None:
    _, _, found = asked(BUDGETS[name], tmp_path)
    problem, freedoms = found[-1]
    plan = plan_optimal(problem, freedoms=freedoms)
    check(problem, plan)
    greedy = plan_greedy(problem)
    check(problem, greedy)
    assert plan.predicted["step_seconds"] <= greedy.predicted["step_seconds"] * 1.02

    def refused(match: str, entry: str, **changes: Any) -> None:
        broken = [replace(one, **changes) if one.name == entry else one for one in plan.classes]
        with pytest.raises(InvalidPlan, match=match):
            check_modes(problem, replace(plan, classes=tuple(broken)))

    layer = plan.entry("layer")
    half = layer.weights.total_bytes // 2 // PAGE * PAGE
    parted = Split(device_bytes=half, host_bytes=0, nvme_bytes=layer.weights.total_bytes - half)
    refused("several tiers", "layer", weights=parted)
    table = plan.entry("model.embed_tokens.weight")
    refused(
        "stay in DEVICE", table.name, weights=Split(device_bytes=0, host_bytes=0, nvme_bytes=table.weights.total_bytes)
    )
    first = replace(layer.updates[0], params=17)
    rest = replace(layer.updates[-1], params=sum(u.params for u in layer.updates) - 17)
    refused("cannot be cut into parameters", "layer", updates=(first, rest))
    if any(update.tier is not N for update in layer.updates) and plan.update_mode is not AFTER:
        on_nvme = Split(device_bytes=0, host_bytes=0, nvme_bytes=layer.weights.total_bytes)
        refused("would be written twice", "layer", weights=on_nvme)


def test_a_plan_that_says_two_things_of_state_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budget = BUDGETS["split"]
    workload, streaming, found = asked(budget, tmp_path)
    plan = lowered_training(plan_optimal(found[-1][0]), workload, streaming, found[-1][0])
    assert plan.state == placement_of(plan, workload, unified=False)
    assert plan.state is not None
    emulate = machine(budget.device, budget.host)

    def refused(match: str, broken: Plan) -> None:
        with pytest.raises(ConfigError, match=match):
            engine(budget, tmp_path, monkeypatch, plan=broken, emulate=emulate)

    refused("classes place state so", replace(plan, state=replace(plan.state, state_slots=1)))
    refused("classes place state so", replace(plan, update_mode=AFTER, buffers=replace(plan.buffers, state_slots=3)))
    layers = plan.entry("layer")
    moved_one = replace(layers.updates[0], params=layers.updates[0].params - 1)
    classes = tuple(replace(c, updates=(moved_one, *c.updates[1:])) if c is layers else c for c in plan.classes)
    refused("in memory, which is cut at", replace(plan, classes=classes))
    refused("its classes are not those", replace(plan, classes=plan.classes[:-1]))
    file = tmp_path / "plan.json"
    file.write_text(plan.to_json())
    with engine(budget, tmp_path, monkeypatch, plan=file, emulate=emulate) as run:
        assert run.plan == plan


def test_what_cannot_be_asked_is_told(tmp_path: Path) -> None:
    case = case_of(BUDGETS["split"])
    given: dict[str, Any] = {"batch_size": BATCH_SIZE, "seq_len": SEQ_LEN, "nvme": tmp_path, "plan": "optimise"}
    given["emulate"] = machine(4096, 4096)
    model: Any = build(case).requires_grad_(False)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    model.get_submodule("base_model.model.model.layers")[1].requires_grad_(True)
    with pytest.raises(ConfigError, match="trains inside a layer, whose weights stay"):
        Engine(model, optimizer=OPTIMIZERS["adamw"], **given)
    with pytest.raises(PlanInfeasible):
        Engine(build(case), optimizer=OPTIMIZERS["adamw"], **{**given, "emulate": machine(64, 64)})
    workload, _, _ = asked(BUDGETS["split"], tmp_path)
    check_can_be_asked(workload)


def test_what_is_measured_runs_the_code_that_steps(tmp_path: Path) -> None:
    workload, streaming, _ = asked(BUDGETS["split"], tmp_path)
    optimizer = OPTIMIZERS["adamw"](list(workload.model.parameters()))
    before = {name: p.detach().clone() for name, p in workload.model.named_parameters()}
    seconds = measured_seconds(workload, streaming, optimizer)
    assert set(seconds.layers) == {draft.name for draft in workload.layers}
    assert all(min(taken.forward, taken.backward) > 0 for taken in seconds.layers.values())
    assert seconds.head.forward > 0 and set(seconds.embeddings) == {"model.embed_tokens.weight"}
    assert seconds.steps_per_second > 0 and seconds.deliveries_per_second > 0
    assert all(p.equal(before[name]) for name, p in workload.model.named_parameters())
    rule = CountingRule()
    (block,) = blocks(1)
    assert steps_per_second(block, rule, {}, on_nvme=False) > 0
    assert len(rule.seen) % min(PIECES, len(block.pieces)) == 0 and len(rule.seen) > 2 * len(block.pieces)
    assert {step for _, _, step in rule.seen[len(block.pieces) :]} == {2}
    assert state_cuts(block)[-1][1] == block.state_bytes
