"""Making a commit log: every byte written and synced before it is one, and never over another."""

import contextlib
import fcntl
import struct
from pathlib import Path

import pytest

import offload_rt.storage.commit_layout as layout_module
from offload_rt.config import NvmePath
from offload_rt.errors import ConfigError, StorageError, StorageFull, StoreCorrupt
from offload_rt.memory.arena import Arena
from offload_rt.storage.commit_layout import MutableExtent, make_log
from offload_rt.storage.commit_log import CommitLog
from offload_rt.transfers.links import Links
from tests.power_loss import PlainIO
from tests.tiny_logs import PAGE, SIZES, extents, holds, make, write
from tests.tiny_logs import arena as arena
from tests.tiny_logs import folders as folders
from tests.tiny_logs import links as links


def test_every_byte_is_written_when_it_is_made(disk_folder, links):
    folder = disk_folder / "log"
    make_log([NvmePath(path=folder)], extents(), links)
    path = folder / "state.bin"
    assert links.counters.bytes_written >= path.stat().st_size >= 2 * sum(SIZES.values())
    assert path.stat().st_blocks * 512 >= path.stat().st_size
    assert not any(flags & UNWRITTEN for flags in extent_flags(path)), "reserved, but not written"


def test_what_the_first_commit_holds_is_left_to_it(disk_folder, links):
    folder = disk_folder / "log"
    names = [extent.name for extent in extents()]
    make_log([NvmePath(path=folder)], extents(), links, written_first=names)
    file_bytes = (folder / "state.bin").stat().st_size
    with contextlib.closing(CommitLog([folder], links)) as log:
        left = sum(log.length_bytes(name) for name in names)
        bodies = log.layout.extents[0].offset_bytes
        assert file_bytes - left <= links.counters.bytes_written <= file_bytes - left + bodies
        for name in names:
            slot = Arena(f"room for {name}", log.length_bytes(name)).acquire(log.length_bytes(name), name)
            links.wait(log.read(name, slot))
            assert not any(slot.buffer())
            slot.buffer()[:] = b"\1" * slot.num_bytes
            links.wait(log.write(name, slot))
        log.commit(1, b"")
    assert not any(flags & UNWRITTEN for flags in extent_flags(folder / "state.bin")), "reserved, but not written"


UNWRITTEN = 0x800


def extent_flags(path):
    """Flags of the file's extents on its file system (FIEMAP)."""
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
