"""Memory that a plan of the fixed rule leaves: layers rest in it, evenly, and never more of them than fit."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planners.errors import PlanInfeasible
from planners.plans.activations import Action
from planners.plans.plan import Plan, Tier
from planners.plans.schedule import StepKind, ring_schedule, walk
from planners.plans.vocabulary import RowsSize
from planners.rule.filling import SPARE_SHARE, Fill, fetched_bytes, streamed_bytes
from planners.rule.shortage import shortages
from planners.rule.streaming import plan_streaming
from planners.rule.streaming_problem import ChunkedSize
from tests.test_plan import KIB, block, problem, problems
from tests.test_plan_state import training_problem

LAYER = 100 * KIB


def plan_of(p):
    """The rule's plan; None where none fits."""
    try:
        return plan_streaming(p)
    except PlanInfeasible:
        return None


def rests(p, plan):
    """By the first letter of its tier, where each layer rests."""
    found = dict.fromkeys(plan.resident, "D")
    for ring in plan.rings:
        for name in ring.blocks:
            split = plan.weights_of(name)
            found[name] = (Tier.HOST if split is not None and split.host_bytes else ring.rest).name[0]
    return "".join(found[layer.name] for layer in p.layers)


def roomy(num_layers, **changes):
    """Layers of equal size in memory that may be filled, of which there is much."""
    fields = {
        "layers": tuple(block(f"layers.{i}", LAYER) for i in range(num_layers)), "device_capacity_bytes": 1 << 40,
        "fills": True,
    }  # fmt: skip
    return problem(**{**fields, **changes})


@given(problems(), st.sampled_from([1, 2, 8]))
@settings(max_examples=100)
def test_a_filled_plan_fits_every_budget_and_none_is_refused_that_was_not(p, num_micro_batches):
    """Nor does one stream more, of however many micro-batches."""
    chunked = ChunkedSize(num_tokens=512, sequence_bytes=10_000)
    p = replace(p, chunked=chunked, num_micro_batches=num_micro_batches)
    filled, before = plan_of(replace(p, fills=True)), plan_of(p)
    assert (filled is None) == (before is None)
    if filled is None:
        return
    assert not shortages(p, filled)
    assert sorted([*filled.resident, *(name for ring in filled.rings for name in ring.blocks)]) == sorted(
        each.name for each in p.layers + p.edges
    )
    assert streamed_bytes(p, filled) <= streamed_bytes(p, before)
    if any(c.action is Action.KEEP for policy in (filled.activations or {}).values() for c in policy.chunks):
        names = [layer.name for layer in p.layers]
        assert list(filled.activations) == names[-len(filled.activations) :]
    assert Plan.from_json(filled.to_json()) == filled


def leanness(p, plan):
    """What is given up last, whatever else it would save: the second slot, which hides every read, and that no step
    writes to a drive.
    """
    rings = plan_streaming(p, fill=Fill.NOTHING).rings
    return plan.layer_inputs is Tier.NVME, any(ring.num_slots == 1 for ring in rings if ring.name == "layers")


@given(st.data())
@settings(max_examples=12)
def test_more_memory_never_streams_more(data):
    """Of one leanness."""
    unified = data.draw(st.booleans())
    table = RowsSize(num_rows=75, row_bytes=4096, most_rows=20)
    p = roomy(
        data.draw(st.integers(3, 8)), unified=unified,
        edges=(replace(block("embed", 300 * KIB), rows=table), block("head", 300 * KIB)),
        layer_input_bytes=data.draw(st.sampled_from([KIB, 30 * KIB])),
        nvme_capacity_bytes=data.draw(st.sampled_from([None, 1 << 40])),
    )  # fmt: skip
    last = {}
    host = None if unified else data.draw(st.integers(300, 1600)) * KIB
    by_host = not unified and data.draw(st.booleans())
    device = data.draw(st.integers(300, 1800)) * KIB
    for more in range(0, 2400 * KIB, 101 * KIB):
        asked = replace(
            p, device_capacity_bytes=device if by_host else 200 * KIB + more,
            host_capacity_bytes=300 * KIB + more if by_host else host,
        )  # fmt: skip
        plan = plan_of(asked)
        if plan is None:
            assert not last
            continue
        lean, num_bytes = leanness(asked, plan), streamed_bytes(asked, plan)
        assert num_bytes <= last.get(lean, num_bytes)
        last[lean] = num_bytes


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=7), st.integers(1, 3), st.data()
)  # fmt: skip
def test_what_is_said_to_be_fetched_is_what_the_schedule_fetches_in_a_steady_state(sizes, num_slots, data):
    chosen = data.draw(st.sets(st.integers(0, len(sizes) - 1)))
    visits, in_slots = walk(len(sizes), training=True), frozenset()
    for _ in range(3):
        fetched, held = [], set(in_slots)
        for step in ring_schedule(visits, num_slots, in_slots, then=tuple(range(len(sizes)))):
            if step.kind is StepKind.FETCH:
                fetched.append(step.block)
                held.add(step.block)
            elif step.kind is StepKind.RELEASE:
                held.discard(step.block)
        in_slots = frozenset(held)
    assert sum(sizes[each] for each in fetched if each in chosen) == fetched_bytes(sizes, num_slots, chosen)


@pytest.mark.parametrize("unified", [True, False])
def test_what_fits_does_not_stream(unified):
    p = roomy(6, unified=unified, host_capacity_bytes=None if unified else 1 << 40)
    plan = plan_streaming(p)
    assert plan.rings == () and streamed_bytes(p, plan) == 0 and rests(p, plan) == "D" * 6
    need = plan.predicted_bytes(Tier.DEVICE) + SPARE_SHARE * plan.peak_bytes["device"]["activations"]
    assert plan_streaming(replace(p, device_capacity_bytes=need)) == plan
    less = replace(p, device_capacity_bytes=need - 1)
    assert streamed_bytes(less, plan_streaming(less)) > 0


def test_layers_that_stay_and_those_that_stream_take_turns():
    p = roomy(12, unified=False, host_capacity_bytes=0)
    staging = 2 * LAYER
    streams = plan_streaming(replace(p, fills=False, host_capacity_bytes=staging))
    spare = SPARE_SHARE * streams.peak_bytes["device"]["activations"]
    device = streams.predicted_bytes(Tier.DEVICE) + spare + 6 * LAYER
    some = replace(p, device_capacity_bytes=device, host_capacity_bytes=staging)
    assert rests(some, plan_streaming(some)) == "DNDNDNDNDNDN"
    half = plan_streaming(replace(some, host_capacity_bytes=staging + 3 * LAYER))
    assert rests(some, half) == "DHDNDHDNDHDN"
    assert half.buffers.host_slots == half.rings[0].num_slots == 2
    assert half.peak_bytes["host"]["weights"] == 3 * LAYER
    all_in_host = plan_streaming(replace(some, host_capacity_bytes=6 * LAYER))
    assert rests(some, all_in_host) == "DHDHDHDHDHDH" and all_in_host.rings[0].rest is Tier.HOST
    assert "staging for layers" not in all_in_host.peak_bytes["host"]


@pytest.mark.parametrize("fills", [True, False])
def test_layers_that_train_keep_what_as_many_of_the_last_ones_save_as_fits(fills):
    """Whether memory may be filled with others or not."""
    p = training_problem(unified=False, fills=fills)
    every = plan_streaming(p)
    names, seen = [layer.name for layer in p.layers], []
    for less in range(0, 2600 * KIB, 300 * KIB):
        asked = replace(p, device_capacity_bytes=every.predicted_bytes(Tier.DEVICE) - less)
        plan = plan_streaming(asked)
        kept = list(plan.activations or ())
        assert not shortages(asked, plan) and kept == names[len(names) - len(kept) :]
        seen.append(len(kept))
    assert seen == sorted(seen, reverse=True) and seen[0] == 6 and {1, 2, 3, 4, 5} & set(seen)


def test_micro_batches_go_together_where_that_streams_less_alone():
    """Even where what waits for its backward goes to a drive: one after the other they would stream a fifth more."""
    p = roomy(
        12, unified=False, num_micro_batches=8, host_capacity_bytes=500 * KIB, layer_input_bytes=32 * KIB,
        chunked=ChunkedSize(num_tokens=512, sequence_bytes=10_000),
    )  # fmt: skip
    tight = replace(p, device_capacity_bytes=1700 * KIB)
    streams, plan = plan_streaming(tight, fill=Fill.NOTHING), plan_streaming(tight)
    assert plan.layer_major and plan.layer_inputs is streams.layer_inputs is Tier.NVME
    assert 0 < streamed_bytes(tight, plan) < streamed_bytes(tight, streams)
    plan = plan_streaming(p)
    assert plan.rings == () and not plan.layer_major and len(plan.activations) == 12, "what they save is kept"


@pytest.mark.parametrize("fills", [True, False])
def test_layers_that_train_and_stream_are_fetched_once_for_all_micro_batches(fills):
    """What they save is kept where they do not stream."""
    p = training_problem(unified=False, fills=fills, num_micro_batches=4)
    seen = set()
    for device in range(1000 * KIB, 4000 * KIB, 200 * KIB):
        asked = replace(p, device_capacity_bytes=device)
        plan, streams = plan_streaming(asked), plan_streaming(asked, fill=Fill.NOTHING)
        assert streams.layer_major and streamed_bytes(asked, plan) <= streamed_bytes(asked, streams)
        assert not (plan.activations and plan.rings)
        seen.add(len(plan.activations or ()))
    assert seen > {0, 1, 6} if fills else seen == {0}


def test_without_leave_nothing_is_filled():
    p = roomy(6)
    streams = plan_streaming(replace(p, fills=False))
    assert streams.rings and plan_streaming(p, fill=Fill.NOTHING) == streams
    assert plan_streaming(p, rest=Tier.NVME).rings == streams.rings
