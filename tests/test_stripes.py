"""Extents over drives: every byte in one place, shared out by speed, within what each drive may hold.

block   |======= A =======|==== B ====|
"""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from offload_rt.storage.stripes import MIN_STRIPE_BYTES, parts, stripe_all

PAGE = 4096
MIB = 1 << 20
UNLIMITED = 1 << 60

LENGTHS = st.lists(st.integers(0, 5000).map(lambda pages: pages * PAGE), min_size=1, max_size=12)
WEIGHTS = st.lists(st.floats(1e6, 2e10), min_size=1, max_size=5)


def ends_of(places, num_drives):
    """Checks that stripes lie one behind the other on each drive; gives where each drive ends."""
    ends = [0] * num_drives
    for stripes in places:
        for stripe in stripes:
            assert stripe.offset_bytes == ends[stripe.drive]
            assert stripe.length_bytes % PAGE == 0
            ends[stripe.drive] += stripe.length_bytes
    return ends


@given(LENGTHS, WEIGHTS)
def test_every_byte_has_one_place_and_no_stripe_is_short(lengths, weights):
    places = stripe_all(lengths, weights, [UNLIMITED] * len(weights))
    ends_of(places, len(weights))
    for length, stripes in zip(lengths, places, strict=True):
        assert sum(stripe.length_bytes for stripe in stripes) == length
        assert len({stripe.drive for stripe in stripes}) == len(stripes)
        assert len(stripes) == 1 or all(stripe.length_bytes >= MIN_STRIPE_BYTES for stripe in stripes)


@pytest.mark.parametrize("weights", [[1.0], [1.0, 1.0], [7.0, 3.5], [5e9, 2e9, 1e9]])
def test_a_large_extent_is_shared_out_by_weight(weights):
    ((*stripes,),) = stripe_all([1 << 30], weights, [UNLIMITED] * len(weights))
    shares = [stripe.length_bytes / (1 << 30) for stripe in stripes]
    assert shares == pytest.approx([weight / sum(weights) for weight in weights], rel=1e-3)


def test_small_extents_fill_drives_by_their_weight():
    places = stripe_all([64 * PAGE] * 400, [3.0, 1.0], [UNLIMITED] * 2)
    assert all(len(stripes) == 1 for stripes in places)
    ends = ends_of(places, 2)
    assert ends[0] / ends[1] == pytest.approx(3, rel=0.05)


@given(LENGTHS, st.lists(st.tuples(st.floats(1e6, 2e10), st.integers(0, 400)), min_size=2, max_size=4))
@example([PAGE, 257 * PAGE], [(1e6, 0), (1e6, 1)])  # too short to cut, and the emptiest drive too small for it
@example([257 * PAGE, 257 * PAGE, PAGE], [(1e6, 0), (1.5e10, 1), (1e6, 2), (6e9, 2)])  # and the fastest one, too
def test_no_drive_overflows_while_there_is_room_elsewhere(lengths, drives):
    weights = [weight for weight, _ in drives]
    capacities = [capacity * MIB for _, capacity in drives[1:]]
    capacities = [sum(lengths), *capacities]  # one of them could take everything
    places = stripe_all(lengths, weights, capacities)
    ends = ends_of(places, len(weights))
    assert all(end <= capacity for end, capacity in zip(ends, capacities, strict=True))
    assert sum(ends) == sum(lengths)


@pytest.mark.parametrize("room", [0.5, 0.9, 0.99, 0.999])
def test_a_fast_drive_that_is_nearly_large_enough_is_filled(room):
    total = 100 * 32 * MIB
    places = stripe_all([32 * MIB] * 100, [1e10, 1e6], [int(room * total), total])
    fast, slow = ends_of(places, 2)
    assert 0.96 * room * total < fast <= room * total
    assert fast + slow == total


def test_it_ends_where_nothing_fits():
    places = stripe_all([10 * MIB, PAGE], [1.0, 2.0], [MIB, 0])
    assert sum(ends_of(places, 2)) == 10 * MIB + PAGE


@given(LENGTHS.filter(any), WEIGHTS, st.data())
def test_parts_of_a_range_are_the_bytes_of_the_whole(lengths, weights, data):
    """Against a list that says of each page of the extent where it lies."""
    places = stripe_all(lengths, weights, [UNLIMITED] * len(weights))
    stripes = places[lengths.index(max(lengths))]
    pages = [(s.drive, s.offset_bytes + at) for s in stripes for at in range(0, s.length_bytes, PAGE)]
    begin = data.draw(st.integers(0, len(pages)))
    count = data.draw(st.integers(0, len(pages) - begin))
    found = list(parts(stripes, begin * PAGE, count * PAGE))
    assert [p.begin_bytes for p in found] == [sum(q.length_bytes for q in found[:n]) for n in range(len(found))]
    assert [
        (part.drive, part.offset_bytes + at) for part in found for at in range(0, part.length_bytes, PAGE)
    ] == pages[begin : begin + count]
