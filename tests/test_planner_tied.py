"""A matrix that is embedding and head, in the optimiser: it stays, or rests once and is read by rows and by tiles."""

from __future__ import annotations

from dataclasses import replace

import pytest

from planners.errors import PlanInfeasible
from planners.optimiser.mip import plan_optimal
from planners.plans.placement import Split, Tier
from planners.plans.plan import Plan
from planners.plans.vocabulary import Lookups
from planners.problems.model_workload import make_workload
from planners.problems.problem import Problem
from planners.shapes.architectures import shape_from_config
from planners.simulator.arenas import with_arenas
from planners.simulator.simulate import simulate
from planners.simulator.static_memory import static_bytes
from planners.simulator.step_work import busy_seconds
from planners.simulator.validate import InvalidPlan, check, check_placement
from tests.planner_cases import MIB, TINY, machine
from tests.test_planner_tiles import NORM_BYTES, PLACES, TABLE_BYTES, TOKENS, VOCABULARY, WIDTH


def question(where, **options):
    config = {**TINY, "hidden_size": WIDTH, "vocab_size": VOCABULARY, "tie_word_embeddings": True}
    workload = make_workload(shape_from_config(config, "tiny"), batch_size=1, seq_len=TOKENS, **options)
    return Problem(hardware=PLACES[where], workload=workload)


@pytest.mark.parametrize("where", PLACES)
def test_a_tied_matrix_that_does_not_stay_rests_once_and_is_read_both_ways(where):
    p = question(where)
    embedding, *_, head = p.workload.classes
    assert embedding.stored_bytes == 0 and head.stored_bytes == TABLE_BYTES + NORM_BYTES
    plan = plan_optimal(p)
    replay = check(p, plan)
    assert Plan.from_json(plan.to_json()) == plan
    if where in ("roomy", "a slot to spare"):
        assert plan.head_tiles is None and plan.lookups is None and "lm_head" in plan.resident
        return
    rest = Tier.NVME if where in ("NVMe", "one memory") else Tier.HOST
    assert plan.head_tiles is not None and plan.lookups is not None
    assert plan.lookups.blocks == (plan.head_tiles.block,) == head.blocks
    assert plan.lookups.rest is plan.head_tiles.rest is rest
    split = plan.entry("head").weights
    assert (split.device_bytes, split.streamed_bytes) == (NORM_BYTES, TABLE_BYTES)
    labels = [event.label for event in replay.events]
    of_rows = [label for label in labels if label[0] == "read rows"]
    assert [position for _, position, _, *_ in of_rows] == ([0] if rest is Tier.NVME else []), "before all else"
    as_a_whole = replace(head, product=None, rows=None)
    whole = replace(p, workload=replace(p.workload, classes=(*p.workload.classes[:-1], as_a_whole)))
    with pytest.raises(PlanInfeasible, match="device"):
        plan_optimal(whole)


@pytest.mark.parametrize("rest", [Tier.HOST, Tier.NVME])
def test_it_costs_its_rows_and_its_tiles(rest):
    p = question("roomy")
    base, head = plan_optimal(p), p.workload.classes[-1]
    host = TABLE_BYTES if rest is Tier.HOST else 0
    split = Split(device_bytes=NORM_BYTES, host_bytes=host, nvme_bytes=TABLE_BYTES - host)
    classes = tuple(replace(c, weights=split) if c.name == "head" else c for c in base.classes)
    size, tiles = p.workload.looked_up_of(head), p.workload.tiles_of(head, rest)
    lookups = Lookups.of(dict.fromkeys(head.blocks, size), rest)
    resident = tuple(name for name in base.resident if name not in head.blocks)
    plan = with_arenas(
        p, replace(base, classes=classes, head_tiles=tiles, lookups=lookups, resident=resident, predicted={})
    )
    before, after = static_bytes(p, base), static_bytes(p, plan)
    more = {key: size for key, size in after["device"].items() if key not in before["device"]}
    assert more == {
        "tiles of the head": tiles.slots_bytes, "products by tiles": tiles.product_bytes,
        "rows of embeddings": lookups.room_bytes,
    }  # fmt: skip
    busy, had, replay = busy_seconds(p, plan), busy_seconds(p, base), simulate(p, plan)
    moved = 2 * TABLE_BYTES + size.looked_up_bytes
    assert busy["host_to_device"] - had["host_to_device"] == pytest.approx(
        moved / p.hardware.links.host_to_device_bytes_per_second
    )
    read = (2 * TABLE_BYTES + size.read_bytes) * (rest is Tier.NVME)
    assert busy["ssd_read"] - had["ssd_read"] == pytest.approx(read / p.hardware.read_bytes_per_second)
    assert all(replay.busy_seconds[name] == pytest.approx(seconds) for name, seconds in busy.items())


def test_what_a_plan_says_of_it_is_checked():
    p = question("HOST")
    plan = plan_optimal(p)
    for lookups in (None, replace(plan.lookups, rest=Tier.NVME, pages_bytes=1 << 20)):
        with pytest.raises(InvalidPlan, match="is the embedding, too"):
            check_placement(p, replace(plan, lookups=lookups))
    with pytest.raises(InvalidPlan, match="in a room of"):
        check_placement(p, replace(plan, lookups=replace(plan.lookups, room_bytes=1)))


def test_where_all_trains_it_streams_whole():
    *_, head = question("HOST", rank=None).workload.classes
    assert head.product is None and head.rows is None


def test_from_nvme_it_stays_where_pages_on_their_way_take_more_room_than_the_matrix():
    """What is no tile there must not be free."""
    config = {**TINY, "hidden_size": WIDTH, "vocab_size": 1000, "tie_word_embeddings": True}
    workload = make_workload(shape_from_config(config, "tiny"), batch_size=1, seq_len=TOKENS)
    head = workload.classes[-1]
    assert workload.tiles_of(head, Tier.HOST) is not None and workload.tiles_of(head, Tier.NVME) is None
    p = Problem(hardware=machine(device=96 * MIB, name="cpu"), workload=workload)
    plan = plan_optimal(p)
    check(p, plan)
    assert plan.entry("head").weights.streamed_bytes == 0 and plan.head_tiles is None and plan.lookups is None
