"""Layer inputs that wait in HOST or on NVMe come back bit for bit, as often as they are asked for, or raise."""

import gc

import pytest
import torch

from offload_rt.errors import StorageError, StorageFull, StorageTimeout
from offload_rt.memory.arena import Arena
from offload_rt.storage.scratch import Scratch
from offload_rt.tiering.stash import GRANULE_BYTES, HostStash, NvmeStash
from offload_rt.tokenwise.saved import Held, Place, SavedCounters, _Storage
from offload_rt.transfers.file_io import AiofilesIO
from offload_rt.transfers.links import Links
from offload_rt.transfers.recording import Recorder
from offload_rt.transfers.throttle import Throttle
from planners.plans.placement import Tier
from planners.problems.hardware import named_hardware
from tests.power_loss import PlainIO

PAGE = 4096


class Parts:
    def __init__(self, disk_folder, kind, places=8):
        self.recorder = Recorder()
        self.links = Links(io=AiofilesIO(), recorder=self.recorder, delay_seconds=0.002)
        self.arena = Arena("stash", (4 if kind == "nvme" else places) * PAGE, poison=True)
        self.scratch = Scratch(disk_folder, places * PAGE, self.links) if kind == "nvme" else None
        self.stash = (
            NvmeStash(self.scratch, self.arena, self.links) if kind == "nvme" else HostStash(self.arena, self.links)
        )

    def close(self):
        self.links.close()
        if self.scratch is not None:
            self.scratch.close()


@pytest.fixture(params=["host", "nvme"])
def parts(request, disk_folder):
    parts = Parts(disk_folder, request.param)
    parts.kind = request.param
    yield parts
    parts.close()


def tensor(number, dtype=torch.float32):
    return (torch.arange(PAGE // dtype.itemsize) * 0.1 + number).to(dtype)


def test_what_is_put_away_comes_back_in_reverse_order(parts):
    held = [parts.stash.put(tensor(i)) for i in range(8)]
    for number in reversed(range(8)):
        assert torch.equal(held[number].load(), tensor(number))
        held[number].release()
    assert parts.recorder.check() == []
    if parts.kind == "nvme":
        assert parts.links.counters.bytes_written == 8 * PAGE
        assert parts.links.counters.bytes_read == 8 * PAGE, "read more than once, or not at all"
    else:
        assert parts.links.counters.bytes_copied == 16 * PAGE


def test_the_next_one_is_on_its_way_while_one_is_used(parts):
    if parts.kind == "host":
        pytest.skip("HOST has nothing to read ahead")
    held = [parts.stash.put(tensor(i)) for i in range(3)]
    held[2].load()
    assert parts.links.counters.bytes_read == 2 * PAGE


def test_as_many_are_read_ahead_as_the_plan_has_room_for(disk_folder):
    links = Links(io=AiofilesIO())
    scratch, staging = Scratch(disk_folder, 8 * PAGE, links), Arena("staging", 6 * PAGE, poison=True)
    stash = NvmeStash(scratch, staging, links, piece_bytes=PAGE, ahead_bytes=3 * PAGE)
    held = [stash.put(tensor(i)) for i in range(8)]
    assert torch.equal(held[7].load(), tensor(7))
    assert links.counters.bytes_read >= 2 * PAGE, "more, if those behind the next one have left: `test_stash_order`"
    for number in reversed(range(7)):
        assert torch.equal(held[number].load(), tensor(number))
        ahead = min(3, number)
        if number < 5:
            assert links.counters.bytes_read == (8 - number + ahead) * PAGE
        held[number].release()
    assert links.counters.bytes_read == 8 * PAGE, "none is read twice"
    links.close()
    scratch.close()


def test_what_was_read_ahead_gives_way_to_what_is_wanted_instead(disk_folder):
    links = Links(io=PlainIO())
    scratch, staging = Scratch(disk_folder, 9 * PAGE, links), Arena("staging", 4 * PAGE, poison=True)
    stash = NvmeStash(scratch, staging, links, piece_bytes=PAGE, ahead_bytes=2 * PAGE)
    held = [stash.put(tensor(i)) for i in range(9)]
    for number in (8, 5):  # and those before each fill the staging
        assert torch.equal(held[number].load(), tensor(number))
    assert staging.held_bytes() == 4 * PAGE and stash.num_given_up == 0
    for number in (1, 7, 4):
        assert torch.equal(held[number].load(), tensor(number))
    assert stash.num_given_up == 1
    links.close()
    scratch.close()


def test_host_wastes_less_than_a_line_of_cache_on_a_tensor():
    arena = Arena("stash", 4096, granule_bytes=GRANULE_BYTES)
    stash = HostStash(arena, Links())
    held = [stash.put(torch.full((17,), float(number))) for number in range(32)]
    assert stash.put(torch.zeros(1)) is None and arena.held_bytes() == 4096
    assert all(float(one.load()[16]) == number for number, one in enumerate(held))


@pytest.mark.parametrize("num_bytes", [PAGE + 4, 4 * PAGE, 7 * PAGE])
def test_what_is_larger_than_a_staging_slot_goes_in_pieces(parts, num_bytes):
    if parts.kind == "host":
        pytest.skip("HOST has no staging")
    large = (torch.arange(num_bytes // 4) * 0.1).reshape(1, -1)
    first, second = parts.stash.put(tensor(7)), parts.stash.put(large)
    assert parts.links.counters.bytes_written == PAGE + -(-num_bytes // PAGE) * PAGE
    for _ in range(2):
        assert torch.equal(second.load(), large)
        assert torch.equal(first.load(), tensor(7))
    assert parts.stash.put(torch.ones(8 * PAGE // 4)) is None, "there is room for seven pages beside the first"
    second.release()
    first.release()
    del first, second
    parts.scratch.take_back()
    everything = parts.arena.try_acquire(parts.arena.num_bytes, "the test")
    assert everything is not None, "nothing of it is held any more"
    del everything
    all_of_it = parts.stash.put(torch.ones(8 * PAGE // 4))
    assert torch.equal(all_of_it.load(), torch.ones(8 * PAGE // 4))
    assert parts.recorder.check() == []


def test_any_order_works(parts):
    held = [parts.stash.put(tensor(i)) for i in range(6)]
    for number in (3, 0, 5, 5, 1, 4, 2, 3):
        assert torch.equal(held[number].load(), tensor(number))


def test_what_comes_back_is_the_callers_own(parts):
    held = parts.stash.put(tensor(1))
    held.load().fill_(9)
    assert torch.equal(held.load(), tensor(1))


def test_the_caller_may_change_what_was_put_away(parts):
    mine = tensor(1)
    held = parts.stash.put(mine)
    mine.fill_(9)
    assert torch.equal(held.load(), tensor(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_dtypes_and_shapes_are_kept(parts, dtype):
    source = (torch.arange(24).reshape(2, 3, 4) % 2).to(dtype)
    for view in (source, source.transpose(0, 2), source[:, 1:, ::2], source[0, 0, 0]):
        back = parts.stash.put(view).load()
        assert back.dtype == dtype and torch.equal(back, view)


def test_places_come_back_after_release(parts):
    for _ in range(5):
        held = [parts.stash.put(tensor(i)) for i in range(8)]
        for one in held:
            one.release()
        del held, one
    gc.collect()


def test_released_is_gone(parts):
    held = parts.stash.put(tensor(1))
    held.release()
    held.release()
    with pytest.raises(RuntimeError, match="after its release"):
        held.load()


@pytest.mark.parametrize("kind", ["host", "nvme"])
def test_more_than_was_planned_is_not_taken_and_harms_nothing(disk_folder, kind):
    parts = Parts(disk_folder, kind, places=2)
    held = [parts.stash.put(tensor(i)) for i in range(2)]
    assert parts.stash.put(tensor(2)) is None
    for number in (1, 0):
        assert torch.equal(held[number].load(), tensor(number))
        held[number].release()
    del held
    assert torch.equal(parts.stash.put(tensor(3)).load(), tensor(3))
    parts.close()


def test_two_graphs_at_once_do_not_mix(parts):
    first = [parts.stash.put(tensor(i)) for i in range(4)]
    second = [parts.stash.put(tensor(10 + i)) for i in range(4)]
    for number in reversed(range(4)):
        assert torch.equal(second[number].load(), tensor(10 + number))
        second[number].release()
        assert torch.equal(first[number].load(), tensor(number))
        first[number].release()


def test_a_graph_that_is_dropped_half_way_leaves_room_for_the_next(parts):
    for _ in range(6):
        held = [parts.stash.put(tensor(i)) for i in range(8)]
        held[7].load()
        held[6].load()
        for one in held:
            one.release()
        del held, one


def parts_whose_writes_end_with(error, disk_folder, at=lambda offset_bytes: True, *, places=2, of="write"):
    """On NVMe. The drive does what is asked; whoever waits for a write to one of these places is told otherwise."""
    parts = Parts(disk_folder, "nvme", places)
    start = parts.links.io.start

    def started(kind, file, offset_bytes, buffer):
        wait = start(kind, file, offset_bytes, buffer)

        def fail(timeout_seconds):
            wait(timeout_seconds)
            raise error

        return fail if kind == of and at(offset_bytes) else wait

    parts.links.io.start = started
    return parts


def test_a_write_that_failed_never_reads_back_as_if_it_had_not(disk_folder):
    parts = parts_whose_writes_end_with(StorageError("write failed", path="scratch", errno=5), disk_folder)
    held = parts.stash.put(tensor(1))
    for _ in range(3):
        with pytest.raises(StorageError, match="write failed"):
            held.load()
    parts.close()


def test_a_write_that_failed_ends_nobody_who_puts_away_something_else(disk_folder):
    error = StorageError("write failed", path="scratch", errno=5)
    parts = parts_whose_writes_end_with(error, disk_folder, at=lambda offset_bytes: not offset_bytes, places=4)
    held = [parts.stash.put(tensor(number)) for number in range(4)]
    for number in (3, 2):
        assert torch.equal(held[number].load(), tensor(number))
    with pytest.raises(StorageError, match="write failed"):
        held[0].load()
    parts.close()


def test_what_failed_to_be_read_ahead_is_read_again_where_it_is_wanted(disk_folder):
    once = iter([True])
    parts = parts_whose_writes_end_with(
        StorageError("read failed", path="scratch", errno=5), disk_folder,
        at=lambda offset_bytes: not offset_bytes and next(once, False), of="read",
    )  # fmt: skip
    held = [parts.stash.put(tensor(number)) for number in range(2)]
    held[1].load()
    parts.stash.free_staging()
    assert next(once, None) is None and torch.equal(held[0].load(), tensor(0))
    parts.close()


def test_a_place_that_may_still_be_written_to_is_not_given_to_others(disk_folder):
    """A write that nobody sees the end of, and that nobody wants any more: it would go over what came next."""
    late = StorageTimeout("not finished")
    parts = parts_whose_writes_end_with(late, disk_folder, at=lambda offset_bytes: offset_bytes == 0)
    held = [parts.stash.put(tensor(number)) for number in range(2)]
    for one in held:
        one.release()
    late.__traceback__ = None
    del held, one
    gc.collect()
    assert parts.scratch.acquire(PAGE).offset_bytes == PAGE
    with pytest.raises(StorageFull):
        parts.scratch.acquire(2 * PAGE)
    parts.close()


class Collecting:
    """A lock inside which garbage is collected. `reentered` says how often a thread wanted it that had it already."""

    def __init__(self):
        self.num_taken = self.num_reentered = 0
        self.is_held = False

    def __enter__(self):
        if self.is_held:
            self.num_reentered += 1  # a real one would wait for ever
            return
        self.is_held = True
        self.num_taken += 1
        gc.collect()

    def __exit__(self, *_):
        self.is_held = False


@pytest.mark.parametrize("whose", ["meter", "recorder", "drives"])
def test_a_graph_that_is_collected_inside_a_lock_does_not_want_that_lock(disk_folder, whose):
    """Its activations are still being written: whoever waited for that would be counted, recorded and paced."""
    links = Links(recorder=Recorder(), throttle=Throttle(named_hardware("rtx4090")))
    scratch, staging = Scratch(disk_folder, 2 * PAGE, links), Arena("staging", 8 * PAGE)
    stash = NvmeStash(scratch, staging, links)
    place = Place("attention", stash, Tier.NVME)
    gc.collect()
    gc.disable()
    try:
        held = [_Storage(None, place, Held(tensor(0), place, SavedCounters()))]
        held.append(held)
        assert held[0].held.is_stashed
        del held
        owner = {"meter": links.meter, "recorder": links.recorder, "drives": links.throttle.drives}[whose]
        owner._lock = lock = Collecting()
        other = stash.put(tensor(1))
    finally:
        gc.enable()
    assert torch.equal(other.load(), tensor(1))
    assert lock.num_taken and not lock.num_reentered
    other.release()
    assert scratch.acquire(2 * PAGE).num_bytes == 2 * PAGE, "what was collected has not given back its place"
    links.close()
    scratch.close()
