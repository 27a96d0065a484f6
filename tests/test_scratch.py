"""Room on NVMe for the length of a step: exact, never shared, gone with the process."""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from offload_rt.errors import StorageError, StorageFull, StorageTimeout, StoreCorrupt
from offload_rt.memory.arena import Arena
from offload_rt.storage.scratch import Scratch
from offload_rt.transfers.file_io import AiofilesIO
from offload_rt.transfers.links import Links
from tests.conftest import open_descriptors

ROOT = Path(__file__).resolve().parents[1]
PAGE = 4096


@pytest.fixture
def links():
    links = Links(io=AiofilesIO())
    yield links
    links.close()


@pytest.fixture
def scratch(disk_folder, links):
    scratch = Scratch(disk_folder, 4 * PAGE, links)
    yield scratch
    scratch.close()


def test_ranges_keep_their_own_bytes(scratch, links):
    arena = Arena("a", 4 * PAGE)
    ranges = [scratch.acquire(PAGE) for _ in range(4)]
    for number, place in enumerate(ranges):
        slot = arena.acquire(PAGE, "x")
        slot.tensor(torch.uint8, (PAGE,)).fill_(number)
        links.wait(place.write(slot))
    for number, place in reversed(list(enumerate(ranges))):
        slot = arena.acquire(PAGE, "x")
        links.wait(place.read(slot))
        assert bytes(slot.buffer()) == bytes([number]) * PAGE
    assert (links.counters.bytes_written, links.counters.bytes_read) == (4 * PAGE, 4 * PAGE)


def test_other_bytes_than_were_written_are_refused_with_the_place(scratch, links):
    arena = Arena("a", 2 * PAGE)
    first, place = scratch.acquire(PAGE), scratch.acquire(PAGE)
    slot = arena.acquire(PAGE, "x")
    slot.tensor(torch.uint8, (PAGE,)).fill_(7)
    links.wait(place.write(slot))
    with open(f"/proc/self/fd/{scratch.file.fd}", "r+b") as file:
        file.seek(PAGE + 100)
        file.write(b"\x06")
    back = arena.acquire(PAGE, "x")
    with pytest.raises(StoreCorrupt, match=rf"scratch at offset {PAGE}, {PAGE} bytes: checksum"):
        links.wait(place.read(back))
    links.wait(place.write(slot))
    links.wait(place.read(back))
    assert bytes(back.buffer()) == bytes([7]) * PAGE
    del first


def test_the_file_has_no_name(scratch, disk_folder):
    assert list(disk_folder.iterdir()) == []


def test_it_is_gone_when_the_process_is_killed(disk_folder):
    code = (
        "import os, signal, sys; from pathlib import Path; from offload_rt.storage.scratch import Scratch; "
        "from offload_rt.transfers.links import Links; s = Scratch(Path(sys.argv[1]), 1 << 20, Links()); "
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(disk_folder)], cwd=ROOT)
    assert list(disk_folder.iterdir()) == []


def test_the_capacity_met_exactly_is_enough_and_one_byte_more_is_not(scratch):
    whole = scratch.acquire(4 * PAGE)
    with pytest.raises(StorageFull, match="no room"):
        scratch.acquire(1)
    del whole
    with pytest.raises(StorageFull):
        scratch.acquire(4 * PAGE + 1)
    scratch.acquire(4 * PAGE)


def test_ranges_come_back_and_join(scratch):
    ranges = [scratch.acquire(PAGE) for _ in range(4)]
    for index in (1, 3, 2):
        ranges[index] = None
    assert scratch.acquire(3 * PAGE).offset_bytes == PAGE


def let_go_while_written(scratch, monkeypatch, make_error):
    """Writes all of it, drops the range, and takes it back by a wait that raises."""
    place = scratch.acquire(4 * PAGE)
    place.write(Arena("a", 4 * PAGE).acquire(4 * PAGE, "x"))
    del place
    wait, waited = scratch.links.wait, []

    def failing(transfer):
        wait(transfer)  # so that nothing is under way, whatever is said of it
        waited.append(transfer)
        if make_error is not None:
            raise make_error()

    with monkeypatch.context() as patched, suppress(KeyboardInterrupt):
        patched.setattr(scratch.links, "wait", failing)
        scratch.take_back()
    assert len(waited) == 1


@pytest.mark.parametrize("make_error", [None, lambda: StorageError("is broken", path="scratch")], ids=["well", "badly"])
def test_a_range_whose_write_has_ended_comes_back(scratch, monkeypatch, make_error):
    let_go_while_written(scratch, monkeypatch, make_error)
    assert scratch.acquire(4 * PAGE).offset_bytes == 0


@pytest.mark.parametrize("make_error", [lambda: StorageTimeout("late"), KeyboardInterrupt], ids=["late", "interrupted"])
def test_a_range_that_may_still_be_written_to_is_kept_for_good(scratch, monkeypatch, make_error):
    let_go_while_written(scratch, monkeypatch, make_error)
    with pytest.raises(StorageFull, match="no room"):
        scratch.acquire(1)


def test_many_steps_do_not_wear_it_out(scratch):
    for _ in range(500):
        held = [scratch.acquire(size) for size in (1, PAGE, PAGE + 1)]
        del held
    assert scratch.acquire(4 * PAGE).num_bytes == 4 * PAGE


def test_a_full_drive_is_reported_and_leaves_nothing(disk_folder, links, monkeypatch):
    import errno

    def full(fd, offset, length):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "posix_fallocate", full)
    before = open_descriptors()
    with pytest.raises(StorageFull):
        Scratch(disk_folder, PAGE, links)
    assert list(disk_folder.iterdir()) == []
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_file_system_that_preallocates_nothing_has_room_all_the_same(disk_folder, links, monkeypatch):
    import errno

    def cannot(fd, offset, length):
        raise OSError(errno.EINVAL, "glibc writes instead, which a direct descriptor refuses")

    monkeypatch.setattr(os, "posix_fallocate", cannot)
    scratch = Scratch(disk_folder, 3 * PAGE, links)
    assert os.fstat(scratch.file.fd).st_size == 3 * PAGE
    assert scratch.acquire(3 * PAGE).num_bytes == 3 * PAGE


def test_a_folder_that_is_gone_is_a_storage_error(disk_folder, links):
    with pytest.raises(StorageError):
        Scratch(disk_folder / "nowhere", PAGE, links)
