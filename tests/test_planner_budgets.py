"""More memory is no slower plan: whole numbers against trying all of them, and plans for ever larger budgets."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest

from planners.optimiser.choices import combinations
from planners.optimiser.mip import search
from planners.optimiser.program import Program
from planners.optimiser.rows import LOW_PRICE, PRICE_SUM, Freedoms
from planners.optimiser.steady import _Builder, _read, solve_steady
from planners.optimiser.trial import GOOD_ENOUGH, Search, in_whole_numbers, try_candidate
from planners.plans.placement import Tier, UpdateMode
from planners.plans.schedule import Phase
from planners.problems.hardware import Drive, Links
from planners.problems.measured import KeptPass, MeasuredSeconds
from planners.problems.problem import BlockClass, Capabilities, Problem, Training, Workload
from planners.shapes.trace import Saved, Transient
from planners.simulator.static_memory import capacities
from planners.simulator.step_work import floor_seconds
from tests.planner_cases import machine

KIB = 1 << 10
SEQ_LEN = 12
LAYERS = 4
TOLERANCE = (1 + LOW_PRICE * PRICE_SUM) / (1 - GOOD_ENOUGH)
"""Candidates that are no better than this are not simulated; moving less breaks ties."""


def problem(*, device: int, host: int = 0, link: float = 2e9, drive: float = 1e9, decode: float = 0.0) -> Problem:
    """Adapters over four layers that were measured: what each saves is kept, swapped or computed again as a whole, and
    what stays of its weights ends where a tensor does. Bytes; a host of 0 makes one tier of memory.
    """
    kept = KeptPass(forward=0.01, backward=0.008, saved_bytes=135 * KIB, put_away=1e-4, taken_back=2e-4)
    layer = BlockClass(
        name="layer", blocks=tuple(f"layers.{i}" for i in range(LAYERS)), positions=tuple(range(LAYERS)), is_layer=True,
        stored_bytes=76 * KIB, decoded_bytes=0, largest_linear_bytes=0, trainable_params=4096, forward_flops=0.0,
        backward_flops=0.0, attention_flops=0.0, moved_bytes=0.0,
        saved=(
            Saved(name="input", bytes_per_token=128.0, recomputable=False),
            Saved(name="activations", bytes_per_token=135 * KIB / (2 * SEQ_LEN)),
        ),
        attention_bytes=0.0, attention_groups=1,
        transients=tuple(Transient(name="passing", bytes_per_token=1024.0, phase=p, begin=0, end=1) for p in Phase),
        weight_cuts=tuple(KIB * cut for cut in (0, 8, 12, 16, 24, 40, 56, 72, 76)),
        measured=MeasuredSeconds(forward=0.01, backward=0.02, decode=decode, kept=kept),
    )  # fmt: skip
    workload = Workload(
        name="measured", training=Training.ADAPTERS, classes=(layer,), hidden=64, batch_size=2, seq_len=SEQ_LEN,
        state_bytes_per_param=8, gradient_bytes_per_param=4, weight_bytes_per_param=4, slab_bytes=0,
        input_staging_bytes=16 * KIB,
    )  # fmt: skip
    capabilities = Capabilities(
        update_modes=(UpdateMode.AFTER,), device_updates=False, token_chunks=False, token_shares=False,
        batch_cuts=False, input_shares=False, state_tiers=(Tier.DEVICE,), reads_ahead=False,
    )  # fmt: skip
    hardware = replace(
        machine(device=device, host=host), unified=not host,
        links=Links(host_to_device_bytes_per_second=link, device_to_host_bytes_per_second=link, duplex=0.5),
        drives=(Drive(capacity_bytes=1 << 30, read_bytes_per_second=drive, write_bytes_per_second=drive),),
    )  # fmt: skip
    return Problem(hardware=hardware, workload=workload, capabilities=capabilities, max_written_bytes=1 << 40)


def builder(p: Problem, knobs):
    room = {tier: float(size) for tier, size in capacities(p).items()}
    found = _Builder(p, knobs, Freedoms(), room, floor_seconds(p), LOW_PRICE, False)
    return found, found.build()


def every_choice(p: Problem, knobs) -> Iterator[float]:
    """Step seconds of the program for each count of layers by home and each cut of their weights."""
    (entry,) = p.workload.classes
    for cut, counts in itertools.product(entry.weight_cuts or (None,), itertools.product(range(LAYERS + 1), repeat=4)):
        if sum(counts) != LAYERS or (p.hardware.unified and counts[2]):
            continue
        program, columns = builder(p, knobs)
        fixed = [] if cut is None else [(columns[0].weights[0], cut / entry.stored_bytes)]
        fixed += zip(columns[0].tokens[1], (count / LAYERS for count in counts), strict=True)
        for column, share in fixed:
            program.program.row([(column, 1.0)], share, share)
        whole = program.program.whole
        own = [float(counts[0] > 0), float(counts[1] + counts[2] > 0), float(counts[1] > 0)]
        # Whether any is computed again, swapped, on NVMe: the last three of a saved tensor that is counted.
        for column, value in zip(whole[-3:], own, strict=True):
            program.program.row([(column, 1.0)], value, value)
        solution = program.program.solve()
        if solution is not None:
            yield _read(program, columns, solution).step_seconds


@pytest.mark.parametrize(
    ("device", "host", "cut"),
    [
        (755, 0, True),
        (755, 0, False),
        *(pytest.param(d, h, True, marks=pytest.mark.full) for d in (565, 900) for h in (0, 90)),
    ],
)
def test_whole_numbers_are_the_best_of_all_that_there_are(device, host, cut):
    """Presolved, HiGHS 1.14 calls worse ones optimal: [Note: presolved whole numbers] in `program`."""
    p = problem(device=device * KIB, host=host * KIB)
    if not cut:
        p = replace(p, workload=replace(p.workload, classes=(replace(p.workload.classes[0], weight_cuts=()),)))
    solved = 0
    for knobs in list(itertools.chain.from_iterable(combinations(p)))[1::5]:
        found = solve_steady(p, knobs, unit_seconds=floor_seconds(p), in_whole_numbers=True)
        best = min(every_choice(p, knobs), default=None)
        assert (found is None) is (best is None)
        if found is not None:
            solved += 1
            assert found.step_seconds <= best * (1 + LOW_PRICE * PRICE_SUM)
            (entry,), (fractions,) = p.workload.classes, found.fractions
            assert not cut or round(fractions.weights[0] * entry.stored_bytes) in entry.weight_cuts
    assert solved


def test_what_was_relaxed_is_rounded_without_being_relaxed_again(monkeypatch):
    """To the same plan, bound and duals as by itself."""
    p, solve, asked = problem(device=755 * KIB), Program.solve, []

    def noted(program, **options):
        asked.append(options.get("in_whole_numbers", False))
        return solve(program, **options)

    unit, found = floor_seconds(p), Search()
    relaxed = next(
        steady for knobs in itertools.chain.from_iterable(combinations(p))
        if (steady := solve_steady(p, knobs, unit_seconds=unit)) is not None
    )  # fmt: skip
    monkeypatch.setattr(Program, "solve", noted)
    rounded = in_whole_numbers(p, relaxed, unit, None, found)
    assert asked == [True]
    assert rounded == solve_steady(p, relaxed.knobs, unit_seconds=unit, in_whole_numbers=True) != relaxed


def ladder(seed: int) -> Iterator[Problem]:
    """A question, and others that have ever more of one thing."""
    r = random.Random(seed)
    host = r.choice((0, 0, 60, 200, 400))
    given = {
        "device": r.randint(540, 900) * KIB, "host": host * KIB, "link": 10 ** r.uniform(7.5, 10),
        "drive": 10 ** r.uniform(8, 10), "decode": r.choice((0.0, 0.001)),
    }  # fmt: skip
    more = r.choice(("device", "device", "drive", "host", "link")) if host else r.choice(("device", "device", "drive"))
    step = r.choice((10, 30, 60)) * KIB
    for _ in range(5):
        yield problem(**given)
        given[more] += round(r.uniform(0.2, 1.5) * step) if more in ("device", "host") else r.random() * given[more]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.full) for seed in range(1, 40))])
def test_more_of_anything_makes_no_plan_slower(seed):
    fastest = float("inf")
    for p in ladder(seed):
        found = search(p)
        if found.simulation is None:
            assert fastest == float("inf"), "what fits in less, fits"
            continue
        assert found.simulation.step_seconds <= fastest * TOLERANCE
        fastest = min(fastest, found.simulation.step_seconds)


def tried(p: Problem) -> float:
    """Step seconds of the fastest plan of all combinations, each tried for itself."""
    unit, fastest = floor_seconds(p), float("inf")
    for knobs in itertools.chain.from_iterable(combinations(p)):
        relaxed = solve_steady(p, knobs, unit_seconds=unit)
        found = Search()
        if relaxed is not None and (whole := in_whole_numbers(p, relaxed, unit, None, found)) is not None:
            try_candidate(p, whole, unit, None, found)
        if found.simulation is not None:
            fastest = min(fastest, found.simulation.step_seconds)
    return fastest


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.full) for seed in range(2, 20))])
def test_a_search_finds_what_trying_all_combinations_finds(seed):
    p = next(ladder(seed))
    found = search(p).simulation
    assert (float("inf") if found is None else found.step_seconds) <= tried(p) * TOLERANCE
