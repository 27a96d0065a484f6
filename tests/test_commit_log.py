"""The commit log: two slots an extent, all changes real at once, and never a different number.

m  [ 7 ]*[ 6 ]   --write-->   [ 7 ]*[ 8 ]   --commit-->   [ 7 ] [ 8 ]*      * is what a kill leaves
"""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import offload_rt.commit_layout as layout_module
from offload_rt.arena import Arena
from offload_rt.checksum import crc32c
from offload_rt.commit_layout import MutableExtent, make_log, read_layout
from offload_rt.commit_log import CommitLog
from offload_rt.commit_record import Record, RecordInvalid, Version, pack_body
from offload_rt.config import NvmePath
from offload_rt.drive_files import FolderLock, close_fenced, open_fenced
from offload_rt.errors import ConfigError, StorageError, StorageFull, StorageTimeout, StoreCorrupt, StoreInUse
from offload_rt.file_io import file_io, storage_error
from offload_rt.native import native_core
from offload_rt.recording import Recorder
from offload_rt.transfer import Links
from tests.power_loss import PlainIO

PAGE = 4096
SIZES = {"a": PAGE, "b": 5 * PAGE, "c": 300 * PAGE}


def extents(num_drives=1):
    return [
        MutableExtent(name=name, length_bytes=size, drive=index % num_drives)
        for index, (name, size) in enumerate(SIZES.items())
    ]


@pytest.fixture(params=["io_uring", "threads", "aiofiles"])
def every_io(request):
    if request.param != "aiofiles" and native_core() is None:
        pytest.skip("the native extension is not built")
    if request.param == "io_uring" and not native_core().io_uring_available()[0]:
        pytest.skip("no io_uring here")
    links = Links(io=file_io(request.param), recorder=Recorder())
    yield links
    links.close()


@pytest.fixture
def links():
    links = Links(io=PlainIO())
    yield links
    links.close()


@pytest.fixture
def arena():
    return Arena("a", 4 << 20, poison=True)


@pytest.fixture
def folders(disk_folder):
    return [disk_folder / "one", disk_folder / "two"]


def make(folders, links, **options):
    make_log([NvmePath(path=folder) for folder in folders], extents(len(folders)), links, **options)
    return CommitLog(folders, links)


def content(name, value):
    return bytes((value * 7 + i) % 251 for i in range(251)) * (SIZES[name] // 251 + 1)


def write(log, arena, name, value):
    slot = arena.acquire(SIZES[name], name)
    slot.buffer()[:] = content(name, value)[: SIZES[name]]
    return log.write(name, slot)


def read(log, arena, name, **options):
    slot = arena.acquire(SIZES[name], name)
    log._links.wait(log.read(name, slot, **options))
    return bytes(slot.buffer())


def holds(log, arena, values):
    return all(read(log, arena, name) == content(name, value)[: SIZES[name]] for name, value in values.items())


# ---- it keeps what was committed ----


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
    deadline = time.monotonic() + 10  # a worker thread may hold a buffer an instant longer
    while arena.held_bytes() and time.monotonic() < deadline:
        time.sleep(0.001)
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


def test_a_commit_writes_what_changed_and_two_pages(folders, arena, links):
    log = make(folders, links)
    write(log, arena, "b", 1)
    before = links.counters.bytes_written
    log.commit(1, b"p")
    assert links.counters.bytes_written - before == 2 * PAGE
    log.close()


# ---- making one ----


def test_every_byte_is_written_when_it_is_made(disk_folder, links):
    folder = disk_folder / "log"
    make_log([NvmePath(path=folder)], extents(), links)
    path = folder / "state.bin"
    assert links.counters.bytes_written >= path.stat().st_size >= 2 * sum(SIZES.values())
    assert path.stat().st_blocks * 512 >= path.stat().st_size
    assert not any(flags & UNWRITTEN for flags in extent_flags(path)), "reserved, but not written"


UNWRITTEN = 0x800


def extent_flags(path):
    """Flags of the file's extents on its file system (FIEMAP)."""
    import fcntl
    import struct

    header = struct.Struct("=QQLLLL")
    request = bytearray(header.pack(0, 1 << 62, 1, 0, 64, 0) + bytes(64 * 56))
    with open(path, "rb") as file:
        try:
            fcntl.ioctl(file, 0xC020660B, request)
        except OSError:
            pytest.skip("this file system does not tell")
    count = header.unpack_from(request)[3]
    assert count > 0
    return [struct.unpack_from("=L", request, header.size + i * 56 + 40)[0] for i in range(count)]


def test_a_log_is_not_there_before_its_bytes_are(folders, monkeypatch):
    events = []

    class Watch(PlainIO):
        def start(self, kind, file, offset_bytes, buffer):
            events.append((kind, Path(file.path).parent.name))
            return super().start(kind, file, offset_bytes, buffer)

    write_atomically = layout_module.write_atomically
    monkeypatch.setattr(
        layout_module,
        "write_atomically",
        lambda path, content: (events.append(("layout", path.parent.name)), write_atomically(path, content)),
    )
    make_log([NvmePath(path=f) for f in folders], extents(2), Links(io=Watch()))
    assert set(events[:-4]) == {("write", "one"), ("write", "two")}
    assert events[-4:] == [("sync", "one"), ("sync", "two"), ("layout", "two"), ("layout", "one")]


class Killed(BaseException):
    """Stands for a process that ends here."""


@pytest.mark.parametrize("name", ["preallocate", "barrier", "sync_folder", "write_atomically"])
@pytest.mark.parametrize("number", [1, 2])
def test_what_a_killed_make_left_is_made_again(folders, links, monkeypatch, name, number):
    """Killed in the first or second call of each function that writes; a barrier is only one."""
    real, calls = getattr(layout_module, name), []

    def killed(*arguments):
        calls.append(arguments)
        if len(calls) == (1 if name == "barrier" else number):
            raise Killed
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(layout_module, name, killed)
        with pytest.raises(Killed):
            make(folders, links)
    with pytest.raises(ConfigError, match="no commit log here"):
        CommitLog(folders, links)
    log = make(folders, links)
    log.commit(1)
    log.close()


def test_a_log_is_never_made_over_another(folders, links, arena, disk_folder):
    log = make(folders, links)
    write(log, arena, "a", 1)
    log.commit(1)
    log.close()
    for again in (folders, folders[::-1]):
        with pytest.raises(ConfigError, match="holds training state"):
            make(again, links)
    for again in (folders[1:], [disk_folder / "new", folders[1]], [folders[0], disk_folder / "new"]):
        with pytest.raises(StoreCorrupt, match="missing"):
            make(again, links)
    log = CommitLog(folders, links)
    assert holds(log, arena, {"a": 1})
    log.close()


def test_too_little_room_is_found_before_the_first_byte(disk_folder, links):
    need = 2 * sum(SIZES.values()) + 4 * PAGE
    folder = disk_folder / "log"
    with pytest.raises(StorageFull, match="allowed by nvme=.*nothing was written"):
        make_log([NvmePath(path=folder, capacity_bytes=need - 1)], extents(), links, payload_bytes=100)
    assert links.counters.bytes_written == 0 and not (folder / "state.bin").exists()
    make_log([NvmePath(path=folder, capacity_bytes=need)], extents(), links, payload_bytes=100)


@pytest.mark.parametrize(
    "extent, message",
    [
        ({"length_bytes": 100}, "no multiple of 4096"),
        ({"length_bytes": 0}, "no multiple of 4096"),
        ({"length_bytes": PAGE, "drive": 1}, "drive 1 of 1"),
        ({"length_bytes": PAGE, "name": "b"}, "given twice"),
    ],
)
def test_what_cannot_be_laid_is_named(disk_folder, links, extent, message):
    wrong = MutableExtent(**{"name": "x", **extent})
    with pytest.raises(ConfigError, match=message):
        make_log([NvmePath(path=disk_folder / "log")], [MutableExtent(name="b", length_bytes=PAGE), wrong], links)
    assert list(disk_folder.iterdir()) == []


def test_mistakes_of_the_caller_are_named(folders, links, arena):
    log = make(folders, links)
    with pytest.raises(ConfigError, match="extent 'aa': not in this log"):
        log.read("aa", arena.acquire(PAGE, "x"))
    with pytest.raises(ValueError, match="of 4096 bytes"):
        log.write("b", arena.acquire(PAGE, "x"))
    with pytest.raises(ConfigError, match="step -1"):
        log.commit(-1)
    log.close()
    with pytest.raises(StorageError, match="closed"):
        log.commit(1)
    with pytest.raises(ConfigError, match="one folder per drive"):
        make_log([NvmePath(path=folders[0])] * 2, [], links)


# ---- faults ----


class FaultyIO(PlainIO):
    """Fails the `fail_at`-th operation when it is waited for; a write has then half arrived."""

    def __init__(self, fail_at, error, kinds=("write", "sync")):
        self.left, self.error, self.kinds, self.failed = fail_at, error, kinds, None

    def start(self, kind, file, offset_bytes, buffer):
        if kind not in self.kinds or self.left != 0:
            self.left -= kind in self.kinds
            return super().start(kind, file, offset_bytes, buffer)
        self.left -= 1
        self.failed = kind
        if kind == "write":
            super().start(kind, file, offset_bytes, memoryview(buffer)[: len(buffer) // 2 // 512 * 512])

        def wait(timeout_seconds):
            raise storage_error(
                f"{kind} failed", path=file.path, offset=offset_bytes, wanted=1, done=0, errno=self.error
            )

        return wait


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_failure_anywhere_is_typed_and_leaves_a_committed_step(folders, links, arena, number):
    make(folders, links).close()
    failed = []
    for fail_at in range(40):
        io = FaultyIO(fail_at, number)
        begun = acknowledged = None
        log = None
        try:
            log = CommitLog(folders, Links(io=io))
            begun = acknowledged = log.committed.step
            for step in range(begun + 1, begun + 3):
                for name in SIZES:
                    write(log, arena, name, step)
                begun = step
                log.commit(step, str(step).encode())
                acknowledged = step
        except StorageError as error:
            assert error.errno == number and isinstance(error, StorageFull) == (number == errno.ENOSPC)
            failed.append(io.failed)
        if log is not None:
            log.close()
        log = CommitLog(folders, links)
        step = log.committed.step
        if begun is not None:
            assert acknowledged <= step <= begun
        assert holds(log, arena, dict.fromkeys(SIZES, step)) if step else True
        log.close()
    assert failed.count("sync") >= 7 and failed.count("write") >= 10


def test_after_a_failed_write_the_step_can_be_done_again(folders, links, arena):
    log = make(folders, links)
    log.close()
    log = CommitLog(folders, Links(io=FaultyIO(1, errno.EIO, kinds=("write",))))
    for again in range(2):
        for name in SIZES:
            write(log, arena, name, 1)
        if again == 0:
            with pytest.raises(StorageError):
                read(log, arena, "b")
            for _ in range(2):
                with pytest.raises(StorageError, match="EIO"):
                    log.commit(1)
            assert log.committed.step == 0
            log.drop()
            assert not any(read(log, arena, "b"))
    log.commit(1)
    assert holds(log, arena, dict.fromkeys(SIZES, 1))
    log.close()


@pytest.mark.parametrize("fail_at", range(3))
def test_after_a_failed_barrier_nothing_goes_on(folders, links, arena, fail_at):
    """A second fdatasync may succeed and mean nothing."""
    make(folders, links).close()
    log = CommitLog(folders, Links(io=FaultyIO(1 + fail_at, errno.EIO, kinds=("sync",))))
    write(log, arena, "a", 1)
    with pytest.raises(StorageError, match="sync failed"):
        log.commit(1)
    for call in (
        log.commit,
        lambda _: log.drop(),
        lambda _: write(log, arena, "a", 1),
        lambda _: read(log, arena, "a"),
    ):
        with pytest.raises(StorageError, match="the commit of step 1 failed half-way; open the log again"):
            call(1)
    log.close()
    log = CommitLog(folders, links)
    assert log.committed.step == (0 if fail_at < 2 else 1)
    log.close()


def flip(path, offset, mask=1):
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ mask]))


def two_commits(folders, links, arena):
    log = make(folders, links)
    for step in (1, 2):
        for name in SIZES:
            write(log, arena, name, step)
        log.commit(step, b"payload")
    layout = log.layout
    log.close()
    return layout


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("where", [0.0, 0.5, 0.9999])
def test_a_flipped_bit_in_a_committed_extent_is_found_at_every_read(folders, links, arena, name, where):
    layout = two_commits(folders, links, arena)
    extent = next(e for e in layout.extents if e.name == name)
    log = CommitLog(folders, links)
    slot = log.version(name).slot
    flip(folders[extent.drive] / "state.bin", extent.slot_offset(1 - slot) + int(where * extent.length_bytes))
    assert holds(log, arena, dict.fromkeys(SIZES, 2)), "the other slot is not looked at"
    flip(folders[extent.drive] / "state.bin", extent.slot_offset(slot) + int(where * extent.length_bytes))
    for _ in range(2):
        with pytest.raises(StoreCorrupt, match=f"extent {name}, slot {slot} at offset .* since step 2"):
            read(log, arena, name)
    write(log, arena, name, 3)  # replaces it
    log.commit(3)
    assert holds(log, arena, {name: 3})
    log.close()


def damaged(folders, layout, place, what):
    path = folders[0] / "state.bin"
    if what == "bit":
        flip(path, layout.record_offset(place) + 33)
    elif what == "body":
        flip(path, layout.body_offset(place) + 5)
    else:
        with open(path, "r+b") as file:
            file.seek(layout.record_offset(place) + (60 if what == "torn" else 0))
            file.write(bytes(512 - 60 if what == "torn" else PAGE))


@pytest.mark.parametrize("what", ["bit", "body", "torn", "zeros"])
def test_a_damaged_record_is_ignored_and_two_are_an_error(folders, links, arena, what):
    layout = two_commits(folders, links, arena)  # step 1 in place 1, step 2 in place 0
    damaged(folders, layout, 0, what)
    log = CommitLog(folders, links)
    assert log.committed.step == 1 and log.ignored.startswith("record 0: ")
    assert holds(log, arena, dict.fromkeys(SIZES, 1))
    log.close()
    damaged(folders, layout, 1, what)
    with pytest.raises(StoreCorrupt, match=r"state.bin: neither of .* record 0: .*; record 1: .*snapshot"):
        CommitLog(folders, links)


def test_a_record_page_that_the_drive_cannot_read_is_ignored(folders, links, arena):
    two_commits(folders, links, arena)
    log = CommitLog(folders, Links(io=FaultyIO(0, errno.EIO, kinds=("read",))))
    assert log.committed.step == 1 and "EIO" in log.ignored
    log.close()


def test_a_record_of_another_log_is_none_of_ours(folders, links, arena, disk_folder):
    two_commits(folders, links, arena)
    others = [disk_folder / "three", disk_folder / "four"]
    two_commits(others, links, arena)
    shutil.copy(others[0] / "state.bin", folders[0] / "state.bin")
    with pytest.raises(StoreCorrupt, match="of log"):
        CommitLog(folders, links)
    with pytest.raises(StoreCorrupt, match="belongs to log"):
        CommitLog([folders[0], others[1]], links)
    with pytest.raises(StoreCorrupt, match=r"lies on 2 drives; missing: \[0\]"):
        CommitLog([folders[1]], links)
    with pytest.raises(StoreCorrupt, match="3 folders were given"):
        CommitLog([*folders, disk_folder], links)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"body_bytes": 1 << 50}, "a body of"),
        ({"body_bytes": 8}, "a body of"),
        ({"num_extents": 2}, "with 2 extents"),
        ({}, "in a slot that there is not"),
    ],
)
def test_a_record_that_cannot_be_is_ignored(folders, links, arena, change, reason):
    """With the right checksum: what another version, or a mistake, might write."""
    layout = two_commits(folders, links, arena)
    body = pack_body([Version(slot=2, crc32c=0)] * len(SIZES), b"")
    fields = {"num_extents": len(SIZES), "body_bytes": len(body), "body_crc32c": crc32c(memoryview(body)), **change}
    record = Record(log_id=bytes.fromhex(layout.log_id), sequence=9, step=9, **fields)
    with open(folders[0] / "state.bin", "r+b") as file:
        for offset, data in ((layout.body_offset(0), body), (layout.record_offset(0), record.pack())):
            file.seek(offset)
            file.write(data)
    log = CommitLog(folders, links)
    assert log.committed.step == 1 and reason in log.ignored
    log.close()


@pytest.mark.parametrize("text", ["", "{}", "[]", "5", '{"body": 5}', '{"body": {}, "sha256": ""}', "\x00"])
def test_a_layout_that_is_none_is_refused(folders, links, text):
    make(folders, links).close()
    (folders[1] / "log.json").write_text(text)
    with pytest.raises(StoreCorrupt, match="two/log.json"):
        CommitLog(folders, links)


def test_a_tampered_layout_and_a_short_file_are_refused(folders, links):
    make(folders, links).close()
    path = folders[0] / "log.json"
    whole = path.read_text()
    data = json.loads(whole)
    data["body"]["layout"]["extents"][0]["offset_bytes"] += PAGE
    path.write_text(json.dumps(data))
    with pytest.raises(StoreCorrupt, match="its own checksum"):
        CommitLog(folders, links)
    path.write_text(whole)
    os.truncate(folders[1] / "state.bin", 5)
    with pytest.raises(StoreCorrupt, match="5 bytes, the layout needs"):
        CommitLog(folders, links)
    (folders[1] / "state.bin").unlink()
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(StoreCorrupt, match="0 bytes, the layout needs"):
        CommitLog(folders, links)
    assert set(os.listdir("/proc/self/fd")) == before, "a failed start kept a descriptor"


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


# ---- locks ----

ROOT = Path(__file__).resolve().parents[1]


def test_a_second_run_is_refused_until_the_first_is_closed(folders, links):
    log = make(folders, links)
    with pytest.raises(StoreInUse, match=f"pid {os.getpid()} "):
        CommitLog(folders, links)
    log.close()
    CommitLog(folders, links).close()


def test_a_forked_child_does_not_keep_a_closed_log_locked(folders, links):
    """A data loader's workers inherit every descriptor."""
    log = make(folders, links)
    wait, go = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(go)
        os.read(wait, 1)
        os._exit(0)
    os.close(wait)
    try:
        log.close()
        CommitLog(folders, links, patience_seconds=0).close()
    finally:
        os.close(go)
        os.waitpid(child, 0)


HOLDER = """
import os, signal, sys
from pathlib import Path
from offload_rt.drive_files import FolderLock, open_fenced
folder = Path(sys.argv[1])
lock, file = FolderLock(folder), open_fenced(folder / "state.bin", 0)
end, other = os.pipe()
if os.fork() == 0:  # stands for the kernel, that holds the file of a request which is under way
    lock._fd and os.close(lock._fd)
    os.close(other)
    print("under way", flush=True)
    sys.stdin.read()
    os._exit(0)
os.close(end)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_runs_writes_in_flight_are_waited_for(folders, links):
    """The lock file is free at once; the file that is written to is not. See [Note: lock lifetime]."""
    make(folders, links).close()
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folders[0])],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "under way\n"
    process.wait()
    with pytest.raises(StoreInUse, match="state.bin: a process that is gone left writes under way"):
        CommitLog(folders, links, patience_seconds=0.05)
    process.stdin.close()  # the write arrives
    CommitLog(folders, links).close()


WRITER = """
import fcntl, mmap, os, sys
from pathlib import Path
from offload_rt.drive_files import FolderLock, open_fenced
from offload_rt.native import native_core
lock, file = FolderLock(Path(sys.argv[1])), open_fenced(Path(sys.argv[1]) / "data", 0)
ring, memory = native_core().Ring(backend="io_uring"), mmap.mmap(-1, 256 << 20)
ring.write(file.fd, file.path, 0, memory)
print("under way", flush=True)
sys.stdin.read()
"""


@pytest.mark.full
def test_io_urings_writes_outlive_a_killed_process_and_its_lock_file(disk_folder):
    """What the fence is for, on the real thing; how long it takes is the drive's business."""
    if native_core() is None or not native_core().io_uring_available()[0]:
        pytest.skip("no io_uring here")
    seen = 0
    for _ in range(8):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(disk_folder)],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        ) as process:  # fmt: skip
            assert process.stdout.readline() == "under way\n"
            time.sleep(0.03)
            process.kill()
            process.wait()
        FolderLock(disk_folder).close()  # free at once
        try:
            close_fenced(open_fenced(disk_folder / "data", 0.0))
        except StoreInUse:
            seen += 1
            close_fenced(open_fenced(disk_folder / "data", 60.0))
    if not seen:
        pytest.skip("the drive was faster than the end of a process")


def test_a_fence_that_is_free_is_passed_at_once(disk_folder):
    file = open_fenced(disk_folder / "f", 0.0)
    with pytest.raises(StoreInUse):
        open_fenced(disk_folder / "f", 0.0)
    close_fenced(file)
    close_fenced(open_fenced(disk_folder / "f", 0.0))


def test_closing_waits_for_what_is_under_way_and_keeps_the_file_where_it_cannot(folders, links, arena):
    folders = folders[:1]  # so that there is one sync, and it must not get lost
    log = make(folders, links)
    stuck = set()
    start = links.io.start

    def slow(kind, file, offset, buffer):
        start(kind, file, offset, buffer)

        def wait(seconds):
            if kind in stuck:
                raise StorageTimeout("still under way")

        return wait

    links.io.start = slow
    write(log, arena, "a", 1)
    for kind in ("write", "sync"):
        stuck.add(kind)
        with pytest.raises(StorageTimeout):
            log.close() if kind == "write" else log.commit(1)
        with pytest.raises(StorageTimeout):
            log.close()
        with pytest.raises(StoreInUse):
            CommitLog(folders, Links(io=PlainIO()))
        stuck.clear()
    log.close()
    assert read_layout(folders) is not None
