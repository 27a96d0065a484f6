"""File I/O under the transfers: registered memory fires and changes nothing, and every refusal leaves it working."""

import asyncio
import errno
import gc
import os
import resource
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from offload_rt.errors import StorageError
from offload_rt.memory.arena import Arena, Region
from offload_rt.native import native_core
from offload_rt.transfers.file_io import AiofilesIO, OpenFile, RingIO, file_io, open_file
from offload_rt.transfers.links import Links
from tests.conftest import open_descriptors
from tests.waiting import Waiting

PAGE = 4096
NUM_BYTES = 300 * PAGE


def needs_io_uring():
    core = native_core()
    if core is None:
        pytest.skip("the native extension is not built")
    if not core.io_uring_available()[0]:
        pytest.skip(f"no io_uring here: {core.io_uring_available()[1]}")
    return core


@pytest.fixture
def file(disk_folder):
    path = disk_folder / "data"
    path.write_bytes(bytes(i % 251 for i in range(NUM_BYTES)))
    try:
        file = OpenFile(str(path), os.open(path, os.O_RDWR | os.O_DIRECT), True)
    except OSError:
        file = OpenFile(str(path), os.open(path, os.O_RDWR), False)
    yield file
    os.close(file.fd)


def read_twice(io, file):
    """The file's bytes by two reads into one arena, and the ring's counters."""
    links = Links(io=io)
    slot = Arena("a", NUM_BYTES).acquire(NUM_BYTES, "x")
    for _ in range(2):
        links.wait(links.read(file, 0, slot))
    content = bytes(slot.buffer())
    counters = io.counters()
    del slot
    links.close()
    return content, counters


class Remembering(ThreadPoolExecutor):
    """Threads that never forget what they were given: the latest that a thread can be."""

    def __init__(self):
        super().__init__(1)
        self.given = []

    def submit(self, *call, **arguments):
        self.given.append((call, arguments))
        return super().submit(*call, **arguments)


@pytest.mark.parametrize("kind", ["read", "write"])
def test_threads_that_are_late_to_forget_an_operation_hold_no_memory(kind, file):
    io, arena = AiofilesIO(), Arena("a", PAGE)
    remembering = Remembering()
    io._loop.set_default_executor(remembering)
    links = Links(io=io, delay_seconds=0.001)
    links._delayer = Remembering()
    links.wait(getattr(links, kind)(file, 0, arena.acquire(PAGE, "x")))
    assert arena.held_bytes() == 0
    assert len(remembering.given) > 1 and len(links._delayer.given) == 1
    links.close()


def test_closing_waits_for_what_is_under_way_though_no_thread_has_begun_with_it(file, monkeypatch):
    """A machine may be slow to run a thread that was started."""
    may_run, run = threading.Event(), asyncio.BaseEventLoop.run_forever

    def late(loop):
        may_run.wait()
        run(loop)

    monkeypatch.setattr(asyncio.BaseEventLoop, "run_forever", late)
    io = AiofilesIO()
    io.start("write", file, 0, memoryview(bytes([7]) * PAGE))
    closing = Waiting(io.close)
    assert closing.still()
    may_run.set()
    closing.result()
    assert Path(file.path).read_bytes()[:PAGE] == bytes([7]) * PAGE and not io._thread.is_alive()


def test_registered_memory_is_used_and_reads_the_same(file):
    core = needs_io_uring()
    registered, used = read_twice(RingIO(core, register=True), file)
    plain, unused = read_twice(RingIO(core, register=False), file)
    assert registered == plain == Path(file.path).read_bytes()
    assert used["fixed_memory_requests"] == used["requests"] == unused["requests"] > 0
    assert unused["fixed_memory_requests"] == 0


def test_registration_is_switched_off_by_the_environment(monkeypatch):
    core = needs_io_uring()
    for value, refusal in [("0", "switched off"), ("1", "")]:
        monkeypatch.setenv("OFFLOAD_RT_IO_REGISTER", value)
        io = RingIO(core)
        assert io.refusal == refusal
        io.close()


def test_threads_serve_unregistered_and_say_so(file):
    if native_core() is None:
        pytest.skip("the native extension is not built")
    io = RingIO(native_core(), "threads")
    assert "io_uring only" in io.refusal
    content, counters = read_twice(io, file)
    assert content == Path(file.path).read_bytes()
    assert counters["fixed_memory_requests"] == 0


def test_the_memory_of_an_arena_is_forgotten_with_it(file):
    """More arenas than the kernel's table has places, one after the other: each finds a place."""
    io = RingIO(needs_io_uring(), register=True)
    links = Links(io=io)
    for _ in range(1100):
        slot = Arena("a", PAGE).acquire(PAGE, "x")
        links.wait(links.read(file, 0, slot))
        del slot
    assert io.refusal == ""
    assert io.counters()["fixed_memory_requests"] == 1100
    links.close()


def test_the_memory_of_an_arena_that_is_collected_as_garbage_is_forgotten_too(file):
    """As that is which an error's traceback holds. Its address is the next one's, who could not be registered."""
    io = RingIO(needs_io_uring(), register=True)
    links = Links(io=io)
    for _ in range(3):
        slot = Arena("a", PAGE).acquire(PAGE, "x")
        links.wait(links.read(file, 0, slot))
        address, circle = slot.region.address, [slot]
        circle.append(circle)
        del slot, circle
        gc.collect()
        with pytest.raises(ValueError, match="not registered"):
            io._ring.forget_memory(address)
    links.close()


def test_memory_is_still_mapped_when_it_is_to_be_forgotten():
    """Afterwards its address may be another arena's."""
    seen = []

    def look(address):
        maps = Path("/proc/self/maps").read_text().splitlines()
        ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in maps]
        seen.append(any(begin <= address < end for begin, end in ranges))

    arena = Arena("a", PAGE)
    arena.region.before_unmap.append(look)
    slot = arena.acquire(PAGE, "x")
    del arena
    assert seen == [], "a lease sees the memory still"
    del slot
    assert seen == [True]


def test_a_ring_may_go_before_the_arenas_that_it_knew(file):
    links = Links(io=RingIO(needs_io_uring(), register=True))
    arena = Arena("a", PAGE)
    links.wait(links.read(file, 0, arena.acquire(PAGE, "x")))
    links.close()
    del links
    assert len(arena.region.before_unmap) == 1
    del arena


LEFT_OPEN = """
import os, sys
from offload_rt.memory.arena import Arena
from offload_rt.transfers.file_io import OpenFile, RingIO
from offload_rt.native import native_core
from offload_rt.transfers.links import Links
links = Links(io=RingIO(native_core(), "io_uring", register=True))
arena = Arena("a", 4096)
links.wait(links.read(OpenFile("data", int(sys.argv[1]), False), 0, arena.acquire(4096, "x")))
import offload_rt.errors
offload_rt.errors.kept = arena  # outlives the modules that it would need
"""


def run_child(code, file, *arguments):
    return subprocess.run(
        [sys.executable, "-c", code, str(file.fd), *arguments],
        capture_output=True, text=True, pass_fds=[file.fd],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )  # fmt: skip


def test_what_is_left_open_at_the_end_of_a_process_is_no_noise(file):
    needs_io_uring()
    done = run_child(LEFT_OPEN, file)
    assert (done.returncode, done.stderr) == (0, "")


ORDINARY_USER = """
import os, resource, sys
from offload_rt.memory.arena import Arena
from offload_rt.transfers.file_io import OpenFile, RingIO
from offload_rt.native import native_core
from offload_rt.transfers.links import Links
fd, direct, num_bytes = int(sys.argv[1]), sys.argv[2] == "True", int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 16, 1 << 16))
if os.geteuid() == 0:
    os.setresuid(65534, 65534, 65534)
links = Links(io=RingIO(native_core(), "io_uring", register=True))
slot = Arena("a", num_bytes).acquire(num_bytes, "x")
links.wait(links.read(OpenFile("data", fd, direct), 0, slot))
print("ENOMEM" in links.io.refusal, links.io.counters()["fixed_memory_requests"], sum(slot.buffer()))
links.close()
"""


def test_an_ordinary_user_reads_without_registration_beyond_the_limit(file):
    """RLIMIT_MEMLOCK counts registered memory for ordinary users, and not for root."""
    needs_io_uring()
    done = run_child(ORDINARY_USER, file, str(file.direct), str(NUM_BYTES))
    assert done.stdout.split() == ["True", "0", str(sum(Path(file.path).read_bytes()))], done.stderr


@pytest.mark.parametrize("backend", ["io_uring", "threads", "aiofiles"])
def test_what_went_through_the_page_cache_is_dropped_from_it(backend, file, monkeypatch):
    if backend == "io_uring":
        needs_io_uring()
    elif backend == "threads" and native_core() is None:
        pytest.skip("the native extension is not built")
    dropped = []
    monkeypatch.setattr(
        os, "posix_fadvise", lambda fd, offset, length, advice: dropped.append((offset, length, advice))
    )
    links = Links(io=file_io(backend))
    fd = os.open(file.path, os.O_RDWR)
    slot = Arena("a", 2 * PAGE).acquire(2 * PAGE, "x")
    links.wait(links.read(OpenFile(file.path, fd, False), PAGE, slot))
    links.wait(links.write(OpenFile(file.path, fd, False), PAGE, slot))
    assert dropped == [(PAGE, 2 * PAGE, os.POSIX_FADV_DONTNEED)] * 2
    if backend != "aiofiles" and file.direct:
        links.wait(links.read(file, 0, slot))
        assert len(dropped) == 2, "there was nothing in the page cache"
    links.close()
    os.close(fd)


def no_flag(monkeypatch):
    """A file system that does not know O_DIRECT."""
    plain = os.open

    def open_(path, flags, *mode):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "refused")
        return plain(path, flags, *mode)

    monkeypatch.setattr(os, "open", open_)


def no_transfer(monkeypatch):
    """One that takes the flag and refuses the first transfer."""

    def refused(*arguments):
        raise OSError(errno.EINVAL, "refused")

    monkeypatch.setattr(os, "pwrite", refused)
    monkeypatch.setattr(os, "preadv", refused)


@pytest.mark.parametrize("refuse", [no_flag, no_transfer])
@pytest.mark.parametrize("backend", ["auto", "aiofiles"])
def test_where_direct_io_is_refused_the_page_cache_serves(refuse, backend, disk_folder, monkeypatch):
    before = len(open_descriptors())
    with monkeypatch.context() as patch:
        refuse(patch)
        files = [open_file(disk_folder / "data", writable=True), open_file(disk_folder / "data", writable=False)]
    assert [file.direct for file in files] == [False, False]
    assert len(os.listdir("/proc/self/fd")) == before + 2, "the refused descriptor was left open"
    links = Links(io=file_io(backend))
    slots = [Arena("a", PAGE).acquire(PAGE, "x") for _ in range(2)]
    slots[0].buffer()[:] = bytes(range(256)) * 16
    links.wait(links.write(files[0], PAGE, slots[0]))
    links.wait(links.read(files[1], PAGE, slots[1]))
    assert slots[1].buffer() == slots[0].buffer()
    links.close()
    for file in files:
        file.close()


def test_a_file_is_opened_past_the_page_cache_and_left_as_it_was(disk_folder):
    path = disk_folder / "data"
    made = open_file(path, writable=True)
    assert path.stat().st_size == 0
    path.write_bytes(b"content")
    again, read = open_file(path, writable=True), open_file(path, writable=False)
    assert path.read_bytes() == b"content"
    assert len({file.direct for file in (made, again, read)}) == 1
    for file in (made, again, read):
        file.close()


def test_what_cannot_be_opened_is_no_matter_of_direct_io(tmp_path):
    with pytest.raises(FileNotFoundError):
        open_file(tmp_path / "missing", writable=False)
    with pytest.raises(IsADirectoryError):
        open_file(tmp_path, writable=True)


def test_tuning_sets_the_length_of_requests(file):
    io = RingIO(needs_io_uring(), register=False)
    io.tune(file, 2, 16 * PAGE)
    content, counters = read_twice(io, file)
    assert content == Path(file.path).read_bytes()
    assert counters["requests"] == 2 * -(-NUM_BYTES // (16 * PAGE))
    assert counters["max_in_flight"] == 2


def test_a_region_is_private_and_page_aligned():
    region = Region(3 * PAGE)
    assert region.address % PAGE == 0
    assert len(region) == 3 * PAGE
    assert len(Region(0)) == resource.getpagesize()


def test_aiofiles_takes_what_only_the_ring_uses(file):
    io = AiofilesIO()
    io.adopt(Region(PAGE))
    io.tune(file, 1, PAGE)
    io.close()


class Interrupted:
    """A ring whose first wait ends, and Ctrl-C comes before anybody knows it."""

    def __init__(self, ring):
        self.ring, self.num_waits = ring, 0

    def __getattr__(self, name):
        return getattr(self.ring, name)

    def wait(self, *arguments):
        self.num_waits += 1
        try:
            self.ring.wait(*arguments)
        finally:
            if self.num_waits == 1:
                raise KeyboardInterrupt


@pytest.mark.parametrize("past_the_end", [False, True], ids=["a read", "a read that fails"])
def test_what_an_interrupted_wait_has_ended_can_be_waited_for_and_ends_as_it_did(past_the_end, file):
    core = native_core()
    if core is None:
        pytest.skip("the native extension is not built")
    links = Links(io=RingIO(core))
    ring = links.io._ring = Interrupted(links.io._ring)
    slot = Arena("a", NUM_BYTES).acquire(NUM_BYTES, "x")
    transfer = links.read(file, PAGE if past_the_end else 0, slot)
    with pytest.raises(KeyboardInterrupt):
        transfer.wait()
    for _ in range(2):
        if past_the_end:
            with pytest.raises(StorageError, match="end of file|read failed"):
                transfer.wait()
        else:
            transfer.wait()
    assert ring.num_waits == 2 and transfer.was_waited_for
    assert past_the_end or bytes(slot.buffer()) == Path(file.path).read_bytes()
    del slot, transfer
    links.close()
