"""The native ring as Python sees it: both back ends, every edge, ownership of buffers, and errors with evidence.

What only a broken kernel shows (short, interrupted, cancelled and refused requests) is in native/tests.
"""

import errno
import gc
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import SHARES_FIXTURES

native = pytest.importorskip("_offload_rt_native", reason="the native extension is not built")

PATIENCE_SECONDS = 60.0  # a bound on hanging, not an expectation
LENGTHS = [0, 1, 63, 64, 65, 4095, 4096, 4097, 65535, 65536, 65537, 10_000_019]
PAGE = 4096
# Where this process found the extension, its children shall too.
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


@pytest.fixture(params=["io_uring", "threads"])
def backend(request):
    available, reason = native.io_uring_available()
    if request.param == "io_uring" and not available:
        pytest.skip(f"no io_uring here: {reason}")
    return request.param


@pytest.fixture
def ring(backend):
    with native.Ring(depth=8, io_bytes=1 << 16, backend=backend) as ring:
        yield ring


@pytest.fixture
def fd(tmp_path):
    descriptor = os.open(tmp_path / "file.bin", os.O_RDWR | os.O_CREAT)
    yield descriptor
    os.close(descriptor)


def pattern(length, seed=0):
    return np.random.default_rng(seed).integers(0, 256, length, dtype=np.uint8)


def aligned(length):
    """Anonymous mappings start at a page: what O_DIRECT asks for."""
    return np.frombuffer(mmap.mmap(-1, length), dtype=np.uint8)


def open_direct(path):
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    except OSError as error:
        pytest.skip(f"no O_DIRECT on {path.parent}: {error}")


def wait_for(condition):
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.001)


# ---- it moves the bytes ----


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("offset_bytes", [0, 1, 4097])
def test_bytes_come_back_as_written(ring, fd, length, offset_bytes):
    written, read = pattern(length), bytearray(length)
    ring.wait(ring.write(fd, "file.bin", offset_bytes, written), PATIENCE_SECONDS)
    assert os.pread(fd, length, offset_bytes) == written.tobytes()  # the twin
    ring.wait(ring.read(fd, "file.bin", offset_bytes, read), PATIENCE_SECONDS)
    assert read == written.tobytes()
    counters = ring.counters()
    assert counters["bytes_read"] == counters["bytes_written"] == length
    assert counters["operations"] == 2
    assert counters["requests"] == 2 * -(-length // (1 << 16))
    assert counters["resubmitted"] == 0


def test_direct_io_with_aligned_slots(ring, tmp_path):
    fd = open_direct(tmp_path / "direct.bin")
    arena = aligned(64 * PAGE)
    written, read = arena[: 32 * PAGE], arena[32 * PAGE :]
    written[:] = pattern(32 * PAGE)
    ring.wait(ring.write(fd, "direct.bin", 3 * PAGE, written), PATIENCE_SECONDS)
    ring.wait(ring.read(fd, "direct.bin", 3 * PAGE, read), PATIENCE_SECONDS)
    os.close(fd)
    np.testing.assert_array_equal(read, written)


def test_direct_io_into_an_unaligned_buffer_is_an_error_or_right(ring, tmp_path):
    """Most file systems refuse it; the ring neither hides that nor repairs it."""
    (tmp_path / "direct.bin").write_bytes(pattern(PAGE).tobytes())
    fd = open_direct(tmp_path / "direct.bin")
    slot = aligned(2 * PAGE)[1 : PAGE + 1]
    try:
        ring.wait(ring.read(fd, "direct.bin", 0, slot), PATIENCE_SECONDS)
        np.testing.assert_array_equal(slot, pattern(PAGE))
    except native.NativeStorageError as error:
        assert error.errno == errno.EINVAL
    finally:
        os.close(fd)


def test_many_operations_outstanding_and_waited_for_in_another_order(ring, fd):
    length, num_operations = 100_001, 200
    chunks = [pattern(length, seed) for seed in range(num_operations)]
    writes = [ring.write(fd, "file.bin", i * length, chunk) for i, chunk in enumerate(chunks)]
    for ticket in reversed(writes):
        ring.wait(ticket, PATIENCE_SECONDS)
    targets = [bytearray(length) for _ in chunks]
    reads = [ring.read(fd, "file.bin", i * length, target) for i, target in enumerate(targets)]
    for i in np.random.default_rng(0).permutation(num_operations):
        ring.wait(reads[i], PATIENCE_SECONDS)
        assert targets[i] == chunks[i].tobytes()
    assert ring.outstanding() == ""
    assert ring.counters()["max_in_flight"] == 8


def test_threads_share_a_ring(ring, fd):
    length = 300_007
    right = []

    def work(index):
        written, read = pattern(length, index), bytearray(length)
        for _ in range(10):
            ring.wait(ring.write(fd, "file.bin", index * length, written), PATIENCE_SECONDS)
            ring.wait(ring.read(fd, "file.bin", index * length, read), PATIENCE_SECONDS)
        right.append(read == written.tobytes())

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 4


def test_operations_proceed_without_python_calling_in(ring, fd):
    ticket = ring.write(fd, "file.bin", 0, pattern(3_000_000))
    wait_for(lambda: os.fstat(fd).st_size == 3_000_000)  # asks the file, not the ring
    ring.wait(ticket, PATIENCE_SECONDS)


def test_wait_drops_the_gil(ring, fd):
    """A thread that only counts gets on while another waits; whoever has the GIL is left it for long otherwise."""
    ticks, stop = [0], threading.Event()

    def count():
        while not stop.is_set():
            ticks[0] += 1

    def gets_on():
        before = ticks[0]
        ring.wait(ring.write(fd, "file.bin", 0, data), PATIENCE_SECONDS)
        return ticks[0] > before

    data, interval = pattern(20_000_000), sys.getswitchinterval()
    thread = threading.Thread(target=count)
    thread.start()
    try:
        wait_for(lambda: ticks[0] > 0)
        sys.setswitchinterval(0.5)
        time.sleep(0.01)  # the thread may still be waiting for its turn by the old one
        assert any(gets_on() for _ in range(8)), "a write may be over before it is waited for, not all of them"
    finally:
        stop.set()
        sys.setswitchinterval(interval)
        thread.join()


@st.composite
def batches(draw):
    """Reads and writes of ranges that do not overlap."""
    at, operations = 0, []
    for _ in range(draw(st.integers(1, 8))):
        at += draw(st.integers(0, 3 * PAGE))
        length = draw(st.integers(0, 12 * PAGE))
        operations.append((draw(st.sampled_from(["read", "write"])), at, length))
        at += length
    return operations


@settings(max_examples=50, deadline=None, suppress_health_check=SHARES_FIXTURES)
@given(st.lists(batches(), min_size=1, max_size=3), st.integers(1, 9), st.integers(1, 6), st.integers(0, 20), st.data())
def test_it_does_what_pread_and_pwrite_do(backend, tmp_path, rounds, depth, io_pages, registered_pages, data):
    """The same operations, one after the other, by the system calls, on a file and memory of their own."""
    memory, expected = aligned(8 * 15 * PAGE), bytearray(8 * 15 * PAGE)
    plain_fd, fd = (os.open(tmp_path / name, os.O_RDWR | os.O_CREAT) for name in ("plain", "ring"))
    for descriptor in (plain_fd, fd):
        os.pwrite(descriptor, pattern(len(memory)).tobytes(), 0)
    with native.Ring(depth, io_pages * PAGE, backend, piece_bytes=2 * PAGE) as ring:
        if backend == "io_uring" and registered_pages:
            ring.register_memory(memory[: registered_pages * PAGE])
        for seed, operations in enumerate(rounds, start=1):
            memory[:] = pattern(len(memory), seed)
            expected[:] = memory.tobytes()
            tickets = [getattr(ring, kind)(fd, "ring", at, memory[at : at + n]) for kind, at, n in operations]
            for ticket in data.draw(st.permutations(tickets)):
                ring.wait(ticket, PATIENCE_SECONDS)
            for kind, at, length in operations:
                if kind == "write":
                    os.pwrite(plain_fd, expected[at : at + length], at)
                else:
                    expected[at : at + length] = os.pread(plain_fd, length, at)
            assert memory.tobytes() == expected
            assert os.pread(fd, len(memory), 0) == os.pread(plain_fd, len(memory), 0)
    os.close(fd)
    os.close(plain_fd)


# ---- it owns the buffers until they are waited for ----


class Tracked(bytearray):
    """A bytearray that can be weakly referenced."""


def test_a_buffer_outlives_its_callers_reference(ring, fd):
    data = pattern(5_000_000)
    os.pwrite(fd, data.tobytes(), 0)
    target = Tracked(len(data))
    alive = weakref.ref(target)
    ticket = ring.read(fd, "file.bin", 0, target)
    del target
    gc.collect()
    assert alive() is not None
    wait_for(lambda: ring.done(ticket))
    assert alive() == data.tobytes()  # finished, not waited for: still owned
    ring.wait(ticket, PATIENCE_SECONDS)
    gc.collect()
    assert alive() is None


def test_a_buffer_cannot_be_resized_in_flight(ring, fd):
    os.pwrite(fd, b"x" * 100, 0)
    target = bytearray(100)
    ticket = ring.read(fd, "file.bin", 0, target)
    with pytest.raises(BufferError):
        target.extend(b"more")
    ring.wait(ticket, PATIENCE_SECONDS)
    target.extend(b"more")


def test_a_failed_operation_gives_its_buffer_back(ring):
    target = Tracked(100)
    alive = weakref.ref(target)
    ticket = ring.read(987_654, "none", 0, target)
    del target
    with pytest.raises(native.NativeStorageError):
        ring.wait(ticket, PATIENCE_SECONDS)
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("how", ["close", "delete"])
def test_the_end_of_a_ring_gives_all_buffers_back(backend, fd, how):
    os.ftruncate(fd, 50_000_000)
    ring = native.Ring(backend=backend)
    targets = [Tracked(50_000_000) for _ in range(4)]
    alive = [weakref.ref(target) for target in targets]
    for target in targets:
        ring.read(fd, "file.bin", 0, target)
    del targets, target
    if how == "close":
        ring.close()
    else:
        del ring
    gc.collect()
    assert [reference() for reference in alive] == [None] * 4


def test_a_read_needs_a_writable_buffer(ring, fd):
    with pytest.raises(BufferError):
        ring.read(fd, "file.bin", 0, b"constant")
    with pytest.raises((BufferError, ValueError)):
        ring.read(fd, "file.bin", 0, np.zeros((4, 4), dtype=np.uint8)[:, ::2])
    assert ring.counters()["operations"] == 0


# ---- it tells what went wrong ----


def test_end_of_file_raises_with_evidence(ring, fd):
    os.pwrite(fd, b"x" * 100_000, 0)
    ticket = ring.read(fd, "weights.bin", 10_000, bytearray(200_000))
    with pytest.raises(native.NativeStorageError, match="end of file") as caught:
        ring.wait(ticket, PATIENCE_SECONDS)
    error = caught.value
    assert isinstance(error, OSError)
    assert (error.code, error.errno, error.kind) == ("end_of_file", 0, "read")
    assert (error.path, error.offset, error.wanted) == ("weights.bin", 10_000, 200_000)
    assert (error.done, error.failed_at) == (90_000, 100_000)


def test_a_closed_descriptor_raises_with_evidence(ring, tmp_path):
    fd = os.open(tmp_path / "closed.bin", os.O_RDWR | os.O_CREAT)
    os.close(fd)
    with pytest.raises(native.NativeStorageError) as caught:
        ring.wait(ring.write(fd, "closed.bin", 8192, bytes(100)), PATIENCE_SECONDS)
    assert caught.value.errno == errno.EBADF
    message = "closed.bin: write 0 of 100 bytes at offset 8192 (errno 9, EBADF, failed at offset 8192)"
    assert str(caught.value) == message


def test_a_full_disk_raises_with_evidence(ring):
    fd = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(native.NativeStorageError) as caught:
        ring.wait(ring.write(fd, "/dev/full", 0, bytes(1_000_000)), PATIENCE_SECONDS)
    os.close(fd)
    assert (caught.value.errno, caught.value.kind, caught.value.done) == (errno.ENOSPC, "write", 0)


def test_a_sync_ends_and_its_failure_has_evidence(ring, fd):
    ring.wait(ring.write(fd, "file.bin", 0, b"x" * PAGE), PATIENCE_SECONDS)
    ring.wait(ring.sync(fd, "file.bin"), PATIENCE_SECONDS)
    assert ring.counters()["requests"] == 2
    ends = os.pipe()  # has nothing to sync: the kernel was asked
    with pytest.raises(native.NativeStorageError) as raised:
        ring.wait(ring.sync(ends[1], "pipe"), PATIENCE_SECONDS)
    assert (raised.value.errno, raised.value.kind, raised.value.path) == (errno.EINVAL, "fdatasync", "pipe")
    for end in ends:
        os.close(end)


def test_a_file_size_limit_raises_after_what_still_fitted(backend, tmp_path):
    """A real short write in the middle: the kernel takes what fits below the limit, then refuses."""
    program = f"""
import os, resource, signal, _offload_rt_native as native
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
fd = os.open({str(tmp_path / "limited.bin")!r}, os.O_RDWR | os.O_CREAT)
with native.Ring(io_bytes=1 << 16, depth=1, backend={backend!r}) as ring:
    try:
        ring.wait(ring.write(fd, "limited.bin", 0, bytes(200_000)), {PATIENCE_SECONDS})
    except native.NativeStorageError as error:
        print(error.errno, error.done, error.failed_at, ring.counters()["resubmitted"])
"""
    finished = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=ENVIRONMENT
    )
    assert finished.stdout.split() == [str(errno.EFBIG), "100000", "100000", "1"]


def test_one_failure_leaves_other_operations_alone(ring, fd):
    data = pattern(1_000_000)
    good = ring.write(fd, "file.bin", 0, data)
    bad = ring.read(987_654, "none", 0, bytearray(1_000_000))
    with pytest.raises(native.NativeStorageError):
        ring.wait(bad, PATIENCE_SECONDS)
    ring.wait(good, PATIENCE_SECONDS)
    assert os.pread(fd, 1_000_000, 0) == data.tobytes()


def test_close_raises_the_failure_that_nobody_waited_for(backend):
    ring = native.Ring(backend=backend)
    ring.read(987_654, "none", 0, bytearray(10))
    with pytest.raises(native.NativeStorageError, match="EBADF"):
        ring.close()
    ring.close()


def test_an_exception_inside_the_with_block_is_not_replaced(backend):
    with pytest.raises(KeyError), native.Ring(backend=backend) as ring:
        ring.read(987_654, "none", 0, bytearray(10))
        raise KeyError


def test_mistakes_are_value_errors(ring, fd):
    ticket = ring.write(fd, "file.bin", 0, b"x")
    ring.wait(ticket, PATIENCE_SECONDS)
    for mistake in (
        lambda: ring.wait(ticket, 1.0),
        lambda: ring.done(ticket),
        lambda: ring.wait(ring.write(fd, "file.bin", 0, b"x"), -1.0),
        lambda: ring.read(fd, "file.bin", 2**63, bytearray(1)),
        lambda: native.Ring(depth=0),
        lambda: native.Ring(io_bytes=1000),
        lambda: native.Ring(backend="aio"),
    ):
        with pytest.raises(ValueError):
            mistake()
    ring.close()
    with pytest.raises(ValueError, match="closed"):
        ring.write(fd, "file.bin", 0, b"x")


# ---- every wait can time out ----


def test_a_timeout_dumps_what_is_outstanding_and_leaves_the_ticket(backend, tmp_path):
    """Four reads of a hole, 2 requests in flight: the last has not ended at once, whatever the machine."""
    path = tmp_path / "hole.bin"
    with path.open("wb") as file:
        file.truncate(64 << 20)
    fd = os.open(path, os.O_RDONLY)
    target = np.empty(64 << 20, dtype=np.uint8)
    with native.Ring(depth=2, backend=backend) as ring:
        tickets = [ring.read(fd, "hole.bin", 0, target) for _ in range(4)]
        with pytest.raises(native.NativeTimeout) as caught:
            ring.wait(tickets[-1], 0.0)
        assert isinstance(caught.value, TimeoutError)
        line = caught.value.dump.splitlines()[-1]
        assert line.startswith(f"ticket {tickets[-1]}: hole.bin: read 0 of {64 << 20} bytes at offset 0, ")
        assert line.endswith(" s old")
        assert not ring.done(tickets[-1])
        assert str(tickets[-1]) in ring.outstanding()
        for ticket in tickets:
            ring.wait(ticket, PATIENCE_SECONDS)
    os.close(fd)
    assert not target.any()


@pytest.fixture
def uring():
    available, reason = native.io_uring_available()
    if not available:
        pytest.skip(f"no io_uring here: {reason}")
    with native.Ring(backend="io_uring") as ring:
        yield ring


def test_a_read_that_hangs_times_out_and_finishes_later(uring):
    """io_uring can read an eventfd, which answers when somebody writes to it."""
    event = os.eventfd(0)
    target = bytearray(8)
    ticket = uring.read(event, "event", 0, target)
    with pytest.raises(native.NativeTimeout, match="1 requests in flight"):
        uring.wait(ticket, 0.5)
    os.eventfd_write(event, 5)
    uring.wait(ticket, PATIENCE_SECONDS)
    os.close(event)
    assert target[0] == 5


def test_a_ring_whose_drive_hangs_is_closed_later(uring):
    event, target = os.eventfd(0), bytearray(8)
    with native.Ring(backend="io_uring", patience_seconds=0.3) as ring:
        ring.read(event, "event", 0, target)
        with pytest.raises(native.NativeTimeout, match="event: read 0 of 8 bytes"):
            ring.close()
        with pytest.raises(ValueError, match="closed"):
            ring.read(event, "event", 0, target)
        os.eventfd_write(event, 5)
        while "event" in ring.outstanding():
            time.sleep(0.001)
    os.close(event)
    assert target[0] == 5


def test_a_ring_that_nobody_sees_leaves_its_memory_to_a_drive_that_hangs(uring):
    event, target = os.eventfd(0), bytearray(8)
    ring = native.Ring(backend="io_uring", patience_seconds=0.3)
    ring.read(event, "event", 0, target)
    while "1 requests in flight" not in ring.outstanding():  # what no request was made of is forgotten
        time.sleep(0.001)
    del ring
    with pytest.raises(BufferError):
        target.clear()  # somebody sees it
    os.eventfd_write(event, 5)
    while not target[0]:
        time.sleep(0.001)
    os.close(event)


@pytest.mark.parametrize("waits", ["wait", "close"])
def test_ctrl_c_interrupts_who_waits_and_leaves_the_ticket(waits, uring):
    event = os.eventfd(0)
    ticket = uring.read(event, "event", 0, bytearray(8))
    timer = threading.Timer(0.1, lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            timer.start()
            uring.wait(ticket, PATIENCE_SECONDS) if waits == "wait" else uring.close()
        timer.join()
    finally:
        signal.signal(signal.SIGINT, before)
        os.eventfd_write(event, 1)
    uring.wait(ticket, PATIENCE_SECONDS)
    os.close(event)


# ---- back ends ----


def test_the_backend_in_use_is_told():
    available, reason = native.io_uring_available()
    with native.Ring() as ring:
        assert ring.backend == ("io_uring" if available else "threads")
        assert ring.fallback_reason == reason
    with native.Ring(backend="threads") as ring:
        assert (ring.backend, ring.fallback_reason) == ("threads", "")


def test_a_forked_child_can_drop_the_ring_but_not_use_it(backend, fd):
    ring = native.Ring(backend=backend)
    ticket = ring.write(fd, "file.bin", 0, bytes(1_000_000))
    child = os.fork()
    if child == 0:
        try:
            ring.wait(ticket, 0.0)
        except ValueError:
            del ring
            os._exit(7)
        os._exit(1)
    _, how = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(how) == 7
    ring.wait(ticket, PATIENCE_SECONDS)


def test_operations_are_recorded_up_to_a_number_and_forgotten(ring, fd):
    data = pattern(3 * PAGE)
    os.pwrite(fd, data.tobytes(), 0)
    ring.wait(ring.read(fd, "before", 0, bytearray(PAGE)), PATIENCE_SECONDS)
    assert ring.records() == ([], 0)
    ring.record(2)
    begin = time.perf_counter()
    for number in range(3):
        ring.wait(ring.read(fd, f"file {number}", number * PAGE, bytearray(PAGE)), PATIENCE_SECONDS)
    found, num_left_out = ring.records()
    assert [each[:4] for each in found] == [("read", f"file {n}", n * PAGE, PAGE) for n in range(2)]
    assert num_left_out == 1
    for *_, submitted, begun, finished in found:
        assert begin <= submitted <= begun <= finished <= time.perf_counter(), "one clock"
    ring.record(2)
    ring.wait(ring.sync(fd, "file"), PATIENCE_SECONDS)
    ((found,), num_left_out) = ring.records()
    assert found[:4] == ("fdatasync", "file", 0, 0) and not num_left_out
    ring.record(0)
    ring.wait(ring.read(fd, "after", 0, bytearray(PAGE)), PATIENCE_SECONDS)
    assert ring.records() == ([], 0)
