"""A failing drive, a torn record, a flipped bit: a correct resume or a typed error, never another number."""

import errno
import json
import os
import shutil

import pytest

from offload_rt.checksum import crc32c
from offload_rt.errors import StorageError, StorageFull, StoreCorrupt, storage_error
from offload_rt.storage.commit_log import CommitLog
from offload_rt.storage.commit_record import Record, Version, pack_body
from offload_rt.transfers.links import Links
from tests.conftest import flip, open_descriptors
from tests.power_loss import PlainIO
from tests.tiny_logs import PAGE, SIZES, holds, make, read, write
from tests.tiny_logs import arena as arena
from tests.tiny_logs import folders as folders
from tests.tiny_logs import links as links


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


def test_files_that_are_removed_are_warned_of_once_and_still_read(folders, links, arena, caplog):
    log = make(folders, links)
    for step in (1, 2, 3):
        for name in SIZES:
            write(log, arena, name, step)
        if step == 2:
            shutil.rmtree(folders[1])
        log.commit(step)
        assert len(caplog.records) == (step > 1)
    assert f"{folders[1] / 'state.bin'} was removed" in caplog.text
    assert log.committed.step == 3 and holds(log, arena, dict.fromkeys(SIZES, 3))
    log.close()


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
    before = open_descriptors()
    with pytest.raises(StoreCorrupt, match="0 bytes, the layout needs"):
        CommitLog(folders, links)
    assert set(os.listdir("/proc/self/fd")) == before, "a failed start kept a descriptor"
