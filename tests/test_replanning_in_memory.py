"""A plan made again where no drive has the weights: they are handed over, or moved to where the next plan has them."""

import gc
from dataclasses import replace

import pytest
import torch

from offload_rt.config import EngineConfig
from offload_rt.emulation import emulated_config
from offload_rt.errors import StorageError
from offload_rt.memory import mapped
from offload_rt.meter import DEVICE_TO_HOST, HOST_TO_DEVICE
from offload_rt.plans.planning import lowered, problem_of
from offload_rt.plans.workload_sizes import streaming_problem
from offload_rt.running import rehearsal, replanning
from offload_rt.tiering import moving
from offload_rt.tiering.moving import moves_between, why_not_follow
from offload_rt.tiering.resting import splits_of
from offload_rt.wiring import runtime_assembly
from offload_rt.wiring.runtime_options import RuntimeOptions
from offload_rt.wiring.workload import find_workload
from planners.errors import PlanInfeasible, format_bytes
from planners.optimiser.mip import plan_optimal
from planners.plans.plan import Tier
from planners.problems.hardware import Links
from planners.rule.attempts import attempts
from planners.rule.edges import EdgesBy
from planners.simulator.division import divided
from planners.simulator.simulate import simulate
from tests.changing_plans import propose, results
from tests.conftest import build_base, build_lora
from tests.parity import BATCH_SIZE, SEQ_LEN
from tests.test_planning import SECONDS as HEAD_SECONDS
from tests.test_planning import machine
from tests.test_replanning import (
    ASKED_UNTIL,
    CHANGED_IN,
    FOUND_AT,
    KIB,
    MIB,
    RATE,
    SECONDS,
    WINDOW_STEPS,
    Run,
    equal,
    measured,
    without_clocks,
)

SLOW = 8.0
OFF = RuntimeOptions(replan=False)
LAST = 6


@pytest.fixture(autouse=True)
def no_clocks(monkeypatch, tmp_path):
    without_clocks(monkeypatch)
    monkeypatch.setenv("OFFLOAD_RT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run of adapters whose plan is never made again, of as many steps as any other here."""
    with pytest.MonkeyPatch.context() as patches:
        without_clocks(patches)
        with Run(tmp_path_factory.mktemp("undisturbed"), nvme=None, plan="auto", options=OFF) as run:
            return run.train(ASKED_UNTIL + WINDOW_STEPS + 3)


def question(hardware):
    """As `test_planning.question`, without a drive."""
    config = EngineConfig(bits=4, batch_size=BATCH_SIZE, seq_len=SEQ_LEN)
    workload = find_workload(build_lora(), None, emulated_config(config, hardware))
    sizes = streaming_problem(workload)
    seconds = {draft.name: SECONDS for draft in workload.layers}
    return workload, sizes, problem_of(workload, sizes, hardware, seconds, HEAD_SECONDS)


def found_for(factors, *, stays, begin=832 * KIB):
    """A machine without a drive whose best plan is another one, and a good deal faster, where its links are slower by
    `factors`; which has the weights where they are, or some of them elsewhere.
    """
    links = Links(host_to_device_bytes_per_second=RATE, device_to_host_bytes_per_second=RATE, duplex=0.5)
    for device in range(begin, 768 * KIB, -8 * KIB):
        hardware = replace(machine(device, 64 * MIB), drives=(), links=links)
        workload, sizes, problem = question(hardware)
        plan, slow = plan_optimal(problem), measured(problem, factors)
        other = plan_optimal(slow)
        gains = simulate(divided(slow, plan), plan).step_seconds > 1.2 * other.predicted["step_seconds"]
        plans = lowered(plan, sizes, problem), lowered(other, sizes, slow)
        moved = {move.block for move in moves_between(workload, *plans)}
        if gains and (not moved if stays else 0 < len(moved) < len(workload.drafts)):
            return hardware
    raise AssertionError("no such machine")


def booked(run):
    """What is reserved for weights, by tier and name, and that arenas are known to be so large at least."""
    tiers, resting = run.engine._runtime.tiers, run.engine._runtime.resting.items()
    for tier in (Tier.DEVICE, Tier.HOST):
        assert tiers.account(tier).arena_bytes >= sum(slot.num_bytes for (_, of), slot in resting if of is tier)
    names = ("weights", "resident blocks")
    return {(tier, name): a.holdings.get(name) for tier, a in tiers.accounts.items() for name in names}


def weights_of(run):
    """Where the weights are, by address."""
    return {place: slot.buffer().obj for place, slot in run.engine._runtime.resting.items()}


def test_a_link_that_is_slower_changes_the_plan_around_the_weights_and_no_number(undisturbed, tmp_path):
    factors = {DEVICE_TO_HOST: SLOW}
    hardware = found_for(factors, stays=True, begin=792 * KIB)
    last = CHANGED_IN + 2
    with Run(tmp_path, lambda step: factors, emulate=hardware, nvme=None) as run:
        run.train(ASKED_UNTIL)
        before, weights = run.engine._runtime, weights_of(run)
        assert weights and any(tier is Tier.HOST for _, tier in weights)
        resting = sum({id(s.region): len(s.region) for s in before.resting.values()}.values())
        accounts = {id(account) for account in before.tiers.accounts.values()}
        arenas = sum(account.arena_bytes for account in before.tiers.accounts.values())
        gc.disable()  # memory comes back without it
        try:
            watch = mapped.Watch()
            run.train(CHANGED_IN)
            changes = [(id(m.account) in accounts, m.num_bytes, there) for m, there in watch.changes if m.num_bytes]
            watch.close()
        finally:
            gc.enable()
        (decision,) = run.decisions
        assert decision["result"] == "changed" and decision["because"].startswith(DEVICE_TO_HOST)
        assert decision["seconds_after"] < decision["seconds_before"] and decision["change_seconds"] == 0
        given_back = [num_bytes for old, num_bytes, there in changes if old and not there]
        assert sum(given_back) == arenas - resting > 0, "all but the weights, before the next plan's memory"
        assert not any(not old and there for old, _, there in changes[: len(given_back)])
        assert run.engine._runtime is not before and before.resting == {}
        assert weights_of(run) == weights, "the same memory"
        run.train(last)
        assert run.engine.plan != run.first_plan and run.engine.report()["peaks"]["over"] == []
    assert equal(run, undisturbed)


@pytest.mark.parametrize("room", [True, pytest.param(False, marks=pytest.mark.full)])
def test_links_that_are_slower_move_weights_and_change_no_number(room, undisturbed, tmp_path, monkeypatch):
    factors = dict.fromkeys((HOST_TO_DEVICE, DEVICE_TO_HOST), SLOW)
    hardware = found_for(factors, stays=False)
    with Run(tmp_path, lambda step: factors, emulate=hardware, nvme=None) as run:
        if not room:
            monkeypatch.setattr(moving, "in_order", lambda moves, _: None if moves else [])
        run.train(ASKED_UNTIL)
        before, weights = run.engine._runtime, weights_of(run)
        run.train(CHANGED_IN + 1)
        (decision,) = run.decisions
        if room:
            assert decision["result"] == "changed" and decision["change_seconds"] > 0
            moves = moves_between(before.made_of.workload, run.first_plan, run.engine.plan)
            elsewhere = {(move.block, tier) for move in moves for tier in move.new}
            stays = {place: memory for place, memory in weights_of(run).items() if place not in elsewhere}
            assert elsewhere and stays and stays.items() <= weights.items(), "what stays is the same memory"
            booked(run)
            assert run.engine.report()["peaks"]["over"] == []
        else:
            assert decision["result"] == "kept" and "no room to do it in" in decision["why"]
            assert run.engine._runtime is before and weights_of(run) == weights
            return
    assert equal(run, undisturbed)


def rule_with(problem, by):
    """The rule's plans that have the blocks outside the layers so."""
    return [plan for plan in attempts(problem, Tier.HOST, None) if _edges_of(plan) is by]


def _edges_of(plan):
    if plan.head_tiles is not None:
        return EdgesBy.TILES
    if plan.lookups is not None:
        return EdgesBy.ROWS
    return EdgesBy.WHOLE if any(ring.name == "edges" for ring in plan.rings) else EdgesBy.RESIDENT


@pytest.mark.parametrize(
    "by",
    [
        EdgesBy.ROWS,
        EdgesBy.TILES,
        *(pytest.param(by, marks=pytest.mark.full) for by in (EdgesBy.RESIDENT, EdgesBy.WHOLE)),
    ],
)
def test_rings_rows_and_tiles_take_weights_over_from_host(by, tmp_path):
    """Another number of slots, decoded weights held or not, inputs elsewhere."""

    def run_of(plan, **arguments):
        memory = {"device_memory": "64MiB", "host_memory": "64MiB"}
        return Run(tmp_path, model=build_lora(vocab_size=4096), nvme=None, plan=plan, **memory, **arguments)

    with run_of("auto") as run:
        plans = {}
        for plan in rule_with(run.engine._runtime.made_of.problem, by):
            plans.setdefault((plan.rings[0].num_slots, plan.layer_inputs, plan.decode_scope), plan)
        first, *_, last = plans.values()
    with run_of(first, options=OFF) as undisturbed:
        undisturbed.train(LAST)
    with run_of(first) as run:
        run.train(2)
        weights, before = weights_of(run), booked(run)
        for step, plan in ((4, last), (LAST, first)):
            propose(run.engine, plan)
            run.train(step)
            assert run.engine.plan == plan and weights_of(run) == weights and booked(run) == before
        assert results(run.engine) == ["changed"] * 2 and equal(run, undisturbed)
        run.engine.save_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("trains", ["adapters", "all"])
def test_memory_that_others_take_is_given_up(trains, undisturbed, tmp_path, monkeypatch):
    """One tier, which was what was free; the fixed rule has all weights in it, and state that rests there, and gives up
    what is beside them.
    """
    last = ASKED_UNTIL + WINDOW_STEPS + 3

    def started(**arguments):
        torch.manual_seed(0)
        full = {"model": build_base("llama", torch.float32).requires_grad_(True).train(), "bits": None}
        return Run(tmp_path, nvme=None, plan="auto", **(full if trains == "all" else {}), **arguments)

    if trains == "all":
        with started(options=OFF) as undisturbed:
            undisturbed.train(last)
    with started() as run:
        run.train(FOUND_AT - 1)
        used = run.engine._runtime.tiers.account(Tier.DEVICE).used_bytes
        short = used // 16 // KIB * KIB
        taken = run.engine._base.resident_bytes + used - short
        monkeypatch.setattr(replanning, "free_memory_bytes", lambda: 0)
        monkeypatch.setattr(replanning, "resident_bytes", lambda: taken)
        weights = weights_of(run)
        run.train(last)
        (decision,) = run.decisions
        assert decision["because"] == f"memory is short by {format_bytes(short)}"
        assert decision["result"] == "changed", decision["why"]
        assert run.engine._runtime.tiers.account(Tier.DEVICE).used_bytes <= used - short
        assert weights_of(run) == weights and equal(run, undisturbed)


def test_a_change_that_fails_goes_back_with_the_weights(undisturbed, tmp_path, monkeypatch):
    with Run(tmp_path, nvme=None, plan="auto") as run:
        run.train(2)
        weights, attach, failures = weights_of(run), runtime_assembly.RuntimeAssembly._attach, []

        def broken(self, *arguments):
            if not failures:
                failures.append(self.plan)
                raise StorageError("there was none", path="/dev/null", errno=12)
            return attach(self, *arguments)

        monkeypatch.setattr(runtime_assembly.RuntimeAssembly, "_attach", broken)
        propose(run.engine, replace(run.first_plan, allocator_slack_bytes=0))
        run.train(4)
        assert failures and results(run.engine) == ["kept"] and run.engine.plan == run.first_plan
        assert weights_of(run) == weights and equal(run, undisturbed)


@pytest.mark.parametrize("moves", [False, True])
def test_a_rehearsal_that_finds_more_has_the_rule_plan_again(moves, tmp_path, monkeypatch):
    """More than the freed memory that could be had: weights stay, decoded ones are not held. Or no plan is so."""
    monkeypatch.setattr(rehearsal, "ROOM", 1 << 40)
    monkeypatch.setattr(rehearsal, "remembered_bytes", lambda *_: None)
    with Run(tmp_path, nvme=None, plan="auto", options=OFF) as undisturbed:
        undisturbed.train(2)
        used = undisturbed.engine._runtime.tiers.account(Tier.DEVICE).used_bytes
    with Run(tmp_path, nvme=None, plan="auto", device_memory=used) as run:
        first, weights, runtime = run.first_plan, weights_of(run), run.engine._runtime
        account = runtime.tiers.account(Tier.DEVICE)
        short = account.holdings[rehearsal.SLACK] * 3 // 4 + 4 * KIB
        more = iter([account.capacity_bytes - account.used_bytes + short])
        monkeypatch.setattr(rehearsal, "measure", lambda of, *_: (rehearsal.planned_bytes(of) + next(more), None))
        if moves:
            other = replace(first, resident=first.resident[1:])
            runtime.made_of = replace(runtime.made_of, plan_again=lambda problem: other)
            with pytest.raises(PlanInfeasible, match="rehearsal of the longest step"):
                run.train(1)
            return
        run.train(2)
        assert run.engine.report()["rehearsal"]["result"] == "planned again"
        assert run.engine.plan != first and weights_of(run) == weights and equal(run, undisturbed)


def test_where_weights_rest_is_read_off_a_plan(tmp_path):
    with Run(tmp_path, nvme=None, plan="auto") as run:
        workload = run.engine._runtime.made_of.workload
        splits = splits_of(run.first_plan, workload)
        assert {name: split.device_bytes for name, split in splits.items()} == {
            draft.name: draft.spec.stored_bytes for draft in workload.drafts
        }
        fewer, problem = (
            replace(run.first_plan, resident=run.first_plan.resident[1:]),
            run.engine._runtime.made_of.problem,
        )
        assert "no place in memory" in why_not_follow(workload, problem, run.first_plan, fewer)
