"""The happens-before checker finds what is not ordered, and only that.

host      submit(A) ------ join(A) -- use(A) -- submit(B, same slot) -- join(B) -- use(B)
transfer       read -> slot                        read -> slot
"""

import random

import pytest

from offload_rt.memory.arena import Arena, MemoryRange
from offload_rt.transfers.file_io import AiofilesIO
from offload_rt.transfers.links import Links
from offload_rt.transfers.recording import Recorder

SLOT = MemoryRange("ring", 0, 4096)
OTHER = MemoryRange("ring", 4096, 8192)


def races(recorder):
    return [(race.first.name, race.second.name) for race in recorder.check()]


def test_the_right_order_is_accepted():
    recorder = Recorder()
    for name in ("A", "B"):
        number = recorder.submit(name, writes=[SLOT])
        recorder.join(number)
        recorder.use(f"use {name}", reads=[SLOT])
    assert races(recorder) == []
    assert len(recorder.operations) == 4


def test_a_missing_wait_is_found():
    recorder = Recorder()
    recorder.submit("A", writes=[SLOT])
    recorder.use("use A", reads=[SLOT])
    assert races(recorder) == [("A", "use A")]
    assert "not ordered after A" in str(recorder.check()[0]) and "ring [0, 4096)" in str(recorder.check()[0])


def test_a_slot_that_is_overwritten_before_its_last_use_is_found():
    recorder = Recorder()
    recorder.join(recorder.submit("A", writes=[SLOT]))
    number = recorder.submit("B", writes=[SLOT])
    recorder.use("use A", reads=[SLOT])
    recorder.join(number)
    assert races(recorder) == [("B", "use A")]


def test_two_transfers_into_one_slot_are_found():
    recorder = Recorder()
    recorder.submit("A", writes=[SLOT])
    recorder.submit("B", writes=[SLOT])
    assert races(recorder) == [("A", "B")]


def test_a_write_back_that_the_next_fetch_overtakes_is_found():
    recorder = Recorder()
    recorder.use("make", writes=[SLOT])
    recorder.submit("write back", reads=[SLOT])
    recorder.submit("fetch", writes=[SLOT])
    assert races(recorder) == [("write back", "fetch")]


def test_a_copy_is_ordered_after_the_read_it_follows():
    recorder = Recorder()
    read = recorder.submit("read", writes=[SLOT])
    copy = recorder.submit("copy", reads=[SLOT], writes=[OTHER], after=[read])
    recorder.join(copy)
    recorder.use("use", reads=[OTHER])
    recorder.submit("next read", writes=[SLOT])
    assert races(recorder) == []


def test_a_copy_that_does_not_follow_its_read_is_found():
    recorder = Recorder()
    recorder.submit("read", writes=[SLOT])
    recorder.submit("copy", reads=[SLOT], writes=[OTHER])
    assert races(recorder) == [("read", "copy")]


def test_reads_do_not_race_and_other_bytes_do_not_matter():
    recorder = Recorder()
    recorder.submit("write back", reads=[SLOT])
    recorder.use("use", reads=[SLOT])
    recorder.submit("A", writes=[OTHER])
    recorder.use("use", writes=[MemoryRange("another arena", 4096, 8192)])
    assert races(recorder) == []


@pytest.mark.parametrize("begin, end, raced", [(4095, 4097, True), (4096, 4097, False), (0, 1, True)])
def test_ranges_are_half_open(begin, end, raced):
    recorder = Recorder()
    recorder.submit("A", writes=[SLOT])
    recorder.use("use", reads=[MemoryRange("ring", begin, end)])
    assert bool(recorder.check()) is raced


def test_a_wait_on_one_lane_does_not_order_another():
    recorder = Recorder()
    number = recorder.submit("A", writes=[SLOT], lane="copy stream")
    recorder.join(number, lane="copy stream")
    recorder.use("kernel", reads=[SLOT], lane="compute stream")
    assert races(recorder) == [("A", "kernel")]


def test_an_operation_on_its_own_bytes_does_not_race_with_itself():
    recorder = Recorder()
    recorder.submit("in place", reads=[SLOT], writes=[SLOT])
    assert races(recorder) == []


@pytest.mark.parametrize("seed", range(20))
def test_the_checker_agrees_with_reachability_in_a_graph(seed):
    """Against the slow twin: depth-first search over explicit edges."""
    draw = random.Random(seed)
    recorder, edges, heads, waited = Recorder(), {}, {}, {}
    for _ in range(25):
        lane = draw.choice(["host", "stream"])
        where = MemoryRange("a", draw.randrange(3), draw.randrange(3, 5))
        access = {draw.choice(["reads", "writes"]): [where]}
        action = draw.choice(["submit", "use", "join"])
        before = set(heads.get(lane, set()))
        if action == "join" and waited:
            number = draw.choice(sorted(waited))
            recorder.join(number, lane=lane)
            heads.setdefault(lane, set()).add(number)
        elif action == "submit":
            number = recorder.submit("t", lane=lane, **access)
            edges[number], waited[number] = before, True
        elif action == "use":
            number = recorder.use("u", lane=lane, **access)
            edges[number] = before
            heads[lane] = {*before, number}

    def reaches(number, target):
        return target in edges[number] or any(reaches(parent, target) for parent in edges[number])

    expected = set()
    for second in recorder.operations:
        for first in recorder.operations[: second.number]:
            a, b = (*first.reads, *first.writes)[0], (*second.reads, *second.writes)[0]
            overlap = a.begin < b.end and b.begin < a.end
            if overlap and (first.writes or second.writes) and not reaches(second.number, first.number):
                expected.add((first.number, second.number))
    assert {(race.first.number, race.second.number) for race in recorder.check()} == expected


def test_links_record_what_they_do():
    recorder = Recorder()
    links = Links(io=AiofilesIO(), recorder=recorder)
    arena = Arena("a", 8192)
    source, target = arena.acquire(4096, "source"), arena.acquire(4096, "target")
    try:
        copy = links.copy(source, target)
        recorder.use("too early", reads=[target.range])
        links.wait(copy)
        recorder.use("in time", reads=[target.range])
    finally:
        links.close()
    assert races(recorder) == [("copy", "too early")]
