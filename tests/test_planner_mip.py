"""The optimiser: its programs agree with simulator and checker, its bound is a bound, and it beats the greedy rule."""

import itertools
import math
from dataclasses import replace

import pytest

from planners.errors import PlanInfeasible
from planners.optimiser.choices import combinations
from planners.optimiser.expand import expand
from planners.optimiser.greedy import plan_greedy
from planners.optimiser.mip import plan_any, plan_optimal
from planners.optimiser.program import Program, SolverFailed, SolverMissing
from planners.optimiser.rows import Freedoms
from planners.optimiser.steady import solve_steady
from planners.plans.placement import UpdateMode, UpdatePlace
from planners.plans.plan import Plan
from planners.problems.hardware import Drive, named_hardware
from planners.problems.model_workload import make_workload
from planners.problems.problem import Capabilities, Problem
from planners.render import page
from planners.shapes.models import find_model
from planners.simulator.arenas import peak_bytes
from planners.simulator.simulate import simulate
from planners.simulator.static_memory import capacities
from planners.simulator.step_work import busy_seconds, floor_seconds
from planners.simulator.validate import InvalidPlan, check
from planners.units import ProblemError
from tests.planner_cases import MIB, machine, problem

TIGHT = {"device": 24 * MIB, "host": 28 * MIB}
PROBLEMS = {
    "adapters": lambda: problem(machine_=machine(**TIGHT)),
    "adapters in 4 bit": lambda: problem(machine_=machine(**TIGHT), bits=4),
    "one long sequence": lambda: problem(batch_size=1, seq_len=4096, machine_=machine(device=40 * MIB, host=64 * MIB)),
    "full": lambda: problem(full=True, machine_=machine(device=40 * MIB, host=48 * MIB)),
    "full, committed": lambda: problem(full=True, machine_=machine(device=40 * MIB, host=48 * MIB), commit_every=10),
    "full, clipped": lambda: problem(full=True, clips=True, machine_=machine(device=40 * MIB, host=64 * MIB)),
    "roomy": lambda: problem(full=True, machine_=machine(device=1 << 33, host=1 << 33)),
    "no drive": lambda: problem(full=True, machine_=machine(device=40 * MIB, host=1 << 30, nvme=0)),
    "small drive": lambda: problem(full=True, machine_=machine(device=40 * MIB, host=64 * MIB, nvme=12 * MIB)),
    "cpu": lambda: problem(machine_=machine(device=64 * MIB, name="cpu")),
}
SOLVED_TWICE = ("adapters in 4 bit", "full, clipped", "small drive")


def test_a_program_that_is_solved_in_one_scaling_alone_is_solved_in_it():
    """The least that is short within what the drives are spared: HiGHS ended it without a status, and so a dry run."""
    hardware = named_hardware("h100")
    drive = Drive(capacity_bytes=60 * 10**12, read_bytes_per_second=20e9, write_bytes_per_second=14e9)
    hardware = replace(hardware, host=replace(hardware.host, memory_bytes=1500 << 30), drives=(drive,))
    workload = make_workload(find_model("llama3-405b"), batch_size=1, seq_len=1 << 20, bits=4, rank=16)
    plan = plan_optimal(Problem(hardware=hardware, workload=workload))
    assert plan.predicted["gap"] < 0.1


@pytest.mark.parametrize("name", PROBLEMS)
def test_an_optimal_plan_passes_every_check_and_beats_greedy(name):
    p = PROBLEMS[name]()
    plan = plan_optimal(p)
    replay = check(p, plan)
    predicted = plan.predicted
    assert predicted["step_seconds"] == replay.step_seconds
    assert floor_seconds(p) <= predicted["lower_bound_seconds"] * (1 + 1e-3)
    assert predicted["lower_bound_seconds"] <= predicted["step_seconds"]
    assert predicted["step_seconds"] <= plan_greedy(p).predicted["step_seconds"] * 1.02
    assert Plan.from_json(plan.to_json()) == plan
    if name in SOLVED_TWICE:
        assert plan_optimal(p) == plan, "the same problem, another plan"


@pytest.mark.parametrize("stride", [11, pytest.param(2, marks=pytest.mark.full)])
@pytest.mark.parametrize("name", PROBLEMS)
def test_programs_simulator_and_checker_agree(name, stride):
    """What a program thinks a plan needs and takes is what the simulator finds, for combinations of every kind.

    Time: never less than the program's. Work: the checker's sum by hand is the simulator's.
    """
    p = PROBLEMS[name]()
    solved = 0
    for knobs in list(itertools.chain.from_iterable(combinations(p)))[::stride]:
        steady = solve_steady(p, knobs, unit_seconds=floor_seconds(p))
        if steady is None:
            continue
        solved += 1
        plan = expand(p, knobs, steady.fractions, planner="test")
        replay = simulate(p, plan)
        busy = busy_seconds(p, plan)
        assert all(math.isclose(busy[r], s, rel_tol=1e-6, abs_tol=1e-9) for r, s in replay.busy_seconds.items())
        # Whole tokens and bytes: a plan of so few tokens may round up by a few KiB.
        assert replay.peak_bytes["nvme"] <= capacities(p)["nvme"] * 1.005
        assert replay.step_seconds >= steady.bound_seconds * (1 - 1e-3)
        assert steady.bound_seconds <= steady.step_seconds * (1 + 1e-6)
        assert max(busy["cpu"], busy["compute"] + busy["device_update"]) <= steady.step_seconds * (1 + 1e-3)
    assert solved


def test_a_certificate_needs_no_trust_in_the_solver():
    """Minimise x + 2y, x + y >= 3, x <= 2: optimum 4 at (2, 1). Any duals give a bound, the right ones this one."""
    p = Program()
    x, y = p.variable(2, cost=1.0), p.variable(10, cost=2.0)
    p.row([(x, 1.0), (y, 1.0)], 3.0, math.inf, "sum")
    solution = p.solve()
    assert solution is not None and solution.values == pytest.approx([2.0, 1.0])
    assert p.certified_bound(solution.duals) == pytest.approx(4.0)
    for dual in (-1.0, 0.0, 0.5, 1.5, 2.0, 3.0):
        assert p.certified_bound([dual]) <= 4.0 + 1e-12


def test_rows_in_bytes_are_still_solved():
    p = Program()
    x = p.variable(1, cost=1.0)
    p.row([(x, 4e14)], 1e14, math.inf)
    solution = p.solve()
    assert solution is not None and solution.values[x] == pytest.approx(0.25)


def test_infeasible_time_limit_and_malformed_are_three_things():
    p = Program()
    x = p.variable(1, cost=1.0)
    p.row([(x, 1.0)], 2.0, math.inf)
    assert p.solve() is None
    q = Program()
    for _ in range(30):
        q.variable(1, cost=-1.0)
    for i in range(29):
        q.row([(i, 1.0), (i + 1, 1.7)], 0.0, 1.3)
    with pytest.raises(SolverFailed, match="[Tt]ime limit"):
        q.solve(time_limit_seconds=0.0)
    with pytest.raises(ValueError, match="finite bounds"):
        Program().variable(math.inf)


def test_without_a_solver_it_says_so(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "highspy", None)
    with pytest.raises(SolverMissing, match="pip install"):
        plan_optimal(PROBLEMS["adapters"]())


def test_infeasible_names_tier_need_and_have():
    with pytest.raises(PlanInfeasible) as caught:
        plan_optimal(problem(machine_=machine(device=4 * MIB)))
    assert caught.value.tier == "device" and caught.value.need_bytes > caught.value.have_bytes == 4 * MIB
    with pytest.raises(PlanInfeasible):
        plan_optimal(problem(full=True, machine_=machine(nvme=0, device=20 * MIB, host=12 * MIB)))


def test_more_of_anything_never_takes_longer():
    base = problem(full=True, machine_=machine(device=40 * MIB, host=48 * MIB))
    bounds = {"base": plan_optimal(base).predicted["lower_bound_seconds"]}
    for tier in ("device", "host"):
        more = {"device": 40 * MIB, "host": 48 * MIB}
        more[tier] *= 2
        bounds[tier] = plan_optimal(replace(base, hardware=machine(**more))).predicted["lower_bound_seconds"]
        assert bounds[tier] <= bounds["base"] * (1 + 1e-6)


@pytest.mark.parametrize("share, fits", [(0.98, False), (1.02, True)])
def test_what_changes_has_two_slots_on_the_drive(share, fits):
    """Weights and state on the drive alone, activations elsewhere: twice their bytes, and no byte less."""
    p = problem(full=True)
    on_drive = sum(e.count * (e.stored_bytes + 12 * e.trainable_params) for e in p.workload.classes)
    p = replace(p, hardware=machine(device=1 << 32, host=1 << 32, nvme=int(2 * on_drive * share)))
    freedoms = Freedoms(weights=(False, False, True), states=(False, False, True))
    knobs = next(itertools.chain.from_iterable(combinations(p)))
    steady = solve_steady(p, knobs, unit_seconds=floor_seconds(p), freedoms=freedoms)
    assert (steady is not None) is fits


def test_what_overflows_when_it_is_laid_out_is_tightened(monkeypatch):
    """The layout is made to need 32 MiB more of HOST than it does; the plan leaves them free."""
    p = problem(full=True, batch_size=16, machine_=machine(device=64 * MIB, host=96 * MIB))
    assert plan_optimal(p).predicted["peak_bytes"]["host"] > 64 * MIB

    def pessimistic(problem_, plan):
        found = peak_bytes(problem_, plan)
        return {**found, "host": found["host"] + 32 * MIB}

    monkeypatch.setattr("planners.optimiser.greedy.peak_bytes", pessimistic)
    plan = plan_optimal(p)
    assert simulate(p, plan).peak_bytes["host"] <= 64 * MIB


def test_a_freedom_taken_away_is_not_used():
    p = problem(full=True, machine_=machine(device=40 * MIB, host=48 * MIB))
    plan = plan_optimal(p, freedoms=Freedoms(nvme_activations=False, device_updates=False, swaps=False))
    for entry in plan.classes:
        for split in entry.tokens:
            assert split.name == "input" or split.recompute_tokens == 256
        assert all(update.place is UpdatePlace.CPU for update in entry.updates)


def test_only_modes_of_the_runtime_are_emitted():
    p = problem(full=True, machine_=machine(device=48 * MIB, host=96 * MIB))
    for mode in UpdateMode:
        q = replace(p, capabilities=Capabilities(update_modes=(mode,), token_chunks=False, device_updates=False))
        plan = plan_optimal(q)
        check(q, plan)
        assert plan.update_mode is mode


def test_a_limit_on_writes_is_kept_or_refused():
    """Eight times the host memory would need no writes at all: what is written here is what memory lacks."""
    p = problem(full=True, batch_size=16, machine_=machine(device=44 * MIB, host=32 * MIB))
    free = plan_optimal(p)
    written = free.predicted["ssd_bytes_written_per_step"]
    assert written > 0
    limited = replace(p, max_written_bytes=int(written * 1.01))
    plan = plan_optimal(limited)
    check(limited, plan)
    assert plan.predicted["ssd_bytes_written_per_step"] <= written * 1.01
    with pytest.raises((PlanInfeasible, ProblemError)):
        plan_optimal(replace(p, max_written_bytes=1))


def problem_that_swaps(**options):
    """Adapters whose fastest plan has activations on NVMe; a slower one has none."""
    drive = Drive(
        capacity_bytes=1 << 30, read_bytes_per_second=7e9, write_bytes_per_second=5e9,
        endurance_bytes=options.pop("endurance", 1 << 50),
    )  # fmt: skip
    hardware = replace(machine(device=24 * MIB, host=18 * MIB), drives=(drive,))
    return problem(batch_size=16, machine_=hardware, **options)


@pytest.mark.parametrize("commit_every", [None, 1])
def test_a_plan_for_adapters_keeps_the_drives_for_their_warranty(commit_every):
    p = problem_that_swaps(commit_every=commit_every)
    plan, commits = plan_optimal(p), 2359296 if commit_every else 0
    check(p, plan)
    assert plan.predicted["ssd_bytes_written_per_step"] == commits
    said = plan.predicted["spared_drives"]
    pace = (1 << 50) / (5 * 365 * 86400)
    assert said["limit_bytes"] - commits == pytest.approx(pace * said["step_seconds_without"], rel=0.01)
    assert said["step_seconds_without"] < 0.9 * plan.predicted["step_seconds"]
    assert said["ssd_bytes_written_without"] > 50 * said["limit_bytes"] - 50 * commits
    days = (1 << 50) / said["ssd_bytes_written_without"] * said["step_seconds_without"] / 86400
    assert said["days_to_endurance_without"] == pytest.approx(days) and days < 30
    assert "(--max-written)" in page(p, plan)


def test_writes_that_are_asked_for_or_worth_a_drive_or_cannot_be_spared_are_planned():
    free = plan_optimal(replace(problem_that_swaps(), max_written_bytes=1 << 30))
    written, seconds = (free.predicted[name] for name in ("ssd_bytes_written_per_step", "step_seconds"))
    assert written > 0 and "spared_drives" not in free.predicted
    spared = plan_optimal(problem_that_swaps())
    gain = spared.predicted["step_seconds"] / seconds - 1
    for days, wanted in ((29, 0), (31, written)):  # that the drive's life saves
        endurance = int(days * 86400 / gain / seconds * written)
        plan = plan_optimal(problem_that_swaps(endurance=endurance))
        assert plan.predicted["ssd_bytes_written_per_step"] == wanted
    short = problem(batch_size=16, machine_=machine(device=24 * MIB, host=16 * MIB))
    assert plan_optimal(short).predicted["ssd_bytes_written_per_step"] > 0, "layer inputs fit nowhere else"


def test_a_drive_without_a_rating_is_taken_for_a_usual_one():
    unknown, known = problem_that_swaps(endurance=0), problem_that_swaps(endurance=600 * 10**12)
    assert plan_optimal(unknown).predicted["spared_drives"] == plan_optimal(known).predicted["spared_drives"]


@pytest.mark.parametrize("full", [False, True])
def test_what_is_reported_short_would_be_enough(full):
    """The shortage is the least: with it, and a little for what the programs do not see, a plan is found."""
    small = {"device": (26 if full else 18) * MIB, "host": 4 * MIB}
    p = problem(full=full, machine_=machine(**small))
    with pytest.raises(PlanInfeasible) as caught:
        plan_optimal(p)
    needs = caught.value.needs
    assert needs and all(need > capacities(p)[tier] for tier, need in needs.items())
    enough = {**small, **{tier: int(need * 1.15) for tier, need in needs.items() if tier != "nvme"}}
    assert plan_any(replace(p, hardware=machine(**enough))) is not None


def test_a_plan_that_leaves_its_machine_is_caught():
    """The checker does not take the optimiser's word: the same plan on a smaller machine."""
    p = PROBLEMS["full"]()
    plan = replace(plan_optimal(p), machine="")
    need = plan.predicted["peak_bytes"]["host"]
    assert need <= capacities(p)["host"]
    with pytest.raises(InvalidPlan, match="of host"):
        check(replace(p, hardware=machine(device=40 * MIB, host=need - MIB)), plan)


def test_layers_decide_by_cost():
    """Slow products make swapping worth while, a slow link makes recomputing worth while."""
    base = machine(device=24 * MIB, host=1 << 30)
    slow = replace(base, device=replace(base.device, matmul_flops_per_second=1e11))
    fast = replace(base, links=replace(base.links, host_to_device_bytes_per_second=1e8))
    shares = {}
    for name, hardware in (("slow products", slow), ("slow link", fast)):
        plan = plan_optimal(problem(batch_size=16, machine_=hardware))
        tokens = {t.name: t for t in plan.entry("layer").tokens}
        shares[name] = tokens["up"].recompute_tokens
    assert shares["slow products"] < 100 and shares["slow link"] > 200
