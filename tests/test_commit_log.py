"""The commit log: two slots an extent, all changes real at once, and never a different number.

m  [ 7 ]*[ 6 ]   --write-->   [ 7 ]*[ 8 ]   --commit-->   [ 7 ] [ 8 ]*      * is what a kill leaves
"""

import pytest

from offload_rt.checksum import crc32c
from offload_rt.config import NvmePath
from offload_rt.errors import ConfigError
from offload_rt.memory.arena import Arena
from offload_rt.native import native_core
from offload_rt.storage.commit_layout import BUFFER_BYTES, LOG_BUFFER_BYTES, make_log
from offload_rt.storage.commit_log import CommitLog
from offload_rt.storage.commit_record import Record, RecordInvalid, body_bytes
from offload_rt.transfers.file_io import file_io
from offload_rt.transfers.links import Links
from offload_rt.transfers.recording import Recorder
from tests.tiny_logs import PAGE, SIZES, content, holds, make, read, write
from tests.tiny_logs import arena as arena
from tests.tiny_logs import folders as folders
from tests.tiny_logs import links as links


@pytest.fixture(params=["io_uring", "threads", "aiofiles"])
def every_io(request):
    if request.param != "aiofiles" and native_core() is None:
        pytest.skip("the native extension is not built")
    if request.param == "io_uring" and not native_core().io_uring_available()[0]:
        pytest.skip("no io_uring here")
    links = Links(io=file_io(request.param), recorder=Recorder())
    yield links
    links.close()


def test_what_is_committed_is_there_when_it_opens_again(every_io, folders, arena):
    log = make(folders, every_io)
    assert (log.committed.step, log.committed.payload, log.committed.sequence) == (0, b"", 0)
    assert all(not any(read(log, arena, name)) for name in SIZES), "a new log is zero"
    for step in range(1, 4):
        for name in SIZES:
            write(log, arena, name, step)
        log.commit(step, f"step {step}".encode())
    log.close()
    log = CommitLog(folders[::-1], every_io)  # in any order
    assert (log.committed.step, log.committed.payload, log.committed.sequence) == (3, b"step 3", 3)
    assert log.ignored is None
    assert holds(log, arena, dict.fromkeys(SIZES, 3))
    log.close()
    assert every_io.recorder.check() == []


def test_what_is_not_committed_is_read_until_it_is_dropped(every_io, folders, arena):
    log = make(folders, every_io)
    for name in SIZES:
        write(log, arena, name, 1)
    log.commit(1)
    write(log, arena, "a", 2)
    write(log, arena, "c", 2)
    assert log.dirty == ["a", "c"]
    assert holds(log, arena, {"a": 2, "b": 1, "c": 2})
    assert read(log, arena, "c", committed=True) == content("c", 1)[: SIZES["c"]]
    log.drop()
    assert log.dirty == []
    assert holds(log, arena, dict.fromkeys(SIZES, 1))
    write(log, arena, "a", 3)
    log.close()  # nothing is committed by closing
    log = CommitLog(folders, every_io)
    assert log.committed.step == 1 and holds(log, arena, dict.fromkeys(SIZES, 1))
    log.close()


def test_a_step_is_done_again_over_the_first_try(every_io, folders, arena):
    log = make(folders, every_io)
    for value in (1, 2, 3):  # without a drop, and without waiting for the try before
        write(log, arena, "c", value)
    assert holds(log, arena, {"c": 3})
    log.commit(1)
    assert holds(log, arena, {"c": 3})
    log.close()


def test_a_write_waits_for_reads_of_the_slot_that_a_commit_set_free(folders, arena, links):
    """The read began before the commit; its slot is the free one after it."""
    log = make(folders, links)
    write(log, arena, "a", 1)
    log.commit(1)
    order = []
    start = links.io.start

    def watched(kind, file, offset, buffer):
        order.append(("start", kind))
        start(kind, file, offset, buffer)
        return lambda seconds: order.append(("wait", kind))

    links.io.start = watched
    late = log.read("a", arena.acquire(PAGE, "a"))
    write(log, arena, "a", 2)
    log.commit(2)
    order.clear()
    write(log, arena, "a", 3)
    assert order == [("wait", "read"), ("start", "write")]
    late.wait()
    log.close()


def test_in_a_steady_step_neither_reads_nor_writes_block(folders, arena, links):
    """Reads ahead, writes behind, one commit a step: what an optimizer beside the backward pass does."""
    log = make(folders, links)
    waits = []
    start = links.io.start

    def watched(kind, file, offset, buffer):
        start(kind, file, offset, buffer)
        return lambda seconds: waits.append(kind)

    links.io.start = watched
    for step in range(1, 4):
        waits.clear()
        slots = {name: arena.acquire(SIZES[name], name) for name in SIZES}
        reads = [log.read(name, slot) for name, slot in slots.items()]
        assert waits == []
        for read_ahead in reads:
            links.wait(read_ahead)
        assert waits == ["read"] * 3
        for name, slot in slots.items():
            log.write(name, slot)  # not waited for: the commit does
        assert waits == ["read"] * 3
        log.commit(step)
        assert waits == ["read"] * 3 + ["write"] * 4 + ["sync"] * 2 + ["write", "sync"]
        del slots, slot
    log.close()


def test_transfers_hold_their_memory_until_they_are_waited_for(every_io, folders, arena):
    log = make(folders, every_io)
    transfer = write(log, arena, "c", 1)
    assert arena.held_bytes() == SIZES["c"]
    transfer.wait()
    log.commit(1)
    reading = log.read("c", arena.acquire(SIZES["c"], "c"))
    assert arena.held_bytes() == SIZES["c"]
    reading.wait()
    assert arena.held_bytes() == 0
    log.close()


def test_late_transfers_change_nothing(folders, arena):
    """Every operation starts late by a random time: what does not wait meets poison or an old slot."""
    links = Links(delay_seconds=0.002, seed=5)
    log = make(folders, links)
    for step in range(1, 6):
        for name in SIZES:
            write(log, arena, name, 50 + step)
        log.drop()
        for name in SIZES:
            write(log, arena, name, step)
        log.commit(step)
        assert holds(log, arena, dict.fromkeys(SIZES, step))
    log.close()
    links.close()


def test_extents_are_optional_and_payloads_go_up_to_their_room(disk_folder, links):
    folder = disk_folder / "log"
    make_log([NvmePath(path=folder)], [], links, payload_bytes=PAGE)
    log = CommitLog([folder], links)
    log.commit(1, b"x" * PAGE)
    with pytest.raises(ConfigError, match="4097 bytes; this log was made for 4096"):
        log.commit(2, b"x" * (PAGE + 1))
    log.commit(2, b"")
    log.commit(3, b"y" * (PAGE - 1))
    log.close()
    log = CommitLog([folder], links)
    assert log.committed.payload == b"y" * (PAGE - 1)
    log.close()


@pytest.mark.parametrize("beyond", [-BUFFER_BYTES, -1, 0, 1, PAGE, BUFFER_BYTES - 1, 2 * BUFFER_BYTES + 5])
def test_a_commit_of_any_size_goes_through_one_small_buffer(beyond, folders, links):
    """Part by part, the last of them in whole pages; and as one piece through memory of that size, the same bytes."""
    payload = bytes(number % 251 for number in range(BUFFER_BYTES + beyond))
    log = make(folders, links)
    log.commit(1, payload)
    assert log._arena.num_bytes == LOG_BUFFER_BYTES and log._arena.peak_bytes <= LOG_BUFFER_BYTES
    at = log.layout.body_offset(1)
    log.close()
    log = CommitLog(folders, links, buffer=Arena("a commit log", LOG_BUFFER_BYTES, poison=True))
    assert (log.committed.step, log.committed.payload, log.ignored) == (1, payload, None)
    log.close()
    body = (folders[0] / "state.bin").read_bytes()[at:]
    end = body_bytes(len(SIZES), len(payload))
    assert body[body_bytes(len(SIZES), 0) : end] == payload and not any(body[end : -(-end // PAGE) * PAGE])


def test_a_commit_writes_what_changed_and_two_pages(folders, arena, links):
    log = make(folders, links)
    write(log, arena, "b", 1)
    before = links.counters.bytes_written
    log.commit(1, b"p")
    assert links.counters.bytes_written - before == 2 * PAGE
    log.close()


def test_the_record_is_what_its_docstring_says():
    record = Record(log_id=bytes(range(16)), sequence=5, step=4, num_extents=3, body_bytes=29, body_crc32c=7)
    page = record.pack()
    assert len(page) == PAGE and not any(page[64:])
    assert page[:16] == b"ORT-CMT1" + (3).to_bytes(4, "little") + (7).to_bytes(4, "little")
    assert page[16:32] == bytes(range(16))
    assert [int.from_bytes(page[i : i + 8], "little") for i in (32, 40, 48)] == [5, 4, 29]
    assert int.from_bytes(page[60:64], "little") == crc32c(memoryview(page[:60]))
    assert Record.unpack(page) == record
    for bit in range(64 * 8):
        damaged_page = bytearray(page)
        damaged_page[bit // 8] ^= 1 << bit % 8
        with pytest.raises(RecordInvalid):
            Record.unpack(bytes(damaged_page))
