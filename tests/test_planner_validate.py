"""The slow checker rejects what is wrong with a plan, and the greedy planner's plans pass it, to the byte."""

import math
from dataclasses import replace

import pytest

from planners.errors import PlanInfeasible
from planners.optimiser.greedy import plan_greedy, shortages
from planners.plans.placement import Cuts, Split, Tier, TokenSplit, Update, UpdateMode, UpdatePlace
from planners.plans.plan import Plan
from planners.problems.problem import Capabilities
from planners.simulator.arenas import peak_bytes
from planners.simulator.simulate import simulate
from planners.simulator.static_memory import capacities, saving_bytes
from planners.simulator.step_work import floor_seconds
from planners.simulator.validate import InvalidPlan, check
from planners.units import ProblemError
from tests.planner_cases import MIB, machine, plan_of, problem

ROOMY = {"device": 1 << 30, "host": 1 << 30}


@pytest.fixture(scope="module")
def roomy():
    p = problem(full=True, machine_=machine(**ROOMY))
    return p, plan_of(p)


def with_class(plan, name, **changes):
    return replace(plan, classes=tuple(replace(c, **changes) if c.name == name else c for c in plan.classes))


def layer(plan):
    return plan.entry("layer")


MUTATIONS = {
    "of another workload": (lambda p: replace(p, fingerprint="0" * 16), "made for workload"),
    "of another machine": (lambda p: replace(p, machine="0" * 16), "made for machine"),
    "a class missing": (lambda p: replace(p, classes=p.classes[1:]), "has classes"),
    "a byte lost": (
        lambda p: with_class(p, "layer", weights=replace(layer(p).weights, nvme_bytes=layer(p).weights.nvme_bytes - 1)),
        "bytes of weights",
    ),
    "a block in two rings": (lambda p: replace(p, rings=(*p.rings, replace(p.rings[0], name="again"))), "is in rings"),
    "a block in no ring": (
        lambda p: replace(p, rings=(replace(p.rings[0], blocks=p.rings[0].blocks[1:]), *p.rings[1:])), "in a ring"
    ),
    "a streaming block resident": (lambda p: replace(p, resident=layer(p).blocks[:1]), "not resident"),
    "slots too small": (
        lambda p: replace(p, rings=(replace(p.rings[0], slot_bytes=p.rings[0].slot_bytes - 1), *p.rings[1:])),
        "into slots",
    ),
    "a token lost": (
        lambda p: with_class(
            p, "layer", tokens=(replace(layer(p).tokens[0], host_tokens=0), *layer(p).tokens[1:])
        ),
        "of 256 tokens",
    ),
    "an input recomputed": (
        lambda p: with_class(
            p, "layer", tokens=(TokenSplit(name="input", recompute_tokens=256, nvme_tokens=0, host_tokens=0,
                                           device_tokens=0), *layer(p).tokens[1:]),
        ),
        "cannot be recomputed",
    ),
    "another tensor": (
        lambda p: with_class(p, "layer", tokens=(replace(layer(p).tokens[0], name="x"), *layer(p).tokens[1:])),
        "saved tensors",
    ),
    "a parameter never updated": (lambda p: with_class(p, "layer", updates=layer(p).updates[1:]), "do not cover"),
    "other blocks": (lambda p: with_class(p, "layer", blocks=layer(p).blocks[::-1]), "other blocks"),
    "no cuts": (lambda p: replace(p, cuts=None), "says no cuts"),
    "a chunk of a sequence and a half": (lambda p: replace(p, cuts=Cuts(chunk_tokens=384)), "whole sequences"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutated_plan_is_rejected(roomy, name):
    p, plan = roomy
    check(p, plan)
    mutate, message = MUTATIONS[name]
    with pytest.raises(ValueError, match=message):
        check(p, mutate(plan))


def test_modes_that_the_runtime_lacks_are_rejected(roomy):
    p, plan = roomy
    for capabilities, message in (
        (Capabilities(update_modes=(UpdateMode.AFTER,)), "not among the runtime's"),
        (Capabilities(device_updates=False), "steps state on the device"),
        (Capabilities(token_chunks=False), "cuts sequences"),
        (Capabilities(token_policy=False), "not recomputed whole"),
    ):
        with pytest.raises(InvalidPlan, match=message):
            check(replace(p, capabilities=capabilities), plan)


def test_clipping_forbids_updates_before_the_norm_is_known():
    p = problem(full=True, machine_=machine(**ROOMY), clips=True)
    with pytest.raises(InvalidPlan, match="global norm"):
        check(p, plan_of(p))
    with pytest.raises(InvalidPlan, match="global norm"):
        check(p, plan_of(p, mode=UpdateMode.DEFERRED))
    check(p, plan_of(p, mode=UpdateMode.SPECULATIVE))
    check(p, plan_of(p, mode=UpdateMode.AFTER))


def test_a_budget_is_met_to_the_byte_and_not_a_byte_less():
    p = problem(machine_=machine(**ROOMY))
    plan = replace(plan_of(p), machine="")
    peaks = simulate(p, plan).peak_bytes
    for tier in ("device", "host", "nvme"):
        exact = {"device": 1 << 40, "host": 1 << 40, "nvme": 1 << 40, tier: math.ceil(peaks[tier])}
        check(replace(p, hardware=machine(**exact)), plan)
        with pytest.raises(InvalidPlan, match=f"of {tier}"):
            check(replace(p, hardware=machine(**{**exact, tier: exact[tier] - 1})), plan)


def test_a_limit_on_writes_holds():
    p = problem(machine_=machine(**ROOMY))
    with pytest.raises(InvalidPlan, match="writes"):
        check(replace(p, max_written_bytes=1000), plan_of(p))


def test_a_step_that_fits_must_leave_room_for_what_a_save_goes_through():
    """Weights in HOST to the last byte: nothing else of a step needs it."""
    p = problem(machine_=machine(**ROOMY))
    plan = plan_of(p, weights=(0, 1, 0), tokens=(0, 0, 0, 1))
    room = saving_bytes(p, plan)["host"]
    assert room > peak_bytes(p, plan)["host"]
    for host, fits in ((math.ceil(room), True), (math.ceil(room) - 1, False)):
        tight = replace(p, hardware=machine(**{**ROOMY, "host": host}))
        plan_there = replace(plan, machine=tight.machine)
        assert (shortages(tight, plan_there) == []) is fits
        if not fits:
            with pytest.raises(InvalidPlan, match="saving needs"):
                check(tight, plan_there)


def test_no_plan_beats_the_floor():
    p = problem(machine_=machine(**ROOMY))
    assert simulate(p, plan_of(p)).step_seconds >= floor_seconds(p) > 0


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("device", [16 * MIB, 24 * MIB, 48 * MIB, 1 << 30])
@pytest.mark.parametrize("host", [12 * MIB, 32 * MIB, 1 << 30])
def test_greedy_plans_pass_every_check(full, clips, device, host):
    p = problem(full=full, clips=clips, machine_=machine(device=device, host=host))
    try:
        plan = plan_greedy(p)
    except PlanInfeasible as error:
        short = {t: n for t, n in error.needs.items() if n > capacities(p)[t]}
        assert short == error.needs and short
        return
    replay = check(p, plan)
    assert plan.predicted["step_seconds"] == replay.step_seconds
    assert Plan.from_json(plan.to_json()) == plan


def test_greedy_finds_plans_on_both_sides_of_infeasible():
    """The matrix above must not be all of one kind."""
    plan_greedy(problem(machine_=machine(device=24 * MIB, host=32 * MIB)))
    with pytest.raises(PlanInfeasible, match="short by"):
        plan_greedy(problem(machine_=machine(device=4 * MIB)))


def test_greedy_works_without_a_gpu_and_without_a_drive():
    check(q := problem(machine_=machine(name="cpu")), plan_greedy(q))
    check(q := problem(machine_=machine(nvme=0, **ROOMY)), plan_greedy(q))
    with pytest.raises(PlanInfeasible):
        plan_greedy(problem(full=True, machine_=machine(nvme=0, device=20 * MIB, host=12 * MIB)))


def test_what_fits_the_device_stays_there():
    plan = plan_greedy(problem(machine_=machine(device=1 << 34)))
    assert plan.rings == () and plan.layer_inputs is Tier.DEVICE
    assert plan.predicted["busy_seconds"]["ssd_read"] == 0


def test_a_plan_refuses_what_contradicts_itself():
    with pytest.raises(ValueError, match="stepped there"):
        Update(params=1, tier=Tier.DEVICE, place=UpdatePlace.CPU)
    with pytest.raises(ValueError, match="whole number"):
        Split(device_bytes=-1, host_bytes=0, nvme_bytes=0)
    with pytest.raises(ValueError, match="at least 1"):
        Cuts(chunk_tokens=0)
    p = problem()
    deferred = plan_of(p, mode=UpdateMode.DEFERRED)
    with pytest.raises(ValueError, match="deferred update in update mode"):
        replace(deferred, update_mode=UpdateMode.BACKWARD)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 0}, "batch_size"),
        ({"seq_len": -1}, "seq_len"),
        ({"batch_size": True}, "batch_size"),
        ({"batch_size": 1 << 20, "seq_len": 1 << 20}, "tokens a step"),
        ({"bits": 8}, "bits"),
        ({"bits": 4, "full": True}, "4-bit weights are frozen"),
        ({"optimizer": "adamv"}, "did you mean 'adamw'"),
        ({"targets": ("q_prj",)}, "did you mean 'q_proj'"),
    ],
)
def test_a_contradictory_workload_is_malformed(options, message):
    with pytest.raises(ProblemError, match=message):
        problem(**options)
