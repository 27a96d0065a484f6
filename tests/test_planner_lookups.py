"""Embeddings by rows in the optimiser: what it decides, against trying all; what a step takes, and what is refused."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest

from offload_rt.cli.main import main
from planners.errors import PlanInfeasible
from planners.optimiser.choices import combinations
from planners.optimiser.expand import expand
from planners.optimiser.frugal import search_frugal
from planners.optimiser.greedy import plan_greedy
from planners.optimiser.mip import plan_optimal
from planners.optimiser.rows import LOW_PRICE, Freedoms
from planners.optimiser.steady import _Builder, _read, solve_steady
from planners.plans.placement import Split, Tier
from planners.plans.plan import Plan
from planners.plans.vocabulary import Lookups, RowsSize
from planners.problems.model_workload import make_workload
from planners.problems.problem import Problem
from planners.shapes.architectures import shape_from_config
from planners.simulator.arenas import with_arenas
from planners.simulator.simulate import simulate
from planners.simulator.static_memory import capacities, saving_bytes, static_bytes
from planners.simulator.step_work import busy_seconds, floor_seconds
from planners.simulator.validate import InvalidPlan, check
from tests.planner_cases import MIB, TINY, machine

VOCABULARY, WIDTH, TOKENS = 32768, 256, 512
TABLE_BYTES, ROWS_BYTES = VOCABULARY * WIDTH * 2, TOKENS * WIDTH * 2
LOGITS = 512 * MIB
"""Of a tile of the loss, in DEVICE memory whatever the plan."""
PLACES = {
    "roomy": machine(device=1 << 30, host=1 << 30),
    "HOST": machine(device=LOGITS + 26 * MIB, host=64 * MIB),
    "NVMe": machine(device=LOGITS + 30 * MIB, host=57 * MIB),
    "one memory": machine(device=LOGITS + 30 * MIB, name="cpu"),
    "no drive": machine(device=LOGITS + 30 * MIB, host=1 << 30, nvme=0),
}


def question(where, *, tied=False, **options):
    shape = shape_from_config({**TINY, "vocab_size": VOCABULARY, "tie_word_embeddings": tied}, "tiny")
    return Problem(hardware=PLACES[where], workload=make_workload(shape, batch_size=2, seq_len=TOKENS // 2, **options))


def whole(problem):
    """The question without rows: the embedding streams through the slot that the head uses."""
    classes = tuple(replace(entry, rows=None) for entry in problem.workload.classes)
    return replace(problem, workload=replace(problem.workload, classes=classes))


def embedding(plan):
    return plan.entry("embedding").weights


@pytest.mark.parametrize("where", [*PLACES, "almost roomy"])
def test_where_an_embedding_rests_is_what_trying_every_place_finds(where):
    """For each of the discrete choices, the whole-numbered program against one program for each place."""
    almost = machine(device=LOGITS + 46 * MIB, host=64 * MIB)
    p = replace(question("HOST"), hardware=almost) if where == "almost roomy" else question(where)
    unit, solved, parted = floor_seconds(p), 0, 0
    for knobs in list(itertools.chain.from_iterable(combinations(p)))[::4]:
        found = solve_steady(p, knobs, unit_seconds=unit, in_whole_numbers=True)
        tried = {}
        for place in range(3):
            room = {tier: float(size) for tier, size in capacities(p).items()}
            builder = _Builder(p, knobs, Freedoms(), room, unit, LOW_PRICE, False)
            columns = builder.build()
            (names,) = [c.weights for c, e in zip(columns, p.workload.classes, strict=True) if e.rows is not None]
            for index, column in enumerate(names):
                builder.program.high[column] *= float(index == place)
            if (solution := builder.program.solve()) is not None:
                tried[place] = _read(builder, columns, solution).step_seconds
        assert (found is None) == (not tried)
        if found is None:
            continue
        assert found.step_seconds == pytest.approx(min(tried.values()), rel=2e-3)  # prices of moving break ties
        assert found.bound_seconds <= found.step_seconds * (1 + 1e-6)
        shares = found.fractions[0].weights
        assert sorted(shares) == pytest.approx([0, 0, 1], abs=1e-6)
        solved += 1
        relaxed = solve_steady(p, knobs, unit_seconds=unit)
        parted += relaxed is not None and 0.01 < max(relaxed.fractions[0].weights) < 0.99
    assert solved and (parted or where != "almost roomy")


@pytest.mark.parametrize("where", PLACES)
def test_what_memory_does_not_hold_is_read_by_rows_and_a_step_is_no_longer(where):
    p = question(where)
    if where == "NVMe":  # where a greedy plan needs the drive for it, the best one makes room in HOST
        p = replace(p, hardware=machine(device=LOGITS + 26 * MIB, host=44 * MIB))
    plan = plan_optimal(p)
    replay = check(p, plan)
    assert Plan.from_json(plan.to_json()) == plan
    rest = {"roomy": None, "one memory": Tier.NVME, "NVMe": Tier.NVME}.get(where, Tier.HOST)
    if rest is None:
        assert plan.lookups is None and "model.embed_tokens" in plan.resident
        return
    lookups = plan.lookups
    assert lookups is not None and lookups.blocks == ("model.embed_tokens",) and lookups.rest is rest
    assert {Tier.HOST: embedding(plan).host_bytes, Tier.NVME: embedding(plan).nvme_bytes}[rest] == TABLE_BYTES
    labels = [event.label for event in replay.events]
    assert (("read rows", 0, 0) in labels) is (rest is Tier.NVME)
    if where == "NVMe":  # nothing fits whole
        return
    without = plan_optimal(whole(p))
    assert without.lookups is None
    if where != "one memory":  # there, what streams whole hides behind computation
        assert replay.step_seconds < without.predicted["step_seconds"]


@pytest.mark.parametrize(
    ("device", "hosts"),
    [(27, (44, 50)), *(pytest.param(d, tuple(range(36, 66, 2)), marks=pytest.mark.full) for d in (26, 30))],
)
def test_what_fits_while_it_is_saved_fits_in_more_memory(device, hosts):
    """A model is saved through two slabs of HOST, beside all that stays there; a step has room for more."""
    planned = False
    for host in hosts:
        p = replace(question("HOST"), hardware=machine(device=LOGITS + device * MIB, host=host * MIB))
        try:
            plan = plan_optimal(p)
        except PlanInfeasible:
            assert not planned
            continue
        planned = True
        check(p, plan)
    assert planned


def test_a_program_leaves_room_for_slabs_and_says_what_more_of_it_saves():
    p = replace(question("HOST"), hardware=machine(device=LOGITS + 27 * MIB, host=44 * MIB))
    without = replace(p, workload=replace(p.workload, slab_bytes=0))
    unit, room = floor_seconds(p), {tier: float(size) for tier, size in capacities(p).items()}
    more = {**room, "host": room["host"] + 4096}
    for knobs in list(itertools.chain.from_iterable(combinations(p)))[::4]:
        whole = solve_steady(p, knobs, unit_seconds=unit, in_whole_numbers=True)
        plan = expand(p, knobs, whole.fractions, planner="optimiser")
        assert saving_bytes(p, plan)["host"] <= room["host"]
        relaxed, easier = (
            solve_steady(p, knobs, unit_seconds=unit),
            solve_steady(p, knobs, unit_seconds=unit, room=more),
        )
        assert solve_steady(without, knobs, unit_seconds=unit).step_seconds < 0.95 * relaxed.step_seconds
        gained = (relaxed.step_seconds - easier.step_seconds) / 4096
        assert relaxed.seconds_per_gb["host"] == pytest.approx(1e9 * gained, rel=1e-2)


def test_what_is_short_while_a_model_is_saved_is_said_to_be_so():
    """Of the two tiers that are short, HOST is by the slabs; without them, in a step, or not at all."""
    p = replace(question("HOST"), hardware=machine(device=LOGITS + 20 * MIB, host=2 * MIB))
    without = replace(p, workload=replace(p.workload, slab_bytes=0))
    phases = [{short.tier: short.phase for short in search_frugal(asked).short} for asked in (p, without)]
    assert phases == [{"device": "backward", "host": "save"}, {"device": "backward", "host": "backward"}]


@pytest.mark.parametrize("rest", [Tier.HOST, Tier.NVME])
def test_rows_cost_their_bytes_and_their_rooms(rest):
    """What the same plan takes with a resident embedding, less and more by what reading rows takes, to the byte."""
    p = question("roomy")
    base = plan_optimal(p)
    sizes = {Tier.HOST: 0, Tier.NVME: 0, rest: TABLE_BYTES}
    split = Split(device_bytes=0, host_bytes=sizes[Tier.HOST], nvme_bytes=sizes[Tier.NVME])
    moved = by_rows(base, p, split)
    before, after = static_bytes(p, base), static_bytes(p, moved)
    size = RowsSize(num_rows=VOCABULARY, row_bytes=2 * WIDTH, most_rows=TOKENS)
    assert size.looked_up_bytes == ROWS_BYTES
    assert before["device"]["resident weights"] - after["device"]["resident weights"] == TABLE_BYTES
    assert after["device"]["rows of embeddings"] == size.room_bytes() == ROWS_BYTES
    staging = ROWS_BYTES
    if rest is Tier.NVME:
        staging += 2 * size.pages_bytes() + 5 * TABLE_BYTES // 4096
    assert after["host"]["rows on their way"] == staging and "rows on their way" not in before["host"]
    busy, had, replay = busy_seconds(p, moved), busy_seconds(p, base), simulate(p, moved)
    link, drive = p.hardware.links.host_to_device_bytes_per_second, p.hardware.read_bytes_per_second
    assert busy["host_to_device"] - had["host_to_device"] == pytest.approx(ROWS_BYTES / link)
    pages = TOKENS * 4096 if rest is Tier.NVME else 0
    assert busy["ssd_read"] - had["ssd_read"] == pytest.approx(pages / drive)
    hidden_behind_nothing = simulate(p, base).step_seconds + ROWS_BYTES / link + pages / drive
    assert replay.step_seconds == pytest.approx(hidden_behind_nothing)


def by_rows(plan, problem, split):
    """The plan with its embedding read by rows, laid out anew."""
    (entry,) = [entry for entry in problem.workload.classes if entry.rows is not None]
    rest = Tier.NVME if split.nvme_bytes else Tier.HOST
    classes = tuple(replace(c, weights=split) if c.name == "embedding" else c for c in plan.classes)
    lookups = Lookups.of(dict.fromkeys(entry.blocks, problem.workload.rows_of(entry)), rest)
    resident = tuple(name for name in plan.resident if name not in entry.blocks)
    return with_arenas(problem, replace(plan, classes=classes, lookups=lookups, resident=resident, predicted={}))


def test_what_a_plan_says_of_rows_is_checked():
    p = question("HOST")
    plan = plan_optimal(p)
    lookups, split = plan.lookups, embedding(plan)
    assert lookups is not None

    def refused(match, **changes):
        with pytest.raises(InvalidPlan, match=match):
            check(p, replace(plan, predicted={}, **changes))

    name = lookups.blocks[0]
    refused("as its bytes say", lookups=None)
    refused("as its bytes say", resident=(*plan.resident, name))
    refused("as its bytes say", rings=(replace(plan.rings[0], blocks=(*plan.rings[0].blocks, name)),))
    refused("from nvme, where 0 of", lookups=replace(lookups, rest=Tier.NVME, pages_bytes=4096))
    refused("in a room of 8", lookups=replace(lookups, room_bytes=8))
    refused("which the workload's cannot", lookups=replace(lookups, blocks=(name, plan.entry("layer").blocks[0])))
    half = replace(split, host_bytes=split.host_bytes - 4096, nvme_bytes=4096)
    refused("bytes rest", classes=tuple(replace(c, weights=half) if c.name == "embedding" else c for c in plan.classes))
    refused("'rows of embeddings' has 262144 bytes and needs", lookups=replace(lookups, room_bytes=1 << 30))


def test_only_frozen_tables_of_their_own_that_gain_by_it_are_read_by_rows():
    def by_rows_of(**options):
        workload = question("HOST", **options).workload
        return [entry.name for entry in workload.classes if workload.rows_of(entry) is not None]

    assert by_rows_of() == ["embedding"]
    assert by_rows_of(tied=True) == by_rows_of(rank=None) == []
    workload = question("HOST").workload
    many = replace(workload, batch_size=VOCABULARY)  # a batch that needs all of the table
    assert [many.rows_of(entry) for entry in many.classes] == [None] * 3


@pytest.mark.parametrize("where", PLACES)
def test_greedy_reads_rows_where_not_everything_fits(where):
    p = question(where)
    plan = plan_greedy(p)
    check(p, plan)
    assert (plan.lookups is None) is (where == "roomy")


def test_the_command_says_it(tmp_path, capsys):
    argv = ["plan", "--model", "llama3-8b", "--gpu", "rtx3060", "--nvme", "1TB@7.0r/5.0w", "--no-advice", "--bits", "4"]
    tight = ["--device-memory", "5GiB", "--host-memory", "32GiB", "--seq-len", "1024"]
    assert main([*argv, *tight, "--json", str(tmp_path / "plan.json")]) == 0
    assert "model.embed_tokens by rows from HOST" in capsys.readouterr().out
    plan = json.loads((tmp_path / "plan.json").read_text())["plan"]
    assert plan["lookups"]["blocks"] == ["model.embed_tokens"]
    assert plan["peak_bytes"]["device"]["rows of embeddings"] == 8 * MIB
