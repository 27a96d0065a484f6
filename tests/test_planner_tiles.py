"""A head by tiles in the optimiser: what it decides, against trying all; what a step takes, and what is refused."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from offload_rt.cli.main import main
from planners.errors import PlanInfeasible
from planners.optimiser.choices import combinations
from planners.optimiser.greedy import plan_greedy
from planners.optimiser.mip import plan_optimal
from planners.optimiser.rows import LOW_PRICE, Freedoms
from planners.optimiser.steady import _Builder, _read, solve_steady
from planners.plans.placement import Split, Tier
from planners.plans.plan import Plan
from planners.plans.vocabulary import HeadTiles, Lookups
from planners.problems.cost import class_costs
from planners.problems.model_workload import make_workload
from planners.problems.problem import Problem
from planners.shapes.architectures import shape_from_config
from planners.simulator.arenas import with_arenas
from planners.simulator.simulate import simulate
from planners.simulator.static_memory import capacities, static_bytes
from planners.simulator.step_work import busy_seconds, floor_seconds
from planners.simulator.validate import InvalidPlan, check
from tests.planner_cases import MIB, TINY, machine

VOCABULARY, WIDTH, TOKENS = 32768, 1024, 64
TABLE_BYTES, NORM_BYTES = VOCABULARY * WIDTH * 2, WIDTH * 2
TILE_BYTES = TABLE_BYTES // 8
LOGITS = 512 * MIB
"""Of a tile of the loss, in DEVICE memory whatever the plan."""
PLACES = {
    "roomy": machine(device=1 << 30, host=1 << 30),
    "a slot to spare": machine(device=LOGITS + 90 * MIB, host=512 * MIB),
    "HOST": machine(device=LOGITS + 64 * MIB, host=512 * MIB),
    "NVMe": machine(device=LOGITS + 64 * MIB, host=120 * MIB),
    "one memory": machine(device=LOGITS + 80 * MIB, name="cpu"),
}


def question(where, **options):
    shape = shape_from_config({**TINY, "hidden_size": WIDTH, "vocab_size": VOCABULARY}, "tiny")
    return Problem(hardware=PLACES[where], workload=make_workload(shape, batch_size=1, seq_len=TOKENS, **options))


def head(plan):
    return plan.entry("head").weights


@pytest.mark.parametrize("where", PLACES)
def test_where_a_head_rests_is_what_trying_every_place_finds(where):
    """For each of the discrete choices, the whole-numbered program against one program for each two places."""
    p = question(where)
    unit, room, solved = floor_seconds(p), {tier: float(size) for tier, size in capacities(p).items()}, 0
    for knobs in list(itertools.chain.from_iterable(combinations(p)))[::6]:
        found = solve_steady(p, knobs, unit_seconds=unit, in_whole_numbers=True)
        tried = []
        for places in itertools.product(range(3), repeat=2):
            builder = _Builder(p, knobs, Freedoms(), room, unit, LOW_PRICE, False)
            columns = builder.build()
            for entry, place in ((0, places[0]), (-1, places[1])):
                for index, column in enumerate(columns[entry].weights):
                    builder.program.high[column] *= float(index == place)
            if (solution := builder.program.solve()) is not None:
                tried.append(_read(builder, columns, solution).step_seconds)
        assert (found is None) == (not tried)
        if found is not None:
            assert found.step_seconds == pytest.approx(min(tried), rel=2e-3)  # prices of moving break ties
            assert sorted(found.fractions[-1].weights) == pytest.approx([0, 0, 1], abs=1e-6)
            solved += 1
    assert solved


@pytest.mark.parametrize("where", PLACES)
def test_a_head_goes_by_tiles_where_memory_does_not_hold_it(where):
    p = question(where)
    plan = plan_optimal(p)
    replay = check(p, plan)
    assert Plan.from_json(plan.to_json()) == plan
    rest = Tier.NVME if where in ("NVMe", "one memory") else Tier.HOST
    classes = tuple(replace(entry, product=None) for entry in p.workload.classes)
    whole = replace(p, workload=replace(p.workload, classes=classes))
    if where in ("roomy", "a slot to spare"):
        assert replay.step_seconds <= plan_optimal(whole).predicted["step_seconds"] * (1 + 1e-9)
        assert plan.head_tiles is None and "lm_head" in plan.resident
        return
    tiles = plan.head_tiles
    assert tiles is not None and (tiles.block, tiles.rest, tiles.tile_bytes) == ("lm_head", rest, TILE_BYTES)
    assert head(plan).device_bytes == NORM_BYTES and head(plan).streamed_bytes == TABLE_BYTES
    reads = [event.label[2] for event in replay.events if event.label[0] == "read tiles"]
    assert sorted(reads) == ([0, 0, 1, 1] if rest is Tier.NVME else [])
    with pytest.raises(PlanInfeasible, match="device"):
        plan_optimal(whole)


@pytest.mark.parametrize("rest", [Tier.HOST, Tier.NVME])
def test_tiles_cost_their_bytes_twice_their_rooms_and_a_product(rest):
    """What the same plan takes with a resident head, less and more by what tiles take."""
    p = question("roomy")
    base = plan_optimal(p)
    host = TABLE_BYTES if rest is Tier.HOST else 0
    split = Split(device_bytes=NORM_BYTES, host_bytes=host, nvme_bytes=TABLE_BYTES - host)
    classes = tuple(replace(c, weights=split) if c.name == "head" else c for c in base.classes)
    tiles = p.workload.tiles_of(p.workload.classes[-1], rest)
    resident = tuple(name for name in base.resident if name != "lm_head")
    plan = with_arenas(p, replace(base, classes=classes, head_tiles=tiles, resident=resident, predicted={}))
    before, after = static_bytes(p, base), static_bytes(p, plan)
    assert tiles.slots_bytes == 2 * TILE_BYTES
    assert before["device"]["resident weights"] - after["device"]["resident weights"] == TABLE_BYTES
    more = {key: size for key, size in after["device"].items() if key not in before["device"]}
    assert more == {"tiles of the head": tiles.slots_bytes, "products by tiles": tiles.product_bytes}
    staging = after["host"].get("staging for tiles of the head", 0)
    assert staging == (tiles.slots_bytes if rest is Tier.NVME else 0)
    busy, had, replay = busy_seconds(p, plan), busy_seconds(p, base), simulate(p, plan)
    hardware = p.hardware
    link = hardware.links.host_to_device_bytes_per_second
    product = 2 * TOKENS * VOCABULARY * WIDTH / hardware.device.matmul_flops_per_second
    assert busy["host_to_device"] - had["host_to_device"] == pytest.approx(2 * TABLE_BYTES / link)
    assert busy["compute"] - had["compute"] == pytest.approx(product)
    reads = (2 * TABLE_BYTES if rest is Tier.NVME else 0) / hardware.read_bytes_per_second
    assert busy["ssd_read"] - had["ssd_read"] == pytest.approx(reads)
    assert all(replay.busy_seconds[name] == pytest.approx(seconds) for name, seconds in busy.items())
    slowest = max(2 * TABLE_BYTES / link, reads)  # of which the head's own computation hides its time, at most
    own = class_costs(p, plan.cuts, plan.decode_scope)[-1]
    hidden = own.forward_seconds + own.backward_seconds + product
    assert replay.step_seconds >= simulate(p, base).step_seconds + slowest - hidden


def test_what_a_plan_says_of_tiles_is_checked():
    p = question("HOST")
    plan = plan_optimal(p)
    tiles, split = plan.head_tiles, head(plan)

    def refused(match, **changes):
        with pytest.raises(InvalidPlan, match=match):
            check(p, replace(plan, predicted={}, **changes))

    refused("as its bytes say", head_tiles=None)
    refused("as its bytes say", resident=(*plan.resident, "lm_head"))
    refused("from nvme, where 0 of", head_tiles=replace(tiles, rest=Tier.NVME))
    refused("rows, 2048 bytes each, in", head_tiles=replace(tiles, tile_rows=8))
    refused("which the workload's cannot", head_tiles=replace(tiles, block=plan.entry("layer").blocks[0]))
    half = replace(split, host_bytes=split.host_bytes - 4096, nvme_bytes=4096)
    refused("bytes rest", classes=tuple(replace(c, weights=half) if c.name == "head" else c for c in plan.classes))
    less = replace(tiles, product_bytes=tiles.product_bytes - 1)
    with pytest.raises(InvalidPlan, match=f"need {tiles.product_bytes}"):
        check(p, with_arenas(p, replace(plan, head_tiles=less, predicted={})))
    refused("'products by tiles' has", head_tiles=replace(tiles, product_bytes=1 << 30))


def test_only_frozen_heads_alone_that_gain_by_it_go_by_tiles():
    def tiled(workload):
        return [entry.name for entry in workload.classes if workload.tiles_of(entry) is not None]

    workload = question("HOST").workload
    assert tiled(workload) == ["head"] and tiled(question("HOST", rank=None).workload) == []
    assert tiled(replace(workload, batch_size=512)) == []  # gradients of all inputs are more than the head
    shares = tuple(replace(entry, rows=None) for entry in workload.classes)
    assert tiled(replace(workload, classes=shares)) == []  # its slot, with the embedding


@pytest.mark.parametrize("where", ["roomy", "a slot to spare"])
def test_greedy_keeps_a_head_that_it_has_room_for(where):
    p = question(where)
    plan = plan_greedy(p)
    check(p, plan)
    assert plan.head_tiles is None and "lm_head" in plan.resident


def test_the_command_says_it(capsys):
    argv = ["plan", "--model", "llama3-8b", "--gpu", "rtx3060", "--nvme", "1TB@7.0r/5.0w", "--no-advice", "--bits", "4"]
    assert main([*argv, "--device-memory", "4GiB", "--host-memory", "32GiB", "--seq-len", "1024"]) == 0
    assert "lm_head by tiles of 8192 rows from " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("of", "change"),
    [
        *(
            (HeadTiles, {name: value})
            for name in ("num_slots", "product_bytes")
            for value in (-1, 1.5, "1", None, True)
        ),
        *((HeadTiles, {"block": block}) for block in ([], ["head"], None)),
        *((Lookups, {"room_bytes": value}) for value in (-1, 4096.5, True)),
        (Lookups, {"blocks": [["head"]]}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else str(value),
)
def test_what_is_no_number_or_name_is_refused_where_a_plan_is_read(of, change):
    tiles = {"block": "head", "rest": "nvme", "tile_rows": 8, "tile_bytes": 4096, "num_slots": 2, "product_bytes": 0}
    lookups = {"blocks": ["table"], "rest": "nvme", "room_bytes": 4096, "pages_bytes": 4096}
    good = tiles if of is HeadTiles else lookups
    assert of.from_json(good).rest is Tier.NVME
    with pytest.raises(ValueError, match=f"plan: .*{next(iter(change))[:5]}"):
        of.from_json({**good, **change})
