"""Asynchronous copies: they own both ends, report every error with its evidence, and can be waited for again."""

import contextlib
import errno
import gc
import os
import threading
import time
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from offload_rt.errors import StorageError, StorageFull, StorageTimeout, storage_error
from offload_rt.memory.arena import Arena
from offload_rt.native import native_core
from offload_rt.transfers.file_io import AiofilesIO, OpenFile, file_io
from offload_rt.transfers.links import Links
from offload_rt.transfers.recording import Recorder
from offload_rt.transfers.transfer import Transfer

PAGE = 4096


@pytest.fixture(params=["io_uring", "threads", "aiofiles"])
def io(request):
    if request.param != "aiofiles":
        core = native_core()
        if core is None:
            pytest.skip("the native extension is not built")
        if request.param == "io_uring" and not core.io_uring_available()[0]:
            pytest.skip(f"no io_uring here: {core.io_uring_available()[1]}")
    io = file_io(request.param)
    yield io
    io.close()


@pytest.fixture
def arena():
    return Arena("a", 64 * PAGE)


@pytest.fixture
def file(disk_folder):
    path = disk_folder / "data"
    path.write_bytes(bytes(i % 251 for i in range(16 * PAGE)))
    fd = os.open(path, os.O_RDWR)
    yield OpenFile(str(path), fd, False)
    os.close(fd)


def test_an_error_that_is_told_again_keeps_nothing_that_it_went_through():
    def fails(timeout_seconds):
        raise storage_error("write failed", path="data", offset=PAGE, wanted=2, done=1, errno=errno.ENOSPC)

    def waits(graph):
        transfer.wait()

    transfer = Transfer("write data", 2, fails, ())
    gc.disable()
    try:
        for _ in range(3):
            graph = torch.empty(1)
            held, said = weakref.ref(graph), ""
            try:
                waits(graph)
            except StorageFull as error:
                assert (error.path, error.offset, error.wanted, error.done, error.errno) == ("data", PAGE, 2, 1, 28)
                said = str(error)
            del graph
            assert "write failed (1 of 2 bytes" in said and held() is None
    finally:
        gc.enable()


class StuckIO:
    """Never finishes until told; counts what was started."""

    name = "stuck"
    refusal = ""

    def __init__(self):
        self.go = threading.Event()
        self.started = 0
        self.error = None

    def start(self, kind, file, offset_bytes, buffer):
        self.started += 1

        def wait(timeout_seconds):
            if not self.go.wait(timeout_seconds):
                raise StorageTimeout(f"{file.path}: {kind} not finished; outstanding: {kind} at {offset_bytes}")
            if self.error is not None:
                raise self.error
            buffer[:1] = b"\x01"

        return wait

    def adopt(self, region):
        pass

    def outstanding(self):
        return ""

    def close(self):
        pass


@pytest.mark.parametrize("offset, length", [(0, PAGE), (0, 16 * PAGE), (15 * PAGE, PAGE), (PAGE, 0)])
def test_what_is_read_is_what_is_there(io, arena, file, offset, length):
    links = Links(io=io)
    slot = arena.acquire(length, "x")
    transfer = links.read(file, offset, slot)
    links.wait(transfer)
    assert bytes(slot.buffer()) == bytes(i % 251 for i in range(offset, offset + length))
    assert (links.counters.bytes_read, links.counters.num_transfers) == (length, 1)


def test_what_is_written_reads_back(io, arena, file):
    links = Links(io=io)
    slot = arena.acquire(2 * PAGE, "x")
    slot.tensor(torch.uint8, (2 * PAGE,)).fill_(77)
    links.wait(links.write(file, 3 * PAGE, slot))
    content = Path(file.path).read_bytes()
    assert content[3 * PAGE : 5 * PAGE] == bytes([77]) * (2 * PAGE)
    assert content[: 3 * PAGE] == bytes(i % 251 for i in range(3 * PAGE)), "wrote beside its range"
    assert links.counters.bytes_written == 2 * PAGE


def test_many_at_once_each_land_in_their_own_slot(io, arena, file):
    links = Links(io=io)
    slots = [arena.acquire(PAGE, "x") for _ in range(16)]
    transfers = [links.read(file, i * PAGE, slot) for i, slot in enumerate(slots)]
    for transfer in reversed(transfers):
        links.wait(transfer)
    for index, slot in enumerate(slots):
        assert bytes(slot.buffer()) == bytes(i % 251 for i in range(index * PAGE, (index + 1) * PAGE))


def test_a_sync_asks_the_kernel_and_reports_what_it_says(io, arena, file):
    links = Links(io=io)
    links.wait(links.write(file, 0, arena.acquire(PAGE, "x")))
    links.sync(file).wait()
    ends = os.pipe()  # has nothing to sync
    with pytest.raises(StorageError) as raised:
        links.sync(OpenFile("pipe", ends[1], False)).wait()
    assert (raised.value.path, raised.value.errno) == ("pipe", errno.EINVAL)
    for end in ends:
        os.close(end)


def test_waiting_twice_is_waiting_once(io, arena, file):
    transfer = Links(io=io).read(file, 0, arena.acquire(PAGE, "x"))
    transfer.wait()
    transfer.wait()


def test_a_short_file_is_an_error_with_its_evidence_and_stays_one(io, arena, file):
    transfer = Links(io=io).read(file, 15 * PAGE, arena.acquire(2 * PAGE, "x"))
    for _ in range(2):
        with pytest.raises(StorageError) as raised:
            transfer.wait()
        error = raised.value
        assert (error.path, error.offset, error.wanted, error.done) == (file.path, 15 * PAGE, 2 * PAGE, PAGE)


def test_a_bad_descriptor_is_an_error_with_its_number(io, arena, file):
    fd = os.open(file.path, os.O_RDONLY)
    transfer = Links(io=io).write(OpenFile(file.path, fd, False), 0, arena.acquire(PAGE, "x"))
    with pytest.raises(StorageError) as raised:  # not opened for writing (root may reopen: then it is written)
        transfer.wait()
        raise StorageError("written through a reopened descriptor", path=file.path, errno=errno.EBADF)
    assert raised.value.path == file.path
    os.close(fd)


def test_a_transfer_holds_its_memory_until_it_is_waited_for(io, arena, file):
    transfer = Links(io=io).read(file, 0, arena.acquire(PAGE, "x"))
    assert arena.held_bytes() == PAGE
    transfer.wait()
    assert arena.held_bytes() == 0


def test_a_failed_transfer_gives_its_memory_back(io, arena, file):
    transfer = Links(io=io).read(file, 16 * PAGE, arena.acquire(PAGE, "x"))
    with contextlib.suppress(StorageError):
        transfer.wait()
    del transfer
    gc.collect()  # of the error's frames, a circle
    assert arena.held_bytes() == 0


class Clinging(ThreadPoolExecutor):
    """Its threads hold on to what they were called with after the result is known, until they are told to let go."""

    def __init__(self):
        super().__init__(8)
        self.let_go = threading.Event()
        self.num_calls = 0

    def submit(self, function, /, *args):
        self.num_calls += 1
        known = Future()

        def run():
            try:
                known.set_result(function(*args))
            except BaseException as error:
                known.set_exception(error)
                self.let_go.wait()
                raise
            self.let_go.wait()

        super().submit(run)
        return known


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("place", ["aiofiles", "started late", "a copy"])
def test_a_thread_that_lets_go_late_holds_no_memory(arena, file, place, fails):
    io, clinging = AiofilesIO(), Clinging()
    links = Links(io=io, delay_seconds=1e-6)
    if place == "aiofiles":
        io._loop.set_default_executor(clinging)
    elif place == "started late":
        links._delayer = clinging
    else:
        links._copier = clinging
    if place == "a copy":
        slots = arena.acquire(PAGE, "from"), arena.acquire(PAGE, "to")
        transfer = links.copy(*slots, check=broken if fails else None)
        del slots
    else:
        transfer = links.read(file, (16 if fails else 15) * PAGE, arena.acquire(PAGE, "to"))
    try:
        with pytest.raises(StorageError) if fails else contextlib.nullcontext():
            transfer.wait()
        del transfer
        gc.collect()
        assert arena.held_bytes() == 0 and clinging.num_calls
    finally:
        clinging.let_go.set()
    links.close()


def broken():
    raise StorageError("broken", path="p")


def test_a_full_drive_has_a_class_of_its_own():
    for number, kind in [(errno.ENOSPC, StorageFull), (errno.EDQUOT, StorageFull), (errno.EIO, StorageError)]:
        error = storage_error("write failed", path="/p", offset=1, wanted=2, done=0, errno=number)
        assert type(error) is kind
        assert "/p" in str(error) and errno.errorcode[number] in str(error) and "0 of 2 bytes" in str(error)


def test_a_timeout_leaves_the_transfer_under_way_and_its_memory_held(arena, file):
    io = StuckIO()
    transfer = Links(io=io).read(file, 5, arena.acquire(PAGE, "x"))
    for _ in range(2):
        with pytest.raises(StorageTimeout, match="outstanding: read at 5"):
            transfer.wait(0.01)
    assert arena.held_bytes() == PAGE
    io.go.set()
    transfer.wait()
    gc.collect()
    assert io.started == 1


def test_a_timeout_of_a_real_back_end_says_what_was_outstanding(io, arena, disk_folder):
    path = disk_folder / "fifo"
    os.mkfifo(path)
    fd = os.open(path, os.O_RDWR)
    links = Links(io=io)
    try:
        try:
            transfer = links.read(OpenFile(str(path), fd, False), 0, arena.acquire(PAGE, "x"))
            with pytest.raises(StorageTimeout, match="fifo"):
                transfer.wait(0.05)
        except StorageError:
            pytest.skip("this back end does not take a pipe")
    finally:
        os.write(fd, bytes(2 * PAGE))  # lets it go
        os.close(fd)


def test_links_whose_drive_hangs_are_closed_in_bounded_time_and_say_so(arena, disk_folder, monkeypatch):
    core = native_core()
    if core is None or not core.io_uring_available()[0]:
        pytest.skip("threads do not read a pipe")
    monkeypatch.setattr("offload_rt.transfers.file_io.WAIT_SECONDS", 0.3)
    path = disk_folder / "fifo"
    os.mkfifo(path)
    fd = os.open(path, os.O_RDWR)
    links = Links(io=file_io("io_uring"))
    transfer = links.read(OpenFile(str(path), fd, False), 0, arena.acquire(PAGE, "x"))
    with pytest.raises(StorageTimeout, match="fifo: not closed"):
        links.close()
    assert links.is_stuck and not transfer.was_waited_for
    os.write(fd, bytes(2 * PAGE))  # lets it go
    while "fifo" in links.io.outstanding():
        time.sleep(0.001)
    links.close()
    os.close(fd)


def test_an_error_of_the_back_end_reaches_whoever_waits(arena, file):
    io = StuckIO()
    io.error = StorageError("gone", path="/p", errno=errno.EIO)
    transfer = Links(io=io).read(file, 0, arena.acquire(PAGE, "x"))
    io.go.set()
    for _ in range(2):
        with pytest.raises(StorageError, match="gone"):
            transfer.wait()


def test_a_copy_waits_for_the_read_it_follows(arena, file):
    io = StuckIO()
    links = Links(io=io)
    source, target = arena.acquire(PAGE, "s"), arena.acquire(PAGE, "t")
    target.tensor(torch.uint8, (PAGE,)).zero_()
    read = links.read(file, 0, source)
    copy = links.copy(source, target, after=read)
    with pytest.raises(StorageTimeout):
        copy.wait(0.02)
    assert target.buffer()[0] == 0
    io.go.set()
    links.wait(copy)
    assert target.buffer()[0] == 1
    assert links.counters.bytes_copied == PAGE
    links.close()


def test_a_failed_read_fails_the_copy_that_follows_it(arena, file):
    io = StuckIO()
    io.error = StorageError("gone", path="/p", errno=errno.EIO)
    io.go.set()
    links = Links(io=io)
    source, target = arena.acquire(PAGE, "s"), arena.acquire(PAGE, "t")
    copy = links.copy(source, target, after=links.read(file, 0, source))
    for _ in range(2):
        with pytest.raises(StorageError, match="gone"):
            copy.wait()
    links.close()


def test_copies_of_different_sizes_are_refused(arena):
    links = Links(io=StuckIO())
    with pytest.raises(ValueError, match="4096 bytes into 8192"):
        links.copy(arena.acquire(PAGE, "s"), arena.acquire(2 * PAGE, "t"))
    links.close()


def test_a_finished_copy_holds_no_lease(arena):
    links = Links(io=StuckIO())
    copy = links.copy(arena.acquire(PAGE, "s"), arena.acquire(PAGE, "t"))
    links.wait(copy)
    assert arena.held_bytes() == 0
    links.close()


def test_delays_change_nothing_but_the_time(io, arena, file):
    links = Links(io=io, delay_seconds=0.01, seed=3)
    slots = [arena.acquire(PAGE, "x") for _ in range(8)]
    copies = []
    for index, slot in enumerate(slots[:4]):
        read = links.read(file, index * PAGE, slot)
        copies.append(links.copy(slot, slots[4 + index], after=read))
    for copy in copies:
        links.wait(copy)
    for index in range(4):
        assert bytes(slots[4 + index].buffer()) == bytes(i % 251 for i in range(index * PAGE, (index + 1) * PAGE))
    assert links.counters.stall_seconds > 0
    links.close()


@pytest.fixture
def held_back():
    """Links in the stress mode, whose delay lasts until the event is set."""
    links, delay = Links(io=AiofilesIO(), delay_seconds=1.0), threading.Event()
    links._sleep = delay.wait
    yield links, delay
    delay.set()
    links.close()


def test_a_use_that_does_not_wait_meets_poison_when_delayed(held_back, file):
    """The stress mode does what it is for: without a wait, the bytes are not there yet."""
    links, delay = held_back
    slot = Arena("a", PAGE, poison=True).acquire(PAGE, "x")
    transfer = links.read(file, 0, slot)
    assert links.io.outstanding() == "nothing"
    assert slot.tensor(torch.float32, (4,)).isnan().all()
    delay.set()
    links.wait(transfer)
    assert not slot.tensor(torch.float32, (4,)).isnan().any()


def test_a_timeout_while_delayed_is_a_timeout_like_any_other(held_back, arena, file):
    links, delay = held_back
    transfer = links.read(file, 0, arena.acquire(PAGE, "x"))
    with pytest.raises(StorageTimeout, match="not begun"):
        transfer.wait(0.01)
    assert arena.held_bytes() == PAGE, "its memory was given back while the read was still to come"
    delay.set()
    transfer.wait()


def test_closing_waits_for_what_is_under_way(io, arena, file):
    links = Links(io=io)
    slots = [arena.acquire(PAGE, "x") for _ in range(8)]
    transfers = [links.write(file, i * PAGE, slot) for i, slot in enumerate(slots)]
    for slot in slots:
        slot.buffer()[:1] = b"\x00"
    links.close()
    del transfers
    links.io.close()  # twice is once


def test_joined_transfers_have_arrived_when_all_have(io, arena, file):
    links = Links(io=io)
    slot = arena.acquire(4 * PAGE, "x")
    reads = [links.read(file, (3 - i) * PAGE, slot.part(i * PAGE, PAGE)) for i in range(4)]
    joined = links.join("four", reads)
    links.wait(joined)
    joined.wait()
    expected = b"".join(Path(file.path).read_bytes()[(3 - i) * PAGE : (4 - i) * PAGE] for i in range(4))
    assert bytes(slot.buffer()) == expected
    assert joined.num_bytes == 4 * PAGE


def test_a_failed_part_is_told_when_no_other_is_under_way(io, arena, file):
    stuck = StuckIO()
    slow = Links(io=stuck).read(file, 0, arena.acquire(PAGE, "slow"))
    links = Links(io=io)
    bad = links.read(file, 16 * PAGE, arena.acquire(PAGE, "bad"))
    joined = links.join("both", [bad, slow])
    with pytest.raises(StorageTimeout):
        joined.wait(0.05)  # the error waits: the other end is still written to
    stuck.go.set()
    for _ in range(2):
        with pytest.raises(StorageError, match="data"):
            joined.wait()


class Part:
    """A transfer that has arrived, and how long it was allowed to take."""

    moves = "a part"
    num_bytes = 1
    operation = None
    legs = ()
    allowed = None

    def wait(self, timeout_seconds):
        self.allowed = timeout_seconds


def test_a_stop_while_one_part_is_waited_for_is_not_held_against_the_next(file, arena):
    """Or a slow drive: what arrives shows that nothing is stuck."""
    links = Links(io=StuckIO())
    parts = [Part(), Part(), Part()]
    joined = links.join("three", parts)
    joined.wait(7.0)
    assert [part.allowed for part in parts] == [7.0, 7.0, 7.0]
    stuck = links.read(file, 0, arena.acquire(PAGE, "x"))
    last = Part()
    with pytest.raises(StorageTimeout):
        links.join("stuck", [Part(), stuck, last]).wait(0.02)
    assert last.allowed is None
    links.close()


def test_who_waits_for_a_joined_transfer_is_ordered_after_all_its_parts(io, arena, file):
    recorder = Recorder()
    links = Links(io=io, recorder=recorder)
    slot = arena.acquire(2 * PAGE, "x")
    joined = links.join("two", [links.read(file, 0, slot.part(0, PAGE)), links.read(file, 0, slot.part(PAGE, PAGE))])
    links.wait(joined)
    recorder.use("afterwards", reads=[slot.range])
    assert recorder.check() == []
    late = links.join("two", [links.read(file, 0, slot.part(0, PAGE)), links.read(file, 0, slot.part(PAGE, PAGE))])
    recorder.use("too early", reads=[slot.range])
    assert len(recorder.check()) == 2
    links.wait(late)


def test_no_thread_is_left_behind(file, arena):
    before = threading.active_count()
    links = Links(io=AiofilesIO(), delay_seconds=0.001)
    links.wait(links.read(file, 0, arena.acquire(PAGE, "x")))
    links.wait(links.copy(arena.acquire(PAGE, "s"), arena.acquire(PAGE, "t")))
    links.close()
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before
