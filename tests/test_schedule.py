"""How a ring is walked: always legal, never more blocks than slots, and as few fetches as any schedule can have."""

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planners.plans.schedule import Phase, Step, StepKind, Visit, num_fetches, ring_schedule, walk

visits_of = st.lists(st.integers(0, 5), max_size=9).map(lambda blocks: tuple(Visit(b, Phase.FORWARD) for b in blocks))


@st.composite
def problems(draw):
    visits = draw(visits_of)
    num_slots = draw(st.integers(1, 4))
    resident = frozenset(draw(st.lists(st.integers(0, 5), max_size=num_slots, unique=True)))
    then = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
    return visits, num_slots, resident, then


def replay(steps, visits, num_slots, resident):
    """Runs `steps` on a fake ring; returns what is resident at the end. Fails where a step is not legal."""
    here, computed = set(resident), []
    for step in steps:
        if step.kind is StepKind.FETCH:
            assert step.block not in here, "fetched what is there"
            here.add(step.block)
        elif step.kind is StepKind.RELEASE:
            assert step.block in here, "released what is not there"
            here.remove(step.block)
        else:
            assert step.block in here, "computed on what is not there"
            computed.append(Visit(step.block, step.phase))
        assert len(here) <= num_slots
    assert tuple(computed) == visits
    return here


@cache
def fewest_fetches(order, num_slots, resident):
    """The optimum by trying every victim: the slow, obvious twin."""
    if not order:
        return 0
    block, rest = order[0], order[1:]
    if block in resident:
        return fewest_fetches(rest, num_slots, resident)
    if len(resident) < num_slots:
        return 1 + fewest_fetches(rest, num_slots, resident | {block})
    return 1 + min(fewest_fetches(rest, num_slots, (resident - {victim}) | {block}) for victim in resident)


@given(problems())
def test_every_block_is_there_when_it_computes_and_slots_are_never_exceeded(problem):
    visits, num_slots, resident, then = problem
    replay(ring_schedule(visits, num_slots, resident, then), visits, num_slots, resident)


@st.composite
def passes(draw):
    """What a model asks for: a pass from anywhere, with whatever the last one left in the slots."""
    num_blocks = draw(st.integers(1, 6))
    num_slots = draw(st.integers(1, 4))
    start = draw(st.none() | st.builds(Visit, st.integers(0, num_blocks - 1), st.sampled_from(Phase)))
    first = draw(st.integers(0, num_blocks))
    backward = draw(st.none() | st.just(frozenset(range(first, num_blocks))))
    visits = walk(num_blocks, training=draw(st.booleans()), start=start, backward=backward)
    # What a training step leaves behind, or, where a pass begins in the middle, nothing.
    resident = frozenset(range(num_slots) if start is None and draw(st.booleans()) else ())
    return visits, num_slots, frozenset(b for b in resident if 0 <= b < num_blocks)


@given(passes())
@settings(max_examples=300)
def test_a_pass_over_a_model_fetches_as_rarely_as_any_schedule_can(problem):
    """Belady's optimum, by brute force. (For other orders, prefetching early may cost a fetch more.)"""
    visits, num_slots, resident = problem
    order = tuple(visit.block for visit in visits)
    assert num_fetches(ring_schedule(visits, num_slots, resident)) == fewest_fetches(order, num_slots, resident)


@given(problems())
def test_no_order_fetches_more_than_once_a_visit(problem):
    visits, num_slots, resident, then = problem
    assert num_fetches(ring_schedule(visits, num_slots, resident, then)) <= len(visits) + len(then)


@given(problems())
def test_what_comes_then_is_there_at_the_end(problem):
    visits, num_slots, resident, then = problem
    here = replay(ring_schedule(visits, num_slots, resident, then), visits, num_slots, resident)
    assert set(list(dict.fromkeys(then))[:num_slots]) <= here


@given(problems())
def test_it_is_deterministic(problem):
    assert ring_schedule.__wrapped__(*problem) == ring_schedule.__wrapped__(*problem)


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 7])
@pytest.mark.parametrize("num_slots", [1, 2, 3, 8])
def test_a_training_step_in_steady_state_moves_twice_what_does_not_fit(num_blocks, num_slots):
    visits = walk(num_blocks, training=True)
    resident = frozenset()
    for step in range(3):
        steps = ring_schedule(visits, num_slots, resident)
        resident = frozenset(replay(steps, visits, num_slots, resident))
        if step:
            assert num_fetches(steps) == 2 * max(0, num_blocks - num_slots)


def test_a_fetch_is_started_as_soon_as_a_slot_is_free():
    """Two slots, three blocks: block 2 is under way while block 1 computes.

    compute 0 | release 0, fetch 2 | compute 1 | compute 2
    """
    steps = ring_schedule(walk(3, training=False), 2)
    compute_1 = steps.index(Step(StepKind.COMPUTE, 1, Phase.FORWARD))
    assert Step(StepKind.FETCH, 2) in steps[:compute_1]
    assert steps[:2] == (Step(StepKind.FETCH, 0), Step(StepKind.FETCH, 1))


def test_the_turn_from_forward_to_backward_fetches_nothing_twice():
    steps = ring_schedule(walk(5, training=True), 2)
    assert num_fetches(steps) == 5 + 3
    assert sum(s.kind is StepKind.FETCH and s.block == 4 for s in steps) == 1


def test_a_walk_is_forward_then_reverse():
    blocks = [(v.block, v.phase) for v in walk(3, training=True)]
    f, b = Phase.FORWARD, Phase.BACKWARD
    assert blocks == [(0, f), (1, f), (2, f), (2, b), (1, b), (0, b)]
    assert walk(3, training=False) == walk(3, training=True)[:3]
    assert walk(0, training=True) == ()


def test_a_walk_begins_in_the_middle():
    assert [v.block for v in walk(4, training=True, start=Visit(2, Phase.FORWARD))] == [2, 3, 3, 2, 1, 0]
    assert [v.block for v in walk(4, training=True, start=Visit(2, Phase.BACKWARD))] == [2, 1, 0]
    assert [v.block for v in walk(4, training=False, start=Visit(3, Phase.FORWARD))] == [3]


def test_a_walk_leaves_out_what_is_not_visited_in_backward():
    assert [v.block for v in walk(3, training=True, backward=frozenset({2}))] == [0, 1, 2, 2]


@pytest.mark.parametrize("num_slots", [0, -1])
def test_no_slots_is_an_error(num_slots):
    with pytest.raises(ValueError, match="num_slots"):
        ring_schedule(walk(2, training=False), num_slots)


def test_more_residents_than_slots_is_an_error():
    with pytest.raises(ValueError, match="2 blocks in 1 slots"):
        ring_schedule(walk(2, training=False), 1, frozenset({0, 1}))
