"""Snapshots: what is committed, in a folder of its own, for any log with the same extents."""

import errno
import fcntl
import json
import os
import shutil
import struct
from collections import namedtuple

import pytest

import offload_rt.storage.snapshot as snapshot_module
from offload_rt.config import NvmePath
from offload_rt.errors import CheckpointError, CheckpointVerifyError, ConfigError, StorageFull, StoreCorrupt
from offload_rt.memory.arena import Arena
from offload_rt.storage.commit_layout import MutableExtent, make_log
from offload_rt.storage.commit_log import CommitLog
from offload_rt.storage.snapshot import load_snapshot, save_snapshot
from offload_rt.transfers.file_io import file_io
from offload_rt.transfers.links import Links
from tests.conftest import flip
from tests.durable import Durable
from tests.power_loss import PlainIO

PAGE = 4096
SIZES = {"a": PAGE, "b": 70 * PAGE, "d": 70 * PAGE, "c": 9 * PAGE}
"""A small one, and two that fill both slots only if each begins where a slot does."""
TOTAL = sum(SIZES.values())


@pytest.fixture
def links():
    links = Links(io=file_io())
    yield links
    links.close()


def make(folders, links, sizes=SIZES, **options):
    extents = [MutableExtent(name=n, length_bytes=s, drive=i % len(folders)) for i, (n, s) in enumerate(sizes.items())]
    make_log([NvmePath(path=folder) for folder in folders], extents, links, **options)
    return CommitLog(folders, links)


def fill(log, value):
    arena = Arena("fill", 2 * TOTAL)
    for name, size in SIZES.items():
        slot = arena.acquire(size, name)
        slot.buffer()[:] = bytes((value + i) % 251 for i in range(size))
        log.write(name, slot)


def holds(log, links, value):
    arena = Arena("holds", 2 * TOTAL)
    for name, size in SIZES.items():
        slot = arena.acquire(size, name)
        links.wait(log.read(name, slot))
        if bytes(slot.buffer()) != bytes((value + i) % 251 for i in range(size)):
            return False
    return True


@pytest.fixture
def log(disk_folder, links):
    log = make([disk_folder / "one", disk_folder / "two"], links)
    fill(log, 1)
    log.commit(7, b"payload of 7")
    yield log
    log.close()


@pytest.fixture
def saved(log, links, disk_folder):
    save_snapshot(log, disk_folder / "snapshot", links)
    return disk_folder / "snapshot"


def test_a_snapshot_is_the_commit_and_loads_into_a_log_on_other_drives(log, links, disk_folder):
    fill(log, 2)  # not committed: not part of it
    copied_bytes = save_snapshot(log, disk_folder / "snapshot", links)
    assert copied_bytes in (TOTAL, 0), "neither copied nor cloned"
    assert sorted(p.name for p in (disk_folder / "snapshot").iterdir()) == ["manifest.json", "payload.bin", "state.bin"]
    assert holds(log, links, 2)
    for step in (8, 9):  # overwrites both slots of the log
        fill(log, step)
        log.commit(step)
    other = make([disk_folder / "three"], links, dict(reversed(SIZES.items())))
    other.commit(*load_snapshot(disk_folder / "snapshot", other, links))
    other.close()
    other = CommitLog([disk_folder / "three"], links)
    assert (other.committed.step, other.committed.payload) == (7, b"payload of 7")
    assert holds(other, links, 1)
    other.close()
    assert holds(log, links, 9)


def test_memory_is_two_of_the_largest_extent(log, links, disk_folder, monkeypatch):
    arenas = []
    monkeypatch.setattr(snapshot_module, "Arena", lambda *args: arenas.append(Arena(*args)) or arenas[-1])
    monkeypatch.setattr(snapshot_module, "_clone", lambda *_: False)
    save_snapshot(log, disk_folder / "snapshot", links)
    log.commit(*load_snapshot(disk_folder / "snapshot", log, links))
    assert [arena.num_bytes for arena in arenas] == [2 * max(SIZES.values())] * 2


class CloningKernel:
    """Stands for a file system that clones: does by copying what FICLONERANGE does by sharing."""

    def __init__(self, error=None):
        self.ranges, self.error = [], error

    def __call__(self, target, request, argument):
        assert request == 0x4020940D
        source, offset, length, target_offset = struct.unpack("=qQQQ", argument)
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        assert offset % PAGE == length % PAGE == target_offset % PAGE == 0
        self.ranges.append(length)
        buffer = Arena("clone", length).acquire(length, "clone").buffer()
        assert os.preadv(source, [buffer], offset) == length
        assert os.pwritev(target, [buffer], target_offset) == length


def test_where_ranges_can_be_cloned_nothing_is_copied_and_no_room_is_needed(log, links, disk_folder, monkeypatch):
    kernel = CloningKernel()
    monkeypatch.setattr(fcntl, "ioctl", kernel)
    Usage = namedtuple("Usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2 << 20))
    before = links.counters.bytes_written
    assert save_snapshot(log, disk_folder / "snapshot", links) == 0
    assert kernel.ranges == list(SIZES.values()) and links.counters.bytes_written == before
    monkeypatch.undo()
    fill(log, 5)
    log.commit(8)
    log.commit(*load_snapshot(disk_folder / "snapshot", log, links))
    assert log.committed.step == 7 and holds(log, links, 1)


def test_cloned_and_copied_are_the_same_bytes(log, links, disk_folder, monkeypatch):
    for name, kernel in (("cloned", CloningKernel()), ("copied", CloningKernel(errno.EXDEV))):
        monkeypatch.setattr(fcntl, "ioctl", kernel)
        assert save_snapshot(log, disk_folder / name, links) == (0 if name == "cloned" else TOTAL)
    for file in ("state.bin", "payload.bin", "manifest.json"):
        assert (disk_folder / "cloned" / file).read_bytes() == (disk_folder / "copied" / file).read_bytes()


def test_a_clone_that_fails_otherwise_is_an_error(log, links, disk_folder, monkeypatch):
    monkeypatch.setattr(fcntl, "ioctl", CloningKernel(errno.ENOSPC))
    with pytest.raises(StorageFull, match="cannot be cloned"):
        save_snapshot(log, disk_folder / "snapshot", links)
    assert not list(disk_folder.glob("*snapshot*")) and not list(disk_folder.glob(".snapshot*"))


def test_too_little_room_is_found_before_the_first_byte(log, links, disk_folder, monkeypatch):
    monkeypatch.setattr(snapshot_module, "_clone", lambda *_: False)
    Usage = namedtuple("Usage", "free")
    need = TOTAL + len(b"payload of 7") + (1 << 20)
    before = links.counters.bytes_written
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(need - 1))
    with pytest.raises(StorageFull, match="nothing was written"):
        save_snapshot(log, disk_folder / "snapshot", links)
    assert links.counters.bytes_written == before and not (disk_folder / "snapshot").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(need))
    save_snapshot(log, disk_folder / "snapshot", links)


def test_a_corrupt_extent_is_not_saved(log, links, disk_folder, monkeypatch):
    monkeypatch.setattr(snapshot_module, "_clone", lambda *_: False)
    file, offset = log.committed_place("b")
    flip(file.path, offset + 5)
    with pytest.raises(StoreCorrupt, match="extent b"):
        save_snapshot(log, disk_folder / "snapshot", links)
    assert not list(disk_folder.glob("*snapshot*"))


def test_a_snapshot_is_not_written_over_anything(saved, log, links):
    with pytest.raises(ConfigError, match="exists"):
        save_snapshot(log, saved, links)


class Killed(BaseException):
    """Stands for a process that ends here."""


@pytest.mark.parametrize("fail_at", range(2))
def test_a_save_that_was_killed_leaves_none_and_is_tidied_by_the_next(log, links, disk_folder, monkeypatch, fail_at):
    write_atomically, calls = snapshot_module.write_atomically, [0]

    def killed(path, content):
        calls[0] += 1
        if calls[0] > fail_at:
            raise Killed
        write_atomically(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(snapshot_module, "write_atomically", killed)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(Killed):
            save_snapshot(log, disk_folder / "snapshot", links)
    assert not (disk_folder / "snapshot").exists()
    assert len(list(disk_folder.glob(".snapshot.partial-*"))) == 1
    save_snapshot(log, disk_folder / "snapshot", links)
    assert not list(disk_folder.glob(".snapshot*"))
    log.commit(*load_snapshot(disk_folder / "snapshot", log, links))


def damage(path, how):
    if how == "remove":
        path.unlink()
    elif how == "cut":
        os.truncate(path, path.stat().st_size // 2)
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize("name", ["state.bin", "payload.bin", "manifest.json"])
@pytest.mark.parametrize("how", ["flip", "cut", "remove"])
def test_damage_is_found_and_leaves_the_log_as_it_was(saved, log, links, name, how):
    fill(log, 3)
    log.commit(8, b"8")
    damage(saved / name, how)
    with pytest.raises((CheckpointError, CheckpointVerifyError, OSError), match=str(saved)):
        load_snapshot(saved, log, links)
    assert (log.committed.step, log.committed.payload, log.dirty) == (8, b"8", [])
    assert holds(log, links, 3)


def test_what_does_not_fit_is_named_and_changes_nothing(saved, disk_folder, links):
    for index, sizes in enumerate(({**SIZES, "e": PAGE}, {"a": PAGE, "b": PAGE}, {**SIZES, "c": PAGE})):
        other = make([disk_folder / f"other-{index}"], links, sizes)
        with pytest.raises(CheckpointError, match="other extents"):
            load_snapshot(saved, other, links)
        assert other.committed.sequence == 0
        other.close()
    with pytest.raises(CheckpointError, match="there is no snapshot"):
        load_snapshot(disk_folder / "nowhere", None, links)


@pytest.mark.parametrize("text", ["", "[]", "5", "{}", '{"body": 5, "sha256": ""}'])
def test_a_manifest_that_is_none_is_refused(saved, log, links, text):
    (saved / "manifest.json").write_text(text)
    with pytest.raises((CheckpointError, CheckpointVerifyError), match="manifest.json"):
        load_snapshot(saved, log, links)


def test_the_manifest_names_every_extent(saved):
    body = json.loads((saved / "manifest.json").read_text())["body"]
    assert [extent["name"] for extent in body["extents"]] == list(SIZES)
    assert [extent["offset_bytes"] for extent in body["extents"]] == [0, PAGE, 71 * PAGE, 141 * PAGE]


def test_nothing_is_saved_before_it_is_synced(log, disk_folder, monkeypatch):
    events = []

    class Watch(PlainIO):
        def start(self, kind, file, offset_bytes, buffer):
            events.append(kind)
            return super().start(kind, file, offset_bytes, buffer)

    monkeypatch.setattr(snapshot_module, "_clone", lambda *_: False)
    write_atomically = snapshot_module.write_atomically
    monkeypatch.setattr(
        snapshot_module,
        "write_atomically",
        lambda path, content: (events.append(path.name), write_atomically(path, content)),
    )
    save_snapshot(log, disk_folder / "snapshot", Links(io=Watch()))
    assert events == ["write"] * 4 + ["sync", "payload.bin", "manifest.json"]


def test_a_snapshot_has_its_name_on_the_drive_when_it_is_saved(log, disk_folder, monkeypatch):
    durable, folder = Durable(monkeypatch), disk_folder / "new" / "snapshot"
    save_snapshot(log, folder, Links(io=PlainIO()))
    assert durable.has_name(folder) and durable.has_name(folder.parent)
    assert set(durable.missing(folder)) <= {"state.bin"}, "which is synced by the links"
